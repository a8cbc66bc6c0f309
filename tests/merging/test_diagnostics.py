import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clvr_jax as clvr
from clvr_jax.merging.diagnostics import angle, interaction, over_noise_levels, over_scales
from clvr_jax.models.common.lora import init_lora

INPUT = jnp.asarray(np.random.default_rng(0).normal(size=(7, 6)), jnp.float32)


def weights(seed, spread=1.0):
    random = np.random.default_rng(seed)
    shapes = {"first": (6, 8), "second": (8, 5)}
    return {name: {"kernel": jnp.asarray(spread * random.normal(size=s), jnp.float32)} for name, s in shapes.items()}


def linear(params):
    return INPUT @ params["first"]["kernel"]


def network(params, sigma=1.0):
    return jnp.tanh(sigma * INPUT @ params["first"]["kernel"]) @ params["second"]["kernel"]


def test_a_linear_function_adds_up_at_every_scale():
    for scale, found in over_scales(linear, weights(0), weights(1), weights(2)).items():
        assert found.additivity_error < 1e-6, scale
        assert found.angle == pytest.approx(
            over_scales(linear, weights(0), weights(1), weights(2))[1.0].angle, abs=0.01
        )


def test_the_measure_is_the_formula_of_the_paper():
    base, distill, align = weights(0), weights(1, 0.1), weights(2, 0.1)
    wide = [jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree) for tree in (base, distill, align)]

    def at(*parts):
        w = [sum(part[name]["kernel"] for part in parts) for name in ("first", "second")]
        return np.tanh(np.asarray(INPUT, np.float64) @ w[0]) @ w[1]

    before = at(wide[0])
    of_distill, of_align, of_both = (at(*parts) - before for parts in ((wide[0], wide[1]), (wide[0], wide[2]), wide))
    found = interaction(network, base, distill, align)
    error = np.linalg.norm(of_both - of_distill - of_align) / np.linalg.norm(of_both)
    cosine = np.sum(of_distill * of_align) / np.linalg.norm(of_distill) / np.linalg.norm(of_align)
    assert found.additivity_error == pytest.approx(error, rel=1e-4)
    assert found.angle == pytest.approx(math.degrees(math.acos(cosine)), abs=1e-3)
    assert found.distill == pytest.approx(np.linalg.norm(of_distill) / np.linalg.norm(before), rel=1e-5)


def test_the_error_grows_with_the_scale_from_the_derivative_on():
    base, distill, align = weights(0), weights(1, 0.2), weights(2, 0.2)
    found = over_scales(network, base, distill, align, (0, 0.001, 0.5, 1, 2))
    errors = [one.additivity_error for one in found.values()]
    assert errors[0] == 0
    assert errors == sorted(errors)
    assert errors[-1] > 0.1
    assert found[0.0].angle == pytest.approx(found[0.001].angle, abs=0.2)
    assert abs(found[2.0].angle - found[0.0].angle) > 0.5


def test_changes_of_different_outputs_are_orthogonal():
    base = {"left": jnp.ones(3), "right": jnp.ones(3)}

    def squares(params):
        return {name: leaf**2 for name, leaf in params.items()}

    distill, align = {"left": jnp.ones(3), "right": jnp.zeros(3)}, {"left": jnp.zeros(3), "right": jnp.ones(3)}
    found = interaction(squares, base, distill, align)
    assert found.angle == pytest.approx(90)
    assert found.additivity_error == 0


def test_every_noise_level_is_measured_by_itself():
    base, distill, align = weights(0), weights(1, 0.1), weights(2, 0.1)
    found = over_noise_levels(network, base, distill, align, (0.1, 1.0))
    alone = interaction(lambda params: network(params, 0.1), base, distill, align)
    assert found[0.1].additivity_error == pytest.approx(alone.additivity_error, rel=1e-3)
    assert found[0.1].additivity_error < found[1.0].additivity_error


def test_a_lora_is_measured_like_its_product():
    base, distill = weights(0), weights(1, 0.1)
    lora = jax.tree.map(lambda leaf: leaf + 0.1, init_lora(base, ["first"], 2, 2.0, jax.random.key(0)))
    full = clvr.delta(clvr.apply_delta(base, lora), base)
    for scale in (0.0, 1.0):
        ours, theirs = (interaction(network, base, distill, align, scale) for align in (lora, full))
        assert ours.angle == pytest.approx(theirs.angle, abs=0.01)
        assert ours.additivity_error == pytest.approx(theirs.additivity_error, rel=1e-3)


def test_a_change_of_nothing_has_no_angle():
    base, nothing = weights(0), jax.tree.map(jnp.zeros_like, weights(0))
    found = interaction(network, base, nothing, weights(1, 0.1))
    assert math.isnan(found.angle)
    assert found.additivity_error == 0
    assert angle(jnp.ones(2), -jnp.ones(2)) == 180
    assert angle(jnp.asarray([1.0, 0]), jnp.asarray([1.0, 1e-4])) == pytest.approx(math.degrees(1e-4), rel=1e-3)
