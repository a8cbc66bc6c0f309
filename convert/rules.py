"""How an NNX parameter is called and laid out in a PyTorch checkpoint.

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
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from flax import nnx

from clvr_jax.errors import ClvrError

Array = np.ndarray
Path = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class TensorTransform:
    """A pair of inverse re-layouts of one tensor, and the PyTorch shape that an NNX shape becomes."""

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
    """An exception: the NNX path (dots, no layer index) that matches `pattern` has this key (template) and transform.

    `key` may use the pattern's groups as \\1; None keeps the general name. `dtype` is the PyTorch dtype if it is fixed.
    """

    pattern: str
    key: str | None = None
    transform: TensorTransform | None = None
    dtype: str | None = None


@dataclasses.dataclass(frozen=True)
class KeyMapping:
    """What the general rules do not say about one architecture.

    stacked: dotted paths of modules built by `stack_blocks`.
    special: exceptions, the first that matches holds.
    prefix: written before every key, for checkpoints that hold the model inside a larger one.
    """

    stacked: tuple[str, ...] = ()
    special: tuple[Rule, ...] = ()
    prefix: str = ""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One NNX leaf and the PyTorch tensors that it is made of.

    path: path in the NNX state; shape: its shape; keys: one PyTorch key, or one for each layer of a stack;
    torch_shape: shape of each of those tensors.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: Any
    keys: tuple[str, ...]
    torch_shape: tuple[int, ...]
    transform: TensorTransform
    stacked: bool
    torch_dtype: str | None

    def from_torch(self, tensors: list[Array]) -> Array:
        """PyTorch tensors in the order of `keys` -> the NNX leaf."""
        leaves = [np.asarray(self.transform.from_torch(tensor), order="C") for tensor in tensors]
        return np.stack(leaves) if self.stacked else leaves[0]

    def to_torch(self, leaf: Array) -> list[Array]:
        """The NNX leaf -> PyTorch tensors in the order of `keys`."""
        layers = list(leaf) if self.stacked else [leaf]
        return [np.asarray(self.transform.to_torch(layer), order="C") for layer in layers]


def leaves_of(module_or_state: Any) -> dict[Path, Any]:
    """Path -> array or ShapeDtypeStruct for every variable of an NNX module or state."""
    state = nnx.state(module_or_state) if isinstance(module_or_state, nnx.Module) else module_or_state
    flat: Iterable[tuple[Any, Any]] = nnx.to_flat_state(state)
    return {path: leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf for path, leaf in flat}


def entries(state: Any, key_mapping: KeyMapping) -> list[Entry]:
    """The correspondence of a whole model, in the order of the NNX state.

    Args:
      state: NNX module or state; shapes are enough (`nnx.eval_shape`).
      key_mapping: the architecture's key_mapping.
    Raises: ClvrError if a rule of the key_mapping matches nothing, which means that key_mapping and model went apart.
    """
    used: set[Rule] = set()
    result = []
    for path, leaf in leaves_of(state).items():
        result.append(_entry(path, tuple(leaf.shape), leaf.dtype, key_mapping, used))
    unused = [rule.pattern for rule in key_mapping.special if rule not in used]
    if unused:
        raise ClvrError(f"key mapping: no parameter matches {unused}")
    return result


def _entry(path: Path, shape: tuple[int, ...], dtype: Any, key_mapping: KeyMapping, used: set[Rule]) -> Entry:
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
    tensors: Mapping[str, Array], state: Any, key_mapping: KeyMapping, where: str = "checkpoint"
) -> Any:
    """PyTorch tensors -> an NNX state with the structure of `state`; strict about keys and shapes.

    Raises: ClvrError listing what is missing, what is unexpected and which shapes differ.
    """
    plan = entries(state, key_mapping)
    check_keys(plan, {key: tuple(tensor.shape) for key, tensor in tensors.items()}, where)
    flat = {entry.path: entry.from_torch([np.asarray(tensors[key]) for key in entry.keys]) for entry in plan}
    return nnx.from_flat_state(flat.items())


def state_to_torch(state: Any, key_mapping: KeyMapping) -> dict[str, Array]:
    """NNX module or state -> PyTorch key -> array, the inverse of `state_from_torch`."""
    leaves = leaves_of(state)
    tensors = {}
    for entry in entries(state, key_mapping):
        for key, tensor in zip(entry.keys, entry.to_torch(np.asarray(leaves[entry.path])), strict=True):
            tensors[key] = tensor.astype(entry.torch_dtype) if entry.torch_dtype else tensor
    return tensors


def check_keys(plan: list[Entry], found: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raises ClvrError, with both sides listed, unless `found` has exactly the plan's keys and shapes."""
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
    """Raises ClvrError, naming both sides, where a weight is stored as integers or booleans, which would be cast."""
    wrong = [
        f"{key} (expected a floating-point type, found {found[key]})"
        for entry in plan
        if np.dtype(entry.dtype).kind not in "iub"
        for key in entry.keys
        if found[key].kind in "iub"
    ]
    if wrong:
        raise ClvrError(f"{where}: {len(wrong)} weights are stored as another type: {_some(wrong)}; they are quantized")


def _some(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f", ... ({len(names) - most} more)" if len(names) > most else "")
