"""One optimizer step as a pure function of state, frozen weights and batch, laid out over a mesh."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from clvr_jax.programs import StoredFunction
from clvr_jax.sharding import MeshLayout, with_shardings
from clvr_jax.trees import Batch, Params

Metrics = dict[str, jax.Array]
Loss = Callable[[Params, Params, Batch, jax.Array], tuple[jax.Array, Metrics]]
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

    step: jax.Array
    params: Params
    ema: Params
    opt_state: PyTree
    skipped: jax.Array
    skipped_in_a_row: jax.Array

    @property
    def iteration(self) -> Int[Array, ""]:
        """Number of finished iterations of the training loop."""
        return self.step

    @classmethod
    def create(cls, params: Params, optimizer: optax.GradientTransformation, layout: MeshLayout | None = None) -> Self:
        """Returns the state of step 0, sharded over the mesh; the EMA starts at the parameters.

        The parameters are copied, since a step takes its state's memory.
        """

        def start(params: Params) -> PyTree:
            return cls(**cls._initial(params, optimizer))

        if layout is None:
            state: Self = start(params)
            return state
        params = jax.device_put(params, layout.parameters(params))
        shardings = jax.eval_shape(start, params).shardings(layout)
        state = StoredFunction[Self](start, out_shardings=shardings, trace=True)(params)
        return state

    @classmethod
    def abstract(cls, params: Params, optimizer: optax.GradientTransformation, layout: MeshLayout) -> Self:
        """Returns shapes, dtypes and shardings of the state that `create` returns; shapes are enough."""
        state: Self = jax.eval_shape(lambda params: cls(**cls._initial(params, optimizer)), params)
        placed: Self = with_shardings(state, state.shardings(layout))
        return placed

    @classmethod
    def _initial(cls, params: Params, optimizer: optax.GradientTransformation) -> dict[str, PyTree]:
        """Returns all fields at step 0."""
        params, ema = (jax.tree.map(jnp.copy, params) for _ in range(2))
        counters = {name: jnp.int32(0) for name in ("step", "skipped", "skipped_in_a_row")}
        return {**counters, "params": params, "ema": ema, "opt_state": optimizer.init(params)}

    def shardings(self, layout: MeshLayout) -> Self:
        """Returns the sharding of every part; shapes are enough."""
        replicated = layout.replicated
        shardings: dict[str, PyTree] = {
            "step": replicated,
            "params": layout.parameters(self.params),
            "ema": layout.parameters(self.ema),
            "opt_state": layout.optimizer_state(self.opt_state, self.params),
            "skipped": replicated,
            "skipped_in_a_row": replicated,
        }
        return dataclasses.replace(self, **shardings)


State = TypeVar("State", bound=TrainState)


class GradAccumulator(NamedTuple):
    """Sums over the rows of microbatches: gradients, metrics, and the weight of the rows (their number, say)."""

    grads: Params
    metrics: Metrics
    weight: jax.Array

    def add(self, other: "GradAccumulator") -> "GradAccumulator":
        """Returns the sums with those of another microbatch added."""
        found: GradAccumulator = jax.tree.map(jnp.add, self, other)
        return found

    def mean(self) -> tuple[Params, Metrics]:
        """Returns gradients and metrics of the mean over all rows."""
        grads, metrics = (jax.tree.map(lambda leaf: leaf / self.weight, tree) for tree in (self.grads, self.metrics))
        return grads, metrics


def apply_gradients(
    state: State, grads: Params, loss: Float[Array, ""], optimizer: optax.GradientTransformation, ema_decay: float
) -> tuple[State, Float[Array, ""]]:
    """Takes one optimizer step; one whose loss or gradients are not finite changes only the counters.

    Args:
      state: before the step.
      grads: of the parameters. loss: scalar that they are of.
      optimizer: of the run.
      ema_decay: of the EMA of the parameters; it is smaller in the first steps.
    Returns: the state after the step, and the global norm of the gradients.
    """
    norm = optax.global_norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    # In the first steps the EMA forgets the initial parameters quickly, later it has its full memory.
    decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
    ema = jax.tree.map(lambda old, new: (decay * old + (1 - decay) * new).astype(old.dtype), state.ema, params)
    is_finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    old = (state.params, state.ema, state.opt_state)
    new = (params, ema, opt_state)
    params, ema, opt_state = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), new, old)
    next_state = dataclasses.replace(
        state,
        step=state.step + 1,
        params=params,
        ema=ema,
        opt_state=opt_state,
        skipped=state.skipped + ~is_finite,
        skipped_in_a_row=jnp.where(is_finite, 0, state.skipped_in_a_row + 1),
    )
    return next_state, norm


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """The part of a run's configuration that one training step depends on."""

    gradient_accumulation_steps: int = 1
    """Number of microbatches that a batch is split into, for batches whose activations do not fit."""
    compute_dtype: str = "float32"
    """Parameters are cast to this dtype for the loss; parameters, EMA and optimizer state keep theirs."""
    ema_decay: float = 0.995
    """Decay of the exponential moving average (EMA) of the parameters; it is smaller in the first steps."""
    seed: int = 0
    """Seed of all random numbers."""


def make_train_step(
    loss: Loss, optimizer: optax.GradientTransformation, config: StepConfig, layout: MeshLayout | None = None
) -> Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]:
    """Returns the jitted function (state, frozen, batch) -> (state, metrics), which donates the old state.

    A step whose loss or gradients are not finite leaves everything but the counters as it was.
    """

    def train_step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        grads, metrics = _mean_gradients(loss, config, state.params, frozen, batch, key)
        next_state, norm = apply_gradients(state, grads, metrics["loss"], optimizer, config.ema_decay)
        metrics = {**metrics, "grad_norm": norm, "skipped": next_state.skipped}
        if layout is not None:
            next_state = jax.lax.with_sharding_constraint(next_state, next_state.shardings(layout))
        return next_state, metrics

    return StoredFunction(train_step, donate_argnums=0, trace=True)


def _mean_gradients(
    loss: Loss, config: StepConfig, params: Params, frozen: Params, batch: Batch, key: jax.Array
) -> tuple[Params, Metrics]:
    """Returns gradients and metrics of the mean over the whole batch, which is split into microbatches if asked for."""

    def weighted_loss(params: Params, rows: Batch, key: jax.Array) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
        mean, metrics = loss(_cast(params, config.compute_dtype), frozen, rows, key)
        weight = jnp.asarray(metrics.pop(WEIGHT, 1.0), jnp.float32)
        return mean.astype(jnp.float32) * weight, (weight, {**metrics, "loss": mean})

    gradient = jax.value_and_grad(weighted_loss, has_aux=True)
    if config.gradient_accumulation_steps == 1:
        (_, (weight, metrics)), grads = gradient(params, batch, key)
        return jax.tree.map(lambda leaf: leaf / weight, grads), metrics

    def split(leaf: jax.Array) -> jax.Array:
        # Every microbatch takes some rows of every device, so that no row is sent to another.
        return leaf.reshape(-1, config.gradient_accumulation_steps, *leaf.shape[1:]).swapaxes(0, 1)

    def loss_and_grads(index: jax.Array, rows: Batch) -> GradAccumulator:
        (_, (weight, metrics)), grads = gradient(params, rows, jax.random.fold_in(key, index))
        return GradAccumulator(grads, jax.tree.map(lambda value: value * weight, metrics), weight)

    microbatches = (jnp.arange(config.gradient_accumulation_steps), jax.tree.map(split, batch))
    shapes = jax.eval_shape(loss_and_grads, *jax.tree.map(lambda leaf: leaf[0], microbatches))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    sums, _ = jax.lax.scan(lambda sums, rows: (sums.add(loss_and_grads(*rows)), None), zeros, microbatches)
    total: GradAccumulator = sums
    return total.mean()


def _cast(params: Params, dtype: str) -> Params:
    """Casts floating-point leaves, which stay sharded: what is gathered from other devices is already small."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, params)
