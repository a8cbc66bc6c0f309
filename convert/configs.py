"""config.json of diffusers and transformers <-> our frozen configurations."""

import dataclasses
import math
import types
from collections.abc import Iterable, Mapping
from typing import Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from clvr_jax.errors import ClvrError
from clvr_jax.files.json_input import JSON, UncheckedJSON, shown

MOST_LAYERS = 1000
"""Largest number of layers, blocks or list members: each is a module to build, so a larger number would not finish."""
MOST = 2**31 - 1
"""Largest size of an axis."""
_COUNTS = ("layers", "depth", "blocks")
_POSITIVE = ("eps", "theta")

Config = TypeVar("Config")


def from_known_fields(
    config_class: type[Config],
    given: UncheckedJSON,
    *,
    fixed: Mapping[str, object] | None = None,
    ignored: Iterable[str] = (),
) -> Config:
    """Builds a configuration from a JSON object; every field must be known.

    Args:
      config_class: a frozen dataclass; a field that the JSON lacks gets its default.
      given: the JSON object; keys that begin with an underscore are bookkeeping and ignored.
      fixed: fields that our module does not have, and the only values that it supports; another value is an error.
      ignored: fields that do not change the computation.
    Raises: ClvrError for an unknown field, a fixed field with another value, or a value of another type or size than
      that of the field.
    """
    names = {field.name for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    fixed = fixed or {}
    hints = get_type_hints(config_class)
    values: dict[str, JSON] = {}
    for key, value in given.items():
        if key in names:
            if not _is_of(value, hints[key], MOST_LAYERS if any(word in key for word in _COUNTS) else MOST):
                expected = _described(hints[key])
                raise ClvrError(f"{config_class.__name__}: {key} is {shown(value)}; it must be {expected}")
            if key.endswith(_POSITIVE) and not value > 0:
                raise ClvrError(f"{config_class.__name__}: {key} is {shown(value)}; it must be above 0")
            values[key] = tuple(value) if isinstance(value, list) else value
        elif key in fixed:
            if value != fixed[key]:
                raise ClvrError(f"{config_class.__name__}: {key} = {value!r} is not supported, only {fixed[key]!r}")
        elif not key.startswith("_") and key not in ignored:
            raise ClvrError(f"{config_class.__name__}: unknown field {key!r} in config.json")
    try:
        return config_class(**values)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        # A size of 0, or lists of different lengths, with which the class computes before it validates them.
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise ClvrError(f"{config_class.__name__}: its fields do not fit together ({reason})") from error


def section(config: UncheckedJSON, name: str) -> dict[str, JSON]:
    """Returns an object inside a configuration, {} if it is absent or null. Raises: ClvrError for another value."""
    found = config.get(name)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise ClvrError(f"config.json: {name} is {shown(found)}; it must be an object")
    return dict(found)


def _is_of(value: JSON, kind: object, most: int) -> bool:
    """Returns whether a JSON value has an annotated type: finite numbers, sizes from 0 to `most`, bounded lists."""
    if get_origin(kind) in (Union, types.UnionType):
        return any(_is_of(value, member, most) for member in get_args(kind))
    if get_origin(kind) is Literal:
        return any(type(value) is type(member) and value == member for member in get_args(kind))
    if get_origin(kind) is tuple:
        members = get_args(kind)
        if not isinstance(value, list | tuple) or len(value) > MOST_LAYERS:
            return False
        if members[1:] == (...,):
            return all(_is_of(member, members[0], most) for member in value)
        return len(value) == len(members) and all(map(_is_of, value, members, [most] * len(members)))
    if kind in (None, type(None)):
        return value is None
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and 0 <= value <= most
    if kind is float:
        return isinstance(value, int | float) and abs(value) < 1e38 and math.isfinite(value)
    return isinstance(kind, type) and isinstance(value, kind)


def _described(kind: object) -> str:
    """Returns a description of an annotated type for an error message."""
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(map(_described, get_args(kind)))
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) is tuple:
        return f"a list ({_described(get_args(kind)[0])} each)"
    words: dict[object, str] = {
        int: "an integer in the supported range",
        float: "a finite number",
        bool: "true or false",
        str: "a text",
    }
    return words.get(kind, "null" if kind in (None, type(None)) else str(kind))
