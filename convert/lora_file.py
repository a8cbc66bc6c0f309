"""LoRA files: safetensors of diffusers, PEFT, kohya, ai-toolkit and LyCORIS, read as factors of PyTorch modules.

Every tensor of a file is used or named in an error. Files are written in diffusers' format.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from clvr_jax.convert.lora_config import METADATA, PEFT_NAME, AdapterConfig
from clvr_jax.convert.lora_names import TEXT_ENCODER, KeyAlias, component, key_aliases, without_prefix
from clvr_jax.convert.tensors import StoredTensor, read_header
from clvr_jax.errors import ClvrError
from clvr_jax.files import write_atomically
from clvr_jax.trees import some

FILE_NAME = "pytorch_lora_weights.safetensors"

_FACTOR = re.compile(r"(.+?)(?:\.lora_(A|B|down|up)(?:\.\w+)?|[._]lora(?:_linear_layer)?\.(down|up))\.weight")
_ALPHA = re.compile(r"(.+)\.alpha")
_OTHER_KINDS = {
    "DoRA": re.compile(r".+\.(dora_scale|lora_magnitude_vector)\b.*"),
    "LoKr": re.compile(r".+\.lokr_.+"),
    "LoHa": re.compile(r".+\.hada_.+"),
    "LoCon with a core tensor": re.compile(r".+\.lora_mid\..+"),
}


@dataclass(frozen=True)
class Factors:
    """The low-rank delta of one PyTorch weight: scale * up down.

    down: (rank, in) or (rank, in, height, width); up: (out, rank) or (out, rank, 1, 1); scale: alpha / rank.
    """

    down: np.ndarray
    up: np.ndarray
    scale: float


def find_lora(path: Path) -> Path | None:
    """Returns the LoRA file at `path`, a file or a directory that contains one; None if `path` is a complete model.

    Raises: ClvrError for a directory with neither a model nor exactly one LoRA file, and for a damaged file.
    """
    if path.is_dir():
        is_model = any((path / name).exists() for name in ("config.json", "model_index.json"))
        return None if is_model else _file(path)
    kinds = (_FACTOR, *_OTHER_KINDS.values())
    return path if any(kind.fullmatch(tensor.key) for tensor in read_header(path) for kind in kinds) else None


def read_factors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], ignore_text_encoder: bool = False
) -> dict[str, Factors]:
    """Reads the factors in a LoRA file.

    Args:
      path: the file, or a directory that contains it (diffusers' or PEFT's file name, or the only file).
      shapes: module -> shape of its PyTorch weight, for all modules of the model that can be adapted.
      ignore_text_encoder: leave out tensors that adapt a text encoder, which are an error otherwise.
    Returns: diffusers' name of a module -> its factors.
    Raises: ClvrError for a file that is missing, damaged, of another kind (DoRA, LoKr, LoHa) or of another model.
    """
    file = _file(path)
    stored = {tensor.key: tensor for tensor in read_header(file)}
    _refuse_other_kinds(file, stored)
    text = [key for key in stored if TEXT_ENCODER.fullmatch(key)]
    if text and not ignore_text_encoder:
        raise ClvrError(
            f"{file}: {len(text)} tensors adapt a text encoder ({some(text, 2)}); "
            f"--ignore-text-encoder (in Python, ignore_text_encoder=True) uses only the {component(shapes)}"
        )
    names = key_aliases(shapes)
    pairs, faults = _paired({key: tensor for key, tensor in stored.items() if key not in text}, names, shapes)
    if faults:
        listed = "; ".join(f"{len(keys)} {title}: {some(keys)}" for title, keys in faults.items())
        raise ClvrError(f"{file}: not a LoRA of this {component(shapes)} (it has {some(shapes, 2)}); {listed}")
    if not pairs:
        raise ClvrError(f"{file}: contains no LoRA of a {component(shapes)}; it has {some(stored)}")
    config = AdapterConfig.read(file, component(shapes))
    factors: dict[str, Factors] = {}
    for name, (down, up, alpha) in pairs.items():
        scale = config.scale(name, down.shape[0], None if alpha is None else _number(alpha))
        downs, ups = _split(names[name], down.open(), up.open())
        for module, own_down, own_up in zip(names[name].modules, downs, ups, strict=True):
            if module in factors:
                raise ClvrError(f"{file}: adapts {module} twice, once as {name}; a file must hold one adapter")
            factors[module] = Factors(own_down, own_up, scale)
    return factors


def write_factors(path: Path, factors: Mapping[str, Factors], component: str) -> None:
    """Writes a file that `load_lora_weights` of a diffusers pipeline reads; the file appears only when it is complete.

    Args:
      path: a directory, in which the file is named `pytorch_lora_weights.safetensors`, or a path that ends in
        .safetensors.
      factors: diffusers' name of a module -> its factors.
      component: "transformer" or "unet".
    Raises: ClvrError if it cannot be written.
    """
    tensors, ranks, alphas = {}, {}, {}
    for module, pair in factors.items():
        tensors[f"{component}.{module}.lora_A.weight"] = np.ascontiguousarray(pair.down)
        tensors[f"{component}.{module}.lora_B.weight"] = np.ascontiguousarray(pair.up)
        ranks[module] = pair.down.shape[0]
        alphas[module] = float(f"{pair.scale * ranks[module]:.12g}")  # alpha / rank * rank can miss alpha by one bit
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{module}": own for module, own in ranks.items() if own != rank},
        "alpha_pattern": {f"^{module}": own for module, own in alphas.items() if own != alpha},
        "target_modules": sorted(factors),
    }
    adapter = json.dumps({f"{component}.{key}": value for key, value in config.items()}, indent=2, sort_keys=True)
    target = path if path.suffix == ".safetensors" else path / FILE_NAME
    write_atomically(target, save(tensors, metadata={"format": "pt", METADATA: adapter}))


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


def _refuse_other_kinds(file: Path, keys: Mapping[str, StoredTensor]) -> None:
    for kind, pattern in _OTHER_KINDS.items():
        if own := [key for key in keys if pattern.fullmatch(key)]:
            raise ClvrError(
                f"{file}: is a {kind} ({some(own, 1)}), not a plain LoRA; merge it into the weights with its own tool"
            )


def _paired(
    stored: Mapping[str, StoredTensor], names: Mapping[str, KeyAlias], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, tuple[StoredTensor, StoredTensor, StoredTensor | None]], dict[str, list[str]]]:
    """Returns name in the file -> (down, up, alpha), and the invalid keys by kind of error."""
    parts: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    faults: dict[str, list[str]] = defaultdict(list)
    for key, tensor in stored.items():
        match = _FACTOR.fullmatch(key) or _ALPHA.fullmatch(key)
        name = without_prefix(match[1]) if match else ""
        if match is None or name not in names:
            faults["unknown"].append(key)
            continue
        part = "alpha" if match.re is _ALPHA else "down" if (match[2] or match[3]) in ("A", "down") else "up"
        if part in parts[name]:
            faults["given twice"].append(key)
        parts[name][part] = tensor
    pairs = {}
    for name, own in parts.items():
        if not {"down", "up"} <= own.keys():
            faults["without the other half"] += [tensor.key for tensor in own.values()]
            continue
        down, up = own["down"], own["up"]
        outputs = sum(shapes[module][0] for module in names[name].modules)
        inputs = shapes[names[name].modules[0]][1:]
        rank = down.shape[0] if down.shape else 0
        expected = (rank, *inputs), (outputs, rank, *(1 for _ in inputs[1:]))
        if rank == 0 or (down.shape, up.shape) != expected:
            model = f"the model's {expected[0]} and {expected[1]}"
            faults["of another shape"].append(f"{down.key} {down.shape} and {up.key} {up.shape} ({model})")
        pairs[name] = down, up, own.get("alpha")
    return pairs, faults


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


def _number(tensor: StoredTensor) -> float:
    return float(np.asarray(tensor.open(), np.float64).reshape(-1)[0])
