"""One trainer for every recipe: state, step, checkpoints, metrics. What is trained is a `Task`.

The state is a pytree; the data of step n depends on the seed and n alone. So a run that is killed and resumed gives the
same losses as one that was not.
"""

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clvr_jax.console import progress
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.training.checkpoint import Checkpoints
from clvr_jax.training.metrics import MetricLog

Tree = Any
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Optimiser, schedule and bookkeeping of a run.

    steps: optimiser steps. learning_rate: peak of a cosine with linear warm-up over `warmup` of the steps, down to
    `final_learning_rate` of the peak. muon_learning_rate: if positive, the matrices of the scanned blocks are trained
    by Muon with this peak, in units of AdamW's (a step moves an entry by 0.2 of it, as AdamW's typically does), and
    AdamW trains the rest. ema_decay: of the exported average. save_minutes: time between checkpoints.
    """

    steps: int = 1000
    learning_rate: float = 1e-3
    muon_learning_rate: float = 0.0
    warmup: float = 0.05
    final_learning_rate: float = 0.02
    weight_decay: float = 0.01
    b1: float = 0.9
    b2: float = 0.99
    clip_norm: float = 1.0
    ema_decay: float = 0.995
    seed: int = 0
    log_every: int = 20
    save_minutes: float = 4.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"TrainConfig: steps must be at least 1, got {self.steps}")
        if not 0 <= self.warmup < 1 or not 0 <= self.ema_decay < 1:
            raise UsageError("TrainConfig: warmup and ema_decay must lie in [0, 1)")

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW, or Muon and AdamW, behind a clip of the global gradient norm."""
        if self.muon_learning_rate > 0:
            rule = optax.contrib.muon(
                self._schedule(self.muon_learning_rate),
                adam_learning_rate=self._schedule(self.learning_rate),
                adam_b1=self.b1,
                adam_b2=self.b2,
                weight_decay=self.weight_decay,
                adam_weight_decay=self.weight_decay,
                weight_decay_mask=_is_matrix,
                consistent_rms=0.2,
                muon_weight_dimension_numbers=_block_matrices,
            )
        else:
            rule = optax.adamw(
                self._schedule(self.learning_rate),
                b1=self.b1,
                b2=self.b2,
                weight_decay=self.weight_decay,
                mask=_is_matrix,
            )
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), rule)

    def _schedule(self, peak: float) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=peak,
            warmup_steps=max(1, round(self.warmup * self.steps)),
            decay_steps=max(2, self.steps),
            end_value=self.final_learning_rate * peak,
        )


def _is_matrix(params: Tree) -> Tree:
    """Biases and norm scales are not decayed."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _block_matrices(params: Tree) -> Tree:
    """Muon's dimension numbers: kernels (layer, in, out) of scanned blocks; None, so AdamW, for everything else."""

    def numbers(path: Any, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        is_stacked = leaf.ndim == 3 and any(getattr(key, "key", None) == "kernel" for key in path)
        return optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2) if is_stacked else None

    return jax.tree_util.tree_map_with_path(numbers, params)


@dataclasses.dataclass(frozen=True)
class Task:
    """What a recipe hands to the trainer.

    name: used in progress lines.
    params: trainable pytree, the start of the run.
    frozen: pytree the loss reads and nobody changes.
    loss: (params, frozen, batch, key) -> (scalar loss, metrics).
    batches: step -> batch as a pytree of NumPy arrays; a pure function of the step.
    export: (ema_params, folder) -> None, called at the end of the run.
    """

    name: str
    params: Tree
    frozen: Tree
    loss: Callable[[Tree, Tree, Any, jax.Array], tuple[jax.Array, Metrics]]
    batches: Callable[[int], Any]
    export: Callable[[Tree, Path], None]


@partial(jax.tree_util.register_dataclass, data_fields=["step", "params", "ema", "opt_state"], meta_fields=[])
@dataclasses.dataclass
class TrainState:
    """Everything a run continues from."""

    step: jax.Array
    params: Tree
    ema: Tree
    opt_state: Tree

    @classmethod
    def create(cls, params: Tree, optimizer: optax.GradientTransformation) -> "TrainState":
        """Step 0: the average starts at the parameters (as copies, since the step donates its state)."""
        ema = jax.tree.map(jnp.copy, params)
        return cls(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), ema, optimizer.init(params))


def make_train_step(
    loss: Callable[..., tuple[jax.Array, Metrics]], optimizer: optax.GradientTransformation, config: TrainConfig
) -> Callable[[TrainState, Tree, Any], tuple[TrainState, Metrics]]:
    """(state, frozen, batch) -> (state, metrics), jitted; the old state is donated."""

    @partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, frozen: Tree, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state.params, frozen, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # Early on the average forgets the start quickly, later it has its full memory.
        decay = jnp.minimum(config.ema_decay, (1 + state.step) / (10 + state.step))
        ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, params)
        metrics = {**metrics, "loss": value, "grad_norm": optax.global_norm(grads)}
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    return train_step


def fit(
    task: Task, config: TrainConfig, out: Path, *, resume: bool = False, stop_after: int | None = None
) -> TrainState:
    """Trains a task; checkpoints, metrics and the exported weights lie under `out`.

    Args:
      task: what to train.
      config: how.
      out: folder of the run: `checkpoints/`, `metrics.jsonl`, TensorBoard events, `export/`.
      resume: continue from the newest checkpoint in `out`; without it an `out` that holds one is an error.
      stop_after: stop (with a checkpoint) once this step is reached; for tests and for sharing a machine.
    Returns: the final state.
    Raises: ClvrError if the loss is not finite.
    """
    optimizer = config.optimizer()
    state = TrainState.create(task.params, optimizer)
    with Checkpoints(out / "checkpoints") as checkpoints:
        state = checkpoints.restore_or(state, resume=resume)
        start = int(state.step)
        last = min(config.steps, stop_after or config.steps)
        if start < last:
            state = _run(
                task, config, state, start, last, out, checkpoints, make_train_step(task.loss, optimizer, config)
            )
    if last == config.steps:
        task.export(state.ema, out / "export")
    return state


def _run(
    task: Task,
    config: TrainConfig,
    state: TrainState,
    start: int,
    last: int,
    out: Path,
    checkpoints: Checkpoints,
    train_step: Callable[[TrainState, Tree, Any], tuple[TrainState, Metrics]],
) -> TrainState:
    saved = logged = time.monotonic()
    waiting: list[Metrics] = []
    with (
        MetricLog(out, start) as log,
        ThreadPoolExecutor(1) as loader,
        progress(task.name, config.steps, start) as advance,
    ):
        following = loader.submit(task.batches, start)
        for step in range(start, last):
            batch = following.result()
            if step + 1 < last:
                following = loader.submit(task.batches, step + 1)
            state, metrics = train_step(state, task.frozen, batch)
            waiting.append(metrics)
            if (step + 1) % config.log_every == 0 or step + 1 == last:
                means = _means(jax.device_get(waiting))
                now = time.monotonic()
                means["seconds_per_step"] = (now - logged) / len(waiting)
                logged, waiting = now, []
                log.write(step + 1, means)
                if not np.isfinite(means["loss"]):
                    raise ClvrError(
                        f"{task.name}: the loss is {means['loss']} near step {step + 1}; resume the last checkpoint "
                        f"in {out / 'checkpoints'} with a smaller learning rate"
                    )
                advance(step + 1, f"loss {means['loss']:.4f}  {means['seconds_per_step']:.2f} s/step")
            if time.monotonic() - saved > 60 * config.save_minutes or step + 1 == last:
                checkpoints.save(step + 1, state)
                saved = time.monotonic()
    return state


def _means(metrics: list[dict[str, Any]]) -> dict[str, float]:
    """Mean of each metric over the steps that reported it: batches of different kinds may report different ones."""
    names = {name for step in metrics for name in step}
    return {name: float(np.mean([step[name] for step in metrics if name in step])) for name in sorted(names)}
