"""Runs of several processes: how they find each other."""

import os
from dataclasses import dataclass

import jax

from clvr_jax.errors import ClvrError, UsageError

HEARTBEAT_SECONDS = 30
"""A process that sends nothing for so many seconds is lost, and the others end."""


@dataclass(frozen=True)
class Cluster:
    """Address of process 0 as host:port, number of processes, and which of them this is.

    All None: TPU VMs, GKE, SLURM and Open MPI provide them; without any of these this is the only process.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None

    def __post_init__(self) -> None:
        given = [value is not None for value in (self.coordinator, self.processes, self.process)]
        if any(given) and not all(given):
            raise UsageError("coordinator, processes and process belong together: give all three or none")
        if self.processes is not None and self.process is not None and not 0 <= self.process < self.processes:
            raise UsageError(f"process {self.process} of {self.processes}: must be in 0..{self.processes - 1}")

    def initialize(self) -> None:
        """Joins the processes; must be called before JAX uses a device.

        Raises: ClvrError, one line, if they cannot be joined.
        """
        if self.coordinator is None and not _is_managed():
            return
        try:
            jax.distributed.initialize(
                self.coordinator,
                self.processes,
                self.process,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
        except (RuntimeError, ValueError) as error:
            reason = (str(error).splitlines() or [""])[0][:200]
            where = self.coordinator or "the cluster's own coordinator"
            raise ClvrError(f"the processes do not come together at {where} ({reason})") from error


def virtual_devices(count: int) -> dict[str, str]:
    """Returns the environment of a process whose CPU is `count` virtual devices; set it before JAX uses a device.

    XLA keeps as many threads as there are devices or cores. Devices that wait for one another in a collective can hold
    all of them while the last one waits for a free thread to end its matrix product: the program waits for ever.
    With NPROC, the number of cores that XLA believes in, there are always threads left. A busy machine may still be
    slow: XLA's patience of 40 seconds is raised.
    """
    flags = os.environ.get("XLA_FLAGS", "").split()
    ours = ("--xla_force_host_platform_device_count", "--xla_cpu_collective_call_terminate_timeout_seconds")
    kept = [flag for flag in flags if not flag.startswith(ours)]
    return {"XLA_FLAGS": " ".join([*kept, f"{ours[0]}={count}", f"{ours[1]}=600"]), "NPROC": str(4 * count)}


def _is_managed() -> bool:
    """Returns whether the environment describes several processes in one of the ways that JAX understands."""
    counts = (os.environ.get(name, "") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "NNODES"))
    several = any(count.isdecimal() and int(count) > 1 for count in counts)
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "") or os.environ.get("MEGASCALE_COORDINATOR_ADDRESS", "")
    return several or "," in hosts or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ or _is_tpu_vm()


def _is_tpu_vm() -> bool:
    """Returns whether this is a TPU VM, which finds the other hosts of its slice through its metadata server."""
    return "TPU_ACCELERATOR_TYPE" in os.environ or os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio/0")
