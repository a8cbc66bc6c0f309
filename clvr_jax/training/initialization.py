"""How a network starts that is trained from nothing: its initial weights, some of them scaled."""

import re
from collections.abc import Mapping
from typing import Any

import jax

from clvr_jax.errors import ClvrError

Tree = Any


def scaled(params: Tree, factors: Mapping[str, float]) -> Tree:
    """Multiplies leaves by the factor of the first pattern that is found in their path.

    Args:
      params: pytree, such as the state of an NNX module.
      factors: regular expressions, searched in paths like "layers.self_attn.o_proj.kernel", and what they multiply by.
    Returns: a tree of the same structure; leaves without a pattern are the same arrays.
    Raises: ClvrError for a pattern that is the first for no leaf: it would be a rule that does nothing.
    """
    used: set[str] = set()

    def scale(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        name = ".".join(str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path)
        pattern = next((pattern for pattern in factors if re.search(pattern, name)), None)
        if pattern is None:
            return leaf
        used.add(pattern)
        return leaf * factors[pattern]

    result = jax.tree_util.tree_map_with_path(scale, params)
    if idle := [pattern for pattern in factors if pattern not in used]:
        raise ClvrError(f"initialization: no weight matches {', '.join(map(repr, idle))}")
    return result
