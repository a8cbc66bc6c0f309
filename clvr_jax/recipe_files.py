"""Recipes as files: a Python module that lies anywhere, and its configuration as JSON and back."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_type_hints

from clvr_jax.errors import ClvrError


def plain(config: Any) -> Any:
    """A configuration as JSON can hold it."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def rebuilt(template: Any, values: Any, declared: Any = None) -> Any:
    """The inverse of `plain`, for a configuration of the template's types.

    Args:
      template: a configuration, or the value of one of its fields.
      values: what `plain` made of another of the same types.
      declared: the declared type of the field, which decides where the template holds None.
    """
    if dataclasses.is_dataclass(template) and not isinstance(template, type):
        hints = get_type_hints(type(template))
        fields = {
            field.name: rebuilt(getattr(template, field.name), values[field.name], hints[field.name])
            for field in dataclasses.fields(template)
            if field.name in values
        }
        return dataclasses.replace(template, **fields)
    if isinstance(values, str) and (isinstance(template, Path) or Path in get_args(declared)):
        return Path(values)
    return tuple(values) if isinstance(template, tuple) else values


def import_recipe(path: Path) -> ModuleType:
    """The module of a recipe file, wherever it lies. Raises: ClvrError, one line, if it cannot be imported."""
    if not path.is_file():
        raise ClvrError(f"{path}: no such recipe; give a Python file such as configs/shapes_vae.py")
    name = f"clvr_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ClvrError(f"{path}: not a Python file; a recipe ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except ClvrError as error:
        raise ClvrError(f"{path}: {error}") from error
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ClvrError(f"{path}: cannot be imported ({type(error).__name__}: {reason})") from error
    return module
