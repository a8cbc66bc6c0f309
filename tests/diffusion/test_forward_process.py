"""Forward processes: the prediction of what was added gives back the clean sample, as in diffusers."""

import dataclasses

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from clvr_jax.diffusion import FlowProcess, NoiseSchedule, VariancePreservingProcess

SHAPE = (6, 5, 4)
T_FLOW, T_INTEGER = jnp.array([0.1, 0.2, 0.5, 0.7, 0.9, 1.0]), jnp.array([5, 100, 300, 500, 700, 999])


@pytest.fixture
def samples():
    keys = jax.random.split(jax.random.key(3))
    return tuple(jax.random.normal(key, SHAPE) for key in keys)


def velocity(samples, schedule, t):
    """v = sqrt(alpha) noise - sqrt(1 - alpha) x0."""
    x0, noise = samples
    alpha = jnp.asarray(schedule.alphas_cumprod)[t][:, None, None]
    return jnp.sqrt(alpha) * noise - jnp.sqrt(1 - alpha) * x0


def test_the_velocity_of_a_flow_implies_the_clean_sample(samples):
    x0, noise = samples
    x_t = FlowProcess().corrupt(x0, noise, T_FLOW)
    np.testing.assert_allclose(x_t[-1], noise[-1])  # at t = 1 nothing of the sample is left
    np.testing.assert_allclose(FlowProcess().predict_x0(x_t, noise - x0, T_FLOW), x0, atol=2e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noise_or_v_implies_the_clean_sample(samples, prediction_type):
    x0, noise = samples
    schedule = dataclasses.replace(NoiseSchedule(), prediction_type=prediction_type)
    process = VariancePreservingProcess(schedule)
    truth = noise if prediction_type == "epsilon" else velocity(samples, schedule, T_INTEGER)
    x_t = process.corrupt(x0, noise, T_INTEGER)
    np.testing.assert_allclose(process.predict_x0(x_t, truth, T_INTEGER), x0, atol=2e-4)


def test_noise_is_added_as_diffusers_does(samples):
    x0, noise = samples
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    tensors = (torch.tensor(np.asarray(array)) for array in (x0, noise, T_INTEGER))
    expected = scheduler.add_noise(*tensors).numpy()
    found = VariancePreservingProcess(NoiseSchedule()).corrupt(x0, noise, T_INTEGER)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
