"""The command `clvr`: parses the command line, runs a command, and prints its result.

Exit codes: 0 success, 1 failure, 2 invalid command line, 130 interrupted. Progress and errors are printed to stderr,
results to stdout. Modules that a command needs are imported when it runs, so that `clvr --help` is fast.
"""

import contextlib
import errno
import io
import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Annotated, Any, TextIO, Union

import tyro
from rich.console import Console

from clvr_jax.arguments import read_arguments
from clvr_jax.commands.checkpoints.conversion import Convert
from clvr_jax.commands.checkpoints.merging import Merge
from clvr_jax.commands.common import Command, CommandGroup, Result
from clvr_jax.commands.eval.group import Eval
from clvr_jax.commands.generation.generate import Generate
from clvr_jax.commands.generation.sample import Sample
from clvr_jax.commands.generation.serve import Serve
from clvr_jax.commands.generation.verifying import Verify
from clvr_jax.commands.generation.warm import Warm
from clvr_jax.commands.recipes.curves import Curves
from clvr_jax.commands.recipes.launch import Launch
from clvr_jax.commands.recipes.recipe_command import RecipeCommand, parse_recipe_command
from clvr_jax.commands.recipes.synthesis import Synth
from clvr_jax.commands.recipes.training import Plan, Train
from clvr_jax.display.console import escape_control_characters, print_error
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.interrupts import check_interrupt, interruptible, is_interrupted

COMMANDS: Mapping[str, type[Command | CommandGroup]] = {
    "generate": Generate,
    "sample": Sample,
    "verify": Verify,
    "serve": Serve,
    "warm": Warm,
    "train": Train,
    "launch": Launch,
    "curves": Curves,
    "synth": Synth,
    "plan": Plan,
    "eval": Eval,
    "convert": Convert,
    "merge": Merge,
}
_DESCRIPTION = (
    "Generates images from dense prompts by a loop of planning, generating, verifying and correcting. "
    "clvr --version prints the version."
)


def leaf_commands(
    commands: Mapping[str, type[Command | CommandGroup]] = COMMANDS, prog: str = "clvr"
) -> Iterator[tuple[str, type[Command]]]:
    """Yields every command with its words, such as "clvr eval shapes"; groups are replaced by what they contain."""
    for name, kind in commands.items():
        if issubclass(kind, CommandGroup):
            yield from leaf_commands(kind.COMMANDS, f"{prog} {name}")
        else:
            yield f"{prog} {name}", kind


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    _escape_unencodable_characters()
    with interruptible():
        try:
            command = _parse_or_print_help(arguments)
            if command is None:
                return 1
            result = command.run()
            check_interrupt()
            return _print_result(result, command.common.json)
        except KeyboardInterrupt as error:
            print_error(str(error) or "interrupted")
            return 130
        except (SystemExit, GeneratorExit):
            raise
        # Every error is reported in one line. Panics of Rust libraries are not of class `Exception`.
        except BaseException as error:  # noqa: BLE001
            if debug:
                traceback.print_exc()
            return _report_error(error)


def _report_error(error: BaseException) -> int:
    """Prints an error in one line; returns the exit code."""
    if is_interrupted():  # a callback turned a KeyboardInterrupt into this error
        print_error("interrupted")
        return 130
    if isinstance(error, ClvrError):
        print_error(str(error))
        return 2 if isinstance(error, UsageError) else 1
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # wherever the name is first used
        name = str(error.filename)[:60]
        print_error(f"{name!r} ...: the name is too long for a file or directory; give a shorter one")
        return 1
    print_error(f"{type(error).__name__}: {error}; --debug prints the traceback")
    return 1


def _parse_or_print_help(arguments: Sequence[str]) -> Any:
    """Returns the command of a command line; None if stdout cannot take the help. Raises: as `parse`."""
    try:
        try:
            return parse(arguments)
        except SystemExit:
            if sys.stdout is not None:
                sys.stdout.flush()
            raise
    except OSError as error:
        if error.filename is not None:
            raise
        _drop_stdout()
        if isinstance(error, BrokenPipeError):
            raise SystemExit(0) from error
        print_error(f"standard output cannot be written ({error.strerror or error})")
        return None


def _print_result(result: Result, as_json: bool) -> int:
    """Prints the result of a command; returns the exit code."""
    try:
        if as_json:
            # JSON has its own escapes for characters that the terminal cannot encode.
            print(json.dumps(result.data, ensure_ascii=not _is_unicode(sys.stdout)))
        else:
            text = escape_control_characters(result.text) if isinstance(result.text, str) else result.text
            Console(soft_wrap=isinstance(text, str), highlight=False).print(text, markup=False)
        if sys.stdout is not None:
            sys.stdout.flush()
        return 0
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        _drop_stdout()
        return 0
    except OSError as error:
        _drop_stdout()
        print_error(f"standard output cannot be written ({error.strerror or error}); the command itself was completed")
        return 1


def _escape_unencodable_characters() -> None:
    """Makes stdout print escapes in place of characters that its encoding lacks, so that no result is lost."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        with contextlib.suppress(ValueError):  # closed
            sys.stdout.reconfigure(errors="backslashreplace")


def _is_unicode(stream: TextIO | None) -> bool:
    return (getattr(stream, "encoding", None) or "").lower().replace("-", "").startswith("utf")


def _drop_stdout() -> None:
    """Discards buffered output, which Python would try to write again at its exit and fail again."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parse(arguments: Sequence[str]) -> Command:
    """Parses a command line to a command.

    Raises: UsageError, one line, for an invalid command line; SystemExit(0) after --help and --version.
    """
    if list(arguments) == ["--version"]:
        print(f"clvr-jax {version('clvr-jax')}")
        raise SystemExit(0)
    return _parse(arguments, COMMANDS, "clvr", _DESCRIPTION, Generate.EXAMPLE)


def _parse(
    arguments: Sequence[str],
    commands: Mapping[str, type[Command | CommandGroup]],
    prog: str,
    description: str | None,
    example: str,
) -> Command:
    """Parses a command line that begins with the name of one of `commands`."""
    arguments = _move_common_flags(arguments)
    if not arguments or arguments[0] not in commands:
        known = tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in commands.items())
        union: Any = Union[known]  # noqa: UP007 - built from a table
        command: Command = read_arguments(union, arguments, prog, description, example)
        return command
    name, rest = arguments[0], arguments[1:]
    kind = commands[name]
    if issubclass(kind, CommandGroup):
        return _parse(rest, kind.COMMANDS, f"{prog} {name}", kind.__doc__, kind.EXAMPLE)
    if issubclass(kind, RecipeCommand):
        return parse_recipe_command(kind, rest)
    if issubclass(kind, Launch):
        return Launch.parse(rest)
    return read_arguments(kind, rest, f"{prog} {name}", kind.__doc__, kind.EXAMPLE)


def _move_common_flags(arguments: Sequence[str]) -> list[str]:
    """Moves common flags behind the command: `clvr --json generate ...` -> `clvr generate --json ...`."""
    flags = ("--json", "--debug")
    leading = next((i for i, argument in enumerate(arguments) if argument not in flags), len(arguments))
    return [*arguments[leading : leading + 1], *arguments[:leading], *arguments[leading + 1 :]]


if __name__ == "__main__":
    sys.exit(main())
