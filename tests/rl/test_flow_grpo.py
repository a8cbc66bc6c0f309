"""Flow-GRPO: its random roll-out is distributed as the flow is, and its gradient is the advantage-weighted score."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clvr_jax.diffusion import NoiseSchedule, VariancePreservingProcess, euler_solve
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.rl import FlowGRPO, fit
from clvr_jax.rl.algorithms.flow_grpo import GRPOConfig, grpo_loss, sample_path, sde_step
from tests.rl.pprl_toy import SIGMAS, changed, make_dataset, make_task, toy_policy

MEAN, SPREAD = 1.5, 0.4
T, NEXT_T = jnp.array([1.0, 0.8, 0.5, 0.2]), jnp.array([0.8, 0.5, 0.2, 0.1])


def gaussian_velocity(x, t):
    """E[noise - x0 | x_t] for x0 of a normal distribution."""
    spread = ((1 - t) * SPREAD) ** 2 + t**2
    return -MEAN + (t - (1 - t) * SPREAD**2) / spread * (x - (1 - t) * MEAN)


@pytest.mark.slow
@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
def test_the_random_roll_out_has_the_marginals_of_the_flow(eta):
    """Of a normal target, whose velocity is known: mean and deviation at two noise levels.

    Seed 0, 40,000 samples, 300 steps from the exact distribution at .95. The bound is 4.5 standard errors and, for the
    error of the steps themselves, .004; without the drift's correction the deviation at .2 is off by .06 to .44.
    """
    samples, sigmas = 40_000, np.linspace(0.95, 0.2, 301)
    keys = jax.random.split(jax.random.key(0))

    def moments(t):
        return (1 - t) * MEAN, np.hypot((1 - t) * SPREAD, t)

    mean, deviation = moments(0.95)
    start = mean + deviation * jax.random.normal(keys[0], (samples, 1))
    path = jax.jit(lambda x, key: sample_path(gaussian_velocity, x, jnp.asarray(sigmas), eta, key)[:, [150, 300], 0])
    flow = euler_solve(gaussian_velocity, start, jnp.asarray(sigmas))[:, 0]
    found = path(start, keys[1])
    for states, t in ((found[:, 0], sigmas[150]), (found[:, 1], sigmas[300]), (flow, sigmas[300])):
        mean, deviation = moments(t)
        error = deviation / np.sqrt(samples)
        assert abs(float(states.mean()) - mean) < 4.5 * error + 0.004
        assert abs(float(states.std()) - deviation) < 4.5 * error / np.sqrt(2) + 0.004
    # It is another way there: of its start it knows less than the flow does.
    assert np.corrcoef(start[:, 0], flow)[0, 1] > 0.999
    assert np.corrcoef(start[:, 0], found[:, 1])[0, 1] < 0.97


@pytest.mark.slow
def test_a_path_is_one_row_s_own_and_ends_without_noise():
    noise = jax.random.normal(jax.random.key(1), (3, 4, 6))
    keys = jax.random.split(jax.random.key(2), 3)

    def velocity(x, t):
        return 0.3 * x + t

    whole, alone = (
        sample_path(velocity, noise[rows], jnp.asarray(SIGMAS), 0.7, keys[rows])
        for rows in (np.arange(3), np.array([1]))
    )
    assert whole.shape == (3, 5, 4, 6)
    np.testing.assert_allclose(whole[1], alone[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(whole[:, 0], noise)
    last = whole[:, -2]
    np.testing.assert_allclose(whole[:, -1], last - SIGMAS[-2] * velocity(last, SIGMAS[-2]), rtol=1e-5, atol=1e-6)
    assert not np.allclose(whole[0, 1] - noise[0], -0.2 * velocity(noise[0], 1.0), atol=1e-2)


@pytest.fixture
def case():
    keys = jax.random.split(jax.random.key(3), 6)
    x_t = jax.random.normal(keys[0], (4, 5, 6))
    old = {"w": 0.3 * jax.random.normal(keys[1], (6, 6)), "b": jax.random.normal(keys[2], (6,))}
    mean, deviation = sde_step(x_t, linear(old)(x_t, T), T, NEXT_T, 0.7)
    x_next = mean + deviation * jax.random.normal(keys[3], x_t.shape)
    return {"old": old, "x_t": x_t, "x_next": x_next, "advantages": jnp.array([1.5, -0.5, 0.0, -2.0])}


def linear(params):
    return lambda x, t: x @ params["w"] + params["b"] * jnp.cos(t)[:, None, None]


def loss(case, params, old=None, reference=None, valid_mask=None, **config):
    policies = linear(params), linear(old or case["old"]), linear(reference or case["old"])
    valid_mask = jnp.ones(4) if valid_mask is None else valid_mask
    states = case["x_t"], case["x_next"]
    return grpo_loss(*policies, *states, case["advantages"], valid_mask, T, NEXT_T, GRPOConfig(**config))


def nudged(case, size):
    return jax.tree.map(lambda leaf: leaf + size * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), case["old"])


@pytest.mark.slow
def test_at_theta_equal_old_the_ratio_is_one_and_the_gradient_the_weighted_score(case):
    def log_density(params):
        """Mean over the numbers of a latent of the normal log-density of x_next."""
        mean, deviation = sde_step(case["x_t"], linear(params)(case["x_t"], T), T, NEXT_T, 0.7)
        return jax.scipy.stats.norm.logpdf(case["x_next"], mean, deviation).mean((1, 2))

    expected = jax.jit(jax.grad(lambda params: -jnp.mean(case["advantages"] * log_density(params))))(case["old"])
    gradient = jax.jit(jax.value_and_grad(lambda p: loss(case, p, kl_weight=0.0), has_aux=True))
    (value, parts), found = gradient(case["old"])
    assert float(value) == pytest.approx(-float(case["advantages"].mean()), rel=1e-6)  # ratio 1
    assert float(parts["clipped"]) == 0
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6 * float(jnp.abs(value).max()))


def test_a_step_that_went_far_enough_teaches_no_more(case):
    far = nudged(case, 0.05)
    clipped = jax.grad(lambda p: loss(case, p, kl_weight=0.0)[0])(far)
    free = jax.grad(lambda p: loss(case, p, kl_weight=0.0, clip=1e6)[0])(far)
    share = float(loss(case, far, kl_weight=0.0)[1]["clipped"])
    assert 0 < share < 1
    assert float(jnp.abs(clipped["w"] - free["w"]).max()) > 0.01 * float(jnp.abs(free["w"]).max())
    for advantage, gain in ((1.0, 1 + 1e-4), (-1.0, 1.0)):  # only what would be gained is cut off
        one = {**case, "advantages": jnp.full(4, advantage)}
        assert float(loss(one, far, kl_weight=0.0)[0]) >= -advantage * gain - 1e-6


def test_the_distance_to_the_reference_is_that_of_the_steps_distributions(case):
    far, still = nudged(case, 0.05), {**case, "advantages": jnp.zeros(4)}
    means = [sde_step(case["x_t"], linear(p)(case["x_t"], T), T, NEXT_T, 0.7)[0] for p in (far, case["old"])]
    deviation = sde_step(case["x_t"], case["x_t"], T, NEXT_T, 0.7)[1]
    expected = float(jnp.mean(jnp.square(means[0] - means[1]) / (2 * deviation**2)))
    assert float(loss(still, far, kl_weight=1.0)[0]) == pytest.approx(expected, rel=1e-5)


def test_samples_that_do_not_count_and_other_policies_get_no_gradient(case):
    valid_mask = jnp.array([1, 0, 1, 1])
    other = {**case, "x_next": case["x_next"].at[1].set(1e4)}
    one, two = (
        jax.grad(lambda p, c=c: loss(c, p, valid_mask=valid_mask)[0])(nudged(case, 1e-3)) for c in (case, other)
    )
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])
    still = jax.grad(lambda p: loss(case, case["old"], old=p, reference=p, kl_weight=1.0)[0])(nudged(case, 0.1))
    assert all(float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(still))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "trajectories", 6)


def metrics(out):
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("seconds")} for row in found]


@pytest.mark.slow
def test_the_loop_trains_it_and_goes_on_where_it_was_stopped(dataset, tmp_path):
    config = changed(
        algorithm="grpo", grpo=GRPOConfig(kl_weight=0.0, clip=1e-2), optimizer={"learning_rate": 2e-2}, epochs=16
    )
    whole = fit(make_task(dataset, config), config, tmp_path / "whole")
    fit(make_task(dataset, config), config, tmp_path / "parts", stop_after=8)
    parts = fit(make_task(dataset, config), config, tmp_path / "parts", resume=True)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    rows = metrics(tmp_path / "whole")
    assert rows == metrics(tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, whole.old, whole.params)  # the next epoch is drawn with what trained
    assert rows[0]["kl"] < rows[-1]["kl"]
    assert rows[-1]["reward"] > rows[0]["reward"] + 3 * rows[0]["reward_std"]
    with pytest.raises(ClvrError, match=r"begun with .*'grpo'.* this run has .*'nft'"):
        fit(make_task(dataset, changed()), changed(), tmp_path / "parts", resume=True)


def test_what_it_cannot_train_is_refused():
    with pytest.raises(ClvrError, match="eta, clip and advantage_clip must be positive"):
        GRPOConfig(eta=0.0)
    with pytest.raises(UsageError, match="predicts no velocity"):
        FlowGRPO(
            dataclasses.replace(toy_policy(), forward_process=VariancePreservingProcess(NoiseSchedule())), GRPOConfig()
        )
    with pytest.raises(UsageError, match="needs two or more"):
        FlowGRPO(dataclasses.replace(toy_policy(), timesteps=SIGMAS[:1]), GRPOConfig())
