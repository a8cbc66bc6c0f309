"""What the gradients of DiffusionNFT are, whose they are not, and what rewards that are missing do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clvr_jax.diffusion import FlowProcess, NoiseSchedule, VariancePreservingProcess
from clvr_jax.errors import ClvrError
from clvr_jax.rl.advantages import group_advantages
from clvr_jax.rl.algorithms.diffusion_nft import NFTConfig, nft_loss, old_decay, optimality

SHAPE = (6, 5, 4)
PROCESSES = {"flow": FlowProcess(), "epsilon": VariancePreservingProcess(NoiseSchedule())}


def linear(params):
    """A policy that is linear in its input, and depends on the timestep."""

    def policy(x, t):
        return x @ params["w"] + params["b"] * jnp.cos(t / 100.0)[:, None, None]

    return policy


@pytest.fixture(params=PROCESSES)
def case(request):
    keys = jax.random.split(jax.random.key(3), 8)
    flow = request.param == "flow"
    return {
        "theta": {"w": jax.random.normal(keys[0], (4, 4)), "b": jax.random.normal(keys[1], (4,))},
        "other": {"w": jax.random.normal(keys[2], (4, 4)), "b": jax.random.normal(keys[3], (4,))},
        "x0": jax.random.normal(keys[4], SHAPE),
        "r": jax.random.uniform(keys[5], (6,)),
        "t": jax.random.uniform(keys[6], (6,), minval=0.1) if flow else jnp.array([5, 100, 300, 500, 700, 999]),
        "key": keys[7],
        "process": PROCESSES[request.param],
    }


def loss(case, theta, old, reference=None, r=None, valid_mask=None, **config):
    reference = linear(case["other"]) if reference is None else reference
    valid_mask = jnp.ones(6) if valid_mask is None else valid_mask
    return nft_loss(
        theta, old, reference, case["x0"], case["r"] if r is None else r, valid_mask, case["t"], case["key"],
        case["process"], NFTConfig(**config),
    )  # fmt: skip


def gradient(case, old, **options):
    return jax.jit(jax.grad(lambda params: loss(case, linear(params), old, **options)[0]))(case["theta"])


def test_the_two_mixtures_are_the_identity_of_the_paper():
    """With e = v_old - v*, d = v_theta - v_old: [r|e + beta d|^2 + (1-r)|e - beta d|^2] / beta
    = |e|^2 / beta + 2 (2r - 1) e.d + beta |d|^2."""
    rng = np.random.default_rng(0)
    e, d = rng.normal(size=(2, 50))
    for beta in (0.1, 1.0, 2.0):
        for r in (0.0, 0.3, 1.0):
            left = (r * np.sum((e + beta * d) ** 2) + (1 - r) * np.sum((e - beta * d) ** 2)) / beta
            right = np.sum(e**2) / beta + 2 * (2 * r - 1) * e @ d + beta * np.sum(d**2)
            assert left == pytest.approx(right, rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.1, 1.0, 2.0])
def test_at_theta_equal_old_the_gradient_is_weighted_regression_whatever_beta_is(case, beta):
    """Of c (2 r - 1) |x0_theta - x0|^2 / w, with w the error of old: the sample's own reconstruction."""

    def regression(params):
        noise = jax.random.normal(case["key"], SHAPE)
        x_t = case["process"].corrupt(case["x0"], noise, case["t"])
        clean = case["process"].predict_x0(x_t, linear(params)(x_t, case["t"]), case["t"])
        error = (clean - case["x0"]).reshape(6, -1)
        width = jax.lax.stop_gradient(jnp.abs(error).mean(1))
        return 5.0 * jnp.mean((2 * case["r"] - 1) * jnp.square(error).mean(1) / width)

    expected = jax.grad(regression)(case["theta"])
    found = gradient(case, linear(case["theta"]), beta=beta, kl_weight=0.0)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5 * float(jnp.abs(value).max()))


def test_equal_rewards_pull_theta_nowhere(case):
    r = optimality(group_advantages(np.full(6, 0.7), np.zeros(6)).values, 5.0)
    np.testing.assert_array_equal(r, 0.5)
    theta = linear(case["theta"])
    zero = gradient(case, theta, r=r, kl_weight=0.0)
    size = gradient(case, theta, r=jnp.ones(6), kl_weight=0.0)
    for name in zero:
        assert float(jnp.abs(zero[name]).max()) < 1e-5 * float(jnp.abs(size[name]).max())


def test_old_and_reference_get_no_gradient(case):
    def of(other):
        return loss(case, linear(case["theta"]), linear(other), linear(other), kl_weight=1.0)[0]

    for leaf in jax.tree.leaves(jax.jit(jax.grad(of))(case["other"])):
        np.testing.assert_array_equal(leaf, 0)


def test_a_sample_without_a_reward_changes_nothing(case):
    valid_mask = jnp.array([1, 1, 0, 1, 0, 1])
    broken = {**case, "x0": case["x0"].at[2].set(1e6), "r": case["r"].at[4].set(0.0)}
    old = linear(case["other"])
    one, two = (gradient(c, old, valid_mask=valid_mask) for c in (case, broken))
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])
    assert float(loss(case, linear(case["theta"]), old, valid_mask=valid_mask)[1]["weight"]) == 4
    assert float(loss(case, linear(case["theta"]), old, valid_mask=jnp.zeros(6))[0]) == 0


def test_the_order_of_samples_changes_nothing_but_rounding(case):
    """The noise goes with the sample's place, so a policy and samples are used to which it does not matter."""
    rewards, groups = np.array([0.1, 0.9, 0.4, 0.2, 0.8, 0.5]), np.array([7, 7, 7, 3, 3, 3])
    order = np.array([5, 0, 3, 2, 4, 1])
    straight, shuffled = group_advantages(rewards, groups), group_advantages(rewards[order], groups[order])
    np.testing.assert_allclose(shuffled.values, straight.values[order], rtol=1e-12)


def test_advantages_by_hand():
    rewards = [1.0, 3.0, np.nan, 5.0, 5.0, np.inf, 2.0]
    found = group_advantages(rewards, [0, 0, 0, 1, 1, 1, 2])
    np.testing.assert_allclose(found.values, [-1 / 1.0001, 1 / 1.0001, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(found.valid_mask, [True, True, False, True, True, False, True])
    assert found.zero_variance == 2
    np.testing.assert_allclose(found.mean, [2, 5, 2])
    by_epoch = group_advantages(rewards, [0, 0, 0, 1, 1, 1, 2], "epoch")
    np.testing.assert_allclose(by_epoch.values[:2], np.array([-1, 1]) / (np.std([1, 3, 5, 5, 2]) + 1e-4))
    np.testing.assert_allclose(optimality([-9.0, -2.5, 0, 5.0], 5.0), [0, 0.25, 0.5, 1])


def test_rewards_that_cannot_be_used_are_refused():
    with pytest.raises(ClvrError, match="none of 3"):
        group_advantages([np.nan] * 3, [0, 0, 1])
    with pytest.raises(ClvrError, match=r"\(2,\)"):
        group_advantages([1.0, 2.0], [0])
    with pytest.raises(ClvrError, match="beta"):
        NFTConfig(beta=0.0)


def test_decay_of_the_policy_that_samples():
    np.testing.assert_allclose(old_decay([0, 100, 500, 9000]), [0, 0.1, 0.5, 0.5])
    np.testing.assert_allclose(old_decay([0, 74, 175, 9000], "delayed"), [0, 0, 0.75, 0.999])
