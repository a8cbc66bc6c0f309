"""What tells the programs of one function apart, in this process and on disk."""

import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding

from clvr_jax.programs.environment import environment, layout_parts, mesh_parts, named_settings, settings, sources
from clvr_jax.programs.fingerprint import NotStorableError, fingerprint
from clvr_jax.sharding import MeshLayout, active_layout


class Signature(NamedTuple):
    """A call of a function, without the values of its arrays.

    static: names and values of the static arguments. tree: structure of the others. leaves: type of each, and the
    sharding of an array with whether it is committed to its devices. layout, mesh, settings: what tracing reads besides
    the arguments.
    """

    static: tuple[tuple[int | str, Hashable], ...]
    tree: jax.tree_util.PyTreeDef
    leaves: tuple[tuple[Any, ...], ...]
    layout: MeshLayout | None
    mesh: Hashable
    settings: tuple[object, ...]


def signature(
    static: tuple[tuple[int | str, Hashable], ...], args: Sequence[Any], named: Mapping[str, Any]
) -> Signature | None:
    """Returns the signature of a call; None inside of another function that is traced.

    static: the static arguments. args, named: the others.
    """
    leaves, tree = jax.tree.flatten((tuple(args), dict(named)))
    described: list[tuple[Any, ...]] = []
    for leaf in leaves:
        if isinstance(leaf, jax.core.Tracer):
            return None
        if isinstance(leaf, jax.Array):
            described.append((jax.typeof(leaf), leaf.sharding, leaf.committed))
        else:
            described.append((jax.typeof(leaf), type(leaf)))
    return Signature(static, tree, tuple(described), active_layout(), jax.sharding.get_abstract_mesh(), settings())


def disk_key(function: object, own: Signature, client: Any) -> str:
    """Returns the key of a signature on disk. Raises: NotStorableError if there is none.

    function: everything that tells functions apart.
    """
    return fingerprint(_environment(client), function, own.static, own.tree, call_parts(own))


def sharding_parts(shardings: Any) -> tuple[object, ...]:
    """Returns what describes a tree of shardings. Raises: NotStorableError for one of an unknown type."""
    leaves, tree = jax.tree.flatten(shardings)
    return tree, tuple(_part(leaf) for leaf in leaves)


def call_parts(own: Signature) -> tuple[object, ...]:
    """Returns what describes the arrays of a call and the settings that it is compiled with."""
    leaves = tuple((repr(leaf[0]), *map(_part, leaf[1:])) for leaf in own.leaves)
    mesh: Any = own.mesh
    return leaves, layout_parts(own.layout), mesh_parts(mesh), named_settings(own.settings)


def content_key(own: Signature, client: Any, lowered: jax.stages.Lowered) -> str | None:
    """Returns the digest of what is compiled; None if this version of JAX does not show all of it.

    Two functions may lower to the same text and use other arguments, or return other types, so these are in it.
    """
    compile_args = getattr(getattr(lowered, "_lowering", None), "compile_args", {})
    if "kept_var_idx" not in compile_args:
        return None
    results = [(repr(each.shape), str(each.dtype), repr(each)) for each in jax.tree.leaves(lowered.out_info)]
    kept = tuple(sorted(compile_args["kept_var_idx"]))
    # The tree of the arguments is not in it: a name in it may be that of another version of the source.
    return fingerprint(_compiler(client), call_parts(own), lowered.as_text(), kept, _donated(lowered), results)


def devices_of(own: Signature) -> list[jax.Device]:
    """Returns the devices of a program, in its order. Raises: NotStorableError if that is not certain."""
    shardings = {leaf[1] for leaf in own.leaves if len(leaf) == 3 and leaf[2]}
    orders: set[tuple[jax.Device, ...]] = set()
    for sharding in shardings:
        if isinstance(sharding, NamedSharding):
            orders.add(tuple(sharding.mesh.devices.flat))
        elif isinstance(sharding, SingleDeviceSharding):
            orders.add(tuple(sharding.device_set))
        else:
            raise NotStorableError(f"a sharding of the type {type(sharding).__name__} is not stored")
    if not orders and own.layout is not None:
        orders.add(tuple(own.layout.mesh.devices.flat))
    if not orders:
        default: Any = getattr(jax.config, "jax_default_device")  # noqa: B009 - not in JAX's types
        orders.add((default,) if isinstance(default, jax.Device) else (jax.local_devices()[0],))
    if len(orders) > 1:
        raise NotStorableError("arrays on different devices")
    return list(orders.pop())


def _part(value: Any) -> object:
    if isinstance(value, NamedSharding):
        return "mesh", mesh_parts(value.mesh), repr(value.spec), value.memory_kind
    if isinstance(value, SingleDeviceSharding):
        device: Any = next(iter(value.device_set))
        return "device", device.id, value.memory_kind
    if isinstance(value, type):
        return (
            f"{value.__module__}.{value.__qualname__}" if value.__module__ in ("builtins", "numpy") else _refuse(value)
        )
    if isinstance(value, bool | np.bool_):
        return bool(value)
    return _refuse(type(value))


def _refuse(kind: type) -> object:
    raise NotStorableError(f"an argument with the type {kind.__module__}.{kind.__qualname__} is not stored")


def _donated(lowered: jax.stages.Lowered) -> list[bool]:
    return [each.donated for each in jax.tree.leaves(lowered.args_info)]


@functools.lru_cache(maxsize=8)
def _environment(client: Any) -> str:
    return fingerprint(_compiler(client), sources())


@functools.lru_cache(maxsize=8)
def _compiler(client: Any) -> str:
    return environment(client)
