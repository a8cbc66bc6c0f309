"""One optimizer step as a pure function of state, frozen weights and batch, laid out over a mesh."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from clvr_jax.sharding import MeshLayout

Tree = Any
Metrics = dict[str, jax.Array]
Loss = Callable[[Tree, Tree, Any, jax.Array], tuple[jax.Array, Metrics]]
"""(params, frozen, batch, key) -> (mean loss, metrics). Where the mean is not over equal rows, metrics["weight"] is the
number it was divided by (tokens that count, say), so that parts of a batch add up to the whole."""

WEIGHT = "weight"


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "ema", "opt_state", "skipped", "skipped_in_a_row"],
    meta_fields=[],
)
@dataclasses.dataclass
class TrainState:
    """Everything a run continues from. skipped: steps whose gradients were not finite and changed nothing."""

    step: Any
    params: Tree
    ema: Tree
    opt_state: Tree
    skipped: Any
    skipped_in_a_row: Any

    @classmethod
    def create(
        cls, params: Tree, optimizer: optax.GradientTransformation, layout: MeshLayout | None = None
    ) -> "TrainState":
        """Step 0, laid out over the mesh; the average starts at the parameters.

        The parameters are copied, since a step takes its state's memory.
        """

        def start(params: Tree) -> "TrainState":
            params, ema = (jax.tree.map(jnp.copy, params) for _ in range(2))
            return TrainState(jnp.int32(0), params, ema, optimizer.init(params), jnp.int32(0), jnp.int32(0))

        if layout is None:
            return start(params)
        params = jax.device_put(params, layout.parameters(params))
        return jax.jit(start, out_shardings=state_shardings(jax.eval_shape(start, params), layout))(params)


def state_shardings(state: TrainState, layout: MeshLayout) -> TrainState:
    """Where each part of a state (shapes are enough) lies."""
    whole = layout.replicated
    return TrainState(
        whole,
        layout.parameters(state.params),
        layout.parameters(state.ema),
        layout.optimizer_state(state.opt_state, state.params),
        whole,
        whole,
    )


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """The part of a run's configuration that one training step depends on."""

    accumulate: int = 1
    """Number of microbatches that a batch is split into, for batches whose activations do not fit."""
    compute_dtype: str = "float32"
    """Parameters are cast to this dtype for the loss; parameters, EMA and optimizer state keep theirs."""
    ema_decay: float = 0.995
    """Decay of the exponential moving average (EMA) of the parameters; it is smaller in the first steps."""
    seed: int = 0
    """Seed of all random numbers."""


def make_train_step(
    loss: Loss, optimizer: optax.GradientTransformation, config: StepConfig, layout: MeshLayout | None = None
) -> Callable[[TrainState, Tree, Any], tuple[TrainState, Metrics]]:
    """(state, frozen, batch) -> (state, metrics), jitted; the old state is donated.

    A step whose loss or gradients are not finite leaves everything but the counters as it was.
    """

    def train_step(state: TrainState, frozen: Tree, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        grads, metrics = _gradients(loss, config, state.params, frozen, batch, key)
        norm = optax.global_norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # Early on the average forgets the start quickly, later it has its full memory.
        decay = jnp.minimum(config.ema_decay, (1 + state.step) / (10 + state.step))
        ema = jax.tree.map(lambda old, new: (decay * old + (1 - decay) * new).astype(old.dtype), state.ema, params)
        is_good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        old = (state.params, state.ema, state.opt_state)
        new = (params, ema, opt_state)
        params, ema, opt_state = jax.tree.map(lambda new, old: jnp.where(is_good, new, old), new, old)
        in_a_row = jnp.where(is_good, 0, state.skipped_in_a_row + 1)
        following = TrainState(state.step + 1, params, ema, opt_state, state.skipped + ~is_good, in_a_row)
        return following, {**metrics, "grad_norm": norm, "skipped": following.skipped}

    if layout is None:
        return jax.jit(train_step, donate_argnums=0)

    @partial(jax.jit, donate_argnums=0)
    def laid_out_step(state: TrainState, frozen: Tree, batch: Any) -> tuple[TrainState, Metrics]:
        following, metrics = train_step(state, frozen, batch)
        shardings = state_shardings(following, layout)
        return jax.lax.with_sharding_constraint(following, shardings), metrics

    return laid_out_step


def _gradients(
    loss: Loss, config: StepConfig, params: Tree, frozen: Tree, batch: Any, key: jax.Array
) -> tuple[Tree, Metrics]:
    """Gradients and metrics of the mean over the whole batch, in parts if asked for."""

    def total(params: Tree, part: Any, key: jax.Array) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
        mean, metrics = loss(_cast(params, config.compute_dtype), frozen, part, key)
        weight = jnp.asarray(metrics.pop(WEIGHT, 1.0), jnp.float32)
        return mean.astype(jnp.float32) * weight, (weight, {**metrics, "loss": mean})

    gradient = jax.value_and_grad(total, has_aux=True)
    if config.accumulate == 1:
        (_, (weight, metrics)), grads = gradient(params, batch, key)
        return jax.tree.map(lambda leaf: leaf / weight, grads), metrics

    def cut(leaf: jax.Array) -> jax.Array:
        # Every part takes some rows of every device, so that no row moves.
        return leaf.reshape(-1, config.accumulate, *leaf.shape[1:]).swapaxes(0, 1)

    def contribution(number: jax.Array, rows: Any) -> tuple[Tree, jax.Array, Metrics]:
        (_, (weight, metrics)), grads = gradient(params, rows, jax.random.fold_in(key, number))
        return grads, weight, jax.tree.map(lambda value: value * weight, metrics)

    parts = (jnp.arange(config.accumulate), jax.tree.map(cut, batch))
    shapes = jax.eval_shape(contribution, *jax.tree.map(lambda leaf: leaf[0], parts))
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    sums, _ = jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, contribution(*part)), None), nothing, parts)
    grads, weight, metrics = sums
    return jax.tree.map(lambda leaf: leaf / weight, (grads, metrics))


def _cast(params: Tree, dtype: str) -> Tree:
    """Floating-point leaves in another dtype; cast where they lie, so that what is gathered is already small."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, params)
