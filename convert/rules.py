"""The correspondence of NNX parameters and PyTorch tensors: keys, axis order and dtypes.

Our modules carry the attribute names of the PyTorch modules, so that nearly everything follows from the kind of a leaf:

    NNX leaf                    PyTorch key       transform
    kernel (in, out)            weight            transposed
    kernel (kh, kw, in, out)    weight            (out, in, kh, kw)
    scale, embedding            weight            as it is
    bias and all others         same name         as it is

A `KeyMapping` holds the exceptions of one architecture: which module attributes are scanned stacks (one NNX leaf with a
leading layer axis is `depth` PyTorch tensors), and the special leaves.
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import PyTree

from clvr_jax.checkpoint_io.orbax_tree import open_tree
from clvr_jax.errors import ClvrError
from clvr_jax.trees import Params, Path

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class TensorTransform:
    """Two inverse functions that reorder the axes of one tensor.

    to_torch: NNX array -> PyTorch array. from_torch: its inverse. torch_shape: NNX shape -> PyTorch shape.
    """

    to_torch: Callable[[Array], Array]
    from_torch: Callable[[Array], Array]
    torch_shape: Callable[[tuple[int, ...]], tuple[int, ...]]


def _permutation(order: tuple[int, ...]) -> TensorTransform:
    inverse = tuple(int(i) for i in np.argsort(order))
    return TensorTransform(
        to_torch=lambda array: np.transpose(array, order),
        from_torch=lambda array: np.transpose(array, inverse),
        torch_shape=lambda shape: tuple(shape[i] for i in order),
    )


AS_IS = TensorTransform(lambda array: array, lambda array: array, lambda shape: shape)
LINEAR = _permutation((1, 0))
CONV_2D = _permutation((3, 2, 0, 1))
CONV_3D = _permutation((4, 3, 0, 1, 2))
_KERNELS = {2: LINEAR, 4: CONV_2D, 5: CONV_3D}


@dataclasses.dataclass(frozen=True)
class Rule:
    """An exception for the NNX leaves whose dotted path, without a layer index, matches a pattern.

    pattern: regular expression for the whole path. key: PyTorch key, which may use the pattern's groups as \\1; None
    keeps the general key. transform: None keeps the general transform. dtype: PyTorch's dtype if it is fixed.
    """

    pattern: str
    key: str | None = None
    transform: TensorTransform | None = None
    dtype: str | None = None


@dataclasses.dataclass(frozen=True)
class KeyMapping:
    """The exceptions of one architecture from the general rules.

    stacked: dotted paths of the modules that `stack_blocks` built.
    special: exceptions; the first that matches a path applies.
    prefix: prepended to every key, for checkpoints that contain the model inside a larger one.
    """

    stacked: tuple[str, ...] = ()
    special: tuple[Rule, ...] = ()
    prefix: str = ""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One NNX leaf and the PyTorch tensors that it consists of.

    path: path in the NNX state. shape, dtype: of the leaf. keys: one PyTorch key, or one per layer of a stack.
    torch_shape: shape of each of these tensors. transform: reorders the axes of one of them. stacked: whether the
    leaf's first axis is the layers. torch_dtype: PyTorch's dtype if it is fixed, else None.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    keys: tuple[str, ...]
    torch_shape: tuple[int, ...]
    transform: TensorTransform
    stacked: bool
    torch_dtype: str | None

    def from_torch(self, tensors: list[Array]) -> Array:
        """Returns the NNX leaf of PyTorch tensors, which are in the order of `keys`."""
        leaves = [np.asarray(self.transform.from_torch(tensor), order="C") for tensor in tensors]
        return np.stack(leaves) if self.stacked else leaves[0]

    def to_torch(self, leaf: Array) -> list[Array]:
        """Returns the PyTorch tensors of an NNX leaf in the order of `keys`."""
        layers = list(leaf) if self.stacked else [leaf]
        return [np.asarray(self.transform.to_torch(layer), order="C") for layer in layers]


def leaves_of(module_or_state: Params) -> dict[Path, PyTree]:
    """Returns path -> array or ShapeDtypeStruct for every variable of an NNX module or state."""
    state = nnx.state(module_or_state) if isinstance(module_or_state, nnx.Module) else module_or_state
    flat: Iterable[tuple[Any, PyTree]] = nnx.to_flat_state(state)
    return {path: leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf for path, leaf in flat}


def entries(state: Params, key_mapping: KeyMapping) -> list[Entry]:
    """Returns one entry per parameter of a model, in the order of the NNX state.

    Args:
      state: NNX module or state; shapes are enough (`nnx.eval_shape`).
      key_mapping: of the architecture.
    Raises: ClvrError if a rule of the key mapping matches no parameter, so that it does not fit the model.
    """
    used: set[Rule] = set()
    result = []
    for path, leaf in leaves_of(state).items():
        result.append(_entry(path, tuple(leaf.shape), leaf.dtype, key_mapping, used))
    unused = [rule.pattern for rule in key_mapping.special if rule not in used]
    if unused:
        raise ClvrError(f"key mapping: no parameter matches {unused}")
    return result


def _entry(path: Path, shape: tuple[int, ...], dtype: np.dtype, key_mapping: KeyMapping, used: set[Rule]) -> Entry:
    dotted = ".".join(map(str, path))
    stack = next((name for name in key_mapping.stacked if dotted.startswith(name + ".")), None)
    layer_shape = shape[1:] if stack else shape
    owner, _, kind = dotted.rpartition(".")
    key = f"{owner}.{'weight' if kind in ('kernel', 'scale', 'embedding') else kind}"
    transform = _KERNELS.get(len(layer_shape), AS_IS) if kind == "kernel" else AS_IS
    torch_dtype = None
    for rule in key_mapping.special:
        match = re.fullmatch(rule.pattern, dotted)
        if match:
            used.add(rule)
            key = match.expand(rule.key) if rule.key is not None else key
            transform = rule.transform or transform
            torch_dtype = rule.dtype
            break
    if stack:
        keys = tuple(f"{key_mapping.prefix}{stack}.{i}{key[len(stack) :]}" for i in range(shape[0]))
    else:
        keys = (key_mapping.prefix + key,)
    return Entry(
        path, shape, dtype, keys, transform.torch_shape(layer_shape), transform, stack is not None, torch_dtype
    )


def state_from_torch(
    tensors: Mapping[str, Array], state: Params, key_mapping: KeyMapping, where: str = "checkpoint"
) -> Params:
    """Converts PyTorch tensors to an NNX state with the structure of `state`.

    Args:
      tensors: PyTorch key -> array.
      state: NNX module or state; shapes are enough.
      key_mapping: of the architecture.
      where: the source of the tensors, for the error.
    Raises: ClvrError listing missing keys, unexpected keys and shapes that differ.
    """
    plan = entries(state, key_mapping)
    check_keys(plan, {key: tuple(tensor.shape) for key, tensor in tensors.items()}, where)
    flat = {entry.path: entry.from_torch([np.asarray(tensors[key]) for key in entry.keys]) for entry in plan}
    return nnx.from_flat_state(flat.items())


def state_to_torch(state: Params, key_mapping: KeyMapping) -> dict[str, Array]:
    """Returns PyTorch key -> array for an NNX module or state, the inverse of `state_from_torch`."""
    leaves = leaves_of(state)
    tensors = {}
    for entry in entries(state, key_mapping):
        for key, tensor in zip(entry.keys, entry.to_torch(np.asarray(leaves[entry.path])), strict=True):
            tensors[key] = tensor.astype(entry.torch_dtype) if entry.torch_dtype else tensor
    return tensors


def check_keys(plan: list[Entry], found: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raises ClvrError, which lists both sides, unless `found` has exactly the keys and shapes of the plan."""
    expected = {key: entry.torch_shape for entry in plan for key in entry.keys}
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    misshapen = [
        f"{key} (expected {expected[key]}, found {found[key]})"
        for key in sorted(expected.keys() & found.keys())
        if tuple(expected[key]) != tuple(found[key])
    ]
    faults = [
        f"{len(names)} {title}: {_some(names)}"
        for title, names in (("missing", missing), ("unexpected", unexpected), ("with another shape", misshapen))
        if names
    ]
    if faults:
        raise ClvrError(f"{where}: tensors do not match the model; " + "; ".join(faults))


def check_dtypes(plan: list[Entry], found: Mapping[str, np.dtype], where: str) -> None:
    """Raises ClvrError, which names both sides, if a weight is stored as integers or booleans (quantized)."""
    wrong = [
        f"{key} (expected a floating-point type, found {found[key]})"
        for entry in plan
        if np.dtype(entry.dtype).kind not in "iub"
        for key in entry.keys
        if found[key].kind in "iub"
    ]
    if wrong:
        raise ClvrError(f"{where}: {len(wrong)} weights are stored as another type: {_some(wrong)}; they are quantized")


def check_tree(directory: pathlib.Path, plan: list[Entry]) -> dict[str, np.dtype]:
    """Raises ClvrError unless the checkpoint has exactly the leaves of a model.

    Returns: PyTorch key -> dtype of the leaf that contains the tensor.
    """
    arrays = open_tree(directory)
    expected = {".".join(map(str, entry.path)): entry for entry in plan}
    shared = expected.keys() & arrays.keys()
    faults = [
        f"{len(names)} {title}: {', '.join(sorted(names)[:6])}"
        for title, names in (
            ("missing", expected.keys() - arrays.keys()),
            ("unexpected", arrays.keys() - expected.keys()),
            ("with another shape", {name for name in shared if arrays[name].shape != expected[name].shape}),
        )
        if names
    ]
    if faults:
        raise ClvrError(f"{directory}: leaves do not match the model; " + "; ".join(faults))
    return {key: arrays[name].dtype for name, entry in expected.items() for key in entry.keys}


def _some(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f", ... ({len(names) - most} more)" if len(names) > most else "")
