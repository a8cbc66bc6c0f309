"""The child process of `clvr launch`: joins the other hosts, then runs `clvr train`."""

import argparse
import signal
import sys


def main() -> int:
    """Runs one process of a training; returns the exit code, 143 if SIGTERM stopped a run that was then saved."""
    try:
        return _train(sys.argv[1:])
    except KeyboardInterrupt:  # before `clvr train` starts, which reports it itself
        print("clvr: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def _train(arguments: list[str]) -> int:
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
    code = clvr(["train", *rest])
    # Saved but not finished: a scheduler that restarts failed runs must not take it for finished.
    return 128 + signal.SIGTERM if code == 0 and was_stopped() else code


if __name__ == "__main__":
    sys.exit(main())
