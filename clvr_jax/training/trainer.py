"""Training of a `Task`, SFT or distillation, by optimizer steps, which `loop` repeats until the run is complete."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np

from clvr_jax.errors import UsageError
from clvr_jax.sharding import MeshConfig, MeshLayout
from clvr_jax.training.checkpoint import CheckpointConfig
from clvr_jax.training.graceful_shutdown import GracefulShutdown
from clvr_jax.training.loop import LoopConfig, StepMetrics, export_in_process_0, mesh_of, run_loop, wait_on_cpu
from clvr_jax.training.metrics import Throughput
from clvr_jax.training.monitoring.input_wait import InputWait
from clvr_jax.training.optimization.optimizer import OptimizerConfig
from clvr_jax.training.optimization.step import Loss, Metrics, StepConfig, TrainState, make_train_step
from clvr_jax.training.prefetch import Batches, DataIterator, DeviceBatch, IteratorState, prefetch
from clvr_jax.trees import Batch, Params

__all__ = ["Metrics", "Task", "TrainConfig", "TrainState", "fit", "make_train_step"]


@dataclasses.dataclass(frozen=True)
class TrainConfig(OptimizerConfig):
    """Configuration of a training run: the optimizer, the step, the mesh, and what is saved and logged."""

    gradient_accumulation_steps: int = 1
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
    max_nonfinite_steps: int = 8
    """End the run after this many steps in a row whose loss or gradients are not finite; fewer are skipped and counted.
    """
    log_every: int = 20
    """Write the metrics every so many steps."""
    checkpoint: CheckpointConfig = CheckpointConfig(save_interval_minutes=4.0)
    """Configuration of the checkpoints."""
    wandb: str = ""
    """Log to this project of Weights & Biases as well; nothing is logged there if it is empty."""
    goodput_logger: str = ""
    """Report the goodput to this logger of Google Cloud Logging as well, by the package ml-goodput-measurement; nothing
    is reported there if it is empty."""
    profile: int | None = None
    """Write a profile of three steps, beginning with this one, to OUT/profile; nothing is profiled if it is not given.
    """

    RENAMED: ClassVar[Mapping[str, str]] = {
        "accumulate": "gradient_accumulation_steps",
        "bad_steps": "max_nonfinite_steps",
        "save_minutes": "checkpoint.save_interval_minutes",
        "keep": "checkpoint.max_to_keep",
    }
    """Names in `recipe.json` of runs before these fields were renamed -> today's, for `config_from_json`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ema_decay < 1:
            raise UsageError(f"TrainConfig: ema_decay must be in [0, 1), got {self.ema_decay}")
        counts = ("gradient_accumulation_steps", "max_nonfinite_steps", "log_every")
        if low := [name for name in counts if getattr(self, name) < 1]:
            raise UsageError(f"TrainConfig: {', '.join(low)} must be at least 1")
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise UsageError(f"TrainConfig: compute_dtype must be float32 or bfloat16, got {self.compute_dtype!r}")

    @property
    def step(self) -> StepConfig:
        """Returns the fields that a step needs."""
        return StepConfig(self.gradient_accumulation_steps, self.compute_dtype, self.ema_decay, self.seed)

    def loop(self, name: str) -> LoopConfig:
        """Returns the fields that the loop needs, for a task of some name."""
        return LoopConfig(
            name=name,
            unit="step",
            iterations=self.steps,
            max_nonfinite_steps=self.max_nonfinite_steps,
            checkpoint=self.checkpoint,
            note=lambda metrics: f"loss {metrics['loss']:.4f}  {metrics['seconds_per_step']:.2f} s/step",
            log_every=self.log_every,
            wandb=self.wandb,
            goodput_logger=self.goodput_logger,
            logged_config=dataclasses.asdict(self),
            profile=range(0) if self.profile is None else range(self.profile, self.profile + 3),
        )


@dataclasses.dataclass(frozen=True)
class Task:
    """The model, data and loss of a run, which a recipe passes to the trainer.

    name: shown in progress lines. params: trainable pytree, the start of the run. frozen: pytree that the loss reads
    and that is not trained. loss: (params, frozen, batch, key) -> (scalar loss, metrics), see `step.Loss`. batches:
    step -> the whole batch as a pytree of NumPy arrays, a pure function of the step; or a `DataIterator`. export:
    (EMA of the parameters, directory) -> None, called at the end of the run. flops: batch -> model FLOPs of its step (6
    for each parameter and token, and attention), for the utilization. hardware_flops: the same with what is computed
    again in the backward pass; None: as `flops`. tokens: batch -> its number of tokens, for the throughput.
    """

    name: str
    params: Params
    frozen: Params
    loss: Loss
    batches: Batches
    export: Callable[[Params, Path], None]
    flops: Callable[[Batch], float] | None = None
    hardware_flops: Callable[[Batch], float] | None = None
    tokens: Callable[[Batch], int] | None = None


def fit(
    task: Task,
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    stop_after: int | None = None,
    on_begin: Callable[[], None] | None = None,
    on_export: Callable[[Path, int], None] | None = None,
) -> TrainState:
    """Trains a task; checkpoints, metrics and the exported model are stored in `out`.

    Args:
      task: what to train.
      config: of the run.
      out: directory of the run, which may be in a bucket: `checkpoints/`, `metrics.jsonl`, TensorBoard events,
        `export/`.
      resume: continue from the newest checkpoint in `out`; without it an `out` that holds one is an error.
      stop_after: stop (with a checkpoint) once this step is reached; for tests and for sharing a machine.
      on_begin: called when nothing refuses the run any more, before its first step.
      on_export: (directory, number of steps) -> None, called in process 0 with the exported model.
    Returns: the final state; the saved state of a run that was asked to stop (SIGTERM).
    Raises: KeyboardInterrupt after Ctrl-C, once the state is saved; ClvrError if too many steps in a row were not
      finite; UsageError for a mesh or batch that cannot be sharded.
    """
    with mesh_of(config.mesh) as layout:
        return run_loop(
            config.loop(task.name),
            lambda: TrainState.abstract(task.params, config.optimizer(), layout),
            lambda: TrainState.create(task.params, config.optimizer(), layout),
            lambda steps, iterator_state: _step_runner(task, config, layout, steps, iterator_state),
            lambda state, directory: export_in_process_0(task.export, state.ema, directory),
            out,
            resume=resume,
            stop_after=stop_after,
            on_begin=on_begin,
            on_export=on_export,
        )


@contextlib.contextmanager
def _step_runner(
    task: Task, config: TrainConfig, layout: MeshLayout, steps: range, iterator_state: IteratorState
) -> Iterator["_StepRunner"]:
    """Opens the runner of some steps, which prefetches their batches."""
    if isinstance(task.batches, DataIterator) and iterator_state:
        task.batches.restore(iterator_state)
    wait = InputWait(task.name)
    prefetched = prefetch(task.batches, layout, steps, config.gradient_accumulation_steps, wait)
    with contextlib.closing(prefetched) as batches:
        yield _StepRunner(task, config, layout, batches, iterator_state, wait)


class _StepRunner:
    """Runs optimizer steps, each on the next batch."""

    def __init__(
        self,
        task: Task,
        config: TrainConfig,
        layout: MeshLayout,
        batches: Iterator[DeviceBatch],
        iterator_state: IteratorState,
        wait: InputWait,
    ):
        self._layout, self._batches, self._iterator_state, self._wait = layout, batches, iterator_state, wait
        self._train_step = make_train_step(task.loss, config.optimizer(), config.step, layout)
        # Frozen weights are sharded as trained ones are.
        self._frozen = jax.device_put(task.frozen, layout.parameters(task.frozen))
        self._throughput = Throughput(task.flops, task.tokens, layout)

    def run(self, state: TrainState, iteration: int, shutdown: GracefulShutdown) -> tuple[TrainState, Metrics]:
        batch, self._iterator_state = next(self._batches)
        state, metrics = self._train_step(state, self._frozen, batch)
        wait_on_cpu(self._layout, metrics)
        self._wait.computed = metrics
        self._throughput.add(batch)
        return state, metrics

    def summarize(self, metrics: Sequence[StepMetrics]) -> dict[str, float]:
        return {**_means(jax.device_get(metrics)), **self._throughput.read()}

    def iterator_state(self) -> IteratorState:
        return self._iterator_state


def _means(metrics: Sequence[StepMetrics]) -> dict[str, float]:
    """Returns the mean of each metric over the steps that reported it: batches may report different ones."""
    names = {name for step in metrics for name in step}
    return {name: float(np.mean([step[name] for step in metrics if name in step])) for name in sorted(names)}
