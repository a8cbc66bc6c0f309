"""Planning: what a program will cost on other chips, found by compiling it for their topology from shapes alone.

A training recipe is planned by its real train step, other programs (a sampler, a rollout) as a recipe describes them.
`search` tries several meshes and batch sizes.
"""

import dataclasses
import itertools
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding
from jaxtyping import PyTree
from rich.table import Table

from clvr_jax.compilation import without_compilation_cache
from clvr_jax.cost_model.hardware import Topology, parse_topology, planning_devices
from clvr_jax.cost_model.report import JointReport, Report, Stage, elements_per_chip, measure
from clvr_jax.cost_model.roofline import training_hbm_bytes
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.json_input import JSON
from clvr_jax.sharding import MESH_AXES, MeshConfig, MeshLayout, with_shardings
from clvr_jax.training.optimization.step import TrainState, make_train_step
from clvr_jax.training.prefetch import DataIterator, check_batch
from clvr_jax.training.recipes import Recipe, RecipeConfig
from clvr_jax.training.trainer import Task, TrainConfig
from clvr_jax.trees import Params


class DoesNotFitError(ClvrError):
    """The program does not fit into a chip's memory."""


@dataclass(frozen=True)
class Program:
    """A function with shapes for its arguments.

    name: shown in reports. function: (weights, data) -> anything, not jitted. weights: trees by name, sharded as
    parameters; data: sharded as a batch. reads: number of times that a call reads each of `weights`. flops: of a call,
    on all devices together. calls: of a run, for the cost. rows: number of rows of `data`, which the mesh must divide;
    0 if all leaves have the same number, otherwise some may have one row for several.
    is_replicated: whether only the batch is sharded, so that the tensor axis does not divide the FLOPs.
    logical_axes: number of axes -> logical axes, for arrays of `data` that are not sharded as a batch.
    other_bytes: read in a call besides the weights, all devices together. donates: whether `data` is donated.
    kept: name of the part of `data` that stays in memory between the programs of a run, "" if none does. token_passes:
    number of tokens that pass through the image transformer, over all steps, for the run.
    """

    name: str
    function: Callable[[Mapping[str, Params], PyTree], PyTree]
    weights: Mapping[str, Params]
    data: PyTree
    reads: Mapping[str, int]
    flops: float
    calls: int = 1
    rows: int = 0
    is_replicated: bool = False
    logical_axes: Mapping[int, tuple[str | None, ...]] = dataclasses.field(default_factory=dict)
    other_bytes: float = 0.0
    donates: bool = False
    kept: str = ""
    token_passes: int = 0

    def shardings(self, layout: MeshLayout) -> PyTree:
        """Returns the sharding of each array of `data`."""

        def place(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
            if leaf.ndim in self.logical_axes:
                return layout.sharding(self.logical_axes[leaf.ndim], leaf.shape)
            found: NamedSharding = layout.batch(leaf)
            return found

        return jax.tree.map(place, _shapes(self.data))


def plan(
    recipe: Recipe, config: RecipeConfig, topology: str, *, dollars_per_chip_hour: float | None = None
) -> Report | JointReport:
    """Compiles the program of a recipe for chips that this machine need not have, and estimates its cost.

    Args:
      recipe: of a training run, or with a `program`: one program, or several that are in memory together.
      config: its configuration; `train.mesh`, or `mesh`, is the mesh of the chips.
      topology: see `cost_model.hardware.parse_topology`.
      dollars_per_chip_hour: for the cost of the whole run.
    Raises: UsageError for a mesh or batch that cannot be sharded; DoesNotFitError if the program does not fit into the
      chips' memory; ClvrError if there is no compiler for the topology, or the recipe has no program to plan.
    """
    chips = parse_topology(topology)
    if recipe.program is not None:
        program = recipe.program(config)
        with MeshLayout(config.mesh.make(planning_devices(chips))).active() as layout:
            if isinstance(program, Program):
                return _plan_program(program, layout, chips, dollars_per_chip_hour)
            return _plan_together(recipe.name, program, layout, chips, dollars_per_chip_hour)
    if not isinstance(getattr(config, "train", None), TrainConfig):
        raise ClvrError(
            f"{recipe.name}: nothing to plan; a recipe of RL is planned by its program(config), see pprl_flux2"
        )
    # A task that is not abstract has arrays on this machine; only their shapes are used.
    task = (recipe.abstract_task or recipe.task)(config)
    with MeshLayout(config.train.mesh.make(planning_devices(chips))).active() as layout:
        return _plan_step(task, config.train, layout, chips, dollars_per_chip_hour)


@dataclass(frozen=True)
class Trial:
    """One mesh and batch size that was tried: its report, or the reason why there is none."""

    mesh: MeshConfig
    batch_size: int | None
    report: Report | None
    reason: str = ""

    @property
    def name(self) -> str:
        """Returns the mesh and batch size, `fsdp 16 x tensor 4, batch 64`."""
        return f"{mesh_name(self.mesh)}, batch {self.batch_size}" if self.batch_size else mesh_name(self.mesh)

    @property
    def summary(self) -> str:
        """Returns the name and the result, for a line of progress."""
        report = self.report
        return f"{self.name}: {self.reason if report is None else report.headline}"

    def to_json(self) -> dict[str, JSON]:
        """Returns the trial as JSON values."""
        report = self.report.to_json() if self.report else None
        return {"mesh": dataclasses.asdict(self.mesh), "batch_size": self.batch_size, "report": report,
                "reason": self.reason}  # fmt: skip


def search(
    recipe: Recipe,
    config: RecipeConfig,
    topology: str,
    *,
    batch_sizes: Sequence[int] = (),
    dollars_per_chip_hour: float | None = None,
) -> Iterator[Trial]:
    """Plans a recipe on every mesh worth trying, with every batch size, in no order; see `ranked`.

    Args:
      recipe, config, topology, dollars_per_chip_hour: see `plan`.
      batch_sizes: to try; the configuration's own if empty.
    Yields: each trial when it is done; it may take the compiler some minutes.
    Raises: UsageError if batch sizes are given and the configuration has none.
    """
    if batch_sizes and not hasattr(config, "batch_size"):
        raise UsageError(f"{recipe.name}: its configuration has no batch_size, so there are none to try")
    chips = parse_topology(topology)
    for mesh, batch in itertools.product(meshes(chips), batch_sizes or (getattr(config, "batch_size", None),)):
        changed = _changed(config, mesh, batch)
        try:
            report = plan(recipe, changed, topology, dollars_per_chip_hour=dollars_per_chip_hour)
            if isinstance(report, JointReport):
                raise ClvrError(
                    f"{recipe.name}: --search takes one program, and this recipe plans several; give --mesh instead"
                )
            yield Trial(mesh, batch, report)
        except (DoesNotFitError, UsageError) as error:
            yield Trial(mesh, batch, None, str(error))


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """Returns the trials that fit by model FLOP utilization, best first; then the others."""

    def key(trial: Trial) -> tuple[bool, float]:
        report = trial.report
        return (report is None or not report.memory.fits, -report.roofline.mfu if report else 0.0)

    return sorted(trials, key=key)


def trials_table(trials: Sequence[Trial]) -> Table:
    """Returns a table of trials for a terminal, one line each."""
    table = Table("mesh", "memory", "step", "bound by", "utilization", "cost")
    for trial in trials:
        report = trial.report
        if report is None:
            table.add_row(trial.name, trial.reason)
            continue
        times = report.roofline
        table.add_row(
            trial.name,
            report.memory.headline,
            f"{times.overlapped:.2f} - {times.serial:.2f} s",
            times.bound,
            f"{times.mfu:.0%} - {times.utilization(times.serial):.0%}",
            report.cost_line,
        )
    return table


def meshes(chips: Topology) -> list[MeshConfig]:
    """Returns meshes worth trying: FSDP alone, with sequence or tensor shards, and on many chips with model copies."""
    count = chips.devices
    inner = [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (1, 4), (1, 8)]
    found = [
        MeshConfig(fsdp=count // (sequence * tensor), sequence=sequence, tensor=tensor)
        for sequence, tensor in inner
        if count % (sequence * tensor) == 0
    ]
    # Beyond a few dozen chips, gathering over all of them is slow; copies of the model sum their gradients once a step.
    return found + [MeshConfig(data=count // inside, fsdp=inside) for inside in (32, 64) if count // inside > 1]


def mesh_name(mesh: MeshConfig) -> str:
    """Returns the axes of a mesh with more than one device, `fsdp 16 x tensor 4`."""
    sizes = {axis: getattr(mesh, axis) for axis in MESH_AXES}
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size != 1) or "one device"


def _changed(config: RecipeConfig, mesh: MeshConfig, batch: int | None) -> RecipeConfig:
    if hasattr(config, "train"):
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, mesh=mesh))
    else:
        config = dataclasses.replace(config, mesh=mesh)
    return config if batch is None else dataclasses.replace(config, batch_size=batch)


def _plan_step(task: Task, train: TrainConfig, layout: MeshLayout, chips: Topology, price: float | None) -> Report:
    optimizer = train.optimizer()
    state = TrainState.abstract(_shapes(task.params), optimizer, layout)
    frozen = with_shardings(_shapes(task.frozen), layout.parameters(task.frozen))
    batch = _shapes(next(task.batches) if isinstance(task.batches, DataIterator) else task.batches(0))
    check_batch(batch, layout, train.gradient_accumulation_steps)
    step = make_train_step(task.loss, optimizer, train.step, layout)
    compiled, text = _compiled(step, (state, frozen, with_shardings(batch, layout.batch(batch))), layout)
    held, read = (elements_per_chip(tree) for tree in (state.params, frozen))
    # Products that are sharded by heads need only their shard of each weight; all others gather it.
    gathered = sum(leaf.size for leaf in jax.tree.leaves(task.params)) / layout.mesh.shape["tensor"]
    return measure(
        compiled,
        text,
        name=task.name,
        topology=chips,
        mesh=layout.mesh,
        flops=task.flops(batch) if task.flops else 0.0,
        hardware_flops=task.hardware_flops(batch) if task.hardware_flops else None,
        hbm_bytes=training_hbm_bytes(parameters=held, gathered=gathered) + 2.0 * read,
        parameters=held,
        steps=train.steps,
        dollars_per_chip_hour=price,
    )


def _plan_program(program: Program, layout: MeshLayout, chips: Topology, price: float | None) -> Report:
    weights = {name: with_shardings(_shapes(tree), layout.parameters(tree)) for name, tree in program.weights.items()}
    data = _shapes(program.data)
    check_batch(jax.ShapeDtypeStruct((program.rows,), bool) if program.rows else data, layout, 1)
    function = jax.jit(program.function, donate_argnums=(1,) if program.donates else ())
    compiled, text = _compiled(function, (weights, with_shardings(data, program.shardings(layout))), layout)
    tensor = layout.mesh.shape["tensor"]
    traffic = sum(
        program.reads[name] * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) / tensor
        for name, tree in program.weights.items()
    )
    return measure(
        compiled,
        text,
        name=program.name,
        topology=chips,
        mesh=layout.mesh,
        flops=program.flops,
        hardware_flops=program.flops * chips.devices / layout.batch_shards if program.is_replicated else None,
        hbm_bytes=traffic + program.other_bytes / chips.devices,
        parameters=elements_per_chip(weights),
        steps=program.calls,
        dollars_per_chip_hour=price,
    )


def _plan_together(
    name: str, programs: Sequence[Program], layout: MeshLayout, chips: Topology, price: float | None
) -> JointReport:
    """Compiles each program; a model that several of them read is counted once."""
    weights: dict[str, int] = {}
    kept, stages = 0, []
    for program in programs:
        weights |= {
            model: _bytes_per_chip(tree, layout.parameters(_shapes(tree))) for model, tree in program.weights.items()
        }
        places = program.shardings(layout)
        inputs = _bytes_per_chip(program.data, places)
        if program.kept:
            own = _bytes_per_chip(program.data[program.kept], places[program.kept])
            inputs, kept = inputs - own, max(kept, own)
        report = _plan_program(program, layout, chips, price)
        stages.append(Stage(report, program.calls, inputs, program.token_passes))
    return JointReport(name, chips.name, chips.devices, dict(layout.mesh.shape), weights, tuple(stages), kept)


def _bytes_per_chip(tree: PyTree, shardings: PyTree) -> int:
    placed = jax.tree.leaves(with_shardings(_shapes(tree), shardings))
    return sum(elements_per_chip(leaf) * leaf.dtype.itemsize for leaf in placed)


def _compiled(function: Any, arguments: tuple[PyTree, ...], layout: MeshLayout) -> tuple[jax.stages.Compiled, str]:
    """Returns the compiled program, and its text."""
    lowered = function.trace(*arguments).lower(lowering_platforms=(layout.platform,))
    with tempfile.TemporaryDirectory(prefix="clvr-plan-") as directory:
        # XLA cannot always parse the program of libtpu (asynchronous collectives of v6e), so its text is dumped.
        is_tpu = layout.platform == "tpu"
        options = {"xla_dump_to": directory, "xla_dump_hlo_as_text": True} if is_tpu else {}
        try:
            with without_compilation_cache():
                compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise _does_not_fit(str(error)) from error
        if not is_tpu:
            return compiled, compiled.as_text()
        texts = sorted(Path(directory).glob("*.after_optimizations.txt"), key=lambda path: path.stat().st_size)
        return compiled, texts[-1].read_text()  # the others are small programs that the compiler runs itself


def _does_not_fit(said: str) -> DoesNotFitError:
    # The compiler's message has one of two forms, with the size of the temporaries or of everything.
    found = re.search(r"\(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)", said)
    found = found or re.search(r"Used ([\d.]+[KMGT]) of ([\d.]+[KMGT]) hbm", said)
    needs = f"needs {found[1]}iB of {found[2]}iB" if found else said.splitlines()[0][:120]
    return DoesNotFitError(f"does not fit a chip's memory: {needs}")


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
