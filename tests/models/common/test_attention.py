"""One attention, three programs: what XLA is given, what the TPU's kernel computes, and both on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.models.common import attention as module
from clvr_jax.models.common.attention import attention
from clvr_jax.sharding import MeshConfig, MeshLayout
from tests.models.parity import TOLERANCE, relative_error


def make(batch=2, queries=10, keys=10, heads=4, kv_heads=2, head_dim=8, seed=0):
    random = np.random.default_rng(seed)
    shapes = (batch, queries, heads, head_dim), (batch, keys, kv_heads, head_dim), (batch, keys, kv_heads, head_dim)
    return tuple(jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes)


def expected(query, key, value, mask, scale):
    """In float64, one head at a time."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    group = query.shape[2] // key.shape[2]
    out = np.zeros(query.shape)
    for b, h in np.ndindex(query.shape[0], query.shape[2]):
        logits = query[b, :, h] @ key[b, :, h // group].T * scale
        logits = np.where(np.broadcast_to(mask, (query.shape[0], *logits.shape))[b], logits, -1e30)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        out[b, :, h] = weights / weights.sum(-1, keepdims=True) @ value[b, :, h // group]
    return out


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("is_masked", [False, True])
def test_masks_say_who_sees_whom(is_causal, is_masked):
    query, key, value = make()
    key_mask = np.arange(10) < np.array([[10], [6]]) if is_masked else np.ones((2, 10), bool)
    mask = np.broadcast_to(key_mask[:, None], (2, 10, 10)) & (np.tri(10, dtype=bool) if is_causal else True)
    ours = attention(query, key, value, key_mask_bk=key_mask if is_masked else None, is_causal=is_causal)
    assert relative_error(ours, expected(query, key, value, mask, 8**-0.5)) < TOLERANCE
    whole = attention(query, key, value, mask=jnp.asarray(mask)[:, None], scale=0.3)
    assert relative_error(whole, expected(query, key, value, mask, 0.3)) < TOLERANCE


def test_causal_queries_are_those_of_the_last_keys():
    query, key, value = make()
    key_mask = jnp.arange(10) < jnp.array([[10], [8]])
    whole = attention(query, key, value, key_mask_bk=key_mask, is_causal=True)
    last = attention(query[:, 7:], key, value, key_mask_bk=key_mask, is_causal=True)
    assert relative_error(last, whole[:, 7:]) < TOLERANCE
    with pytest.raises(ClvrError, match="cudnn does not support causal queries after earlier keys"):
        attention(query[:, 7:], key, value, is_causal=True, implementation="cudnn")


@pytest.mark.slow
def test_the_kernel_of_the_tpu_has_earlier_keys():
    """Interpreted; the numbers of queries and keys are no multiples of its blocks."""
    query, key, value = make(batch=1, queries=40, keys=600, heads=2, kv_heads=2)
    key_mask = jnp.arange(600) % 512 < 500
    splash = jax.jit(lambda *arrays: module._splash(*arrays, key_mask[None], True, 0.2, None, interpret=True))
    ours = splash(query, key, value)
    theirs = attention(query, key, value, key_mask_bk=key_mask[None], is_causal=True, scale=0.2)
    assert relative_error(ours, theirs) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(("is_causal", "kv_heads"), [(False, 4), (True, 2)])
def test_the_kernel_of_the_tpu_computes_the_same(is_causal, kv_heads):
    """Interpreted; odd lengths and channels are padded to its blocks, and padding is seen by nobody."""
    query, key, value = make(queries=530, keys=530, kv_heads=kv_heads, head_dim=24)
    key_mask = jnp.arange(530) < jnp.array([[530], [300]])

    def loss(kind):
        def of(query, key, value):
            out = kind(query, key, value)
            return jnp.sum(jnp.sin(jnp.where(key_mask[:, :, None, None], out, 0))), out

        return jax.jit(jax.value_and_grad(of, argnums=(0, 1, 2), has_aux=True))(query, key, value)

    def splash(q, k, v):
        return module._splash(q, k, v, key_mask, is_causal, 0.2, None, interpret=True)

    def xla(q, k, v):
        return attention(q, k, v, key_mask_bk=key_mask, is_causal=is_causal, scale=0.2)

    ((_, ours), ours_grads), ((_, theirs), theirs_grads) = loss(splash), loss(xla)
    assert relative_error(ours[0], theirs[0]) < TOLERANCE
    assert relative_error(ours[1, :300], theirs[1, :300]) < TOLERANCE
    for mine, other in zip(ours_grads, theirs_grads, strict=True):
        assert relative_error(mine, other) < TOLERANCE


def test_on_a_mesh_heads_are_cut_while_attention_lasts():
    query, key, value = make(batch=2, queries=16, keys=16, heads=8, kv_heads=4)
    alone = attention(query, key, value)
    with MeshLayout(MeshConfig(data=2, fsdp=1, sequence=4).make()).active() as layout:

        def place(x):
            return jax.device_put(x, layout.sharding(("batch", "tokens", None, None), x.shape))

        program = jax.jit(attention).lower(*map(place, (query, key, value))).compile()
        together = program(*map(place, (query, key, value)))
    assert relative_error(together, alone) < TOLERANCE
    assert "all-to-all" in program.as_text()
    assert "all-gather" not in program.as_text()  # nobody holds all tokens of all heads


def test_with_too_few_heads_for_the_mesh_queries_are_sharded():
    query, key, value = make(batch=1, queries=16, keys=12, heads=2, kv_heads=2)
    alone = attention(query, key, value)
    with MeshLayout(MeshConfig(fsdp=1, sequence=4, tensor=2).make()).active():
        together = jax.jit(attention)(query, key, value)
        causal = jax.jit(attention, static_argnames="is_causal")(query, query, query, is_causal=True)
    assert relative_error(together, alone) < TOLERANCE
    assert together.addressable_shards[0].data.shape == (1, 4, 1, 8)
    assert relative_error(causal, attention(query, query, query, is_causal=True)) < TOLERANCE


def test_the_kernel_of_the_tpu_computes_its_shard_of_the_queries():
    """Interpreted; each of four devices pads its 130 queries to full blocks, and has all keys."""
    query, key, value = make(batch=1, queries=520, keys=40, heads=1, kv_heads=1)
    with MeshLayout(MeshConfig(fsdp=1, sequence=4, devices=4).make()).active() as layout:

        def splash(q, k, v):
            return module._splash(q, k, v, None, False, 0.2, layout, interpret=True)

        together = jax.jit(splash)(query, key, value)
    assert relative_error(together, attention(query, key, value, scale=0.2)) < TOLERANCE


def test_a_whole_mask_and_a_kernel_do_not_go_together():
    query, key, value = make()
    with pytest.raises(ClvrError, match="splash supports key_mask_bk and is_causal"):
        attention(query, key, value, mask=jnp.ones((1, 1, 10, 10), bool), implementation="splash")
