"""Caches of references as 8-bit integers, beside caches in the compute dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clvr_jax.errors import ClvrError
from clvr_jax.models.flux2 import Flux2Transformer, ReferenceCache
from clvr_jax.models.flux2.position_ids import latent_ids, reference_ids, text_ids
from clvr_jax.models.flux2.reference_cache import KeyValue, QuantizedKeyValue
from clvr_jax.sharding import MeshConfig, MeshLayout
from tests.helpers.models import random_module
from tests.models.flux2.test_transformer import SMALL, change
from tests.models.parity import relative_error

CONFIG = change(SMALL, num_attention_heads=4)
GRID, TEXT, ROWS = (3, 5), 7, 2
SIZES = ((2, 3), (4, 4))
RANDOM = np.random.default_rng(0)
REFERENCES = [RANDOM.normal(size=(ROWS, h * w, CONFIG.in_channels)).astype(np.float32) for h, w in SIZES]
IMAGE = RANDOM.normal(size=(ROWS, GRID[0] * GRID[1], CONFIG.in_channels)).astype(np.float32)
TEXTS = RANDOM.normal(size=(ROWS, TEXT, CONFIG.joint_attention_dim)).astype(np.float32)
CLOSE = 1e-5


@pytest.fixture(scope="module")
def model():
    return nnx.split(random_module(lambda rngs: Flux2Transformer(CONFIG, rngs=rngs)))


def caches_of(model, quantize):
    """The caches of both references; the second attends to the first as it is stored."""
    graphdef, state = model

    def compute(state, references):
        transformer, caches = nnx.merge(graphdef, state), ()
        for number, (tokens, size) in enumerate(zip(references, SIZES, strict=True)):
            ids = reference_ids([size], number)
            caches += (transformer.reference_cache(tokens, ids, earlier=caches, quantize=quantize),)
        return caches

    return jax.jit(compute)(state, REFERENCES)


def run(model, cached):
    graphdef, state = model
    ids = latent_ids(*GRID), text_ids(TEXT)
    timesteps = np.full(ROWS, 0.7, np.float32)
    return jax.jit(lambda state, cached: nnx.merge(graphdef, state)(IMAGE, TEXTS, timesteps, *ids, cached=cached))(
        state, cached
    )


def dequantized(cache):
    """By NumPy, from the definition."""

    def values(stored):
        scales = (np.asarray(scale).swapaxes(2, 3)[..., None] for scale in (stored.key_scale, stored.value_scale))
        return KeyValue(*(np.asarray(x, np.float32) * scale for x, scale in zip(stored[:2], scales, strict=True)))

    return ReferenceCache(*map(values, cache))


def bfloat16(cache):
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), cache)


@pytest.mark.slow
def test_keys_and_values_are_rounded_to_127_levels_of_each_token_and_head(model):
    first, second = caches_of(model, False)
    rounded, after = caches_of(model, True)
    for stored, exact in zip(rounded, first, strict=True):
        for values, scale, expected in zip(stored[:2], stored[2:], exact, strict=True):
            assert values.dtype == jnp.int8
            largest = np.abs(expected).max(-1).swapaxes(2, 3)
            np.testing.assert_allclose(scale * 127, largest, rtol=1e-5)
            error = np.abs(np.asarray(values, np.float32) * np.asarray(scale).swapaxes(2, 3)[..., None] - expected)
            assert (error <= 0.501 * np.asarray(scale).swapaxes(2, 3)[..., None]).all()
    layers, heads = CONFIG.num_layers + CONFIG.num_single_layers, CONFIG.num_attention_heads
    tokens = SIZES[0][0] * SIZES[0][1]
    assert rounded.nbytes == 2 * layers * ROWS * tokens * heads * (CONFIG.attention_head_dim + 4)
    assert first.nbytes == 2 * layers * ROWS * tokens * heads * CONFIG.attention_head_dim * 4
    assert (rounded.rows, rounded.tokens) == (first.rows, first.tokens) == (ROWS, tokens)
    errors = [relative_error(a, b) for a, b in zip(*map(jax.tree.leaves, (dequantized(after), second)), strict=True)]
    assert 1e-4 < max(errors) < 3e-2  # its first block only rounds; later ones attend to the rounded first reference


@pytest.mark.slow
def test_a_call_computes_with_what_the_integers_stand_for(model):
    exact, stored = caches_of(model, False), caches_of(model, True)
    out = run(model, stored)
    assert relative_error(out, run(model, tuple(map(dequantized, stored)))) < CLOSE
    expected = run(model, exact)
    in_bfloat16 = relative_error(run(model, tuple(map(bfloat16, exact))), expected)
    in_int8 = relative_error(out, expected)
    assert in_bfloat16 < in_int8 < 2e-2


@pytest.mark.slow
def test_a_mesh_of_eight_shards_integers_and_scales_by_heads(model):
    stored = caches_of(model, True)
    expected = run(model, stored)
    with MeshLayout(MeshConfig(fsdp=2, sequence=2, tensor=2).make()).active():
        sharded = caches_of(model, True)
        out = run(model, sharded)
    for cache, single in zip(sharded, stored, strict=True):
        for array, other in zip(jax.tree.leaves(cache), jax.tree.leaves(single), strict=True):
            heads = 3 if array.ndim == 5 else 2
            shape = list(array.shape)
            shape[1], shape[heads] = shape[1] // 2, shape[heads] // 4
            assert array.sharding.shard_shape(array.shape) == tuple(shape)
            difference = np.abs(np.asarray(array, np.float32) - np.asarray(other, np.float32)).max()
            assert difference <= (1 if array.dtype == jnp.int8 else 1e-5)  # another order of sums may round otherwise
    assert relative_error(out, expected) < 1e-3


@pytest.mark.slow
def test_guidance_repeats_integers_and_scales(model):
    (cache, _) = caches_of(model, True)
    twice = cache.repeated(2)
    assert twice.rows == 2 * ROWS
    for array, single in zip(jax.tree.leaves(twice), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(array, np.concatenate([single, single], axis=1))


@pytest.mark.slow
def test_scales_of_another_shape_are_refused(model):
    (cache, _) = caches_of(model, True)
    wrong = {
        r"double is float32 \(2, 2, 1, 6\); this model takes float32 \(2, 2, 4, 6\)": cache.double._replace(
            key_scale=cache.double.key_scale[:, :, :1]
        ),
        "double is float32 .*; this model takes int8": cache.double._replace(key=cache.double.key.astype(jnp.float32)),
    }
    for message, double in wrong.items():
        assert isinstance(double, QuantizedKeyValue)
        with pytest.raises(ClvrError, match=message):
            run(model, (cache._replace(double=double),))
