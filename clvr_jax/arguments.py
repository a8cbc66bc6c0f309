"""Command lines, parsed with tyro; an invalid one is reported in one line."""

import argparse
import contextlib
import io
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Annotated, Any, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.buckets.paths import MAY_BE_IN_BUCKET, storage_path
from clvr_jax.files.file_names import local_path

Parsed = TypeVar("Parsed")

REGISTRY = ConstructorRegistry()
"""How tyro reads the types of options."""
OPTIONS = (tyro.conf.FlagCreatePairsOff, tyro.conf.HelptextFromCommentsOff)


@REGISTRY.primitive_rule
def _read_paths(kind: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:
    """Reads paths, and refuses URLs, of which `Path` would drop a slash, in one line that tyro does not wrap."""
    if kind.type is not Path:
        return None

    def read(texts: list[str]) -> Path:
        try:
            return local_path(texts[0])
        except ClvrError as error:
            raise UsageError(str(error)) from error

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    )


def _read_storage_path(texts: list[str]) -> Path:
    try:
        return storage_path(texts[0])
    except ClvrError as error:
        raise UsageError(str(error)) from error


StoragePath = Annotated[
    Path,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="DIR",
        instance_from_str=_read_storage_path,
        is_instance=lambda value: isinstance(value, PurePath),
        str_from_instance=lambda path: [str(path)],
    ),
    MAY_BE_IN_BUCKET,
]
"""Type of an option or a field of a recipe that names a directory on this machine or in a bucket."""


def read_arguments(
    kind: type[Parsed], arguments: Sequence[str], prog: str, description: str | None, example: str
) -> Parsed:
    """Parses a command line into an instance of the dataclass (or union of dataclasses) `kind`.

    Args:
      kind: its fields are the arguments.
      arguments: the command line, without the program's name.
      prog, description, example: shown by --help.
    Raises: UsageError, one line, for an invalid command line; SystemExit(0) after --help.
    """
    complaint = io.StringIO()
    options = list(arguments[: arguments.index("--")]) if "--" in arguments else list(arguments)
    if "-h" in options or "--help" in options:
        arguments = ["--help"]  # tyro ignores the arguments before it
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                kind,
                prog=prog,
                description=f"{description}\n\nExample:\n    {example}",
                args=list(arguments),
                config=OPTIONS,
                registry=REGISTRY,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
    raise UsageError(f"{_one_line(complaint.getvalue())} (see {prog} --help)")


def argument_parser(kind: type) -> argparse.ArgumentParser:
    """Returns the arguments that `read_arguments` parses, with the sentences that --help prints, for documentation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # no other function of tyro returns the parsed arguments
        parser: Any = tyro.extras.get_parser(kind, config=OPTIONS, registry=REGISTRY)  # of a copy of argparse
    found: argparse.ArgumentParser = parser
    return found


def _one_line(box: str) -> str:
    """Returns the message in one of tyro's boxes, without the frame, the colors, and the text after the first rule."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    rows = [row.strip(" │") for row in plain.splitlines() if not re.match(r"\s*[╭╰]", row)]
    message = [row for row in rows[: next((i for i, row in enumerate(rows) if row.startswith("──")), None)] if row]
    return " ".join(message) or " ".join(plain.split())


def at_least_one(option: str, value: int | None) -> None:
    """Raises UsageError for a count below 1; None means that the option is not given."""
    if value is not None and value < 1:
        raise UsageError(f"{option} must be at least 1, got {value}")


def check_guidance(value: float | None) -> None:
    """Raises UsageError for a guidance scale outside [0, 1000)."""
    if value is not None and not 0 <= value < 1000:
        raise UsageError(f"--guidance must be a number from 0 to 1000, got {value}")


def check_seed(value: int) -> None:
    """Raises UsageError for a seed that is not a 31-bit number."""
    if not 0 <= value < 2**31:
        raise UsageError(f"--seed must be from 0 to {2**31 - 1}, got {value}")


def run_script(main: Callable[..., None]) -> None:
    """Calls a function with the command line as its arguments; an error is reported in one line.

    Raises: SystemExit with 1 or 2, as `clvr` does.
    """
    try:
        tyro.cli(main, registry=REGISTRY)
    except ClvrError as error:
        print(f"clvr: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, UsageError) else 1) from error
