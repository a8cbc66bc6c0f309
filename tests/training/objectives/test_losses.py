"""Losses that take functions: what they ask the function for is what it is said to be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clvr_jax.diffusion import NoiseSchedule
from clvr_jax.training.objectives.losses import noise_prediction_loss


@pytest.mark.slow
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_whoever_knows_the_picture_predicts_noise_without_error(prediction_type):
    schedule = NoiseSchedule(prediction_type=prediction_type)
    x0 = np.random.default_rng(0).normal(size=(50, 3, 5, 2)).astype(np.float32)
    seen = []

    def predict(x, timesteps):
        seen.append(np.asarray(timesteps))
        alpha = jnp.asarray(schedule.alphas_cumprod)[timesteps][:, None, None, None]
        noise = (x - jnp.sqrt(alpha) * x0) / jnp.sqrt(1 - alpha)
        return noise if prediction_type == "epsilon" else jnp.sqrt(alpha) * noise - jnp.sqrt(1 - alpha) * x0

    assert noise_prediction_loss(predict, x0, jax.random.key(0), schedule) < 1e-6
    assert noise_prediction_loss(lambda x, t: 0 * x, x0, jax.random.key(0), schedule) == pytest.approx(1, abs=0.1)
    (timesteps,) = seen
    assert timesteps.dtype == np.int32
    # One in each fiftieth of the schedule.
    assert np.array_equal(timesteps // 20, np.arange(50))
