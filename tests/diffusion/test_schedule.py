"""Noise levels of flows beside diffusers' scheduler, for every field of scheduler_config.json that is obeyed."""

import itertools

import diffusers
import numpy as np
import pytest

from clvr_jax.diffusion import KLEIN_SCHEDULE, FlowSchedule, empirical_mu, flow_sigmas
from clvr_jax.errors import UsageError


@pytest.mark.parametrize(
    ("dynamic", "kind", "terminal", "shift"),
    itertools.product((False, True), ("exponential", "linear"), (None, 0.1), (0.5, 1.0, 3.0)),
)
def test_noise_levels_are_those_of_diffusers(dynamic, kind, terminal, shift):
    fields = {"shift": shift, "use_dynamic_shifting": dynamic, "time_shift_type": kind, "shift_terminal": terminal}
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**fields)
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / 5, 5), mu=empirical_mu(64, 5))
    ours = FlowSchedule.from_config({**theirs.config, "_class_name": type(theirs).__name__})
    np.testing.assert_allclose(ours.sigmas(5, 64), theirs.sigmas.numpy(), rtol=0, atol=1.2e-7)
    assert FlowSchedule.from_config(ours.to_config()) == ours


def test_a_silent_file_has_the_defaults_of_diffusers():
    theirs = diffusers.FlowMatchEulerDiscreteScheduler()
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / 4, 4))
    ours = FlowSchedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler"})
    np.testing.assert_array_equal(ours.sigmas(4, 64), theirs.sigmas.numpy())


def test_the_published_schedule_is_what_recipes_use():
    np.testing.assert_array_equal(flow_sigmas(4, 4096), KLEIN_SCHEDULE.sigmas(4, 4096))
    np.testing.assert_allclose(flow_sigmas(4, 4096), [1, 0.9674, 0.9081, 0.7672, 0], atol=5e-5)


def test_one_step_has_no_terminal_noise_level():
    with pytest.raises(UsageError, match="one step"):
        FlowSchedule(shift_terminal=0.1).sigmas(1, 64)
