"""Loops over layers: what they hold in memory beside the weights, and that they compute the same."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clvr_jax.models.layers import read_only_weights, scan_blocks, stack_blocks

DEPTH, WIDTH, CALLS = 12, 128, 3


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
