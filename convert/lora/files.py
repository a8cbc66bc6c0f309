"""LoRA files: safetensors of diffusers, PEFT, kohya, ai-toolkit and LyCORIS, read as adapters of PyTorch modules.

LoRA, LoHa, LoKr, LoRA with a core tensor (LoCon) and DoRA of each are read. Every tensor of a file is used or named in
an error. `clvr_jax.convert.lora.writing` writes files.
"""

import functools
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from clvr_jax.checkpoint_io.tensors import StoredTensor, read_header
from clvr_jax.convert.lora.config import PEFT_NAME, AdapterConfig
from clvr_jax.convert.lora.names import (
    TEXT_ENCODER,
    KeyAlias,
    component,
    key_aliases,
    without_prefix,
)
from clvr_jax.errors import ClvrError
from clvr_jax.models.common.adapters import MAGNITUDE, WeightAdapter, adapter_product
from clvr_jax.trees import some

FILE_NAME = "pytorch_lora_weights.safetensors"

_FACTOR = re.compile(r"(.+?)(?:\.lora_(A|B|down|up)(?:\.\w+)?|[._]lora(?:_linear_layer)?\.(down|up))\.weight")
# Tensors of the other kinds, by LyCORIS' names: the pattern's second group, or the value.
_OTHERS = {
    re.compile(r"(.+)\.(alpha|dora_scale)"): None,
    re.compile(r"(.+)\.lora_magnitude_vector(?:\.\w+)*"): MAGNITUDE,
    re.compile(r"(.+)\.lora_mid\.weight"): "lora_mid",
    re.compile(r"(.+)\.(hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))(?:\.\w+)?"): None,
}
_PLAIN = frozenset({"lora_down", "lora_up"})
_LOKR = [
    frozenset({*left, *right})
    for left in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
    for right in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"), ("lokr_w2_a", "lokr_w2_b", "lokr_t2"))
]
_LOHA = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
_COMPLETE = {_PLAIN, _PLAIN | {"lora_mid"}, _LOHA, _LOHA | {"hada_t1", "hada_t2"}, *_LOKR}


@dataclass(frozen=True)
class Factors:
    """The low-rank delta of one PyTorch weight: scale * up down.

    down: (rank, in) or (rank, in, height, width); up: (out, rank) or (out, rank, 1, 1); scale: alpha / rank.
    """

    down: np.ndarray
    up: np.ndarray
    scale: float

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        """The factors by LyCORIS' names."""
        return {"lora_down": self.down, "lora_up": self.up}

    def as_adapter(self, shape: tuple[int, ...]) -> WeightAdapter:
        """Returns the same delta in the form of the other kinds. shape: of the PyTorch weight."""
        return WeightAdapter(self.tensors, shape, self.scale, (0, shape[0]))


def find_lora(path: Path) -> Path | None:
    """Returns the LoRA file at `path`, a file or a directory that contains one; None if `path` is a complete model.

    Raises: ClvrError for a directory with neither a model nor exactly one LoRA file, and for a damaged file.
    """
    if path.is_dir():
        is_model = any((path / name).exists() for name in ("config.json", "model_index.json"))
        return None if is_model else _file(path)
    parsed = [_parsed(tensor.key) for tensor in read_header(path)]
    return path if any(each is not None and each[1] != "alpha" for each in parsed) else None


def read_factors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], ignore_text_encoder: bool = False
) -> dict[str, Factors | WeightAdapter]:
    """Reads the adapters in a LoRA file.

    PiSSA, OLoRA, CorDA and LoRA-GA initialize an adapter with a part of the base's weights and subtract it from the
    base. Such an adapter is read if its initial adapter is beside it (see `AdapterConfig.initial_adapter`): the delta
    is the difference of both.

    Args:
      path: the file, or a directory that contains it (diffusers' or PEFT's file name, or the only file).
      shapes: module -> shape of its PyTorch weight, for all modules of the model that can be adapted.
      ignore_text_encoder: leave out tensors that adapt a text encoder, which are an error otherwise.
    Returns: diffusers' name of a module -> its factors, or its adapter if that is no plain LoRA.
    Raises: ClvrError for a file that is missing, damaged, of another kind or of another model.
    """
    file = _file(path)
    adapters = _checked(file, shapes, ignore_text_encoder)
    config = AdapterConfig.read(file, component(shapes))
    if config.fields.get("use_dora") and not any(MAGNITUDE in parts for parts in adapters.values()):
        raise ClvrError(f"{file}: use_dora is true, but the file has no lora_magnitude_vector; save the adapter again")
    factors = _opened(file, adapters, shapes, config)
    if (initial := config.initial_adapter()) is None:
        return factors
    start = _opened(initial, _checked(initial, shapes, ignore_text_encoder), shapes, config)
    return _minus(file, factors, start)


_Parts = dict[str, StoredTensor]
"""The tensors of one adapter, by LyCORIS' names."""


def _checked(file: Path, shapes: Mapping[str, tuple[int, ...]], ignore_text_encoder: bool) -> dict[str, _Parts]:
    """Returns name in the file -> its tensors. Raises: ClvrError if a tensor is unknown or does not fit the model."""
    stored = {tensor.key: tensor for tensor in read_header(file)}
    _check_dtypes(file, stored)
    text = [key for key in stored if TEXT_ENCODER.fullmatch(key)]
    if text and not ignore_text_encoder:
        raise ClvrError(
            f"{file}: {len(text)} tensors adapt a text encoder ({some(text, 2)}); "
            f"--ignore-text-encoder (in Python, ignore_text_encoder=True) uses only the {component(shapes)}"
        )
    names = key_aliases(shapes)
    adapters, invalid = _grouped({key: tensor for key, tensor in stored.items() if key not in text}, names, shapes)
    if invalid:
        listed = "; ".join(f"{len(keys)} {title}: {some(keys)}" for title, keys in invalid.items())
        raise ClvrError(f"{file}: not a LoRA of this {component(shapes)} (it has {some(shapes, 2)}); {listed}")
    if not adapters:
        raise ClvrError(f"{file}: contains no LoRA of a {component(shapes)}; it has {some(stored)}")
    return adapters


def _opened(
    file: Path, adapters: Mapping[str, _Parts], shapes: Mapping[str, tuple[int, ...]], config: AdapterConfig
) -> dict[str, Factors | WeightAdapter]:
    """Returns diffusers' name of a module -> its adapter. Raises: ClvrError if file and configuration differ."""
    names = key_aliases(shapes)
    factors: dict[str, Factors | WeightAdapter] = {}
    for name, parts in adapters.items():
        alpha = parts.pop("alpha", None)
        scale = config.scale(name, _rank(parts), None if alpha is None else _number(alpha))
        alias = names[name]
        if parts.keys() == _PLAIN:
            downs, ups = _split(alias, parts["lora_down"].open(), parts["lora_up"].open())
            own: list[Factors | WeightAdapter] = [Factors(*pair, scale) for pair in zip(downs, ups, strict=True)]
        else:
            own = _others(file, name, alias, parts, shapes, scale)
        for module, adapter in zip(alias.modules, own, strict=True):
            if module in factors:
                raise ClvrError(f"{file}: adapts {module} twice, once as {name}; a file must hold one adapter")
            factors[module] = adapter
    return factors


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise ClvrError(f"{path}: no such file or directory")
    found = sorted(path.glob("*.safetensors"))
    for name in (FILE_NAME, PEFT_NAME):
        if path / name in found:
            return path / name
    if len(found) != 1:
        names = some(f.name for f in found)
        raise ClvrError(f"{path}: contains neither {FILE_NAME} nor exactly one safetensors file; it has {names}")
    return found[0]


def _parsed(key: str) -> tuple[str, str] | None:
    """Returns the name of a module in a file and LyCORIS' name of its tensor; None for a tensor of no adapter."""
    if match := _FACTOR.fullmatch(key):
        return match[1], "lora_down" if (match[2] or match[3]) in ("A", "down") else "lora_up"
    for pattern, part in _OTHERS.items():
        if match := pattern.fullmatch(key):
            return match[1], part or match[2]
    return None


def _grouped(
    stored: Mapping[str, StoredTensor], names: Mapping[str, KeyAlias], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, _Parts], dict[str, list[str]]]:
    """Returns name in the file -> its tensors by LyCORIS' names, and the invalid keys by kind of error."""
    adapters: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    invalid: dict[str, list[str]] = defaultdict(list)
    for key, tensor in stored.items():
        parsed = _parsed(key)
        name = without_prefix(parsed[0]) if parsed else ""
        if parsed is None or name not in names:
            invalid["unknown"].append(key)
            continue
        if parsed[1] in adapters[name]:
            invalid["given twice"].append(key)
        adapters[name][parsed[1]] = tensor
    for name, parts in adapters.items():
        if parts.keys() - {"alpha", MAGNITUDE} not in _COMPLETE:
            invalid["incomplete"] += [tensor.key for tensor in parts.values()]
        elif misfit := _misfit(parts, _fused_shape(names[name], shapes)):
            invalid["of another shape"].append(misfit)
    return adapters, invalid


def _fused_shape(alias: KeyAlias, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Returns the shape of the PyTorch weight to which one name in a file refers."""
    return sum(shapes[module][0] for module in alias.modules), *shapes[alias.modules[0]][1:]


def _misfit(parts: Mapping[str, StoredTensor], shape: tuple[int, ...]) -> str | None:
    """Describes the tensors of an adapter if their product does not have the shape of the model's weight."""
    outputs, *inputs = shape
    found = {part: tensor.shape for part, tensor in parts.items() if part not in ("alpha", MAGNITUDE)}
    described = " and ".join(f"{parts[part].key} {own}" for part, own in found.items())
    if found.keys() == _PLAIN:
        rank = found["lora_down"][0] if found["lora_down"] else 0
        expected = (rank, *inputs), (outputs, rank, *(1 for _ in inputs[1:]))
        if rank == 0 or (found["lora_down"], found["lora_up"]) != expected:
            return f"{described} (the model's {expected[0]} and {expected[1]})"
    elif _product_size(tuple(sorted(found.items()))) != (outputs, math.prod(inputs)):
        return f"{described} (the model's weight: {shape})"
    if MAGNITUDE in parts and _magnitude_axis(parts[MAGNITUDE], shape) is None:
        return f"{parts[MAGNITUDE].key} {parts[MAGNITUDE].shape} (the model's {outputs} outputs or {inputs[0]} inputs)"
    return None


@functools.cache
def _product_size(found: tuple[tuple[str, tuple[int, ...]], ...]) -> tuple[int, int] | None:
    """Returns (outputs, inputs x window) of the product of an adapter's tensors; None if they do not fit together."""
    tensors = {part: jax.ShapeDtypeStruct(shape, np.float32) for part, shape in found}
    if any(0 in tensor.shape or len(tensor.shape) not in (2, 4) for tensor in tensors.values()):
        return None
    try:
        product = jax.eval_shape(adapter_product, tensors)
    except (TypeError, ValueError):
        return None
    return product.shape[0], math.prod(product.shape[1:])


def _magnitude_axis(magnitude: StoredTensor, shape: tuple[int, ...]) -> int | None:
    """Returns the axis of a weight along which DoRA has its magnitudes: 0, outputs, or 1, inputs; None if neither."""
    outputs, inputs = shape[:2]
    # PEFT has (out,), and (1, out, 1, 1) for a convolution; LyCORIS (out, 1) or (1, in) with a 1 for each other axis.
    by_input = magnitude.shape[:2] == (1, inputs) and ".lora_magnitude_vector" not in magnitude.key
    size = math.prod(magnitude.shape)
    if by_input and size == inputs:
        return 1
    return 0 if size == outputs else None


def _rank(parts: Mapping[str, StoredTensor]) -> int | None:
    """Returns the rank of an adapter's tensors; None for the full matrices of LoKr."""
    rows = next((parts[part] for part in ("lora_down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b") if part in parts), None)
    return None if rows is None else rows.shape[0]


def _others(
    file: Path,
    name: str,
    alias: KeyAlias,
    parts: Mapping[str, StoredTensor],
    shapes: Mapping[str, tuple[int, ...]],
    scale: float,
) -> list[Factors | WeightAdapter]:
    """Returns the adapter of each module that one adapter in the file, which is no plain LoRA, adapts."""
    fused = _fused_shape(alias, shapes)
    axis = _magnitude_axis(parts[MAGNITUDE], fused) if MAGNITUDE in parts else 0
    if axis == 1 and len(alias.modules) > 1:
        raise ClvrError(
            f"{file}: {name} has one DoRA magnitude for each input of a weight that is {len(alias.modules)} weights in "
            "this model, which is not supported; merge it into the weights with its own tool"
        )
    adapters: list[Factors | WeightAdapter] = []
    first = 0
    for module in alias.modules:
        rows = first, first + shapes[module][0]
        own = {part: tensor.open() for part, tensor in parts.items()}
        if MAGNITUDE in own and axis == 0:
            magnitude = own[MAGNITUDE].reshape(-1)
            if alias.swapped:
                magnitude = np.concatenate(np.split(magnitude, 2)[::-1])
            own[MAGNITUDE] = magnitude[slice(*rows)]
        adapters.append(WeightAdapter(own, fused, scale, rows, alias.swapped, axis or 0))
        first = rows[1]
    return adapters


def _minus(
    file: Path, trained: Mapping[str, Factors | WeightAdapter], initial: Mapping[str, Factors | WeightAdapter]
) -> dict[str, Factors | WeightAdapter]:
    """Returns trained - initial of plain LoRAs, which has the ranks of both. Raises: ClvrError if they do not match."""
    if trained.keys() != initial.keys():
        differing = sorted(trained.keys() ^ initial.keys())
        raise ClvrError(f"{file}: the initial adapter beside it adapts other modules: {some(differing)}")
    deltas: dict[str, Factors | WeightAdapter] = {}
    for module, own in trained.items():
        start = initial[module]
        if not isinstance(own, Factors) or not isinstance(start, Factors):
            raise ClvrError(f"{file}: {module} is no plain LoRA, so its initial adapter cannot be subtracted")
        down = np.concatenate([own.down, start.down])
        up = np.concatenate([own.up, -np.float32(start.scale / own.scale).astype(start.up.dtype) * start.up], axis=1)
        deltas[module] = Factors(down, up, own.scale)
    return deltas


def _split(alias: KeyAlias, down: np.ndarray, up: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns the down and up factors of each module that one pair in the file adapts."""
    if alias.swapped:
        return [down], [np.concatenate(np.split(up, 2)[::-1])]
    count = len(alias.modules)
    ups = np.split(up, count)
    if count > 1 and len(down) % count == 0:
        # If each module has ranks of its own, `up` is block-diagonal: separate adapters that were fused for saving.
        blocks = [np.split(own, count, axis=1) for own in ups]
        if all(blocks[i][j].any() == (i == j) for i in range(count) for j in range(count)):
            return np.split(down, count), [blocks[i][i] for i in range(count)]
    return [down] * count, ups


def _check_dtypes(file: Path, stored: Mapping[str, StoredTensor]) -> None:
    """Raises ClvrError if a factor is stored as integers or booleans (quantized), or an alpha is not one number."""
    wrong = [
        f"{key} ({tensor.dtype} {tensor.shape})"
        for key, tensor in stored.items()
        if (math.prod(tensor.shape) != 1 if key.endswith(".alpha") else tensor.dtype.kind in "iub")
    ]
    if wrong:
        raise ClvrError(
            f"{file}: {len(wrong)} of its tensors are of another type or shape: {some(wrong)}; factors must be "
            "floating-point tensors, an alpha one number"
        )


def _number(tensor: StoredTensor) -> float:
    return float(np.asarray(tensor.open(), np.float64).reshape(-1)[0])
