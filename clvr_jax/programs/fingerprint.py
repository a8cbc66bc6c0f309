"""Digests of Python values that are the same in every process, for the keys of stored programs.

`hash` depends on the process, and a pickle on which objects are identical. Here a value is written as text that names
its types and contains everything in it. A value of an unknown type has no digest: a key that lacks a part of what a
program depends on would find the wrong program.
"""

import dataclasses
import enum
import functools
import hashlib
import types
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

_ROOTS = frozenset(
    {"builtins", "clvr_jax", "jax", "jaxlib", "flax", "optax", "numpy", "ml_dtypes", "jaxtyping", "functools", "enum"}
    | {"collections", "math", "operator", "typing", "types"}
)
"""Packages whose code an environment has the version or the digest of (`environment.py`)."""

_NOT_DIGESTED = "clvr_jax.configs"
"""Recipes, which are elsewhere than the package, so that no digest includes them."""

_ATOMS = (str, int, float, complex, bool, bytes, type(None), type(...))


class NotStorableError(Exception):
    """A program that is not stored, and why. It is compiled as any other."""


@runtime_checkable
class Fingerprinted(Protocol):
    """A value that knows its digest."""

    @property
    def fingerprint(self) -> str:
        """The digest, which is the same in every process."""
        ...


def fingerprint(*values: object) -> str:
    """Returns a digest of values, 64 hexadecimal digits. Raises: NotStorableError for a value without one."""
    words: list[str] = []
    try:
        for value in values:
            _write(value, words)
    except (RecursionError, ValueError) as error:  # a function that refers to itself, or to a variable without a value
        raise NotStorableError(f"a value has no fingerprint ({error})") from error
    return hashlib.blake2b("\0".join(words).encode(errors="surrogatepass"), digest_size=32).hexdigest()


def _write(value: Any, words: list[str]) -> None:
    kind = type(value)
    if kind in _ATOMS:
        words.append(f"{kind.__name__} {value!r}")  # a repr has no NUL
        return
    if kind in (tuple, list):
        words.append(f"{kind.__name__} {len(value)}")
        for each in value:
            _write(each, words)
        return
    if kind is type or isinstance(value, type):
        words.append(f"type {_name(value)}")
        return
    if kind not in _WRITERS:
        if (writer := _writer_of(value)) is None:
            raise NotStorableError(f"a value of the type {kind.__module__}.{kind.__qualname__} has no fingerprint")
        _WRITERS[kind] = writer
    _WRITERS[kind](value, words)


def _writer_of(value: object) -> Callable[[Any, list[str]], None] | None:
    # The order matters: an enum may be an int, a NamedTuple is a tuple, a dataclass may be callable.
    if isinstance(value, Fingerprinted):
        return lambda own, words: words.append(f"{_name(type(own))} {own.fingerprint}")
    if isinstance(value, enum.Enum):
        return lambda own, words: words.append(f"{_name(type(own))} {own.name}")
    if dataclasses.is_dataclass(value):
        return _write_dataclass
    if isinstance(value, tuple | list):
        return _write_sequence
    if isinstance(value, Mapping):
        return _write_mapping
    if isinstance(value, frozenset | set):
        return lambda own, words: words.append(f"{type(own).__name__} {sorted(fingerprint(each) for each in own)}")
    if isinstance(value, np.dtype):
        return lambda own, words: words.append(f"dtype {own.str} {own.name}")
    if isinstance(value, np.ndarray | np.generic):
        return _write_array
    if isinstance(value, jax.tree_util.PyTreeDef):
        return _write_treedef
    if isinstance(value, jax.sharding.Mesh):
        return _write_mesh
    if callable(value):
        return _write_function
    return None


def _name(kind: Any) -> str:
    """Returns the qualified name of a type or function. Raises: NotStorableError if its code can change unseen."""
    module = kind.__module__ or "builtins"
    if module.partition(".")[0] not in _ROOTS or module.startswith(_NOT_DIGESTED):
        raise NotStorableError(f"{module}.{kind.__qualname__} is code of which no version is known")
    return f"{module}.{kind.__qualname__}"


def _write_dataclass(value: Any, words: list[str]) -> None:
    fields = dataclasses.fields(value)
    words.append(f"{_name(type(value))} {len(fields)}")
    for field in fields:
        words.append(field.name)
        _write(getattr(value, field.name), words)


def _write_sequence(value: Any, words: list[str]) -> None:
    words.append(f"{_name(type(value))} {len(value)}")
    for each in value:
        _write(each, words)


def _write_mapping(value: Any, words: list[str]) -> None:
    words.append(f"{_name(type(value))} {len(value)}")
    for key, each in sorted(value.items(), key=lambda item: repr(item[0])):
        _write(key, words)
        _write(each, words)


def _write_array(value: Any, words: list[str]) -> None:
    if value.dtype.hasobject:
        raise NotStorableError("an array of Python objects has no fingerprint")
    content = hashlib.blake2b(np.ascontiguousarray(value).tobytes(), digest_size=32).hexdigest()
    words.append(f"{type(value).__name__} {value.dtype.name} {value.shape} {content}")


def _write_mesh(value: Any, words: list[str]) -> None:
    words.append("mesh")
    _write((tuple(value.shape.items()), tuple(map(str, value.axis_types or ()))), words)
    _write(tuple(device.id for device in value.devices.flat), words)


def _write_treedef(value: Any, words: list[str]) -> None:
    node, children = value.node_data(), value.children()
    if node is None:
        words.append("leaf" if value.num_leaves else "empty")
        return
    words.append(f"node {len(children)}")
    _write(node[0], words)
    _write(node[1], words)
    for child in children:
        _write_treedef(child, words)


def _write_function(value: Any, words: list[str]) -> None:
    if isinstance(value, functools.partial):
        words.append("partial")
        for part in (value.func, value.args, value.keywords):
            _write(part, words)
        return
    if isinstance(value, types.MethodType):
        words.append("method")
        _write(value.__self__, words)
        _write(value.__func__, words)
        return
    if getattr(value, "__qualname__", None) is None:
        raise NotStorableError(f"a function of the type {type(value).__qualname__} has no fingerprint")
    words.append(f"function {_name(value)}")
    if isinstance(value, types.FunctionType):
        _write_code(value.__code__, words)
        _write(value.__defaults__, words)
        _write(value.__kwdefaults__, words)
        for cell in value.__closure__ or ():
            _write(cell.cell_contents, words)
    elif (wrapped := getattr(value, "__wrapped__", None)) is not None:
        _write(wrapped, words)
    elif not isinstance(value, types.BuiltinFunctionType | np.ufunc):
        raise NotStorableError(f"a function of the type {type(value).__qualname__} has no fingerprint")


def _write_code(code: types.CodeType, words: list[str]) -> None:
    """Writes what tells two functions of one name apart, such as two lambdas of one function."""
    words.append(f"code {hashlib.blake2b(code.co_code, digest_size=32).hexdigest()} {code.co_names}")
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            _write_code(constant, words)
        else:
            words.append(repr(sorted(map(repr, constant))) if isinstance(constant, frozenset) else repr(constant))


_WRITERS: dict[type, Callable[[Any, list[str]], None]] = {
    dict: _write_mapping,
    np.ndarray: _write_array,
    types.FunctionType: _write_function,
    jax.tree_util.PyTreeDef: _write_treedef,
}
