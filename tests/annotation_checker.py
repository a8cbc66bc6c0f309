"""The type checker of annotations in tests, by whose name jaxtyping's import hook finds it."""

from collections.abc import Callable
from typing import Any, get_args

from beartype import beartype


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function with checks of its arrays; beartype cannot check protocols, and mypy checks all else."""
    function.__annotations__ = {name: hint for name, hint in function.__annotations__.items() if _has_array(hint)}
    return beartype(function)


def _has_array(hint: Any) -> bool:
    is_callable = "Callable" in repr(hint)[:30]
    return type(hint).__module__.startswith("jaxtyping") or (not is_callable and any(map(_has_array, get_args(hint))))
