"""config.json of diffusers and transformers <-> our frozen configurations."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from clvr_jax.errors import ClvrError

Config = TypeVar("Config")


def from_known_fields(
    config_class: type[Config],
    given: Mapping[str, Any],
    *,
    fixed: Mapping[str, Any] | None = None,
    ignored: Iterable[str] = (),
) -> Config:
    """Builds a configuration from a JSON object, strictly.

    Args:
      config_class: a frozen dataclass; a field that the JSON lacks takes its default.
      given: the JSON object; keys that begin with an underscore are bookkeeping and skipped.
      fixed: fields our module does not have because it is written for one value; another value is an error.
      ignored: fields that do not touch the arithmetic.
    Raises: ClvrError for an unknown field or a fixed field with another value.
    """
    names = {field.name for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    fixed = fixed or {}
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key in names:
            values[key] = tuple(value) if isinstance(value, list) else value
        elif key in fixed:
            if value != fixed[key]:
                raise ClvrError(f"{config_class.__name__}: {key} = {value!r} is not supported, only {fixed[key]!r}")
        elif not key.startswith("_") and key not in ignored:
            raise ClvrError(f"{config_class.__name__}: unknown field {key!r} in config.json")
    return config_class(**values)
