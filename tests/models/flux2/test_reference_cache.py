"""Cached references of the FLUX.2 transformer, against the KV mode of diffusers' transformer."""

from types import SimpleNamespace

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from clvr_jax.errors import ClvrError
from clvr_jax.models.common.abstract import abstract_module
from clvr_jax.models.flux2 import Flux2Transformer
from clvr_jax.models.flux2.position_ids import latent_ids, reference_ids, text_ids
from clvr_jax.sharding import MeshConfig, MeshLayout
from tests.models.flux2.test_transformer import SMALL, change, make_pair
from tests.models.parity import relative_error, run_jitted

CLOSE = 1e-5
GRID, TEXT, ROWS = (3, 5), 7, 2
SIZES = ((2, 3), (5, 1), (4, 4))


def make_inputs(config, sizes, seed=0):
    """Text, noise, timesteps and reference tokens; guidance if the model embeds it."""
    random = np.random.default_rng(seed)

    def normal(*shape):
        return random.normal(size=(ROWS, *shape)).astype(np.float32)

    tokens = len(reference_ids(sizes))
    return SimpleNamespace(
        image=normal(GRID[0] * GRID[1], config.in_channels),
        text=normal(TEXT, config.joint_attention_dim),
        references=normal(tokens, config.in_channels),
        timesteps=random.uniform(size=(2, ROWS)).astype(np.float32),
        guidance=random.uniform(1, 5, ROWS).astype(np.float32) if config.guidance_embeds else None,
    )


def cache_of(model, inputs, sizes, first=0, earlier=()):
    graphdef, state = nnx.split(model)
    ids = reference_ids(sizes, first)
    return jax.jit(
        lambda state, references, earlier: nnx.merge(graphdef, state).reference_cache(
            references, ids, inputs.guidance, earlier=earlier
        )
    )(state, inputs.references, earlier)


def run(model, inputs, timestep, cached, mask=None):
    graphdef, state = nnx.split(model)
    return jax.jit(
        lambda state, cached, mask: nnx.merge(graphdef, state)(
            inputs.image, inputs.text, timestep, latent_ids(*GRID), text_ids(TEXT), inputs.guidance,
            cached=cached, mask_bt=mask,
        )
    )(state, cached, mask)  # fmt: skip


def run_theirs(reference, inputs, timestep, sizes, **mode):
    """The output of diffusers' transformer in a KV mode, and its cache."""
    diffusers.Flux2KleinKVPipeline._set_kv_attn_processors(SimpleNamespace(transformer=reference))
    hidden, ids = inputs.image, latent_ids(*GRID)
    if mode["kv_cache_mode"] == "extract":
        hidden = np.concatenate([inputs.references, hidden], axis=1)
        ids = np.concatenate([reference_ids(sizes), ids])
        mode["num_ref_tokens"] = inputs.references.shape[1]
    with torch.no_grad():
        return reference(
            hidden_states=torch.tensor(hidden).to(reference.dtype),
            encoder_hidden_states=torch.tensor(inputs.text).to(reference.dtype),
            timestep=torch.tensor(timestep),
            img_ids=torch.tensor(ids),
            txt_ids=torch.tensor(text_ids(TEXT)),
            guidance=None if inputs.guidance is None else torch.tensor(inputs.guidance),
            return_dict=False,
            **mode,
        )


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [False, True])
@pytest.mark.parametrize("sizes", [SIZES[:1], SIZES[:2]])
def test_cache_and_outputs_match_the_kv_mode_of_diffusers(sizes, guidance):
    model, reference = make_pair(change(SMALL, guidance_embeds=guidance))
    inputs = make_inputs(model.config, sizes)
    first, second = inputs.timesteps
    expected, theirs = run_theirs(reference, inputs, first, sizes, kv_cache_mode="extract")
    cache = cache_of(model, inputs, sizes)
    for stack, layers in ((cache.double, theirs.double_block_caches), (cache.single, theirs.single_block_caches)):
        assert len(stack.key) == len(layers)
        for layer, each in enumerate(layers):
            assert relative_error(stack.key[layer], each.k_ref) < CLOSE
            assert relative_error(stack.value[layer], each.v_ref) < CLOSE
    assert relative_error(run(model, inputs, first, (cache,)), expected) < CLOSE
    (later,) = run_theirs(reference, inputs, second, sizes, kv_cache_mode="cached", kv_cache=theirs)
    assert relative_error(run(model, inputs, second, (cache,)), later) < CLOSE


@pytest.mark.slow
def test_cached_references_are_another_model_than_reference_tokens():
    """The control: a cache is not what a model that was trained without it computes."""
    model, _ = make_pair(SMALL)
    inputs = make_inputs(SMALL, SIZES[:1])
    cached = run(model, inputs, inputs.timesteps[0], (cache_of(model, inputs, SIZES[:1]),))
    ids = np.concatenate([latent_ids(*GRID), reference_ids(SIZES[:1])])
    tokens = np.concatenate([inputs.image, inputs.references], axis=1)
    plain = run_jitted(
        lambda model, *arrays: model(*arrays, ids, text_ids(TEXT)), model, tokens, inputs.text, inputs.timesteps[0]
    )
    assert relative_error(cached, plain[:, : inputs.image.shape[1]]) > 1e-2
    without = run(model, inputs, inputs.timesteps[0], ())
    assert relative_error(cached, without) > 1e-2


@pytest.mark.slow
def test_a_mask_of_text_and_image_leaves_the_references_visible():
    model, _ = make_pair(SMALL)
    inputs = make_inputs(SMALL, SIZES[:1])
    cache = cache_of(model, inputs, SIZES[:1])
    mask = np.ones((ROWS, TEXT + inputs.image.shape[1]), bool)
    masked = mask.copy()
    masked[:, 0] = False
    expected, full, partial = (run(model, inputs, inputs.timesteps[0], (cache,), each) for each in (None, mask, masked))
    assert relative_error(full, expected) < CLOSE
    assert relative_error(partial, expected) > 1e-3


@pytest.mark.slow
def test_a_mesh_computes_the_same_and_shards_the_cache_by_heads():
    config = change(SMALL, num_attention_heads=4)
    model, _ = make_pair(config)
    inputs = make_inputs(config, SIZES)
    cache = cache_of(model, inputs, SIZES)
    expected = run(model, inputs, inputs.timesteps[0], (cache,))
    layout = MeshLayout(MeshConfig(fsdp=2, sequence=2, tensor=2).make())
    with layout.active():
        sharded = cache_of(model, inputs, SIZES)
        out = run(model, inputs, inputs.timesteps[0], (sharded,))
    for array, single in zip(jax.tree.leaves(sharded), jax.tree.leaves(cache), strict=True):
        layers, rows, tokens, heads, channels = array.shape
        assert array.sharding.shard_shape(array.shape) == (layers, rows // 2, tokens, heads // 4, channels)
        assert relative_error(array, single) < CLOSE
    assert relative_error(out, expected) < CLOSE


@pytest.mark.slow
def test_bfloat16_matches_diffusers_in_bfloat16():
    model, reference = make_pair(SMALL, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    nnx.update(model, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), nnx.state(model)))
    inputs = make_inputs(SMALL, SIZES)
    expected, _ = run_theirs(reference.to(torch.bfloat16), inputs, inputs.timesteps[0], SIZES, kv_cache_mode="extract")
    cache = cache_of(model, inputs, SIZES)
    assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype(jnp.bfloat16)}
    assert cache.nbytes == 2 * sum(leaf.size for leaf in jax.tree.leaves(cache))
    out = run(model, inputs, inputs.timesteps[0], (cache,))
    assert out.dtype == jnp.bfloat16
    assert relative_error(out.astype(jnp.float32), expected) < 1e-2


@pytest.mark.slow
def test_a_cache_of_another_model_dtype_or_batch_is_refused():
    model, _ = make_pair(SMALL)
    inputs = make_inputs(SMALL, SIZES[:1])
    cache = cache_of(model, inputs, SIZES[:1])
    wrong = {
        "float16": jax.tree.map(lambda x: x.astype(jnp.float16), cache),
        r"\(3, 2, 6, 3, 16\)": cache._replace(single=jax.tree.map(lambda x: x[1:], cache.single)),
        r"takes float32 \(2, 2, 6, 3, 16\)": jax.tree.map(lambda x: jnp.concatenate([x, x[:, :1]], 1), cache),
        r"double is float32 \(2, 2, 6, 1, 16\)": jax.tree.map(lambda x: x[:, :, :, :1], cache),
    }
    for message, other in wrong.items():
        with pytest.raises(ClvrError, match=message):
            run(model, inputs, inputs.timesteps[0], (other,))
    with pytest.raises(ClvrError, match="img_ids: ids are for 5 tokens; got 6"):
        cache_of(model, inputs, SIZES[1:2])
    guided = abstract_module(lambda rngs: Flux2Transformer(change(SMALL, guidance_embeds=True), rngs=rngs))
    with pytest.raises(ClvrError, match="pass guidance_b"):
        guided.reference_cache(inputs.references, reference_ids(SIZES[:1]))
