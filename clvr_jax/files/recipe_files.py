"""Recipe files: found by name and imported; and conversion of their configuration to JSON and back."""

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from types import ModuleType
from typing import Any, ClassVar, Protocol, TypeVar, cast, get_args, get_type_hints

from clvr_jax.errors import ClvrError
from clvr_jax.files.buckets.paths import MAY_BE_IN_BUCKET, storage_path
from clvr_jax.files.file_names import local_path
from clvr_jax.files.json_input import JSON, UncheckedJSON, shown


class Configuration(Protocol):
    """A configuration: an instance of a frozen dataclass, whose fields are the options of its recipe."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


Config = TypeVar("Config", bound=Configuration)


def config_to_json(config: Configuration) -> dict[str, JSON]:
    """Returns a configuration as plain values that JSON can hold."""
    values: dict[str, JSON] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return values


def config_from_json(template: Config, values: UncheckedJSON) -> Config:
    """Returns a configuration of the template's types from plain values; the inverse of `config_to_json`.

    Args:
      template: a configuration.
      values: the result of `config_to_json` for a configuration of the same types.
    Raises: ClvrError, one line, for a value of another type than the template's.

    A configuration class whose fields were renamed has a table RENAMED, old name -> new name; "lora.rank" is the field
    `rank` of the configuration that the field `lora` contains.
    """
    return cast(Config, _from_json(template, values, None, "the configuration"))


def _from_json(template: object, values: object, declared: object, name: str) -> object:
    """Returns a configuration, or the value of one of its fields, whose declared type is used if its own is None."""
    _check_type(template, values, name)
    if dataclasses.is_dataclass(template) and not isinstance(template, type):
        assert isinstance(values, Mapping)  # checked
        hints = get_type_hints(type(template), include_extras=True)
        values = _with_new_names(values, getattr(template, "RENAMED", {}))
        fields = {
            field.name: _from_json(getattr(template, field.name), values[field.name], hints[field.name], field.name)
            for field in dataclasses.fields(template)
            if field.name in values
        }
        return dataclasses.replace(template, **fields)
    if isinstance(values, str) and (isinstance(template, PurePath) or Path in _parts(declared)):
        return storage_path(values) if MAY_BE_IN_BUCKET in _parts(declared) else local_path(values)
    return tuple(values) if isinstance(template, tuple) and isinstance(values, list) else values


def _parts(declared: object) -> list[object]:
    """Returns the members of a union and what is annotated to them."""
    return [declared, *(part for each in get_args(declared) for part in _parts(each))]


def _check_type(template: object, values: object, name: str) -> None:
    """Raises ClvrError for a plain value of another type than the template's; None is allowed for optional fields."""
    if dataclasses.is_dataclass(template) and not isinstance(template, type):
        expected, fits = "an object", isinstance(values, Mapping)
    elif isinstance(template, bool):
        expected, fits = "true or false", isinstance(values, bool)
    elif isinstance(template, int | float):
        expected, fits = "a number", isinstance(values, int | float) and not isinstance(values, bool)
    elif isinstance(template, str | PurePath):
        expected, fits = "a text", isinstance(values, str)
    elif isinstance(template, tuple):
        expected, fits = "a list", isinstance(values, list)
    else:
        return
    if not fits and (values is not None or expected == "an object"):
        raise ClvrError(f"{name} must be {expected}, got {shown(values)}")


def _with_new_names(values: UncheckedJSON, renamed: Mapping[str, str]) -> dict[str, JSON]:
    """Returns the plain values of a configuration with old names replaced; values under new names take precedence."""
    found = {name: value for name, value in values.items() if name not in renamed}
    for old, new in renamed.items():
        if old in values:
            field, _, inner = new.partition(".")
            found[field] = {inner: values[old], **found.get(field, {})} if inner else found.get(field, values[old])
    return found


def find_recipe(name: str | Path) -> Path:
    """Returns the file of a recipe.

    Args:
      name: a Python file, or the name of a recipe that is installed with the package, such as `pprl_shapes`.
    Raises: ClvrError, one line with the names that exist, for the name of no recipe.
    """
    path = Path(name)
    if path.is_file() or path.suffix or len(path.parts) != 1:
        return path
    spec = importlib.util.find_spec("clvr_jax.configs")
    directories = map(Path, (spec and spec.submodule_search_locations) or ())
    installed = {file.stem: file for directory in directories for file in sorted(directory.glob("*.py"))}
    if path.name in installed:
        return installed[path.name]
    names = ", ".join(stem for stem, file in installed.items() if "\nCONFIG = " in file.read_text(encoding="utf-8"))
    raise ClvrError(f"{name}: no such recipe; give a Python file, or one of {names}")


@contextmanager
def exits_refused(path: Path) -> Iterator[None]:
    """Turns a call of sys.exit in the code of a recipe into a ClvrError, as the command would end without a result.

    Args:
      path: of the recipe.
    """
    try:
        yield
    except SystemExit as error:
        raise exited(path, error) from error


def exited(path: Path, error: SystemExit) -> ClvrError:
    """Returns the error for a call of sys.exit in a recipe."""
    return ClvrError(
        f"{path}: the recipe calls sys.exit({error.code!r}) and ends without a result; raise an exception instead"
    )


def import_recipe(path: Path) -> ModuleType:
    """Imports a recipe file, wherever it is stored. Raises: ClvrError, one line, if it cannot be imported."""
    if not path.is_file():
        raise ClvrError(f"{path}: no such recipe; give a Python file, or the name of a recipe such as shapes_vae")
    name = f"clvr_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ClvrError(f"{path}: not a Python file; a recipe ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # needed by dataclasses
    try:
        spec.loader.exec_module(module)
    except SystemExit as error:
        raise exited(path, error) from error
    except ClvrError as error:
        raise ClvrError(f"{path}: {error}") from error
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ClvrError(f"{path}: cannot be imported ({type(error).__name__}: {reason})") from error
    return module
