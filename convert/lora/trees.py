"""Loading and saving of LoRA files as LoRA trees of `Flux2Transformer` and `UNet2DCondition`."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.typing import DTypeLike
from jaxtyping import PyTree

from clvr_jax.convert.lora.files import Factors, read_factors
from clvr_jax.convert.lora.names import component
from clvr_jax.convert.lora.writing import LoRANames, write_factors, write_original_factors
from clvr_jax.convert.rules import Entry, KeyMapping, entries
from clvr_jax.errors import ClvrError
from clvr_jax.models.common.adapters import KernelAdapter, WeightAdapter, is_adapter
from clvr_jax.models.common.lora import LoRAPair, factor_shapes, is_pair
from clvr_jax.trees import Params, dotted, leaves_by_path, some
from clvr_jax.trees import Path as TreePath

Adapter = LoRAPair | KernelAdapter


def load_lora(
    path: Path,
    key_mapping: KeyMapping,
    state: Params,
    *,
    ignore_text_encoder: bool = False,
    dtype: DTypeLike | None = None,
) -> Params:
    """Reads a LoRA file of diffusers, PEFT, kohya, ai-toolkit (BFL's names) or LyCORIS, and detects its format.

    Kernels with LoHa, LoKr, a core tensor or DoRA get a `KernelAdapter` (`clvr_jax.models.common.adapters`), which can
    be merged, but not trained or saved.

    Args:
      path: the file, or the directory that contains it.
      key_mapping: of the model.
      state: NNX module or state of the model; shapes are enough.
      ignore_text_encoder: leave out tensors that adapt a text encoder, which are an error otherwise.
      dtype: of the factors; None keeps the file's.
    Returns: a LoRA tree (`clvr_jax.models.common.lora`).
    Raises: ClvrError, which lists both sides, for a file that is damaged, of another kind or of another model.
    """
    plan = _adaptable(state, key_mapping)
    factors = read_factors(path, _shapes(plan), ignore_text_encoder)
    layers = {entry.path: [factors.get(module) for module in _modules(entry)] for entry in plan}
    return unflatten_dict(
        {entry.path: _adapter(entry, layers[entry.path], dtype) for entry in plan if any(layers[entry.path])}
    )


def adapters_by_path(loras: Sequence[tuple[Params, float]]) -> dict[TreePath, list[tuple[Adapter, float]]]:
    """LoRA trees with their weights -> for each path of a kernel, its adapters, on the host, with their weights."""
    found: dict[TreePath, list[tuple[Adapter, float]]] = {}
    for tree, weight in loras:
        for path, adapter in leaves_by_path(tree, is_adapter).items():
            found.setdefault(path, []).append((jax.tree.map(np.asarray, adapter), weight))
    return found


def delta_slice(
    adapters: Sequence[tuple[Adapter, float]],
    layer: int | None,
    index: tuple[slice, ...],
    kernel: Callable[[], np.ndarray],
) -> np.ndarray:
    """Computes a part of what LoRAs add to a kernel, the weighted sum of their deltas, on the host in float32.

    Args:
      adapters: of one kernel, with their weights.
      layer: of a stack of kernels; None for a kernel that is none.
      index: slices of the kernel (of that layer), one for each leading axis.
      kernel: returns the complete kernel (of that layer) in float32; called only for a `KernelAdapter`.
    """
    total: Any = np.float32(0)
    for adapter, weight in adapters:
        if isinstance(adapter, KernelAdapter):
            total = total + np.float32(weight) * adapter.layer_delta(layer, kernel())[index]
            continue
        factors: tuple[PyTree, PyTree] = adapter.a, adapter.b
        a, b = (np.asarray(factor if layer is None else factor[layer], np.float32) for factor in factors)
        scale = adapter.scale if not isinstance(adapter.scale, tuple) else adapter.scale[layer or 0]
        *outer, rows, columns = (*index, *[slice(None)] * (a.ndim - len(index)))
        # The `b` of a convolution is the same at every place of the window.
        total = total + np.float32(weight * scale) * (a[(*outer, rows)] @ b[..., columns])
    out: np.ndarray = total
    return out


def save_lora(path: Path, lora: Params, key_mapping: KeyMapping, state: Params, names: LoRANames = "diffusers") -> None:
    """Writes a LoRA tree to a file that `load_lora_weights` of the model's diffusers pipeline reads.

    Trailing ranks in which both factors are zero, and layers without nonzero ranks, are padding and are not written.

    Args:
      path: a directory, in which the file is named `pytorch_lora_weights.safetensors`, or a path that ends in
        .safetensors.
      lora: the LoRA tree, in the dtype of the file.
      key_mapping, state: as for `load_lora`.
      names: the tool whose names the tensors get; see `write_factors` and `write_original_factors`.
    Raises: ClvrError for pairs that do not fit this model, or if all factors are zero.
    """
    plan = {entry.path: entry for entry in _adaptable(state, key_mapping)}
    adapters = leaves_by_path(lora, is_adapter)
    if merged := [dotted(at) for at, adapter in adapters.items() if not is_pair(adapter)]:
        raise ClvrError(
            f"{path}: {some(merged, 2)}: only a plain LoRA can be written, not LoHa, LoKr or DoRA; copy the file"
        )
    pairs: dict[TreePath, LoRAPair] = adapters
    foreign = [
        f"{dotted(at)} {pair.a.shape} {pair.b.shape} (the model's kernel: {plan[at].shape if at in plan else None})"
        for at, pair in pairs.items()
        if at not in plan or (pair.a.shape, pair.b.shape) != factor_shapes(plan[at].shape, pair.a.shape[-1])
    ]
    if foreign:
        raise ClvrError(f"{path}: the LoRA tree is of another model; {len(foreign)} do not fit: {some(foreign)}")
    factors = {name: own for at, pair in pairs.items() for name, own in _factors(plan[at], pair).items()}
    if not factors:
        raise ClvrError(f"{path}: nothing to write, the LoRA tree has no factor that is not zero")
    shapes = _shapes(plan.values())
    if names == "diffusers":
        write_factors(path, factors, component(shapes))
    else:
        write_original_factors(path, factors, shapes, names)


def _adaptable(state: Params, key_mapping: KeyMapping) -> list[Entry]:
    return [entry for entry in entries(state, key_mapping) if entry.path[-1] == "kernel"]


def _modules(entry: Entry) -> list[str]:
    return [key.removesuffix(".weight") for key in entry.keys]


def _shapes(plan: Iterable[Entry]) -> dict[str, tuple[int, ...]]:
    return {module: entry.torch_shape for entry in plan for module in _modules(entry)}


def _adapter(entry: Entry, layers: Sequence[Factors | WeightAdapter | None], dtype: DTypeLike | None) -> Adapter:
    """Returns one adapter for those of each layer; None is a layer that is not adapted."""
    if not any(isinstance(layer, WeightAdapter) for layer in layers):
        return _pair(entry, [layer for layer in layers if not isinstance(layer, WeightAdapter)], dtype)
    general = [layer.as_adapter(entry.torch_shape) if isinstance(layer, Factors) else layer for layer in layers]
    held = jax.tree.map(lambda tensor: jnp.asarray(tensor, dtype), tuple(general))
    return KernelAdapter(held, entry.stacked)


def _pair(entry: Entry, layers: Sequence[Factors | None], dtype: DTypeLike | None) -> LoRAPair:
    """Returns one pair for the factors of each layer; None is a layer that is not adapted."""
    present = [layer for layer in layers if layer is not None]
    rank = max(layer.down.shape[0] for layer in present)
    kind = np.dtype(dtype or jnp.result_type(*(x.dtype for layer in present for x in (layer.down, layer.up))))
    kernel = entry.shape[1:] if entry.stacked else entry.shape
    shape_a, shape_b = factor_shapes(kernel, rank)
    a, b = np.zeros((len(layers), *shape_a), kind), np.zeros((len(layers), *shape_b), kind)
    for i, layer in enumerate(layers):
        if layer is not None:
            # Layers of one stack share one shape. Zeros in the ranks that a layer lacks do not change its product, and
            # stay zero in training, because the gradient of each factor is a multiple of the other factor.
            own = layer.down.shape[0]
            a[i, ..., :own] = entry.transform.from_torch(layer.down)
            b[i, ..., :own, :] = entry.transform.from_torch(layer.up)
    scales = {layer.scale for layer in present}
    scale = scales.pop() if len(scales) == 1 else tuple(layer.scale if layer else 0.0 for layer in layers)
    a, b = (a, b) if entry.stacked else (a[0], b[0])
    return LoRAPair(jnp.asarray(a), jnp.asarray(b), scale)


def _factors(entry: Entry, pair: LoRAPair) -> dict[str, Factors]:
    """Returns module -> factors without padding, the inverse of `_pair`."""
    a, b = np.asarray(pair.a), np.asarray(pair.b)
    if not entry.stacked:
        a, b = a[None], b[None]
    scales = pair.scale if isinstance(pair.scale, tuple) else (pair.scale,) * len(a)
    factors = {}
    for module, own_a, own_b, scale in zip(_modules(entry), a, b, scales, strict=True):
        used = own_a.any(axis=tuple(range(own_a.ndim - 1))) | own_b.any(axis=(*range(own_b.ndim - 2), -1))
        if used.any():
            rank = int(np.flatnonzero(used)[-1]) + 1
            down, up = (entry.transform.to_torch(factor) for factor in (own_a[..., :rank], own_b[..., :rank, :]))
            factors[module] = Factors(down, up, scale)
    return factors
