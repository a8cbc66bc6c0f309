"""What a family of drawing models is to Proxy Prompt RL, and how a policy learns from its samples: two methods.

DiffusionNFT draws without fresh noise and learns from clean samples, noised anew. Flow-GRPO draws at random and learns
from the steps that were taken.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from typing_extensions import override

from clvr_jax.diffusion import FlowProcess, ForwardProcess
from clvr_jax.errors import UsageError
from clvr_jax.rl.algorithms.diffusion_nft import NFTConfig, Policy, nft_loss, old_decay, optimality
from clvr_jax.rl.algorithms.flow_grpo import GRPOConfig, grpo_loss, sde_path

Tree = Any


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A family of drawing models as PPRL sees it; all functions are traced.

    condition: (frozen, data) -> pytree of what conditions the drawing, one row for each group.
    policy: (weights, the same repeated for every sample) -> prediction, guided as in the roll-out.
    solve: (policy, noise (b, ...)) -> clean latents (b, ...), without fresh noise.
    decode: (frozen, latents) -> pictures (b, h, w, 3) in [0, 1].
    shape: of one sample's latents. timesteps: (n,) at which `solve` evaluates the policy. forward_process: of this
    family.
    """

    condition: Callable[[Tree, Any], Tree]
    policy: Callable[[Tree, Tree], Policy]
    solve: Callable[[Policy, jax.Array], jax.Array]
    decode: Callable[[Tree, jax.Array], jax.Array]
    shape: tuple[int, ...]
    timesteps: np.ndarray
    forward_process: ForwardProcess


class Method(Protocol):
    """How samples are drawn, and what they teach.

    shape: of what is kept of one sample. places: at how many timesteps it can be learned from. metrics: names of those
    that `loss` returns.
    """

    shape: tuple[int, ...]
    places: int
    metrics: tuple[str, ...]

    def draw(self, policy: Policy, noise: jax.Array, key_b: jax.Array) -> jax.Array:
        """(b, *shape), what is kept of samples drawn from noise (b, ...)."""
        ...

    def clean(self, kept: jax.Array) -> jax.Array:
        """The clean latents (b, ...) of what is kept."""
        ...

    def merits(self, advantages: ArrayLike) -> jax.Array:
        """What the loss takes for each sample, of its advantage."""
        ...

    def loss(
        self,
        policies: tuple[Policy, Policy, Policy],
        kept: jax.Array,
        merits_b: jax.Array,
        counts_b: jax.Array,
        place_b: jax.Array,
        key_b: jax.Array,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns loss and metrics as `nft_loss` does.

        policies are theta, old and reference; place_b is in range(places).
        """
        ...

    def old_decay(self, step: ArrayLike) -> ArrayLike:
        """d of old <- d old + (1 - d) theta after an epoch, `step` optimizer steps into the run."""
        ...


class DiffusionNFT(Method):
    """See `diffusion_nft`."""

    metrics = ("policy_loss", "kl", "norm_ratio")

    def __init__(self, backbone: Backbone, config: NFTConfig, decay: Literal["linear", "delayed"]):
        self._backbone, self._config, self._decay = backbone, config, decay
        self.shape, self.places = backbone.shape, len(backbone.timesteps)

    @override
    def draw(self, policy: Policy, noise: jax.Array, key_b: jax.Array) -> jax.Array:
        return self._backbone.solve(policy, noise)

    @override
    def clean(self, kept: jax.Array) -> jax.Array:
        return kept

    @override
    def merits(self, advantages: ArrayLike) -> jax.Array:
        return optimality(advantages, self._config.advantage_clip)

    @override
    def loss(
        self,
        policies: tuple[Policy, Policy, Policy],
        kept: jax.Array,
        merits_b: jax.Array,
        counts_b: jax.Array,
        place_b: jax.Array,
        key_b: jax.Array,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        t_b = jnp.asarray(self._backbone.timesteps)[place_b]
        return nft_loss(*policies, kept, merits_b, counts_b, t_b, key_b, self._backbone.forward_process, self._config)

    @override
    def old_decay(self, step: ArrayLike) -> ArrayLike:
        return old_decay(step, self._decay)


class FlowGRPO(Method):
    """See `flow_grpo`; what is kept of a sample is its path. Only for velocities."""

    metrics = ("policy_loss", "kl", "norm_ratio", "clipped")

    def __init__(self, backbone: Backbone, config: GRPOConfig):
        if not isinstance(backbone.forward_process, FlowProcess):
            raise UsageError("Flow-GRPO: this model predicts no velocity; train it with --train.method nft")
        if len(backbone.timesteps) < 2:
            raise UsageError("Flow-GRPO: learns from all steps of the roll-out but the last; it needs two or more")
        self._config, self._sigmas = config, np.append(backbone.timesteps, 0).astype(np.float32)
        self.shape, self.places = (len(self._sigmas), *backbone.shape), len(backbone.timesteps) - 1

    @override
    def draw(self, policy: Policy, noise: jax.Array, key_b: jax.Array) -> jax.Array:
        sigmas = jnp.asarray(self._sigmas)
        return sde_path(lambda x, sigma: policy(x, jnp.full(len(x), sigma)), noise, sigmas, self._config.eta, key_b)

    @override
    def clean(self, kept: jax.Array) -> jax.Array:
        return kept[:, -1]

    @override
    def merits(self, advantages: ArrayLike) -> jax.Array:
        return jnp.clip(jnp.asarray(advantages), -self._config.advantage_clip, self._config.advantage_clip)

    @override
    def loss(
        self,
        policies: tuple[Policy, Policy, Policy],
        kept: jax.Array,
        merits_b: jax.Array,
        counts_b: jax.Array,
        place_b: jax.Array,
        key_b: jax.Array,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        rows, sigmas = jnp.arange(len(kept)), jnp.asarray(self._sigmas)
        x_t, x_next = kept[rows, place_b], kept[rows, place_b + 1]
        levels = sigmas[place_b], sigmas[place_b + 1]
        return grpo_loss(*policies, x_t, x_next, merits_b, counts_b, *levels, self._config)

    @override
    def old_decay(self, step: ArrayLike) -> ArrayLike:
        """Returns 0: the policy that samples is the one that is trained."""
        return 0.0
