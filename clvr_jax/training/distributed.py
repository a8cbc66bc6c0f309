"""Several processes, one program: who coordinates, and what happens when one is lost."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from clvr_jax.errors import ClvrError, UsageError

HEARTBEAT_SECONDS = 30
"""A process that is silent for so long is lost, and the others end."""


@dataclass(frozen=True)
class Cluster:
    """Address of process 0 as host:port, number of processes, and which of them this is.

    All None: TPU VMs, GKE, SLURM and Open MPI say it themselves; without any of them this is the only process.
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
        """Joins the processes; must come before JAX touches a device.

        Raises: ClvrError, one line, if they do not come together.
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


def broadcast_from_host0(make: Callable[[], Any]) -> Any:
    """What process 0 makes, a JSON value, on every process; all must call it.

    Raises: ClvrError on every process, if it was raised in process 0.
    """
    if jax.process_count() == 1:
        return make()
    told = b""
    if jax.process_index() == 0:
        try:
            told = json.dumps({"made": make()}).encode()
        except ClvrError as error:
            told = json.dumps({"failed": str(error)}).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(told))))
    bytes_n = multihost_utils.broadcast_one_to_all(np.frombuffer(told or bytes(size), np.uint8))
    found = json.loads(np.asarray(bytes_n).tobytes())
    if "failed" in found:
        raise ClvrError(found["failed"])
    return found["made"]


def virtual_devices(count: int) -> dict[str, str]:
    """Environment of a process in which the CPU plays `count` devices; must be set before JAX touches a device.

    XLA keeps as many threads as there are devices or cores. Devices that wait for one another in a collective can hold
    all of them while the last one waits for a free thread to end its matrix product: the program stands still for ever.
    With NPROC, the number of cores that XLA believes in, there are always threads left. A busy machine may still be
    slow: XLA's patience of 40 seconds is raised.
    """
    flags = os.environ.get("XLA_FLAGS", "").split()
    ours = ("--xla_force_host_platform_device_count", "--xla_cpu_collective_call_terminate_timeout_seconds")
    kept = [flag for flag in flags if not flag.startswith(ours)]
    return {"XLA_FLAGS": " ".join([*kept, f"{ours[0]}={count}", f"{ours[1]}=600"]), "NPROC": str(4 * count)}


def _is_managed() -> bool:
    """Whether the environment says that there are several processes, in one of the ways that JAX understands."""
    several = any(int(os.environ.get(name, "1")) > 1 for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "NNODES"))
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "") or os.environ.get("MEGASCALE_COORDINATOR_ADDRESS", "")
    return several or "," in hosts or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ or _is_tpu_vm()


def _is_tpu_vm() -> bool:
    """A TPU VM of a slice with several hosts finds the others through its metadata server."""
    return "TPU_ACCELERATOR_TYPE" in os.environ or os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio/0")
