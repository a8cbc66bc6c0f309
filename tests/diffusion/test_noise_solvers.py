import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from clvr_jax.diffusion import NoiseSchedule, ddim_solve, euler_noise_solve, lcm_solve
from clvr_jax.errors import ClvrError, UsageError

TOLERANCE = 1e-5
SHAPE = (2, 3, 5, 4)
SDXL = {
    **{"_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.19.0.dev0", "beta_end": 0.012},
    **{"beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False, "interpolation_type": "linear"},
    **{"num_train_timesteps": 1000, "prediction_type": "epsilon", "sample_max_value": 1.0, "set_alpha_to_one": False},
    **{"skip_prk_steps": True, "steps_offset": 1, "timestep_spacing": "leading", "trained_betas": None},
    "use_karras_sigmas": False,
}
SPACINGS = ["leading", "trailing", "linspace"]
EULER, DDIM, LCM = "EulerDiscreteScheduler", "DDIMScheduler", "LCMScheduler"
SOLVERS = {EULER: euler_noise_solve, DDIM: ddim_solve}


def make_pair(scheduler, **fields):
    config = {**SDXL, **fields}
    return NoiseSchedule.from_config(config, scheduler), getattr(diffusers, scheduler).from_config(config)


def timesteps_of(schedule, scheduler, steps):
    of = {EULER: schedule.euler_timesteps, DDIM: schedule.ddim_timesteps, LCM: schedule.lcm_timesteps}
    return of[scheduler](steps)


def predict(x, timestep, library):
    return library.tanh(0.7 * x + 0.3 * library.sin(0.01 * timestep + x)) - 0.1 * x


def run_theirs(reference, noise, steps, step_noise=(), monkeypatch=None):
    reference.set_timesteps(steps)
    fresh = iter(step_noise)
    if monkeypatch:
        module = diffusers.schedulers.scheduling_lcm
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.tensor(next(fresh)))
    x = torch.tensor(noise) * reference.init_noise_sigma
    for timestep in reference.timesteps:
        out = predict(reference.scale_model_input(x, timestep), timestep.float(), torch)
        x = reference.step(out, timestep, x).prev_sample
    assert next(fresh, None) is None
    return x.numpy()


def run_ours(solve, schedule, noise, timesteps, **options):
    def model(x, timestep):
        return predict(x, timestep.astype(jnp.float32), jnp)

    return jax.jit(lambda noise, timesteps: solve(model, noise, schedule, timesteps, **options))(noise, timesteps)


def relative_error(ours, theirs):
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


def draw(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "linear"])
def test_alphas_and_sigmas_are_those_of_diffusers(beta_schedule):
    schedule, reference = make_pair(EULER, beta_schedule=beta_schedule)
    np.testing.assert_allclose(schedule.alphas_cumprod, reference.alphas_cumprod.numpy(), rtol=1e-6)
    np.testing.assert_allclose(schedule.sigmas[::-1], reference.sigmas[:-1].numpy(), rtol=1e-6)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("scheduler", [EULER, DDIM])
def test_timesteps_are_those_of_diffusers(scheduler, spacing):
    schedule, reference = make_pair(scheduler, timestep_spacing=spacing)
    for steps in (*range(1, 61), 100, 333, 999):
        reference.set_timesteps(steps)
        assert np.array_equal(timesteps_of(schedule, scheduler, steps), reference.timesteps.numpy()), steps


def test_lcm_timesteps_are_those_of_diffusers():
    for original in (50, 100, 30):
        schedule, reference = make_pair(LCM, original_inference_steps=original)
        for steps in range(1, original + 1):
            reference.set_timesteps(steps)
            assert np.array_equal(schedule.lcm_timesteps(steps), reference.timesteps.numpy())


@pytest.mark.parametrize("steps", [1, 4, 7, 30])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("scheduler", [EULER, DDIM])
def test_euler_and_ddim_are_those_of_diffusers(scheduler, spacing, prediction_type, steps):
    schedule, reference = make_pair(
        scheduler, timestep_spacing=spacing, prediction_type=prediction_type, set_alpha_to_one=steps == 7
    )
    noise = draw(*SHAPE)
    ours = run_ours(SOLVERS[scheduler], schedule, noise, timesteps_of(schedule, scheduler, steps))
    assert relative_error(ours, run_theirs(reference, noise, steps)) < TOLERANCE


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_lcm_is_that_of_diffusers(monkeypatch, prediction_type, steps):
    schedule, reference = make_pair(LCM, prediction_type=prediction_type)
    noise, fresh = draw(*SHAPE), draw(steps - 1, *SHAPE)
    ours = run_ours(lcm_solve, schedule, noise, schedule.lcm_timesteps(steps), step_noise=fresh)
    assert relative_error(ours, run_theirs(reference, noise, steps, fresh, monkeypatch)) < TOLERANCE


def test_lcm_draws_its_noise_from_the_key():
    schedule, noise, key = NoiseSchedule(), draw(*SHAPE), jax.random.key(3)
    timesteps = schedule.lcm_timesteps(3)
    given = run_ours(lcm_solve, schedule, noise, timesteps, step_noise=jax.random.normal(key, (2, *SHAPE)))
    assert relative_error(run_ours(lcm_solve, schedule, noise, timesteps, key=key), np.asarray(given)) < TOLERANCE
    other = run_ours(lcm_solve, schedule, noise, timesteps, key=jax.random.key(4))
    assert relative_error(other, np.asarray(given)) > 0.01


def test_a_silent_config_means_what_the_class_that_reads_it_takes():
    silent = {key: SDXL[key] for key in ("beta_start", "beta_end", "beta_schedule", "steps_offset", "clip_sample")}
    assert NoiseSchedule.from_config(silent, EULER).timestep_spacing == "linspace"
    assert NoiseSchedule.from_config(silent, DDIM).timestep_spacing == "leading"
    assert not NoiseSchedule.from_config({**silent, "_class_name": "PNDMScheduler"}).set_alpha_to_one


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule"),
        ({"prediction_type": "sample"}, "prediction_type"),
        ({"timestep_spacing": "even"}, "timestep_spacing"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"beta_start": 0.0}, "beta_start"),
        ({"original_inference_steps": 0}, "original_inference_steps"),
        ({"shift": 3.0}, "shift"),
        ({"_class_name": "UniPCMultistepScheduler"}, "UniPC"),
    ],
)
def test_schedules_we_cannot_run_are_refused(fields, message):
    with pytest.raises(ClvrError, match=message):
        NoiseSchedule.from_config({**SDXL, **fields})


def test_wrong_calls_are_refused():
    schedule = NoiseSchedule.from_config(SDXL)
    for steps in (0, 1000, 1001):
        with pytest.raises(UsageError, match="steps"):
            schedule.euler_timesteps(steps)
    with pytest.raises(UsageError, match="original_inference_steps"):
        schedule.lcm_timesteps(51)
    noise = draw(*SHAPE)
    with pytest.raises(UsageError, match="exactly one"):
        run_ours(lcm_solve, schedule, noise, schedule.lcm_timesteps(2))
    with pytest.raises(UsageError, match="must be"):
        run_ours(lcm_solve, schedule, noise, schedule.lcm_timesteps(2), step_noise=draw(2, *SHAPE))
