"""The common parts of all commands: results, options, and settings that precede the import of models."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Protocol

import tyro
from rich.console import RenderableType


@dataclass(frozen=True)
class Result:
    """The result of a command. data: printed with --json. text: printed otherwise."""

    data: Mapping[str, object]
    text: RenderableType


@dataclass(frozen=True)
class Common:
    """Options of every command."""

    json: bool = False
    """Print the result as JSON on stdout."""
    debug: bool = False
    """Print the traceback of an error."""


class Command(Protocol):
    """A command: a dataclass of its options. EXAMPLE: a command line that --help shows."""

    EXAMPLE: ClassVar[str]

    @property
    def common(self) -> Common:
        """The options of every command."""
        ...

    def run(self) -> Result:
        """Runs the command."""
        ...


@dataclass(frozen=True)
class CommandGroup:
    """Commands that share a first word, such as `clvr eval shapes`; its docstring is the description in --help."""

    EXAMPLE: ClassVar[str]
    COMMANDS: ClassVar[Mapping[str, "type[Command]"]]


Flags = Annotated[Common, tyro.conf.arg(name="")]
Count = Annotated[int | None, tyro.conf.arg(metavar="N")]
Directory = Annotated[Path | None, tyro.conf.arg(metavar="DIR")]
Guidance = Annotated[float | None, tyro.conf.arg(metavar="G")]
Prompt = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")]


@contextmanager
def results_directory(out: Path | None, benchmark: str) -> Iterator[None]:
    """Locks the directory that a command writes results.json to; does nothing if there is none.

    Args:
      out: the directory, or None.
      benchmark: name under "benchmark" in results.json.
    Raises: ClvrError if it cannot be written, another process holds it, or it has the results of another benchmark,
      which would be lost.
    """
    if out is None:
        yield
        return
    from clvr_jax.errors import ClvrError
    from clvr_jax.files.atomic_io import read_json
    from clvr_jax.files.locks import locked_output
    from clvr_jax.files.output_paths import check_output_directory

    check_output_directory(out)
    path = out / "results.json"
    if path.exists() and (found := read_json(path).get("benchmark")) != benchmark:
        raise ClvrError(f"{path}: has results of the benchmark {found!r}; choose another --out")
    with locked_output(out):
        yield


def prepare_jax() -> None:
    """Makes the settings that must precede the import of models."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # the advice to install PyTorch
    from clvr_jax.compilation import enable_compilation_cache
    from clvr_jax.programs import enable_program_store

    enable_compilation_cache()
    enable_program_store()
