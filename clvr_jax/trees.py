"""Parameter trees by path: leaves under names like "layers.self_attn.o_proj.kernel", and values chosen by patterns.

A state, a pure dictionary and a module of the same parameters have the same paths.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax

from clvr_jax.errors import ClvrError

Tree = Any
Path = tuple[str | int, ...]
Value = TypeVar("Value")


def leaves_by_path(tree: Tree, is_leaf: Callable[[Any], bool] | None = None) -> dict[Path, Any]:
    """Path -> leaf, in the order of `jax.tree.leaves`."""
    return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf)[0]}


def path_of(keys: tuple[Any, ...]) -> Path:
    """The path of a leaf from JAX's keys to it."""
    # An NNX variable is a node of its own around its array.
    if keys and keys[-1] == jax.tree_util.GetAttrKey("value"):
        keys = keys[:-1]
    return tuple(next(getattr(key, name) for name in ("key", "idx", "name") if hasattr(key, name)) for key in keys)


def dotted(path: Path) -> str:
    """The name of a leaf, as patterns and errors have it."""
    return ".".join(map(str, path))


def by_pattern(patterns: Mapping[str, Value], paths: Iterable[Path], default: Value) -> dict[Path, Value]:
    """For each path the value of the first pattern that is found in its name, `default` where none is.

    Raises: ClvrError for a pattern that is the first for no path: it would be a rule that does nothing.
    """
    paths = list(paths)
    first = {path: next((p for p in patterns if re.search(p, dotted(path))), None) for path in paths}
    if idle := [pattern for pattern in patterns if pattern not in first.values()]:
        raise ClvrError(
            f"no parameter is matched first by {', '.join(map(repr, idle))}; parameters are {some(map(dotted, paths))}"
        )
    return {path: default if pattern is None else patterns[pattern] for path, pattern in first.items()}


def some(names: Iterable[str], most: int = 6) -> str:
    """The first few names and how many there are besides, for errors of one line."""
    names = list(names)
    return (", ".join(names[:most]) or "none") + (f", ... ({len(names) - most} more)" if len(names) > most else "")
