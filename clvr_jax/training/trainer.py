"""One trainer for every recipe: mesh, state, checkpoints, metrics. What is trained is a `Task`.

The state is a pytree; the data of step n depends on the seed and n alone, or its position is saved with the state. So a
run that is killed and resumed gives the same losses as one that was not.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from clvr_jax.console import progress
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.sharding import MeshConfig, MeshLayout, active_layout, without_layout
from clvr_jax.training.checkpoint import Checkpoints
from clvr_jax.training.feed import Batches, Input, feed
from clvr_jax.training.metrics import MetricLog, Throughput
from clvr_jax.training.optimizer import OptimizerConfig
from clvr_jax.training.preemption import agreed, preemption
from clvr_jax.training.step import Loss, Metrics, StepConfig, TrainState, make_train_step

__all__ = ["Metrics", "Task", "TrainConfig", "TrainState", "fit", "make_train_step"]

Tree = Any


@dataclasses.dataclass(frozen=True)
class TrainConfig(OptimizerConfig):
    """Configuration of a training run: the optimizer, the step, the mesh, and what is saved and logged."""

    accumulate: int = 1
    """Split each batch into this many microbatches and accumulate their gradients, for batches whose activations do not
    fit; 1 computes the batch at once."""
    compute_dtype: str = "float32"
    """Compute the loss in this dtype, float32 or bfloat16; parameters, EMA and optimizer state stay in float32."""
    ema_decay: float = 0.995
    """Decay of the exponential moving average (EMA) of the parameters, which is what is exported; it is smaller in the
    first steps, and 0 exports the last parameters."""
    seed: int = 0
    """Seed of all random numbers; the same seed on the same number of devices gives the same run."""
    mesh: MeshConfig = MeshConfig()
    """Configuration of the device mesh."""
    bad_steps: int = 8
    """End the run after this many steps in a row whose loss or gradients are not finite; fewer are skipped and counted.
    """
    log_every: int = 20
    """Write the metrics every so many steps."""
    save_minutes: float = 4.0
    """Save a checkpoint every so many minutes, and at the end of the run."""
    keep: int = 2
    """Keep this many of the newest checkpoints."""
    wandb: str = ""
    """Log to this project of Weights & Biases as well; nothing is logged there if it is empty."""
    profile: int | None = None
    """Write a profile of three steps, beginning with this one, to OUT/profile; nothing is profiled if it is not given.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ema_decay < 1:
            raise UsageError(f"TrainConfig: ema_decay must lie in [0, 1), got {self.ema_decay}")
        if min(self.accumulate, self.bad_steps, self.log_every, self.keep) < 1:
            raise UsageError("TrainConfig: accumulate, bad_steps, log_every and keep must be at least 1")
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise UsageError(f"TrainConfig: compute_dtype must be float32 or bfloat16, got {self.compute_dtype!r}")

    @property
    def step(self) -> StepConfig:
        """The fields that a step needs."""
        return StepConfig(self.accumulate, self.compute_dtype, self.ema_decay, self.seed)


@dataclasses.dataclass(frozen=True)
class Task:
    """What a recipe hands to the trainer.

    name: used in progress lines.
    params: trainable pytree, the start of the run.
    frozen: pytree the loss reads and nobody changes.
    loss: (params, frozen, batch, key) -> (scalar loss, metrics), see `step.Loss`.
    batches: step -> the whole batch as a pytree of NumPy arrays, a pure function of the step; or an `Input`.
    export: (ema_params, folder) -> None, called at the end of the run.
    flops: batch -> model FLOPs of its step (6 for each parameter and token, and attention), for the utilization.
    hardware_flops: with what is computed a second time in the backward pass; as `flops` if None.
    tokens: batch -> tokens in it, for the throughput.
    """

    name: str
    params: Tree
    frozen: Tree
    loss: Loss
    batches: Batches
    export: Callable[[Tree, Path], None]
    flops: Callable[[Any], float] | None = None
    hardware_flops: Callable[[Any], float] | None = None
    tokens: Callable[[Any], int] | None = None


def fit(
    task: Task,
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    stop_after: int | None = None,
    on_begin: Callable[[], None] | None = None,
) -> TrainState:
    """Trains a task; checkpoints, metrics and the exported weights lie under `out`.

    Args:
      task: what to train.
      config: how.
      out: folder of the run: `checkpoints/`, `metrics.jsonl`, TensorBoard events, `export/`.
      resume: continue from the newest checkpoint in `out`; without it an `out` that holds one is an error.
      stop_after: stop (with a checkpoint) once this step is reached; for tests and for sharing a machine.
      on_begin: called once nothing refuses the run any more, before its first step.
    Returns: the final state; of a run that was asked to stop (SIGTERM), the state that was saved.
    Raises: KeyboardInterrupt after Ctrl-C, once the state is saved; ClvrError if too many steps in a row were not
      finite; UsageError for a mesh or batch that cannot be cut.
    """
    with mesh_of(config) as layout:
        state = TrainState.create(task.params, config.optimizer(), layout)
        with Checkpoints(out / "checkpoints", config.keep) as checkpoints:
            state, position = checkpoints.restore_or(state, resume=resume)
            if on_begin is not None:
                on_begin()
            if isinstance(task.batches, Input) and position:
                task.batches.restore(position)
            last = min(config.steps, stop_after or config.steps)
            if int(state.step) < last:
                state = _Run(task, config, layout, out, checkpoints).to(state, last)
        if int(state.step) == config.steps:
            _export(task, state.ema, out / "export")
        return state


@contextlib.contextmanager
def mesh_of(config: TrainConfig) -> Iterator[MeshLayout]:
    """The layout of a run, active; one that is active already is taken as it is."""
    layout = active_layout()
    if layout is not None:
        yield layout
        return
    with MeshLayout(config.mesh.make()).active() as layout:
        yield layout


@dataclasses.dataclass
class _Run:
    """The loop, with what it needs at every step."""

    task: Task
    config: TrainConfig
    layout: MeshLayout
    out: Path
    checkpoints: Checkpoints

    def to(self, state: TrainState, last: int) -> TrainState:
        """Trains up to step `last`, or until it is asked to stop."""
        config, start = self.config, int(state.step)
        train_step = make_train_step(self.task.loss, config.optimizer(), config.step, self.layout)
        frozen = _placed(self.task.frozen, self.layout)
        saved, waiting = time.monotonic(), []
        throughput = Throughput(self.task.flops, self.task.tokens, self.layout)
        with (
            MetricLog(self.out, start, config.wandb, self.task.name, dataclasses.asdict(config)) as log,
            progress(self.task.name, config.steps, start) as advance,
            preemption() as asked,
        ):
            batches = feed(self.task.batches, self.layout, range(start, last), config.accumulate)
            for step, (batch, position) in enumerate(batches, start):
                with _profile(self.out / "profile", step, config.profile):
                    state, metrics = train_step(state, frozen, batch)
                    if self.layout.platform == "cpu":
                        # Virtual devices share few threads: steps in flight could wait for one another for ever.
                        jax.block_until_ready(metrics)
                waiting.append(metrics)
                throughput.add(batch)
                is_last = step + 1 == last or asked.reached(step)
                if (step + 1) % config.log_every == 0 or is_last:
                    means = {**_means(jax.device_get(waiting)), **throughput.read()}
                    waiting = []
                    log.write(step + 1, means)
                    self._check(state, step + 1)
                    advance(step + 1, f"loss {means['loss']:.4f}  {means['seconds_per_step']:.2f} s/step")
                    is_due = agreed(time.monotonic() - saved > 60 * config.save_minutes)
                    if is_due or is_last:
                        self.checkpoints.save(step + 1, state, position)
                        saved = time.monotonic()
                if is_last and step + 1 < last:
                    self.checkpoints.wait()
                    asked.report(self.task.name, f"step {step + 1}")
                    break
        return state

    def _check(self, state: TrainState, step: int) -> None:
        bad = int(state.skipped_in_a_row)
        if bad >= self.config.bad_steps:
            raise ClvrError(
                f"{self.task.name}: loss or gradients of {bad} steps in a row are not finite, up to step {step}; "
                f"resume the last checkpoint in {self.out / 'checkpoints'} with a smaller learning rate"
            )


def _export(task: Task, ema: Tree, folder: Path) -> None:
    """Process 0 exports; what is spread over several hosts comes together there first."""
    if jax.process_count() > 1:
        ema = multihost_utils.process_allgather(ema, tiled=True)
    if jax.process_index() == 0:
        with without_layout():
            task.export(ema, folder)


def _placed(frozen: Tree, layout: MeshLayout) -> Tree:
    """Frozen weights lie as trained ones do; what is no array of numbers stays as it is."""
    return jax.device_put(frozen, layout.parameters(frozen))


@contextlib.contextmanager
def _profile(folder: Path, step: int, first: int | None) -> Iterator[None]:
    """Traces three steps."""
    if first is not None and step == first:
        jax.profiler.start_trace(str(folder))
    yield
    if first is not None and step == first + 2:
        jax.profiler.stop_trace()


def _means(metrics: list[dict[str, Any]]) -> dict[str, float]:
    """Mean of each metric over the steps that reported it: batches of different kinds may report different ones."""
    names = {name for step in metrics for name in step}
    return {name: float(np.mean([step[name] for step in metrics if name in step])) for name in sorted(names)}
