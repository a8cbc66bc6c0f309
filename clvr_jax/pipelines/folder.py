"""Pipeline folders in diffusers layout: model_index.json, one subfolder for each component, and our clvr.json."""

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jax.numpy as jnp
from jax.typing import DTypeLike

from clvr_jax.convert.architectures import FLUX2_TRANSFORMER, FLUX2_VAE, QWEN3
from clvr_jax.convert.configs import from_known_fields
from clvr_jax.convert.model_card import card_of_pipeline
from clvr_jax.convert.models import load_model, save_model
from clvr_jax.data.text import load_tokenizer
from clvr_jax.diffusion import FlowSchedule
from clvr_jax.errors import ClvrError
from clvr_jax.files import located, read_json, replacing, write_json
from clvr_jax.models.autoencoder_kl_flux2 import AutoencoderKLFlux2
from clvr_jax.models.flux2_transformer import Flux2Transformer
from clvr_jax.models.qwen3 import Qwen3
from clvr_jax.pipelines.registry import class_of, read_settings, resolve

if TYPE_CHECKING:
    from clvr_jax.pipelines.flux2 import Flux2Pipeline

Settings = TypeVar("Settings")

_COMPONENTS = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3ForCausalLM"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "Flux2Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLFlux2"],
}


def load_flux2(
    model: str, dtype: DTypeLike, transformer: str | None, settings_class: type[Settings]
) -> tuple[Flux2Transformer, AutoencoderKLFlux2, Qwen3, Any, Settings, FlowSchedule]:
    """Components of a FLUX.2 klein pipeline; see `Flux2Pipeline.from_pretrained`."""
    path, default_transformer = resolve(model)
    index = read_json(path / "model_index.json")
    if (kind := class_of(path)) != "Flux2KleinPipeline":
        raise ClvrError(f"{path}: a {kind}, not a Flux2KleinPipeline")
    schedule = load_schedule(path / "scheduler")
    given = read_settings(path, "flux2", "transformers")
    distilled = index.get("is_distilled") or False
    chosen = transformer or default_transformer
    # A folder may hold several transformers, which are sampled in different ways.
    own = given.get("transformers", {}).get(chosen, {})
    if not isinstance(own, dict):
        raise ClvrError(f"{path / 'clvr.json'}: transformers: {chosen} must be an object")
    settings = from_known_fields(settings_class, {"is_distilled": distilled, **given.get("flux2", {}), **own})
    return (
        load_transformer(path / chosen, dtype),
        load_vae(path / "vae", dtype),
        load_text_encoder(path / "text_encoder", dtype),
        load_tokenizer(path / "tokenizer"),
        settings,
        schedule,
    )


def load_schedule(path: Path) -> FlowSchedule:
    """Returns the schedule of a FLUX.2 pipeline's `scheduler/`. Raises: ClvrError, by name, for what it cannot obey."""
    file = path / "scheduler_config.json"
    with located(file):
        return FlowSchedule.from_config(read_json(file))


def load_transformer(path: Path, dtype: DTypeLike = jnp.float32) -> Flux2Transformer:
    """A Flux2Transformer in diffusers layout."""
    return load_model(path, FLUX2_TRANSFORMER, dtype)


def load_vae(path: Path, dtype: DTypeLike = jnp.float32) -> AutoencoderKLFlux2:
    """An AutoencoderKLFlux2 in diffusers layout."""
    return load_model(path, FLUX2_VAE, dtype)


def load_text_encoder(path: Path, dtype: DTypeLike = jnp.float32) -> Qwen3:
    """A Qwen3 in transformers layout."""
    return load_model(path, QWEN3, dtype)


def save_flux2(path: str | Path, pipeline: "Flux2Pipeline", dtype: str) -> None:
    """Writes a pipeline folder; it appears only when it is complete."""
    target = Path(path)
    settings = dataclasses.asdict(pipeline.settings)
    index = {
        "_class_name": "Flux2KleinPipeline",
        "_diffusers_version": "0.37.0",
        "is_distilled": settings.pop("is_distilled"),
        **_COMPONENTS,
    }
    with replacing(target) as temporary:
        save_model(temporary / "transformer", pipeline.transformer, FLUX2_TRANSFORMER, dtype)
        save_model(temporary / "vae", pipeline.vae, FLUX2_VAE, dtype)
        save_model(temporary / "text_encoder", pipeline.text_encoder, QWEN3, dtype)
        pipeline.tokenizer.save_pretrained(str(temporary / "tokenizer"))
        write_json(temporary / "scheduler" / "scheduler_config.json", pipeline.schedule.to_config())
        write_json(temporary / "clvr.json", {"flux2": settings})
        write_json(temporary / "model_index.json", index)
        card_of_pipeline(temporary, target.name, "Flux2Pipeline.save_pretrained", dtype)


def copy_component(source: Path, target: Path) -> None:
    """Copies a component folder; the copy appears only when it is complete."""
    with replacing(target) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)
