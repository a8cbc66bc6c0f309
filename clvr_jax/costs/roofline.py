"""How long a step takes at best: its arithmetic, its memory traffic and its messages, each at the chip's peak rate.

The largest of the three is the time if all of them overlap, their sum if none do; a real step is between the two, or
above, since no kernel runs at peak. Source of the model: Williams, Waterman, Patterson, Roofline (CACM 2009); of the
times of collectives on a torus: Austin et al., How to Scale Your Model (2025).
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from clvr_jax.costs.hardware import Chip, Topology, links
from clvr_jax.costs.hlo import Collective

_SECONDS_AN_HOUR = 3600


@dataclass(frozen=True)
class Roofline:
    """Seconds of one step on one chip, by what they are spent on, and the share of its peak that is useful work.

    interconnect: over all mesh axes, one after another. model_flops: of one chip's share of the step, without what is
    computed twice. peak_flops: the chip's, a second.
    """

    compute: float
    hbm: float
    interconnect: float
    model_flops: float
    peak_flops: float

    @property
    def overlapped(self) -> float:
        """Seconds if arithmetic, memory and messages hide one another: no step is faster."""
        return max(self.compute, self.hbm, self.interconnect)

    @property
    def serial(self) -> float:
        """Seconds if nothing overlaps."""
        return self.compute + self.hbm + self.interconnect

    @property
    def bound(self) -> str:
        """What the step waits for: "compute", "hbm" or "interconnect"."""
        return max(("compute", "hbm", "interconnect"), key=lambda name: getattr(self, name))

    @property
    def mfu(self) -> float:
        """Model FLOP utilization if all overlaps: the share of the peak that is neither waiting nor repetition."""
        return self.utilization(self.overlapped)

    def utilization(self, seconds: float) -> float:
        """Model FLOP utilization of a step of this many seconds, a measured one for example; 0 for no time."""
        return self.model_flops / (seconds * self.peak_flops) if seconds else 0.0


@dataclass(frozen=True)
class Cost:
    """What a run costs: chip-hours, and dollars at a price for one of them (None without a price)."""

    chip_hours: float
    dollars: float | None


def roofline(
    chip: Chip, *, flops: float, hbm_bytes: float, interconnect: Mapping[str, float], model_flops: float | None = None
) -> Roofline:
    """Times of one step on one chip.

    Args:
      chip: whose peak rates count.
      flops: that one chip does in a step, what it computes twice included.
      hbm_bytes: that one chip reads and writes.
      interconnect: seconds on each mesh axis, from `interconnect_seconds`.
      model_flops: without what is computed twice; `flops` if None.
    """
    return Roofline(
        compute=flops / chip.peak_flops,
        hbm=hbm_bytes / chip.hbm_bandwidth,
        interconnect=sum(interconnect.values()),
        model_flops=flops if model_flops is None else model_flops,
        peak_flops=chip.peak_flops,
    )


def interconnect_seconds(found: Iterable[Collective], topology: Topology, mesh: Mesh) -> dict[str, float]:
    """Seconds that the collectives of a step take on each mesh axis (`data+fsdp` for two at once).

    Gathers, scatters and reductions run as rings over every link of the axis at once; in an all-to-all each byte takes
    as many links as its way is long; a permute uses one direction of one link, and the compiler sends two at a time, in
    both directions. Latency is left out.

    Args:
      found: from `collectives(text, mesh.shape)`.
      topology, mesh: where the program runs.
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
    """Bytes that one chip moves in a training step, counted: weights, gradients, optimizer, activations.

    Args:
      parameters: that this chip keeps. param_bytes, optimizer_bytes: of each, master weight and optimizer state (Adam's
        two moments in float32); both are read and written, and so is a gradient of the master's size.
      compute_bytes: of a weight or an activation as the products take it.
      gathered: weights that this chip multiplies with, all of them under FSDP; `parameters` if None. They are written
        when gathered, and read in the forward and in the backward pass, and once more if blocks are computed again.
      activations: elements kept for the backward pass, written once and read once.
      remat: name of the policy in `layers.REMAT`.
    """
    passes = 2 if remat == "dots" else 3
    weights = 2 * passes * compute_bytes * (parameters if gathered is None else gathered)
    update = 2 * parameters * (2 * param_bytes + optimizer_bytes)
    return weights + update + 2 * compute_bytes * activations


def fits(memory: Any, chip: Chip) -> bool:
    """Whether a compiled program fits a chip: `memory` is its `memory_analysis()`."""
    return total_bytes(memory) <= chip.hbm_bytes


def total_bytes(memory: Any) -> int:
    """Most bytes of device memory in use: arguments, temporaries, results that no donated argument holds, and code."""
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    code = memory.generated_code_size_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + results + code


def run_cost(seconds: float, steps: int, chips: int, dollars_per_chip_hour: float | None = None) -> Cost:
    """Chip-hours and dollars of `steps` steps of so many seconds on so many chips."""
    chip_hours = seconds * steps * chips / _SECONDS_AN_HOUR
    return Cost(chip_hours, None if dollars_per_chip_hour is None else chip_hours * dollars_per_chip_hour)
