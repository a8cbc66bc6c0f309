"""The interface between RL and an architecture: how images are conditioned, predicted, solved for and decoded."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Array, Float, PyTree, Real

from clvr_jax.diffusion import ForwardProcess
from clvr_jax.trees import Params

Predictor = Callable[[Float[Array, "b *d"], Real[Array, " b"]], Float[Array, "b *d"]]
"""(x_t (b, ...), timesteps (b,)) -> the prediction (b, ...) of a policy: a velocity, epsilon or v."""


@dataclass(frozen=True)
class DiffusionPolicy:
    """An architecture as a policy: pure functions of weights, traced inside the jitted steps.

    encode_conditions: (frozen, data) -> pytree of conditions, one row for each group.
    predictor: (weights, conditions, one row for each sample) -> prediction, with guidance as in the rollout.
    solve: (predictor, noise (b, ...)) -> clean latents (b, ...), by the ODE, without fresh noise.
    decode: (frozen, latents (b, ...)) -> images (b, h, w, 3) in [0, 1].
    latent_shape: of one sample. timesteps: (n,), at which `solve` evaluates the predictor. forward_process: of the
    architecture's training.
    """

    encode_conditions: Callable[[Params, PyTree], PyTree]
    predictor: Callable[[Params, PyTree], Predictor]
    solve: Callable[[Predictor, Float[Array, "b *d"]], Float[Array, "b *d"]]
    decode: Callable[[Params, Float[Array, "b *d"]], Float[Array, "b h w 3"]]
    latent_shape: tuple[int, ...]
    timesteps: Real[np.ndarray, " n"]
    forward_process: ForwardProcess
