"""`clvr launch`: `clvr train`, `generate` or `sample` as one process of several."""

import dataclasses
import inspect
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import tyro

from clvr_jax.arguments import read_arguments
from clvr_jax.commands.common import Common, Count, Flags, Result
from clvr_jax.errors import ClvrError

_OPTIONS = ("--coordinator", "--processes", "--process")
# The exit codes of a process that JAX's coordination service ends, by SIGABRT.
_LOST = (-signal.SIGABRT, 128 + signal.SIGABRT)


@dataclass(frozen=True)
class Launch:
    """Runs a command as one process of several: start it once on every host, with the same arguments.

    The command is `train`, `generate` or `sample`; without its name it is `train`. For images, process 0 writes and
    prints the results and asks a controller behind a URL; every host reads models, prompts and images at the same path.

    On TPU VMs, GKE and under SLURM the processes find each other; elsewhere give the three options, and to each host
    its own --process. If another host is lost, this one ends within a minute; start all again, a training with
    --resume. A training that is stopped by SIGTERM saves first and ends with exit code 143 on every host. `clvr train
    CONFIG --help` and `clvr generate --help` list the other options.
    """

    EXAMPLE: ClassVar = (
        "clvr launch --coordinator host0:8476 --processes 2 --process 0 shapes_base --out runs/base --resume"
    )

    coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    """Address of process 0; found automatically on TPU VMs, GKE and under SLURM."""
    processes: Count = None
    """Number of processes in all."""
    process: Count = None
    """Index of this process, from 0."""
    arguments: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    common: Flags = field(default_factory=Common)

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> "Launch":
        """Parses a command line; all but the three options are arguments of the command, which checks them."""
        own, others, rest = [], [], iter(arguments)
        for argument in rest:
            if argument.partition("=")[0] not in _OPTIONS:
                others.append(argument)
                continue
            own.append(argument)
            if "=" not in argument:
                own += [value for value in [next(rest, None)] if value is not None]
        if others in (["--help"], ["-h"]):
            own, others = others, []
        command = read_arguments(cls, own, "clvr launch", inspect.getdoc(cls), cls.EXAMPLE)
        return dataclasses.replace(command, arguments=tuple(others))

    def run(self) -> Result:
        """Runs the command in a child process, since JAX ends the process if a host is lost.

        Raises: ClvrError if another host was lost; SystemExit with the exit code of the command.
        """
        values = dataclasses.asdict(self)
        options = [f"{name}={value}" for name in _OPTIONS if (value := values[name[2:]]) is not None]
        worker = subprocess.Popen(
            [sys.executable, "-m", "clvr_jax.commands.recipes.launch_worker", *options, *self.arguments]
        )
        signal.signal(signal.SIGTERM, lambda number, _: worker.send_signal(number))
        # A terminal sends Ctrl-C to the worker too, which saves; a second one would end it.
        signal.signal(signal.SIGINT, lambda *_: None)
        code = worker.wait()
        if code in _LOST:
            raise ClvrError("another host was lost, so this one ended too; start all again, a training with --resume")
        sys.exit(code if code >= 0 else 128 - code)
