"""Deeper networks from trained ones: new blocks between those of a stack, which change nothing at first.

Source: block expansion of LLaMA Pro (arXiv 2401.02415).
"""

import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from clvr_jax.errors import ClvrError
from clvr_jax.trees import KeyPath, Params, dotted, path_of


def with_identity_blocks(blocks: Params, outputs: Sequence[str]) -> Params:
    """Inserts a new block after each block of a stack, a copy of it whose residual branches give zero.

    Args:
      blocks: parameters of `stack_blocks`, with a leading layer axis.
      outputs: regular expressions for the last layers of the residual branches, kernels and biases; their copies are
        zero, so the new block returns its input.
    Returns: the parameters of the same blocks with twice as many layers; block i of the old stack is block 2 i.
    Raises: ClvrError if an expression matches nothing, as the new blocks would change what the network computes.
    """
    names = [dotted(path_of(keys)) for keys, _ in jax.tree_util.tree_flatten_with_path(blocks)[0]]
    if idle := [pattern for pattern in outputs if not any(re.search(pattern, name) for name in names)]:
        raise ClvrError(f"no parameter of the blocks matches {', '.join(idle)}; parameters are {', '.join(names)}")

    def insert(keys: KeyPath, leaf: jax.Array) -> jax.Array:
        is_output = any(re.search(pattern, dotted(path_of(keys))) for pattern in outputs)
        added = jnp.zeros_like(leaf) if is_output else leaf
        return jnp.stack([leaf, added], axis=1).reshape(2 * leaf.shape[0], *leaf.shape[1:])

    return jax.tree_util.tree_map_with_path(insert, blocks)
