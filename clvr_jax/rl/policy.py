"""The interface between RL and an architecture: how images are conditioned, predicted, solved for and decoded."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from clvr_jax.diffusion import ForwardProcess

Tree = Any

Predictor = Callable[[jax.Array, jax.Array], jax.Array]
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

    encode_conditions: Callable[[Tree, Any], Tree]
    predictor: Callable[[Tree, Tree], Predictor]
    solve: Callable[[Predictor, jax.Array], jax.Array]
    decode: Callable[[Tree, jax.Array], jax.Array]
    latent_shape: tuple[int, ...]
    timesteps: np.ndarray
    forward_process: ForwardProcess
