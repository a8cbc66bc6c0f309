"""The programs of Proxy Prompt RL as pure functions of trees: a roll-out, what a call teaches, and a step of it.

The policies are three trees of weights on one base: `params`, which trains; `old`, which samples; the base itself, the
reference. Where they are LoRA trees they are multiplied out inside each program.

Source: DiffusionNFT (arXiv 2509.16117) as PPRL (arXiv 2605.14876) uses it; Flow-GRPO (arXiv 2505.05470).
"""

import dataclasses
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clvr_jax.errors import UsageError
from clvr_jax.merging.deltas import apply_delta
from clvr_jax.models.lora import init_lora
from clvr_jax.sharding import MeshConfig, MeshLayout, with_logical_constraint
from clvr_jax.training.diffusion_nft import NFTConfig, normal
from clvr_jax.training.flow_grpo import GRPOConfig
from clvr_jax.training.pprl_methods import Backbone, DiffusionNFT, FlowGRPO, Method

Tree = Any

_NOISE, _TIMES, _UPDATE, _PATH = range(4)
"""What random numbers are for."""


@dataclasses.dataclass(frozen=True)
class PPRLConfig:
    """Configuration of a PPRL run; the defaults are the paper's, and DiffusionNFT's where the paper gives none."""

    epochs: int = 100
    """Train for this many epochs of sampling and learning."""
    groups: int = 32
    """Sample images for this many trajectory steps in each epoch, one group of images for each."""
    group: int = 16
    """Number of images sampled for each trajectory step, which are compared with each other."""
    groups_per_call: int = 1
    """Number of groups of one shape that are computed in one call; every device needs at least one of their images."""
    updates: int = 1
    """Number of optimizer steps in each epoch; each takes an equal share of the groups."""
    timesteps: int = 4
    """Number of timesteps of the sampler at which each image is learned from; all of them are used if there are fewer.
    """
    spread: Literal["group", "epoch"] = "group"
    """Divide advantages by the standard deviation of the rewards in the group, or of all rewards in the epoch."""
    method: Literal["nft", "grpo"] = "nft"
    """RL algorithm: nft is DiffusionNFT, and grpo is Flow-GRPO, a baseline."""
    nft: NFTConfig = NFTConfig()
    """Configuration of DiffusionNFT, used with method nft."""
    grpo: GRPOConfig = GRPOConfig()
    """Configuration of Flow-GRPO, used with method grpo."""
    old_decay: Literal["linear", "delayed"] = "linear"
    """How the old policy, which samples, follows the trained one. linear: its decay grows by 0.001 a step up to 0.5.
    delayed: it is a copy for 75 steps, then its decay grows up to 0.999. Flow-GRPO always samples from the trained
    policy."""
    ema_decay: float = 0.9
    """Decay of the exponential moving average (EMA) of the parameters, which is what is evaluated and exported."""
    lora_rank: int = 128
    """Rank of the LoRA that is trained; 0 trains all parameters."""
    lora_alpha: float = 256.0
    """Scale of the LoRA: the weights change by alpha / rank times the product of its two matrices."""
    lora_targets: tuple[str, ...] = ("kernel",)
    """Adapt the kernels in whose path one of these regular expressions is found."""
    learning_rate: float = 1e-4
    """Learning rate of AdamW, which is constant."""
    b1: float = 0.9
    """Decay rate of AdamW's first moment."""
    b2: float = 0.999
    """Decay rate of AdamW's second moment."""
    weight_decay: float = 1e-4
    """Decoupled weight decay of AdamW; 0 switches it off."""
    clip_norm: float = 1.0
    """Rescale gradients whose global norm is above this value."""
    bad_updates: int = 8
    """End the run after this many optimizer steps in a row whose loss or gradients are not finite; fewer are skipped
    and counted."""
    grid_every: int = 10
    """Write a grid of sampled images every so many epochs; 0 writes none."""
    seed: int = 0
    """Seed of all random numbers; the same seed on the same number of devices gives the same run."""
    mesh: MeshConfig = MeshConfig()
    """Configuration of the device mesh."""
    save_minutes: float = 10.0
    """Save a checkpoint at the end of an epoch if so many minutes have passed since the last one."""
    keep: int = 2
    """Keep this many of the newest checkpoints."""
    wandb: str = ""
    """Log to this project of Weights & Biases as well; nothing is logged there if it is empty."""

    def __post_init__(self) -> None:
        counts = ("epochs", "groups", "groups_per_call", "updates", "timesteps", "bad_updates", "keep")
        if low := [name for name in counts if getattr(self, name) < 1]:
            raise UsageError(f"PPRLConfig: {', '.join(low)} must be at least 1")
        if self.group < 2:
            raise UsageError(
                f"PPRLConfig: group is {self.group}; a picture is judged by others of its group, so 2 or more"
            )
        if self.lora_rank < 0 or self.grid_every < 0 or not 0 <= self.seed < 2**31:
            raise UsageError("PPRLConfig: lora_rank, grid_every and seed must be at least 0, seed below 2^31")
        if not 0 <= self.ema_decay < 1:
            raise UsageError(f"PPRLConfig: ema_decay must lie in [0, 1), got {self.ema_decay}")

    @property
    def rows(self) -> int:
        """Samples of one call."""
        return self.groups_per_call * self.group

    @property
    def begun(self) -> dict[str, Any]:
        """What a checkpoint must have been made with."""
        return {"method": self.method, "lora_rank": self.lora_rank, "lora_alpha": self.lora_alpha}

    def learner(self, backbone: Backbone) -> Method:
        """How a family of models is trained."""
        if self.method == "grpo":
            return FlowGRPO(backbone, self.grpo)
        return DiffusionNFT(backbone, self.nft, self.old_decay)

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW behind a clip of the global norm."""
        rule = optax.adamw(self.learning_rate, self.b1, self.b2, weight_decay=self.weight_decay)
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), rule)

    def start(self, base: Tree) -> Tree:
        """What trains, as it starts: a LoRA tree that changes nothing, or float32 copies of all parameters.

        base: shapes are enough for a LoRA.
        """
        if self.lora_rank:
            key = jax.random.key(self.seed)
            return init_lora(base, self.lora_targets, self.lora_rank, self.lora_alpha, key)
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), base)

    def weights(self, base: Tree, trained: Tree) -> Tree:
        """The weights of a policy, in the base's dtypes."""
        if self.lora_rank:
            return apply_delta(base, trained)
        return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), trained, base)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["epoch", "step", "params", "old", "ema", "opt_state", "skipped", "skipped_in_a_row"],
    meta_fields=[],
)
@dataclasses.dataclass
class PPRLState:
    """Everything a run continues from. epoch: finished ones. step: optimizer steps. skipped: of these, how many changed
    nothing because something was not finite."""

    epoch: Any
    step: Any
    params: Tree
    old: Tree
    ema: Tree
    opt_state: Tree
    skipped: Any
    skipped_in_a_row: Any

    @classmethod
    def create(cls, params: Tree, optimizer: optax.GradientTransformation, layout: MeshLayout) -> "PPRLState":
        """Epoch 0, laid out over the mesh: all policies are the same."""

        def start(params: Tree) -> "PPRLState":
            params, old, ema = (jax.tree.map(jnp.copy, params) for _ in range(3))
            zero = jnp.int32(0)
            return PPRLState(zero, zero, params, old, ema, optimizer.init(params), zero, zero)

        params = jax.device_put(params, layout.parameters(params))
        return jax.jit(start, out_shardings=state_shardings(jax.eval_shape(start, params), layout))(params)


def state_shardings(state: PPRLState, layout: MeshLayout) -> PPRLState:
    """Where each part of a state (shapes are enough) lies."""
    whole = layout.replicated
    params, old, ema = (layout.parameters(tree) for tree in (state.params, state.old, state.ema))
    opt_state = layout.optimizer_state(state.opt_state, state.params)
    return PPRLState(whole, whole, params, old, ema, opt_state, whole, whole)


class Drawn(NamedTuple):
    """Of a call: kept, (b, ...), what is learned from, see `Method.draw`; pictures (b, h, w, 3) uint8; conditions, one
    row for each group."""

    kept: jax.Array
    pictures: jax.Array
    conditions: Tree


class Sums(NamedTuple):
    """Over samples that count: gradients, metrics, and the number of them."""

    grads: Tree
    metrics: dict[str, jax.Array]
    weight: jax.Array


def rollout(backbone: Backbone, config: PPRLConfig, base: Tree, old: Tree, frozen: Tree, batch: Any) -> Drawn:
    """Draws `group` pictures for each group of a call with the old policy.

    batch: data, see `Backbone.condition`; number (g,) of each group's step; seed and epoch, scalars. A sample's noise
      depends on seed, epoch, step and its place in the group alone.
    """
    conditions = backbone.condition(frozen, batch["data"])
    policy = backbone.policy(config.weights(base, old), _for_samples(conditions, config.group))
    noise = normal(_sample_keys(config, batch, _NOISE), (config.rows, *backbone.shape))
    learner = config.learner(backbone)
    kept = learner.draw(policy, _cut(noise), _sample_keys(config, batch, _PATH))
    pictures = jnp.round(255 * backbone.decode(frozen, learner.clean(kept))).astype(jnp.uint8)
    return Drawn(kept, pictures, conditions)


def contribution(backbone: Backbone, config: PPRLConfig, params: Tree, base: Tree, old: Tree, batch: Any) -> Sums:
    """What the samples of a call teach at one of their timesteps.

    batch: number, seed and epoch as for `rollout`; what it kept, and its conditions; merits and counts (b,), see
      `Method.loss`; draw, a scalar: the how-manieth of the sample's timesteps, which are a random order of the
      roll-out's own.
    """
    learner = config.learner(backbone)
    conditions = _for_samples(batch["conditions"], config.group)
    orders = jax.vmap(lambda key: jax.random.permutation(key, learner.places))(_sample_keys(config, batch, _TIMES))
    keys = _sample_keys(config, batch, _UPDATE, batch["draw"])
    before = backbone.policy(config.weights(base, old), conditions)
    reference = backbone.policy(base, conditions)

    def total(params: Tree) -> tuple[jax.Array, tuple[jax.Array, dict[str, jax.Array]]]:
        policies = backbone.policy(config.weights(base, params), conditions), before, reference
        merits, counts, places = batch["merits"], batch["counts"], orders[:, batch["draw"]]
        loss, metrics = learner.loss(policies, batch["kept"], merits, counts, places, keys)
        weight = metrics.pop("weight")
        return loss * weight, (weight, {**metrics, "loss": loss})

    grads, (weight, metrics) = jax.grad(total, has_aux=True)(params)
    return Sums(grads, {name: value * weight for name, value in metrics.items()}, weight)


def updated(config: PPRLConfig, state: PPRLState, sums: Sums) -> tuple[PPRLState, dict[str, jax.Array]]:
    """One optimizer step on the mean over the samples of `sums`; one that is not finite changes only the counters."""
    grads, metrics = (jax.tree.map(lambda leaf: leaf / sums.weight, tree) for tree in (sums.grads, sums.metrics))
    norm = optax.global_norm(grads)
    change, opt_state = config.optimizer().update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, change)
    decay = jnp.minimum((1 + state.step) / (10 + state.step), config.ema_decay)
    ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, params)
    is_good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    params, ema, opt_state = jax.tree.map(
        lambda new, old: jnp.where(is_good, new, old),
        (params, ema, opt_state),
        (state.params, state.ema, state.opt_state),
    )
    following = dataclasses.replace(
        state,
        step=state.step + 1,
        params=params,
        ema=ema,
        opt_state=opt_state,
        skipped=state.skipped + ~is_good,
        skipped_in_a_row=jnp.where(is_good, 0, state.skipped_in_a_row + 1),
    )
    return following, {**metrics, "grad_norm": norm}


def followed(learner: Method, state: PPRLState) -> PPRLState:
    """The end of an epoch: old <- d old + (1 - d) params."""
    decay = learner.old_decay(state.step)
    old = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.old, state.params)
    return dataclasses.replace(state, epoch=state.epoch + 1, old=old)


class Programs:
    """The functions above, compiled for a mesh: weights stay laid out as parameters, samples are cut by rows."""

    def __init__(self, backbone: Backbone, config: PPRLConfig, layout: MeshLayout):
        def added(params: Tree, base: Tree, old: Tree, sums: Sums, batch: Any) -> Sums:
            total = jax.tree.map(jnp.add, sums, contribution(backbone, config, params, base, old, batch))
            return total._replace(grads=jax.lax.with_sharding_constraint(total.grads, layout.parameters(params)))

        def stepped(state: PPRLState, sums: Sums) -> tuple[PPRLState, dict[str, jax.Array]]:
            following, metrics = updated(config, state, sums)
            return jax.lax.with_sharding_constraint(following, state_shardings(following, layout)), metrics

        self.learner = config.learner(backbone)
        self.rollout = jax.jit(partial(rollout, backbone, config))
        self.added = jax.jit(added, donate_argnums=3)
        self.updated = jax.jit(stepped, donate_argnums=0)
        self.followed = jax.jit(partial(followed, self.learner), donate_argnums=0)
        self._zeros = jax.jit(
            lambda params: jax.lax.with_sharding_constraint(
                jax.tree.map(jnp.zeros_like, params), layout.parameters(params)
            )
        )

    def nothing(self, params: Tree) -> Sums:
        """Sums over no samples."""
        zeros = {name: jnp.float32(0) for name in (*self.learner.metrics, "loss")}
        return Sums(self._zeros(params), zeros, jnp.float32(0))


def _for_samples(conditions: Tree, group: int) -> Tree:
    """The conditions of groups, repeated for their samples."""
    return jax.tree.map(lambda leaf: _cut(jnp.repeat(leaf, group, axis=0)), conditions)


def _cut(x: jax.Array) -> jax.Array:
    return with_logical_constraint(x, "batch", *[None] * (x.ndim - 1))


def _sample_keys(config: PPRLConfig, batch: Any, *purpose: Any) -> jax.Array:
    """(rows,) keys that depend on seed, epoch, purpose, the sample's step and its place in the group."""
    key = jax.random.fold_in(jax.random.key(batch["seed"]), batch["epoch"])
    for number in purpose:
        key = jax.random.fold_in(key, number)
    numbers = jnp.repeat(batch["number"], config.group)
    places = jnp.tile(jnp.arange(config.group), len(batch["number"]))
    return jax.vmap(lambda number, place: jax.random.fold_in(jax.random.fold_in(key, number), place))(numbers, places)
