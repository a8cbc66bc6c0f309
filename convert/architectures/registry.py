"""The registry of architectures that can be converted, and their detection from config.json."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from clvr_jax.checkpoint_io.tensors import DIFFUSERS_NAME, TRANSFORMERS_NAME, Tensors
from clvr_jax.convert.architectures import (
    autoencoder_kl,
    autoencoder_kl_flux2,
    clip_text,
    flux2_transformer,
    qwen3,
    qwen3_vl,
    unet_2d_condition,
)
from clvr_jax.convert.rules import Entry, KeyMapping, entries
from clvr_jax.errors import ClvrError
from clvr_jax.files.atomic_io import read_json
from clvr_jax.files.json_input import JSON, UncheckedJSON
from clvr_jax.models.common.abstract import abstract_module
from clvr_jax.models.common.quantization import quantize_layers
from clvr_jax.models.flux2 import AutoencoderKLFlux2, Flux2Transformer
from clvr_jax.models.qwen3 import Qwen3, Qwen3Config
from clvr_jax.models.qwen3_vl import Qwen3VL
from clvr_jax.models.stable_diffusion import AutoencoderKL, CLIPText, UNet2DCondition
from clvr_jax.programs import stored_value
from clvr_jax.trees import Params

ModelConfig: TypeAlias = Any
"""The frozen configuration of an architecture's module: a class of its own for each architecture."""


def _checked(read: Callable[[UncheckedJSON], ModelConfig]) -> Callable[[UncheckedJSON], ModelConfig]:
    """Wraps a parser of config.json so that any malformed content raises ClvrError with one line."""

    @functools.wraps(read)
    def checked(config: UncheckedJSON) -> ModelConfig:
        try:
            return read(config)
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
            raise ClvrError(f"config.json: a field has another type than the model expects ({reason})") from error

    return checked


def _unchanged(tensors: Tensors, config: ModelConfig) -> Tensors:
    return tensors


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    title: name for tables and messages. torch_class: the PyTorch class that reads such a directory, `_class_name`
    (diffusers) or `architectures` (transformers) in config.json. module: the NNX module. config_from_dict,
    config_to_dict: config.json <-> the module's configuration. key_mapping: configuration -> key mapping. file_name:
    stem of its safetensors files. canonicalize_keys: (tensors of a file, configuration) -> the same tensors under the
    keys of the key mapping, for files that other versions of the PyTorch class saved.
    """

    title: str
    torch_class: str
    module: Callable[..., nnx.Module]
    config_from_dict: Callable[[UncheckedJSON], ModelConfig]
    config_to_dict: Callable[[ModelConfig], dict[str, JSON]]
    key_mapping: Callable[[ModelConfig], KeyMapping]
    file_name: str = DIFFUSERS_NAME
    canonicalize_keys: Callable[[Tensors, ModelConfig], Tensors] = _unchanged

    def __post_init__(self) -> None:
        object.__setattr__(self, "config_from_dict", _checked(self.config_from_dict))

    def make(self, config: UncheckedJSON, dtype: DTypeLike = jnp.float32) -> Any:
        """Returns the module of a config.json with random weights from seed 0."""
        return self.module(self.config_from_dict(config), rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)

    def split(self, config: UncheckedJSON, dtype: DTypeLike = jnp.float32) -> tuple[nnx.GraphDef[nnx.Module], Params]:
        """Returns graph and abstract state (shapes and dtypes) of a config.json's model; allocates no weights."""
        graphdef, state = _split(self, self.config_from_dict(config), jnp.dtype(dtype))
        return graphdef, jax.tree.map(lambda leaf: leaf, state)  # a copy: states are changed in place

    def entries(self, config: UncheckedJSON) -> list[Entry]:
        """Returns one entry per parameter: its correspondence with PyTorch's tensors."""
        made = self.config_from_dict(config)
        return entries(_split(self, made, jnp.dtype(jnp.float32))[1], self.key_mapping(made))


# Tracing a UNet takes seconds, and a conversion needs the result several times.
@functools.lru_cache(maxsize=16)
def _split(architecture: Architecture, made: ModelConfig, dtype: jnp.dtype) -> tuple[nnx.GraphDef[nnx.Module], Params]:
    def traced() -> tuple[nnx.GraphDef[nnx.Module], Params]:
        return nnx.split(
            abstract_module(lambda rngs: architecture.module(made, rngs=rngs, dtype=dtype, param_dtype=dtype))
        )

    try:
        graphdef, state = stored_value(traced, architecture.torch_class, architecture.module, made, dtype)
    except (ArithmeticError, AssertionError, LookupError, MemoryError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise ClvrError(f"config.json: no {architecture.title} can be built of these sizes ({reason})") from error
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))
    if parameters > MOST_PARAMETERS:
        raise ClvrError(f"config.json: a {architecture.title} of {parameters:.3g} parameters; its sizes are damaged")
    return graphdef, state


FLUX2_TRANSFORMER = Architecture(
    "FLUX.2 transformer",
    "Flux2Transformer2DModel",
    Flux2Transformer,
    flux2_transformer.config_from_dict,
    flux2_transformer.config_to_dict,
    lambda config: flux2_transformer.KEY_MAPPING,
)
FLUX2_VAE = Architecture(
    "FLUX.2 autoencoder",
    "AutoencoderKLFlux2",
    AutoencoderKLFlux2,
    autoencoder_kl_flux2.config_from_dict,
    autoencoder_kl_flux2.config_to_dict,
    lambda config: autoencoder_kl_flux2.KEY_MAPPING,
)
QWEN3 = Architecture(
    "Qwen3",
    "Qwen3ForCausalLM",
    Qwen3,
    qwen3.config_from_dict,
    qwen3.config_to_dict,
    lambda config: qwen3.KEY_MAPPING,
    TRANSFORMERS_NAME,
    qwen3.canonicalize_keys,
)


@functools.cache  # equal families share what is known of them
def qwen3_hidden_states(layers: tuple[int, ...]) -> Architecture:
    """A Qwen3 of which only these hidden states are read: layers above the last of them, and the head, are left out.

    Its directories are those of the whole model; the tensors that are left out are not read.
    """
    top = max(1, *layers)

    def depth(config: Qwen3Config) -> int:
        return min(top, config.num_hidden_layers)

    return replace(
        QWEN3,
        module=lambda config, **options: Qwen3(config, depth=depth(config), **options),
        canonicalize_keys=lambda tensors, config: qwen3.first_layers(
            qwen3.canonicalize_keys(tensors, config), config, depth(config)
        ),
    )


@functools.cache
def quantized(architecture: Architecture) -> Architecture:
    """Returns an architecture whose module has int8 weights; its `entries` are unusable: files have none."""
    return replace(
        architecture, module=lambda config, **options: quantize_layers(architecture.module(config, **options))
    )


QWEN3_VL = Architecture(
    "Qwen3-VL",
    "Qwen3VLForConditionalGeneration",
    Qwen3VL,
    qwen3_vl.config_from_dict,
    qwen3_vl.config_to_dict,
    lambda config: qwen3_vl.KEY_MAPPING,
    TRANSFORMERS_NAME,
    qwen3_vl.canonicalize_keys,
)
UNET = Architecture(
    "Stable Diffusion UNet",
    "UNet2DConditionModel",
    UNet2DCondition,
    unet_2d_condition.config_from_dict,
    unet_2d_condition.config_to_dict,
    unet_2d_condition.key_mapping,
)
AUTOENCODER_KL = Architecture(
    "Stable Diffusion autoencoder",
    "AutoencoderKL",
    AutoencoderKL,
    autoencoder_kl.config_from_dict,
    autoencoder_kl.config_to_dict,
    lambda config: autoencoder_kl.KEY_MAPPING,
    canonicalize_keys=lambda tensors, config: autoencoder_kl.canonicalize_keys(tensors),
)
CLIP_TEXT = Architecture(
    "CLIP text encoder",
    "CLIPTextModel",
    CLIPText,
    clip_text.config_from_dict,
    clip_text.config_to_dict,
    lambda config: clip_text.KEY_MAPPING,
    TRANSFORMERS_NAME,
    lambda tensors, config: clip_text.canonicalize_keys(tensors),
)
CLIP_TEXT_PROJECTED = Architecture(
    "CLIP text encoder with projection",
    "CLIPTextModelWithProjection",
    CLIPText,
    clip_text.config_from_dict,
    clip_text.config_to_dict,
    lambda config: clip_text.KEY_MAPPING,
    TRANSFORMERS_NAME,
    lambda tensors, config: clip_text.canonicalize_keys(tensors),
)
ARCHITECTURES = (
    FLUX2_TRANSFORMER,
    FLUX2_VAE,
    QWEN3,
    QWEN3_VL,
    UNET,
    AUTOENCODER_KL,
    CLIP_TEXT,
    CLIP_TEXT_PROJECTED,
)

MOST_PARAMETERS = 10**13
"""Upper bound for the parameters of a config.json: more than 100 times those of any published model."""

WITHOUT_MODULE = ("Mistral3ForConditionalGeneration", "StableDiffusionSafetyChecker")
"""Classes in pipelines without an NNX module: FLUX.2 dev's text encoder, Stable Diffusion's safety checker."""


def torch_class(directory: Path) -> str | None:
    """Returns the PyTorch class that config.json in `directory` names; None if there is no such file or name.

    Raises: ClvrError for a config.json that is malformed.
    """
    if not (directory / "config.json").exists():
        return None
    config = read_json(directory / "config.json")
    name, listed = config.get("_class_name"), config.get("architectures") or []
    if not isinstance(name, str | None) or not isinstance(listed, list) or not all(isinstance(n, str) for n in listed):
        raise ClvrError(f"{directory / 'config.json'}: _class_name must be a text and architectures a list of texts")
    return name or next(iter(listed), None)


def find_architecture(name: str | None) -> Architecture | None:
    """Returns the architecture of a PyTorch class; None for a class without an NNX module."""
    return next((architecture for architecture in ARCHITECTURES if architecture.torch_class == name), None)


def architecture_of(directory: Path) -> Architecture:
    """Returns the architecture of the model in a directory.

    Raises: ClvrError, which lists the classes that can be converted, for any other content.
    """
    found = torch_class(directory)
    architecture = find_architecture(found)
    if architecture is None:
        known = ", ".join(architecture.torch_class for architecture in ARCHITECTURES)
        what = f"contains a {found}" if found else "has no config.json that names its class"
        raise ClvrError(f"{directory}: {what}; the classes that can be converted are {known}")
    return architecture
