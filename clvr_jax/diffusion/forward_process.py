"""Forward processes: how noise is added to a clean sample, and which clean sample a prediction implies.

Source: flow matching (arXiv 2210.02747); DDPM (arXiv 2006.11239), v-prediction (arXiv 2202.00512).
"""

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real
from typing_extensions import override

from clvr_jax.diffusion.noise_schedule import NoiseSchedule


class ForwardProcess(Protocol):
    """The forward process of an architecture: q(x_t | x_0), and the inverse of its prediction."""

    def corrupt(
        self, x0: Float[Array, "b *d"], noise: Float[Array, "b *d"], t: Real[Array, " b"]
    ) -> Float[Array, "b *d"]:
        """Adds noise to clean samples.

        Args:
          x0: (b, ...) clean samples.
          noise: (b, ...) standard normal.
          t: (b,) timesteps of the process.
        Returns: x_t, (b, ...).
        """
        ...

    def predict_x0(
        self, x_t: Float[Array, "b *d"], prediction: Float[Array, "b *d"], t: Real[Array, " b"]
    ) -> Float[Array, "b *d"]:
        """Returns the clean samples (b, ...) that the network's predictions at x_t imply; t is (b,)."""
        ...


@dataclass(frozen=True)
class FlowProcess(ForwardProcess):
    """x_t = (1 - t) x0 + t noise with t in [0, 1]; the prediction is the velocity noise - x0 (FLUX.2)."""

    @override
    def corrupt(
        self, x0: Float[Array, "b *d"], noise: Float[Array, "b *d"], t: Real[Array, " b"]
    ) -> Float[Array, "b *d"]:
        level = append_dims(t, x0)
        return (1 - level) * x0 + level * noise

    @override
    def predict_x0(
        self, x_t: Float[Array, "b *d"], prediction: Float[Array, "b *d"], t: Real[Array, " b"]
    ) -> Float[Array, "b *d"]:
        return x_t - append_dims(t, x_t) * prediction


@dataclass(frozen=True)
class VariancePreservingProcess(ForwardProcess):
    """x_t = sqrt(alpha) x0 + sqrt(1 - alpha) noise; the prediction is the schedule's, epsilon or v (SDXL, SD 1.5).

    Timesteps are integers below `schedule.num_train_timesteps`.
    """

    schedule: NoiseSchedule

    @override
    def corrupt(
        self, x0: Float[Array, "b *d"], noise: Float[Array, "b *d"], t: Real[Array, " b"]
    ) -> Float[Array, "b *d"]:
        signal, sigma = self._levels(t, x0)
        return signal * x0 + sigma * noise

    @override
    def predict_x0(
        self, x_t: Float[Array, "b *d"], prediction: Float[Array, "b *d"], t: Real[Array, " b"]
    ) -> Float[Array, "b *d"]:
        signal, sigma = self._levels(t, x_t)
        if self.schedule.prediction_type == "epsilon":
            return (x_t - sigma * prediction) / signal
        return signal * x_t - sigma * prediction

    def _levels(self, t: jax.Array, like: jax.Array) -> tuple[jax.Array, jax.Array]:
        alpha = append_dims(jnp.asarray(self.schedule.alphas_cumprod, like.dtype)[t], like)
        return jnp.sqrt(alpha), jnp.sqrt(1 - alpha)


def append_dims(values_b: Real[Array, " b"], like: Float[Array, "b *d"]) -> Float[Array, "b *ones"]:
    """Returns (b,) values with as many axes as `like`, (b, 1, ...), in its dtype."""
    return values_b.reshape(-1, *[1] * (like.ndim - 1)).astype(like.dtype)
