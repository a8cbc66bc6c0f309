"""Initialization of networks that are trained from scratch: initial weights, some of them scaled."""

from collections.abc import Mapping

import jax

from clvr_jax.trees import KeyPath, Params, by_pattern, leaves_by_path, path_of


def scaled(params: Params, factors: Mapping[str, float]) -> Params:
    """Multiplies leaves by the factor of the first pattern that is found in their path.

    Args:
      params: pytree, such as the state of an NNX module.
      factors: regular expression, searched in paths like "layers.self_attn.o_proj.kernel" -> factor.
    Returns: a tree of the same structure; leaves without a pattern are the same arrays.
    Raises: ClvrError for a pattern that is the first for no leaf, and so would do nothing.
    """
    chosen = by_pattern(factors, leaves_by_path(params), None)

    def scale(keys: KeyPath, leaf: jax.Array) -> jax.Array:
        factor = chosen[path_of(keys)]
        return leaf if factor is None else leaf * factor

    return jax.tree_util.tree_map_with_path(scale, params)
