"""Reading and writing of FLUX.2 pipelines in diffusers layout, with our settings in clvr.json."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import jax.numpy as jnp
from jax.typing import DTypeLike

from clvr_jax.checkpoint_io.orbax_tree import PARAMS, is_tree
from clvr_jax.checkpoint_io.tensors import stored_tensors
from clvr_jax.convert.architectures import FLUX2_TRANSFORMER, FLUX2_VAE, QWEN3, qwen3_hidden_states
from clvr_jax.convert.configs import from_known_fields
from clvr_jax.convert.model_card import card_of_pipeline
from clvr_jax.convert.models import load_model, save_model
from clvr_jax.data.preprocessing.text import start_loading_tokenizer
from clvr_jax.diffusion import FlowSchedule
from clvr_jax.errors import ClvrError
from clvr_jax.files.atomic_io import atomic_directory, located, read_json, write_json
from clvr_jax.files.json_input import JSON
from clvr_jax.interfaces.tokenizer import Tokenizer
from clvr_jax.models.common.quantization import Quantization, is_quantized
from clvr_jax.models.flux2 import AutoencoderKLFlux2, Flux2Transformer
from clvr_jax.models.qwen3 import Qwen3
from clvr_jax.pipelines.loading import (
    QUANTIZED_GENERATOR_PARTS,
    LoRA,
    Quantize,
    check_heads,
    quantization_of,
    read_loras,
    resolve_dtype,
)
from clvr_jax.pipelines.offload import HOST
from clvr_jax.pipelines.registry import FLUX2, FLUX2_CLASS, FLUX2_KV_CLASS, class_of, read_settings, resolve
from clvr_jax.sharding import MeshLayout

if TYPE_CHECKING:
    from clvr_jax.pipelines.flux2.pipeline import Flux2Pipeline


class _Settings(Protocol):
    @property
    def text_encoder_out_layers(self) -> tuple[int, ...]: ...


Settings = TypeVar("Settings", bound=_Settings)

_COMPONENTS = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3ForCausalLM"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "Flux2Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLFlux2"],
}

_OF_CLASS: dict[str, dict[str, JSON]] = {
    FLUX2_CLASS: {},
    FLUX2_KV_CLASS: {
        "is_distilled": True,
        "num_inference_steps": 4,
        "guidance_scale": 1.0,
        "reference_cache": "image",
    },
}
"""The settings of a diffusers class that differ from the defaults of `Flux2Settings`, for directories of others."""


def load_flux2(
    model: str,
    dtype: DTypeLike | None,
    transformer: str | None,
    settings_class: type[Settings],
    layout: MeshLayout | None = None,
    lora: Sequence[LoRA] = (),
    ignore_text_encoder: bool = False,
    quantize: Quantize = None,
    is_offloaded: bool = False,
) -> tuple[Flux2Transformer, AutoencoderKLFlux2, Qwen3, Tokenizer, Settings, FlowSchedule, Path]:
    """Loads the components of a FLUX.2 klein pipeline on the active layout.

    The arguments are those of `Flux2Pipeline.from_pretrained`; is_offloaded: transformer and text encoder are placed in
    host memory.
    Returns: the components, and the directory of the text encoder.
    """
    path, default_transformer = resolve(model)
    settings = read_flux2_settings(path, chosen := transformer or default_transformer, settings_class)
    schedule = load_schedule(path / "scheduler")
    check_heads(layout, flux2_heads(model, chosen))
    dtype = resolve_dtype(dtype, path / chosen)
    formats = quantization_of(quantize, QUANTIZED_GENERATOR_PARTS)
    loras = read_loras(path / chosen, FLUX2_TRANSFORMER, lora, ignore_text_encoder)
    memory_kind = HOST if is_offloaded else None
    tokenizer = start_loading_tokenizer(path / "tokenizer")
    layers, encoder_format = settings.text_encoder_out_layers, formats.get("text_encoder")
    return (
        load_model(
            path / chosen,
            FLUX2_TRANSFORMER,
            dtype,
            loras=loras,
            quantize=formats.get("transformer"),
            memory_kind=memory_kind,
        ),
        load_vae(path / "vae", dtype),
        load_text_encoder(path / "text_encoder", dtype, layers, encoder_format, memory_kind),
        tokenizer(),
        settings,
        schedule,
        path / "text_encoder",
    )


def read_flux2_settings(path: Path, transformer: str, settings_class: type[Settings]) -> Settings:
    """Returns the settings of a FLUX.2 pipeline for one of its transformers, each of which may have its own.

    path: directory of the pipeline. Raises: ClvrError for another class, or a field that is unknown or invalid.
    """
    if (kind := class_of(path)) not in FLUX2:
        raise ClvrError(f"{path}: a {kind}, not a {' or a '.join(FLUX2)}")
    of_class = dict(_OF_CLASS[kind])
    if (is_distilled := read_json(path / "model_index.json").get("is_distilled")) is not None:
        of_class["is_distilled"] = is_distilled
    given = read_settings(path, "flux2", "transformers")
    own = given.get("transformers", {}).get(transformer, {})
    if not isinstance(own, dict):
        raise ClvrError(f"{path / 'clvr.json'}: transformers: {transformer} must be an object")
    return from_known_fields(settings_class, {**of_class, **given.get("flux2", {}), **own})


def flux2_heads(model: str, transformer: str | None = None) -> dict[str, int]:
    """Returns the attention heads of a FLUX.2 pipeline, by component; reads its configuration only."""
    path, default_transformer = resolve(model)
    architectures = {transformer or default_transformer: FLUX2_TRANSFORMER, "text_encoder": QWEN3}
    return {
        name: architecture.config_from_dict(read_json(path / name / "config.json")).num_attention_heads
        for name, architecture in architectures.items()
    }


def load_schedule(path: Path) -> FlowSchedule:
    """Returns the schedule in a pipeline's `scheduler/`. Raises: ClvrError for a setting that is not supported."""
    file = path / "scheduler_config.json"
    with located(file):
        return FlowSchedule.from_config(read_json(file))


def load_transformer(path: Path, dtype: DTypeLike = jnp.float32) -> Flux2Transformer:
    """Loads a Flux2Transformer in diffusers layout."""
    transformer: Flux2Transformer = load_model(path, FLUX2_TRANSFORMER, dtype)
    return transformer


def load_vae(path: Path, dtype: DTypeLike = jnp.float32) -> AutoencoderKLFlux2:
    """Loads an AutoencoderKLFlux2 in diffusers layout."""
    vae: AutoencoderKLFlux2 = load_model(path, FLUX2_VAE, dtype)
    return vae


def load_text_encoder(
    path: Path,
    dtype: DTypeLike = jnp.float32,
    layers: tuple[int, ...] | None = None,
    quantize: Quantization | None = None,
    memory_kind: str | None = None,
) -> Qwen3:
    """Loads a Qwen3 in transformers layout.

    Args:
      path: directory of the model.
      dtype: of weights and computation.
      layers: indices of the hidden states that are used; the layers above them and the head are not loaded, unless the
        weights are stored as Orbax arrays, each of which holds all layers. None loads the complete model.
      quantize, memory_kind: see `load_model`.
    """
    is_partial = layers is not None and not is_tree(path / PARAMS)
    architecture = qwen3_hidden_states(layers) if layers and is_partial else QWEN3
    text_encoder: Qwen3 = load_model(path, architecture, dtype, quantize=quantize, memory_kind=memory_kind)
    return text_encoder


def save_text_encoder(target: Path, encoder: Qwen3, source: Path | None, dtype: str) -> None:
    """Writes a complete text encoder; layers that were not loaded are copied from `source`, its original directory.

    Raises: ClvrError if layers were not loaded and `source` is None, does not exist, or holds another model.
    """
    if is_quantized(encoder):
        raise ClvrError(f"{target}: the text encoder is quantized; load it without quantize to save it")
    if encoder.is_whole:
        save_model(target, encoder, QWEN3, dtype)
        return
    if source is None or not source.is_dir():
        raise ClvrError(
            f"{target}: the text encoder was loaded without the layers that are never used, and "
            f"{source or 'its original directory'} does not exist to copy them from; nothing is written"
        )
    stored = QWEN3.canonicalize_keys(stored_tensors(source), encoder.config)
    expected = {key for entry in QWEN3.entries(QWEN3.config_to_dict(encoder.config)) for key in entry.keys}
    if stored.keys() != expected:
        raise ClvrError(f"{source}: not the model that the text encoder was loaded from any more; nothing is written")
    save_model(target, encoder, QWEN3, dtype, rest=stored)


def save_flux2(path: str | Path, pipeline: "Flux2Pipeline", dtype: str) -> None:
    """Writes a pipeline directory, which appears only when it is complete."""
    target = Path(path)
    settings = dataclasses.asdict(pipeline.settings)
    index = {
        "_class_name": FLUX2_CLASS if settings["reference_cache"] == "none" else FLUX2_KV_CLASS,
        "_diffusers_version": "0.37.0",
        "is_distilled": settings.pop("is_distilled"),
        **_COMPONENTS,
    }
    with atomic_directory(target) as temporary:
        save_model(temporary / "transformer", pipeline.transformer, FLUX2_TRANSFORMER, dtype)
        save_model(temporary / "vae", pipeline.vae, FLUX2_VAE, dtype)
        save_text_encoder(temporary / "text_encoder", pipeline.text_encoder, pipeline.text_encoder_source, dtype)
        pipeline.tokenizer.save_pretrained(str(temporary / "tokenizer"))
        write_json(temporary / "scheduler" / "scheduler_config.json", pipeline.schedule.to_config())
        write_json(temporary / "clvr.json", {"flux2": settings})
        write_json(temporary / "model_index.json", index)
        card_of_pipeline(temporary, target.name, "Flux2Pipeline.save_pretrained", dtype)


def copy_component(source: Path, target: Path) -> None:
    """Copies the directory of a component; the copy appears only when it is complete."""
    with atomic_directory(target) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)
