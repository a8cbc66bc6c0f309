"""Reports of planned programs as tables and JSON: whether they fit, what they cost, and what limits their speed."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import jax
from jax.sharding import Mesh
from rich.table import Table

from clvr_jax.cost_model.hardware import GIB, Topology
from clvr_jax.cost_model.hlo import Collective, collectives, merged, sent_by_axis
from clvr_jax.cost_model.roofline import Cost, Roofline, fits, interconnect_seconds, roofline, run_cost, total_bytes
from clvr_jax.errors import ClvrError
from clvr_jax.files.json_input import JSON
from clvr_jax.trees import Leaf, Params

_SHOWN_COLLECTIVES = 6


@dataclass(frozen=True)
class Memory:
    """Bytes of one chip's memory that a program needs, and that the chip has.

    output: results that are not stored in donated arguments.
    """

    arguments: int
    temporaries: int
    output: int
    total: int
    available: float
    fits: bool

    @property
    def headline(self) -> str:
        """Memory on one line, such as `12.34 GiB of 15.75 GiB: fits`."""
        return f"{_gib(self.total)} of {_gib(self.available)}: {'fits' if self.fits else 'does not fit'}"


@dataclass(frozen=True)
class Report:
    """A compiled program on a topology; all numbers are for one step on one chip unless stated otherwise.

    flops: model FLOPs of all chips, without recomputation. flops_per_chip: hardware FLOPs of one chip, with
    recomputation. parameters: number of those stored on one chip. instructions: number of those of the compiled
    program, which is independent of the model's depth. sent: communication volume in bytes over each mesh axis. steps:
    of the run that `cost` is for.
    """

    name: str
    topology: str
    chips: int
    mesh: dict[str, int]
    parameters: int
    instructions: int
    memory: Memory
    flops: float
    flops_per_chip: float
    hbm_bytes: float
    collectives: tuple[Collective, ...]
    sent: dict[str, float]
    roofline: Roofline
    steps: int
    cost: Cost

    @property
    def cost_line(self) -> str:
        """Cost on one line, such as `5,000 steps: 12.3 chip-hours, 14.70 dollars, if all overlaps`."""
        dollars = "" if self.cost.dollars is None else f", {self.cost.dollars:,.2f} dollars"
        return f"{self.steps:,} steps: {self.cost.chip_hours:,.1f} chip-hours{dollars}, if all overlaps"

    @property
    def headline(self) -> str:
        """Memory, time and utilization on one line."""
        times = self.roofline
        return f"{self.memory.headline}, {_seconds(times.overlapped)} a step, {times.mfu:.0%} of the peak"

    def to_json(self) -> dict[str, JSON]:
        """Returns the report with its derived figures, in types that JSON has."""
        times = self.roofline
        derived = {"overlapped": times.overlapped, "serial": times.serial, "bound": times.bound, "mfu": times.mfu}
        found = [{**asdict(collective), "sent": collective.sent} for collective in self.collectives]
        return {**asdict(self), "collectives": found, "roofline": {**asdict(times), **derived}}

    def table(self) -> Table:
        """The report for a terminal."""
        memory, times = self.memory, self.roofline
        table = Table("one chip, one step", "", title=f"{self.name} on {self.topology}", caption=self.cost_line)
        axes = " x ".join(f"{axis} {size}" for axis, size in self.mesh.items() if size > 1) or "one device"
        table.add_row("mesh", f"{axes} ({self.chips} chips)")
        table.add_row("parameters", f"{self.parameters:,}")
        table.add_row("memory", memory.headline)
        table.add_row("  arguments", _gib(memory.arguments))
        table.add_row("  temporaries", _gib(memory.temporaries))
        table.add_row("  results", _gib(memory.output), end_section=True)
        table.add_row("FLOPs", f"{self.flops_per_chip:.3e} (all chips, nothing twice: {self.flops:.3e})")
        table.add_row("memory traffic", _gib(self.hbm_bytes))
        for axis, sent in self.sent.items():
            table.add_row(f"sent over {axis or 'the interconnect'}", _gib(sent))
        for one in self.collectives[:_SHOWN_COLLECTIVES]:
            table.add_row(f"  {one.kind}", f"{one.times} x {one.dtype} {_mib(one.bytes)}, {one.axis or one.devices}")
        if len(self.collectives) > _SHOWN_COLLECTIVES:
            table.add_row("  others", _gib(sum(one.sent for one in self.collectives[_SHOWN_COLLECTIVES:])))
        table.add_section()
        table.add_row("arithmetic", _seconds(times.compute))
        table.add_row("memory", _seconds(times.hbm))
        table.add_row("interconnect", _seconds(times.interconnect))
        table.add_row(
            "step", f"{_seconds(times.overlapped)} overlapped, {_seconds(times.serial)} not; {times.bound} bound"
        )
        serial = times.utilization(times.serial)
        table.add_row("model FLOP utilization", f"{times.mfu:.0%} overlapped, {serial:.0%} not")
        return table


@dataclass(frozen=True)
class Stage:
    """One of several programs whose models are in memory together.

    report: memory and time of one call. calls: number of calls in a run. inputs: bytes of its arguments on one chip,
    without the weights and what stays in memory between programs. token_passes: see `training.plan.Program`.
    """

    report: Report
    calls: int
    inputs: int
    token_passes: int = 0

    @property
    def code(self) -> int:
        """Bytes of the compiled code on one chip."""
        memory = self.report.memory
        return memory.total - memory.arguments - memory.temporaries - memory.output

    @property
    def working(self) -> int:
        """Bytes on one chip without weights and code: inputs, temporaries and outputs."""
        return self.inputs + self.report.memory.temporaries + self.report.memory.output

    @property
    def overlapped(self) -> float:
        """Seconds of all calls if arithmetic, memory and communication overlap completely."""
        return self.calls * self.report.roofline.overlapped

    @property
    def serial(self) -> float:
        """Seconds of all calls if nothing overlaps."""
        return self.calls * self.report.roofline.serial


@dataclass(frozen=True)
class JointReport:
    """Several programs on a topology that run one after another, with all of their models in memory.

    weights: bytes of each model on one chip. stages: the programs, in the order of their first call. kept: bytes on one
    chip that stay in memory between programs, such as caches of references.
    """

    name: str
    topology: str
    chips: int
    mesh: dict[str, int]
    weights: dict[str, int]
    stages: tuple[Stage, ...]
    kept: int = 0

    @property
    def memory(self) -> Memory:
        """Memory on one chip: weights, what is kept, code of all programs, and the largest working memory of one."""
        largest = max(self.stages, key=lambda stage: stage.working)
        weights, code = sum(self.weights.values()) + self.kept, sum(stage.code for stage in self.stages)
        own, available = largest.report.memory, largest.report.memory.available
        total = weights + code + largest.working
        return Memory(weights + largest.inputs, own.temporaries, own.output, total, available, total <= available)

    @property
    def token_passes(self) -> int:
        """Number of tokens that pass through the image transformer, over all images and steps."""
        return sum(stage.token_passes for stage in self.stages)

    @property
    def overlapped(self) -> float:
        """Seconds of a run if arithmetic, memory and communication overlap completely in each program."""
        return sum(stage.overlapped for stage in self.stages)

    @property
    def serial(self) -> float:
        """Seconds of a run if nothing overlaps."""
        return sum(stage.serial for stage in self.stages)

    def to_json(self) -> dict[str, JSON]:
        """Returns the report with its derived figures, in types that JSON has."""
        stages = [
            {
                **stage.report.to_json(),
                "calls": stage.calls,
                "working": stage.working,
                "code": stage.code,
                "token_passes": stage.token_passes,
                "overlapped": stage.overlapped,
                "serial": stage.serial,
            }
            for stage in self.stages
        ]
        return {
            "name": self.name,
            "topology": self.topology,
            "chips": self.chips,
            "mesh": self.mesh,
            "weights": self.weights,
            "kept": self.kept,
            "token_passes": self.token_passes,
            "memory": asdict(self.memory),
            "overlapped": self.overlapped,
            "serial": self.serial,
            "stages": stages,
        }

    def table(self) -> Table:
        """The report for a terminal."""
        axes = " x ".join(f"{axis} {size}" for axis, size in self.mesh.items() if size > 1) or "one device"
        total = f"{_seconds(self.overlapped)} if all overlaps, {_seconds(self.serial)} if nothing does"
        if self.token_passes:
            total += f"; {self.token_passes:,} token passes"
        table = Table(
            *("one chip", "calls", "working memory", "a call", "all calls, overlapped", "not overlapped", "bound by"),
            title=f"{self.name} on {self.topology}, {axes} ({self.chips} chips)",
            caption=f"{self.memory.headline}; {total}",
        )
        for name, size in self.weights.items():
            table.add_row(f"weights of {name}", "", _gib(size))
        if self.kept:
            table.add_row("kept caches of references", "", _gib(self.kept))
        table.add_row("code of all programs", "", _gib(sum(stage.code for stage in self.stages)), end_section=True)
        for stage in self.stages:
            times = stage.report.roofline
            table.add_row(
                stage.report.name,
                f"{stage.calls:,}",
                _gib(stage.working),
                _seconds(times.overlapped),
                _seconds(stage.overlapped),
                _seconds(stage.serial),
                times.bound,
            )
        return table


def measure(
    compiled: jax.stages.Compiled,
    text: str,
    *,
    name: str,
    topology: Topology,
    mesh: Mesh,
    flops: float,
    hardware_flops: float | None = None,
    hbm_bytes: float | None = None,
    parameters: int = 0,
    steps: int = 1,
    dollars_per_chip_hour: float | None = None,
) -> Report:
    """Returns the report of a compiled program.

    Args:
      compiled: the result of `lowered.compile()`.
      text: the optimized program, `compiled.as_text()`.
      name: of the program.
      topology, mesh: those that it was compiled for.
      flops: model FLOPs of one step on all chips, without recomputation, from `flops`.
      hardware_flops: with recomputation; `flops` if None.
      hbm_bytes: memory traffic of one chip in a step; if None, a lower bound: arguments are read once, results written
        once, temporaries written and read once.
      parameters: number of those stored on one chip, from `elements_per_chip`.
      steps, dollars_per_chip_hour: of the run, for its cost.
    Raises: ClvrError if mesh and topology differ in size, or a collective cannot be read.
    """
    if mesh.size != topology.devices:
        raise ClvrError(f"mesh {dict(mesh.shape)} has {mesh.size} devices, {topology.name} has {topology.devices}")
    memory = compiled.memory_analysis()
    assert memory is not None
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    if hbm_bytes is None:
        touched = memory.argument_size_in_bytes + memory.output_size_in_bytes
        hbm_bytes = float(touched + 2 * memory.temp_size_in_bytes)
    found = collectives(text, mesh.shape)
    hardware = flops if hardware_flops is None else hardware_flops
    times = roofline(
        topology.chip,
        flops=hardware / topology.devices,
        hbm_bytes=hbm_bytes,
        interconnect=interconnect_seconds(found, topology, mesh),
        model_flops=flops / topology.devices,
    )
    return Report(
        name=name,
        topology=topology.name,
        chips=topology.devices,
        mesh=dict(mesh.shape),
        parameters=parameters,
        instructions=text.count(" = "),
        memory=Memory(
            arguments=memory.argument_size_in_bytes,
            temporaries=memory.temp_size_in_bytes,
            output=results,
            total=total_bytes(memory),
            available=topology.chip.hbm_bytes,
            fits=fits(memory, topology.chip),
        ),
        flops=flops,
        flops_per_chip=hardware / topology.devices,
        hbm_bytes=hbm_bytes,
        collectives=tuple(merged(found)),
        sent=sent_by_axis(found),
        roofline=times,
        steps=steps,
        cost=run_cost(times.overlapped, steps, topology.devices, dollars_per_chip_hour),
    )


def elements_per_chip(tree: Params) -> int:
    """Returns the number of elements of a tree of arrays, or of shapes, that one device stores by their shardings."""

    def stored(leaf: Leaf) -> int:
        sharding = getattr(leaf, "sharding", None)
        shape: Sequence[int] = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        return math.prod(shape)

    return sum(stored(leaf) for leaf in jax.tree.leaves(tree))


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB"


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
