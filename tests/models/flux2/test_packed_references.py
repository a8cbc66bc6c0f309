"""References that all images of a trajectory share, beside the computation of each image alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clvr_jax.errors import ClvrError
from clvr_jax.models.flux2 import Flux2Transformer, ReferenceCache
from clvr_jax.models.flux2.position_ids import reference_ids
from clvr_jax.pipelines.flux2.programs import attended_references, packed_velocity_field, velocity_field
from clvr_jax.sharding import MeshConfig, MeshLayout
from tests.helpers.models import random_module
from tests.models.flux2.test_transformer import SMALL, change
from tests.models.parity import relative_error

CLOSE = 1e-5
CONFIG = change(SMALL, num_attention_heads=4)
GRID, TEXT, ROWS = (2, 3), 7, 2
TOKENS = GRID[0] * GRID[1]
SEEN = np.array([[0, 1, 3], [0, 2, 3]], np.int32)
"""Number of references that each of the three targets of two trajectories attends to."""
REFERENCES = 3


@pytest.fixture(scope="module")
def model():
    return nnx.split(random_module(lambda rngs: Flux2Transformer(CONFIG, rngs=rngs)))


@pytest.fixture(scope="module")
def data():
    random = np.random.default_rng(0)
    targets = SEEN.size
    return {
        "latents": random.normal(size=(targets, TOKENS, CONFIG.in_channels)).astype(np.float32),
        "text": random.normal(size=(targets, TEXT, CONFIG.joint_attention_dim)).astype(np.float32),
        "timesteps": random.uniform(size=targets).astype(np.float32),
        "references": random.normal(size=(ROWS, REFERENCES * TOKENS, CONFIG.in_channels)).astype(np.float32),
    }


def packed(state, graphdef, data):
    field = packed_velocity_field(nnx.merge(graphdef, state), data["references"], GRID, jnp.asarray(SEEN))
    return field(data["latents"], data["timesteps"], data["text"])


def alone(state, graphdef, data):
    """Every target with caches of its own references, each computed after those before it.

    The two trajectories are rows of one batch, which do not see each other: a row takes the velocity that is its own.
    """
    transformer = nnx.merge(graphdef, state)
    caches: list[ReferenceCache] = []
    for first in range(REFERENCES):
        tokens = data["references"][:, first * TOKENS : (first + 1) * TOKENS]
        caches.append(transformer.reference_cache(tokens, reference_ids([GRID], first), earlier=tuple(caches)))
    found = {}
    for seen in np.unique(SEEN):
        rows, columns = np.nonzero(seen == SEEN)
        own = tuple(jax.tree.map(lambda leaf, rows=rows: leaf[:, rows], cache) for cache in caches[:seen])
        field, targets = velocity_field(transformer, own, GRID, []), rows * SEEN.shape[1] + columns
        velocity = field(data["latents"][targets], data["timesteps"][targets], data["text"][targets])
        found.update(zip(targets.tolist(), velocity, strict=True))
    return jnp.stack([found[target] for target in range(SEEN.size)])


def squared(velocity):
    """The mean square of a velocity and the velocity, and the gradient of the one for the weights."""

    def mean_square(state, graphdef, data):
        found = velocity(state, graphdef, data)
        return jnp.mean(jnp.square(found)), found

    return jax.jit(jax.value_and_grad(mean_square, has_aux=True), static_argnums=1)


@pytest.fixture(scope="module")
def computed(model, data):
    """The mean square, the velocities and the gradient of all images at once, on one device."""
    return squared(packed)(model[1], model[0], data)


@pytest.mark.slow
def test_velocities_and_gradients_are_those_of_each_image_alone(model, data, computed):
    (value, found), gradient = computed
    (expected, single), expected_gradient = squared(alone)(model[1], model[0], data)
    assert relative_error(found, single) < CLOSE
    assert float(value) == pytest.approx(float(expected), rel=CLOSE)
    for found, single in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        assert relative_error(found, single) < CLOSE


def test_a_reference_that_an_image_does_not_see_changes_nothing(model, data):
    graphdef, state = model
    changed = data["references"].copy()
    changed[:, 2 * TOKENS :] += 1
    run = jax.jit(packed, static_argnums=1)
    found, before = (run(state, graphdef, {**data, "references": each}) for each in (changed, data["references"]))
    sees_last = SEEN.reshape(-1) == REFERENCES
    np.testing.assert_array_equal(found[~sees_last], before[~sees_last])
    assert relative_error(found[sees_last], before[sees_last]) > 1e-3


def test_references_of_a_loop_attend_to_earlier_ones_only(model, data):
    transformer = nnx.merge(*model)
    sizes = [GRID] * REFERENCES
    (together,) = attended_references(transformer, data["references"], sizes, "loop")
    (mutual,) = attended_references(transformer, data["references"], sizes, "image")
    first = transformer.reference_cache(data["references"][:, :TOKENS], reference_ids([GRID]))
    for name in ("double", "single"):
        own = getattr(first, name).value
        assert relative_error(getattr(together, name).value[:, :, :TOKENS], own) < CLOSE
        assert relative_error(getattr(mutual, name).value[1:, :, :TOKENS], own[1:]) > 1e-3
    assert attended_references(transformer, data["references"], sizes, "none") is data["references"]


@pytest.mark.slow
def test_a_mesh_computes_the_same(model, data, computed):
    graphdef, state = model
    (expected, _), gradient = computed
    with MeshLayout(MeshConfig(fsdp=2, sequence=2, tensor=2).make()).active():
        (value, _), sharded = squared(packed)(state, graphdef, data)
    assert float(value) == pytest.approx(float(expected), rel=CLOSE)
    for found, single in zip(jax.tree.leaves(sharded), jax.tree.leaves(gradient), strict=True):
        assert relative_error(found, single) < CLOSE


def test_lengths_and_masks_of_other_tokens_are_refused(model, data):
    transformer = nnx.merge(*model)
    with pytest.raises(ClvrError, match=r"lengths \(6, 6\) for 18 tokens"):
        transformer.reference_cache(data["references"], reference_ids([GRID] * REFERENCES), lengths=(6, 6))
    with pytest.raises(ClvrError, match=r"cached_mask_bk has shape \(6, 12\); expected \(6, 18\)"):
        packed_velocity_field_with_mask(transformer, data)


def packed_velocity_field_with_mask(transformer, data):
    from clvr_jax.models.flux2.position_ids import latent_ids, text_ids

    (cache,) = attended_references(transformer, data["references"], [GRID] * REFERENCES, "loop")
    return transformer(
        data["latents"], data["text"], data["timesteps"], latent_ids(*GRID), text_ids(TEXT),
        cached=(cache,), cached_mask_bk=np.ones((6, 12), bool),
    )  # fmt: skip
