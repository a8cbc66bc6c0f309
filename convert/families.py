"""Which model a folder holds: the architectures that can be converted, told apart by config.json."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from clvr_jax.convert import autoencoder_kl_flux2, flux2_transformer, qwen3, qwen3_vl
from clvr_jax.convert.rules import Entry, Table, entries
from clvr_jax.convert.tensors import DIFFUSERS_NAME, TRANSFORMERS_NAME
from flax import nnx
from jax.typing import DTypeLike

from clvr_jax.errors import ClvrError
from clvr_jax.files import read_json
from clvr_jax.models.autoencoder_kl_flux2 import AutoencoderKLFlux2
from clvr_jax.models.flux2_transformer import Flux2Transformer
from clvr_jax.models.qwen3 import Qwen3
from clvr_jax.models.qwen3_vl import Qwen3VL


@dataclass(frozen=True)
class Family:
    """One architecture.

    title: for people. torch_class: the PyTorch class that reads such a folder, `_class_name` (diffusers) or
    `architectures` (transformers) in config.json. module, config_from_dict: config.json -> the NNX module.
    file_name: stem of its safetensors files.
    """

    title: str
    torch_class: str
    module: Callable[..., nnx.Module]
    config_from_dict: Callable[[Mapping[str, Any]], Any]
    table: Table
    file_name: str

    def abstract(self, config: Mapping[str, Any], dtype: DTypeLike = jnp.float32) -> nnx.State:
        """Shapes and dtypes of the parameters of a model with this config.json; nothing is allocated."""
        made = self.config_from_dict(config)
        return nnx.state(nnx.eval_shape(lambda: self.module(made, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)))

    def entries(self, config: Mapping[str, Any]) -> list[Entry]:
        """The correspondence of every parameter with PyTorch's tensors."""
        return entries(self.abstract(config), self.table)


FAMILIES = (
    Family(
        "FLUX.2 transformer",
        "Flux2Transformer2DModel",
        Flux2Transformer,
        flux2_transformer.config_from_dict,
        flux2_transformer.TABLE,
        DIFFUSERS_NAME,
    ),
    Family(
        "FLUX.2 autoencoder",
        "AutoencoderKLFlux2",
        AutoencoderKLFlux2,
        autoencoder_kl_flux2.config_from_dict,
        autoencoder_kl_flux2.TABLE,
        DIFFUSERS_NAME,
    ),
    Family("Qwen3", "Qwen3ForCausalLM", Qwen3, qwen3.config_from_dict, qwen3.TABLE, TRANSFORMERS_NAME),
    Family(
        "Qwen3-VL",
        "Qwen3VLForConditionalGeneration",
        Qwen3VL,
        qwen3_vl.config_from_dict,
        qwen3_vl.TABLE,
        TRANSFORMERS_NAME,
    ),
)


def torch_class(folder: Path) -> str | None:
    """The PyTorch class that config.json in `folder` names, None if there is no such file or name."""
    if not (folder / "config.json").exists():
        return None
    config = read_json(folder / "config.json")
    return config.get("_class_name") or next(iter(config.get("architectures") or []), None)


def family_of(folder: Path) -> Family:
    """The architecture of the model in a folder.

    Raises: ClvrError, listing what can be converted, for anything else.
    """
    found = torch_class(folder)
    for family in FAMILIES:
        if family.torch_class == found:
            return family
    known = ", ".join(family.torch_class for family in FAMILIES)
    what = f"holds a {found}" if found else "has no config.json that names its class"
    raise ClvrError(f"{folder}: {what}; what can be converted is {known}")
