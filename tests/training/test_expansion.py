"""Tests that a deepened network computes what it did, and that its new blocks can learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clvr_jax.errors import ClvrError
from clvr_jax.models.common.layers import scan_blocks, stack_blocks
from clvr_jax.training.expansion import with_identity_blocks


class _Block(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(4, 8, rngs=rngs)
        self.outer = nnx.Linear(8, 4, bias_init=nnx.initializers.normal(1.0), rngs=rngs)

    def __call__(self, x):
        return x + self.outer(nnx.gelu(self.inner(x)))


@pytest.fixture(scope="module")
def stack():
    return nnx.split(stack_blocks(_Block, 3, nnx.Rngs(0)))


def _run(graphdef, params, x):
    return scan_blocks(nnx.merge(graphdef, params), lambda block, x, _: (block(x), None), x)[0]


def test_new_blocks_change_nothing_and_have_gradients(stack):
    graphdef, params = stack
    deeper = with_identity_blocks(params, (r"outer\.",))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(deeper)} == {6}
    np.testing.assert_array_equal(_run(graphdef, deeper, x), _run(graphdef, params, x))
    grads = jax.grad(lambda params: (_run(graphdef, params, x) ** 2).sum())(deeper)
    assert np.abs(np.asarray(grads["outer"]["kernel"][...])[1::2]).min(axis=(1, 2)).max() > 0


def test_outputs_that_are_not_there_are_refused(stack):
    with pytest.raises(ClvrError, match=r"no parameter of the blocks matches mlp; .*inner\.kernel"):
        with_identity_blocks(stack[1], ("mlp",))
