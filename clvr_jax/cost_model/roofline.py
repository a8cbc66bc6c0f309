"""The roofline model: a step's arithmetic, memory traffic and communication, each at the chip's peak rate.

The largest of the three times is that of a step in which all of them overlap, and their sum that of a step without
overlap; a real step is between the two, or above, since no kernel reaches the peak. Sources: Williams, Waterman,
Patterson, Roofline (CACM 2009); for collectives on a torus, Austin et al., How to Scale Your Model (2025).
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from jax.sharding import Mesh

from clvr_jax.cost_model.hardware import Chip, Topology, links
from clvr_jax.cost_model.hlo import Collective

_SECONDS_AN_HOUR = 3600


@dataclass(frozen=True)
class Roofline:
    """The times of one step on one chip, in seconds, and its utilization.

    compute: of arithmetic. hbm: of memory traffic. interconnect: of communication over all mesh axes, one after
    another.
    model_flops: FLOPs of one chip without recomputation. peak_flops: FLOP/s of the chip.
    """

    compute: float
    hbm: float
    interconnect: float
    model_flops: float
    peak_flops: float

    @property
    def overlapped(self) -> float:
        """Seconds if arithmetic, memory traffic and communication overlap completely; a lower bound."""
        return max(self.compute, self.hbm, self.interconnect)

    @property
    def serial(self) -> float:
        """Seconds if nothing overlaps."""
        return self.compute + self.hbm + self.interconnect

    @property
    def bound(self) -> str:
        """The limiting resource: "compute", "hbm" or "interconnect"."""
        return max(("compute", "hbm", "interconnect"), key=lambda name: getattr(self, name))

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization if all overlaps: the fraction of the peak, without recomputation."""
        return self.utilization(self.overlapped)

    def utilization(self, seconds: float) -> float:
        """Returns the model FLOPs utilization of a step that takes `seconds`; 0 if these are 0."""
        return self.model_flops / (seconds * self.peak_flops) if seconds else 0.0


@dataclass(frozen=True)
class Cost:
    """The cost of a run in chip-hours and, with a price per chip-hour, in dollars."""

    chip_hours: float
    dollars: float | None


def roofline(
    chip: Chip, *, flops: float, hbm_bytes: float, interconnect: Mapping[str, float], model_flops: float | None = None
) -> Roofline:
    """Returns the times of one step on one chip.

    Args:
      chip: with its peak rates.
      flops: of one chip in a step, with recomputation.
      hbm_bytes: that one chip reads and writes.
      interconnect: seconds on each mesh axis, from `interconnect_seconds`.
      model_flops: of one chip in a step, without recomputation; `flops` if None.
    """
    return Roofline(
        compute=flops / chip.peak_flops,
        hbm=hbm_bytes / chip.hbm_bandwidth,
        interconnect=sum(interconnect.values()),
        model_flops=flops if model_flops is None else model_flops,
        peak_flops=chip.peak_flops,
    )


def interconnect_seconds(found: Iterable[Collective], topology: Topology, mesh: Mesh) -> dict[str, float]:
    """Returns the seconds of a step's collectives on each mesh axis (`data+fsdp` for two at once).

    Gathers, scatters and reductions are rings over all links of the axis at once; a byte of an all-to-all uses every
    link on its path; a permute uses one direction of one link, and the compiler sends two at a time, in both
    directions. Latency is not modeled.

    Args:
      found: from `collectives(text, mesh.shape)`.
      topology, mesh: of the program.
    """
    seconds: defaultdict[str, float] = defaultdict(float)
    for collective in found:
        of_axis = links(topology, mesh, collective.axes)
        rate, sent = of_axis.bandwidth, collective.sent
        if collective.kind == "all-to-all":
            sent = collective.times * collective.bytes * of_axis.hops
        elif collective.kind == "collective-permute":
            rate = min(rate, 2 * topology.chip.link_bandwidth)
        seconds[collective.axis] += sent / rate
    return dict(seconds)


def training_hbm_bytes(
    *,
    parameters: float,
    param_bytes: float = 4,
    compute_bytes: float = 2,
    optimizer_bytes: float = 8,
    gathered: float | None = None,
    activations: float = 0.0,
    remat: str = "full",
) -> float:
    """Returns the memory traffic of one chip in a training step: weights, gradients, optimizer state, activations.

    Args:
      parameters: number of those stored on this chip.
      param_bytes, optimizer_bytes: bytes per parameter of the master weights and of the optimizer state (Adam's two
        moments in float32); both are read and written, and so are gradients of the master weights' size.
      compute_bytes: bytes of a weight or an activation in the compute dtype.
      gathered: number of weights that this chip computes with, all of them under FSDP; `parameters` if None. They are
        written by the gather and read in the forward and the backward pass, and once more for recomputation.
      activations: number of elements kept for the backward pass, written once and read once.
      remat: rematerialization policy, a name in `layers.REMAT`.
    """
    passes = 2 if remat == "dots" else 3
    weights = 2 * passes * compute_bytes * (parameters if gathered is None else gathered)
    update = 2 * parameters * (2 * param_bytes + optimizer_bytes)
    return weights + update + 2 * compute_bytes * activations


class MemoryAnalysis(Protocol):
    """The sizes that `memory_analysis()` of a compiled program returns, in bytes."""

    argument_size_in_bytes: int
    output_size_in_bytes: int
    alias_size_in_bytes: int
    temp_size_in_bytes: int
    generated_code_size_in_bytes: int


def fits(memory: MemoryAnalysis, chip: Chip) -> bool:
    """Returns whether a compiled program, with its `memory_analysis()`, fits in the memory of a chip."""
    return total_bytes(memory) <= chip.hbm_bytes


def total_bytes(memory: MemoryAnalysis) -> int:
    """Returns the peak device memory in bytes: arguments, temporaries, results that are not donated, and code."""
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    code = memory.generated_code_size_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + results + code


def run_cost(seconds: float, steps: int, chips: int, dollars_per_chip_hour: float | None = None) -> Cost:
    """Returns the cost of `steps` steps of `seconds` each on a number of chips."""
    chip_hours = seconds * steps * chips / _SECONDS_AN_HOUR
    return Cost(chip_hours, None if dollars_per_chip_hour is None else chip_hours * dollars_per_chip_hour)
