"""Loops over layers: what they hold in memory beside the weights, and that they compute the same."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clvr_jax.models.common.layers import embed_tokens, read_only_weights, scan_blocks, stack_blocks, vocabulary_logits

DEPTH, WIDTH, CALLS = 12, 128, 3
TOKENS = 4096


def program(blocks, context):
    graphdef, state = nnx.split(blocks)

    def run(state, x_bd):
        def call(x_bd, _):
            def layer(block, x_bd, scale):
                return jnp.tanh(block(x_bd)) * scale, None

            with context():
                return scan_blocks(nnx.merge(graphdef, state), layer, x_bd, jnp.ones(DEPTH, x_bd.dtype))[0], None

        return jax.lax.scan(call, x_bd, None, length=CALLS)[0]

    return jax.jit(run), state


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_copy_of_a_whole_stack_is_made_for_weights_that_are_only_read(dtype):
    blocks = stack_blocks(
        lambda rngs: nnx.Linear(WIDTH, WIDTH, use_bias=False, dtype=dtype, param_dtype=dtype, rngs=rngs),
        DEPTH,
        nnx.Rngs(0),
    )
    x_bd = jnp.asarray(np.random.default_rng(0).normal(size=(4, WIDTH)), dtype)
    outputs = []
    for context in (contextlib.nullcontext, read_only_weights):
        run, state = program(blocks, context)
        outputs.append(np.asarray(run(state, x_bd), np.float32))
    np.testing.assert_allclose(outputs[0], outputs[1], atol=0 if dtype == jnp.float32 else 1e-2)
    temporaries = run.lower(state, x_bd).compile().memory_analysis().temp_size_in_bytes
    assert temporaries < 4 * DEPTH * WIDTH**2 / 2


@pytest.mark.parametrize("is_tied", [True, False])
def test_no_copy_of_a_head_or_of_embeddings_is_made_in_front_of_a_loop_over_tokens(is_tied):
    rngs = nnx.Rngs(0)
    embed = nnx.Embed(TOKENS, WIDTH, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=rngs)
    graphdef, state = nnx.split(embed)
    head = embed.embedding[...] if is_tied else jax.random.normal(rngs(), (WIDTH, TOKENS), jnp.bfloat16)
    x_bd = jax.random.normal(rngs(), (3, WIDTH), jnp.bfloat16)

    def decode(state, head, x_bd):
        embed = nnx.merge(graphdef, state)

        def step(x_bd, _):
            logits_bv = vocabulary_logits(x_bd, embed.embedding[...] if is_tied else head, is_tied=is_tied)
            return x_bd + embed_tokens(embed, jnp.argmax(logits_bv, axis=-1)), logits_bv

        with read_only_weights():
            return jax.lax.scan(step, x_bd, None, length=CALLS)[1]

    compiled = jax.jit(decode).lower(state, head, x_bd).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * TOKENS * WIDTH / 2
    logits_nbv = np.asarray(compiled(state, head, x_bd))
    head_dv = np.asarray(head.T if is_tied else head, np.float32)
    for logits_bv in logits_nbv:
        np.testing.assert_allclose(logits_bv, np.asarray(x_bd, np.float32) @ head_dv, atol=1e-4)
        x_bd = x_bd + embed(jnp.argmax(logits_bv, axis=-1))
