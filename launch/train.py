"""Trains a recipe as one process of several: start this once on every host.

    python launch/train.py configs/shapes_base.py --out /bucket/run

On TPU VMs, GKE and under SLURM the processes find each other. Elsewhere say who is who, on each host its own number:

    python launch/train.py --coordinator host0:8476 --processes 2 --process 0 configs/shapes_base.py --out runs/base

Everything after these three options is that of `clvr train`. If another host is lost, this one ends within a minute and
says so; start all again with --resume. A run that was asked to stop (SIGTERM) is saved and ends with exit code 143 on
every host, also on those that were not asked themselves.
"""

import argparse
import signal
import subprocess
import sys

_WORKER = "--worker"
# How a process ends that JAX's coordination service takes down: by its own abort.
_LOST = (-6, 134)


def main() -> int:
    """Runs the training in a process of its own and watches how it ends."""
    arguments = sys.argv[1:]
    if arguments[:1] != [_WORKER]:
        worker = subprocess.Popen([sys.executable, __file__, _WORKER, *arguments])
        signal.signal(signal.SIGTERM, lambda number, _: worker.send_signal(number))
        # A terminal sends Ctrl-C to the worker too, which saves; handed on, it would be a second one, which ends it.
        signal.signal(signal.SIGINT, lambda *_: None)
        code = worker.wait()
        if code in _LOST:
            print("clvr: another host was lost, so this one ended too; start all again with --resume", file=sys.stderr)
            return 1
        return code if code >= 0 else 128 - code
    try:
        return _work(arguments[1:])
    except KeyboardInterrupt:  # before the command line runs, which says so itself
        print("clvr: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def _work(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coordinator", help="Address (host:port) of process 0; found automatically on TPU and SLURM.")
    parser.add_argument("--processes", type=int, help="Number of processes in all.")
    parser.add_argument("--process", type=int, help="Number of this process, from 0.")
    who, rest = parser.parse_known_args(arguments)

    from clvr_jax.cli import main as clvr
    from clvr_jax.errors import ClvrError, UsageError
    from clvr_jax.training.distributed import Cluster
    from clvr_jax.training.graceful_shutdown import was_stopped

    try:
        Cluster(who.coordinator, who.processes, who.process).initialize()
    except ClvrError as error:
        print(f"clvr: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    code = clvr(["train", *rest])
    # Saved, not finished: whoever restarts what fails must not take it for done.
    return 128 + signal.SIGTERM if code == 0 and was_stopped() else code


if __name__ == "__main__":
    sys.exit(main())
