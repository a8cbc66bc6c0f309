"""Arithmetic on parameter trees: deltas, full or low-rank, and the weighted sum of a base and its deltas (DSWM).

All arithmetic is float32, regardless of the dtypes of the trees, and each leaf is one compiled expression, so that
there is never a float32 copy of a complete tree, nor of a leaf if the compiler can fuse. All functions also work under
`jax.jit`. Results have the base's structure, dtypes and shardings. Leaves that are not floating-point (counters) are
not weights: they are those of the base, and their delta is 0.

Source: delta-space weight merging of CLVR: W = W_base + w_d (W_distill - W_base) + w_a (W_align - W_base).
"""

from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from clvr_jax.errors import ClvrError
from clvr_jax.models.common.adapters import KernelAdapter, is_adapter, kernel_delta
from clvr_jax.models.common.lora import KERNEL_AXES, LoRAPair, factor_shapes
from clvr_jax.trees import Leaf, Params, Path, by_pattern, dotted, leaves_by_path, some

# One weight for all leaves, or {regular expression: weight}: the first that matches in the path of a leaf, for example
# "transformer_blocks.attn.to_q.kernel", applies, else 1.
Weight = ArrayLike | Mapping[str, ArrayLike]


def dswm(
    base: Params, distill: Params, align: Params, distill_weight: Weight = 1.0, align_weight: Weight = 1.0
) -> Params:
    """Returns base + distill_weight (distill - base) + align_weight (align - base).

    Args:
      base, distill, align: full weights of one architecture; NNX states or any trees with the same paths and shapes.
      distill_weight, align_weight: a number, or {pattern: number} for the leaves whose path contains a match.
    Returns: a tree like `base`.
    Raises: ClvrError listing leaves that only one tree has or whose shapes or kinds differ, or patterns without a leaf.
    """
    others = {"distill": leaves_by_path(distill), "align": leaves_by_path(align)}
    leaves = leaves_by_path(base)
    for name, other in others.items():
        _check_same(leaves, other, name)
    weights = [_weights(weight, leaves) for weight in (distill_weight, align_weight)]
    return _map(lambda path, leaf: _dswm(leaf, *(o[path] for o in others.values()), *(w[path] for w in weights)), base)


def delta(tuned: Params, base: Params) -> Params:
    """Returns tuned - base, a tree like `base`. Raises: ClvrError under the same conditions as `dswm`."""
    leaves = leaves_by_path(tuned)
    _check_same(leaves_by_path(base), leaves, "tuned")
    return _map(lambda path, leaf: _difference(leaves[path], leaf), base, counter=jnp.zeros_like)


def apply_delta(base: Params, delta: Params, weight: Weight = 1.0) -> Params:
    """Returns base + weight * delta; -weight reverts it, up to rounding.

    Args:
      base: full weights.
      delta: a tree like `base`, as the function `delta` returns it, or a LoRA tree, whose adapters are multiplied out.
        The delta of DoRA depends on the base: it is the difference between the adapted kernel and `base`.
      weight: a number, or {pattern: number} for the leaves of `delta` whose path contains a match.
    Returns: a tree like `base`; leaves that a LoRA tree does not adapt are the same arrays.
    Raises: ClvrError listing leaves that do not match, adapters whose product does not have the kernel's shape, or
      patterns without a leaf.
    """
    leaves, deltas = leaves_by_path(base), leaves_by_path(delta, is_adapter)
    low_rank = any(map(is_adapter, deltas.values()))
    _check_same({path: leaves[path] for path in leaves.keys() & deltas} if low_rank else leaves, deltas, "delta")
    weights = _weights(weight, deltas)
    return _map(lambda path, leaf: _sum(leaf, deltas[path], weights[path]) if path in deltas else leaf, base)


def delta_of(tuned: jax.Array, base: jax.Array) -> jax.Array:
    """Returns tuned - base of one leaf, in float32."""
    return _at_least_float32(tuned) - _at_least_float32(base)


def add_deltas(
    base: jax.Array, distill: jax.Array, align: jax.Array, w_distill: ArrayLike, w_align: ArrayLike
) -> jax.Array:
    """Returns base + w_distill * distill + w_align * align of one leaf, in the base's dtype.

    Args:
      base: of any dtype.
      distill, align: its deltas in float32, of its shape.
      w_distill, w_align: scalars.
    """
    # The two small terms are added first, so that the base is rounded once.
    return (_at_least_float32(base) + (w_distill * distill + w_align * align)).astype(base.dtype)


@jax.jit
def _dswm(base: jax.Array, distill: jax.Array, align: jax.Array, w_distill: ArrayLike, w_align: ArrayLike) -> jax.Array:
    return add_deltas(base, delta_of(distill, base), delta_of(align, base), w_distill, w_align)


@jax.jit
def _difference(tuned: jax.Array, base: jax.Array) -> jax.Array:
    return delta_of(tuned, base).astype(base.dtype)


@jax.jit
def _sum(base: jax.Array, delta: jax.Array | LoRAPair | KernelAdapter, weight: ArrayLike) -> jax.Array:
    delta = kernel_delta(delta, base) if isinstance(delta, LoRAPair | KernelAdapter) else _at_least_float32(delta)
    return (_at_least_float32(base) + weight * delta).astype(base.dtype)


def _at_least_float32(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def _map(
    combine: Callable[[Path, jax.Array], jax.Array], base: Params, counter: Callable[[Leaf], Leaf] = lambda leaf: leaf
) -> Params:
    """Returns a tree like `base` of `combine(path, leaf)`, and of `counter(leaf)` for leaves that are not floating."""
    results = [
        _placed(combine(path, leaf), leaf) if _kind(leaf) == "floating" else counter(leaf)
        for path, leaf in leaves_by_path(base).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(base), results)


def _placed(result: jax.Array, leaf: Leaf) -> jax.Array:
    """Returns `result` with the sharding of `leaf`. XLA nearly always keeps it; under `jax.jit` XLA alone decides."""
    if isinstance(result, jax.core.Tracer) or not isinstance(leaf, jax.Array):
        return result
    same = result.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
    return result if same else jax.device_put(result, leaf.sharding)


def _weights(weight: Weight, paths: Iterable[Path]) -> dict[Path, ArrayLike]:
    return by_pattern(weight, paths, 1.0) if isinstance(weight, Mapping) else dict.fromkeys(paths, weight)


def _kind(leaf: ArrayLike) -> str:
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.result_type(leaf)
    return "floating" if jnp.issubdtype(dtype, jnp.floating) else str(dtype)


def _fits(base: ArrayLike, other: ArrayLike | LoRAPair | KernelAdapter) -> bool:
    if isinstance(other, KernelAdapter):
        return other.shape == np.shape(base)
    if not isinstance(other, LoRAPair):
        return (_kind(base), np.shape(base)) == (_kind(other), np.shape(other))
    one_each = isinstance(other.scale, float | int) or (len(other.scale),) == np.shape(base)[:-2]
    shapes = np.shape(other.a), np.shape(other.b)
    return one_each and np.ndim(base) in KERNEL_AXES and shapes == factor_shapes(np.shape(base), shapes[0][-1])


def _described(leaf: ArrayLike | LoRAPair | KernelAdapter) -> str:
    if isinstance(leaf, KernelAdapter):
        return f"adapter of a kernel {leaf.shape}"
    if not isinstance(leaf, LoRAPair):
        return f"{_kind(leaf)} {np.shape(leaf)}"
    return f"LoRA a {np.shape(leaf.a)} b {np.shape(leaf.b)} scale {leaf.scale}"


def _check_same(
    base: Mapping[Path, ArrayLike], other: Mapping[Path, ArrayLike | LoRAPair | KernelAdapter], name: str
) -> None:
    differing = [
        f"{dotted(path)} (base {_described(base[path])}, {name} {_described(other[path])})"
        for path in base
        if path in other and not _fits(base[path], other[path])
    ]
    sides = (
        ("only in base", [dotted(path) for path in base if path not in other]),
        (f"only in {name}", [dotted(path) for path in other if path not in base]),
        ("of another shape or kind", differing),
    )
    if faults := [f"{len(names)} {title}: {some(names)}" for title, names in sides if names]:
        raise ClvrError(f"merging: {name} does not match base; {'; '.join(faults)}")
