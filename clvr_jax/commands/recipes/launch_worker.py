"""The child process of `clvr launch`: joins the other hosts, then runs `clvr train`, `generate` or `sample`."""

import argparse
import os
import signal
import sys

_GENERATING = ("generate", "sample")
"""Commands that generate images; all other first words are arguments of `clvr train`."""


def main() -> int:
    """Runs one process; returns the exit code, 143 if SIGTERM stopped a training that was then saved."""
    try:
        return _run(sys.argv[1:])
    except KeyboardInterrupt:  # before `clvr` starts, which reports it itself
        print("clvr: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    options, rest = parser.parse_known_args(arguments)

    from clvr_jax.cli import main as clvr
    from clvr_jax.errors import ClvrError, UsageError
    from clvr_jax.training.distributed import Cluster
    from clvr_jax.training.graceful_shutdown import was_stopped

    try:
        Cluster(options.coordinator, options.processes, options.process).initialize()
    except ClvrError as error:
        print(f"clvr: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    if rest and rest[0] in _GENERATING:
        _prepare_generating()
        return clvr(rest)
    code = clvr(rest if rest[:1] == ["train"] else ["train", *rest])
    # Saved but not finished: a scheduler that restarts failed runs must not take it for finished.
    return 128 + signal.SIGTERM if code == 0 and was_stopped() else code


def _prepare_generating() -> None:
    """Makes SIGTERM end the process, and leaves progress and results to process 0."""
    from clvr_jax.display.console import console
    from clvr_jax.processes import is_host0

    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX has caught it, for runs that save first
    if not is_host0():
        console.quiet = True
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends


if __name__ == "__main__":
    sys.exit(main())
