"""Paths of the leaves of parameter trees, such as "layers.self_attn.o_proj.kernel", and values chosen by patterns.

A state, a pure dictionary and a module with the same parameters have the same paths.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias, TypeVar

import jax
import numpy as np
from jaxtyping import PyTree

from clvr_jax.errors import ClvrError

Leaf: TypeAlias = jax.Array | np.ndarray | jax.ShapeDtypeStruct
"""A leaf of a tree of parameters: an array or an abstract array."""
Params: TypeAlias = PyTree[Leaf]
"""A tree of parameters: an NNX state or module, or nested dictionaries, of arrays or abstract arrays."""
Batch: TypeAlias = PyTree[jax.Array | np.ndarray]
"""A tree of arrays with one row for each example: NumPy arrays of a data source, JAX arrays on the devices."""
Path = tuple[str | int, ...]
KeyPath = tuple[object, ...]
"""The keys of a leaf as JAX gives them to functions over trees with paths."""
Value = TypeVar("Value")


def leaves_by_path(tree: PyTree, is_leaf: Callable[[object], bool] | None = None) -> dict[Path, PyTree]:
    """Returns path -> leaf, in the order of `jax.tree.leaves`."""
    return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf)[0]}


def path_of(keys: KeyPath) -> Path:
    """Returns the path of a leaf from its JAX keys."""
    # An NNX variable is a node around its array.
    if keys and keys[-1] == jax.tree_util.GetAttrKey("value"):
        keys = keys[:-1]
    return tuple(next(getattr(key, name) for name in ("key", "idx", "name") if hasattr(key, name)) for key in keys)


def dotted(path: Path) -> str:
    """Returns the name of a leaf, for patterns and messages."""
    return ".".join(map(str, path))


def by_pattern(patterns: Mapping[str, Value], paths: Iterable[Path], default: Value) -> dict[Path, Value]:
    """Returns for each path the value of the first pattern that matches its name; `default` without a match.

    Raises: ClvrError for a pattern that is the first match of no path, as it would have no effect.
    """
    paths = list(paths)
    first = {path: next((p for p in patterns if re.search(p, dotted(path))), None) for path in paths}
    if idle := [pattern for pattern in patterns if pattern not in first.values()]:
        raise ClvrError(
            f"no parameter is matched first by {', '.join(map(repr, idle))}; parameters are {some(map(dotted, paths))}"
        )
    return {path: default if pattern is None else patterns[pattern] for path, pattern in first.items()}


def some(names: Iterable[str], most: int = 6) -> str:
    """Returns the first names and the number of the others, for messages on one line."""
    names = list(names)
    return (", ".join(names[:most]) or "none") + (f", ... ({len(names) - most} more)" if len(names) > most else "")
