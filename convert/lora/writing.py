"""Writing of LoRA files with the names of diffusers and PEFT, ComfyUI, or kohya."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors.numpy import save

from clvr_jax.convert.lora.config import METADATA
from clvr_jax.convert.lora.files import FILE_NAME, Factors
from clvr_jax.convert.lora.names import KeyAlias, component, original_names
from clvr_jax.errors import ClvrError
from clvr_jax.files.atomic_io import write_atomically

LoRANames = Literal["diffusers", "comfyui", "kohya"]
"""The tools whose names the tensors of a file can have."""


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


def write_original_factors(
    path: Path, factors: Mapping[str, Factors], shapes: Mapping[str, tuple[int, ...]], names: LoRANames
) -> None:
    """Writes the factors of a FLUX.2 transformer under the names of its original code, as ComfyUI and kohya do.

    Weights that the original code fuses, query, key and value, become one adapter with the ranks of all of them. The
    file appears only when it is complete.

    Args:
      path: ends in .safetensors.
      factors: diffusers' name of a module -> its factors.
      shapes: module -> shape of its PyTorch weight, for all modules of the model that can be adapted.
      names: "comfyui" for diffusion_model.NAME.lora_A.weight without an alpha, the scale is part of lora_B; or "kohya"
        for lora_unet_NAME.lora_down.weight with one.
    Raises: ClvrError for another model, or if the file cannot be written.
    """
    if component(shapes) != "transformer":
        raise ClvrError(f"{path}: the names of {names} are written for FLUX.2 only; write those of diffusers")
    tensors: dict[str, np.ndarray] = {}
    for name, alias in original_names(shapes).items():
        if not any(module in factors for module in alias.modules):
            continue
        down, up = _fused(alias, factors, shapes)
        if names == "comfyui":
            parts = {f"diffusion_model.{name}.lora_A.weight": down, f"diffusion_model.{name}.lora_B.weight": up}
        else:
            key = "lora_unet_" + name.replace(".", "_")
            parts = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            parts[f"{key}.alpha"] = np.asarray(len(down), down.dtype)
        tensors |= {key: np.ascontiguousarray(tensor) for key, tensor in parts.items()}
    write_atomically(path, save(tensors, metadata={"format": "pt"}))


def _fused(
    alias: KeyAlias, factors: Mapping[str, Factors], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns down and scaled up of the modules that the original code fuses; the inverse of how they are read."""
    own = [factors.get(module) for module in alias.modules]
    down = np.concatenate([pair.down for pair in own if pair is not None])
    up = np.zeros((sum(shapes[module][0] for module in alias.modules), len(down)), down.dtype)
    row = column = 0
    for module, pair in zip(alias.modules, own, strict=True):
        rows = shapes[module][0]
        if pair is not None:
            rank = len(pair.down)
            scaled = np.float32(pair.scale) * pair.up.astype(np.float32)
            up[row : row + rows, column : column + rank] = scaled.astype(up.dtype)
            column += rank
        row += rows
    return down, np.concatenate(np.split(up, 2)[::-1]) if alias.swapped else up
