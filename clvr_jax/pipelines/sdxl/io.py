"""Reading and writing of Stable Diffusion pipelines in diffusers layout.

SDXL has two text encoders, Stable Diffusion 1 and 2 have one.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import jax.numpy as jnp
from jax.typing import DTypeLike

from clvr_jax.convert.architectures import AUTOENCODER_KL, CLIP_TEXT, CLIP_TEXT_PROJECTED, UNET
from clvr_jax.convert.configs import from_known_fields
from clvr_jax.convert.model_card import card_of_pipeline
from clvr_jax.convert.models import load_model, save_model
from clvr_jax.data.preprocessing.text import load_tokenizer
from clvr_jax.diffusion import NoiseSchedule
from clvr_jax.errors import ClvrError
from clvr_jax.files.atomic_io import atomic_directory, read_json, write_json
from clvr_jax.files.json_input import JSON, UncheckedJSON
from clvr_jax.interfaces.tokenizer import Tokenizer
from clvr_jax.models.stable_diffusion import AutoencoderKL, CLIPText, UNet2DCondition, UNet2DConditionConfig
from clvr_jax.pipelines.loading import LoRA, check_heads, read_loras, resolve_dtype
from clvr_jax.pipelines.registry import class_of, read_settings, resolve
from clvr_jax.sharding import MeshLayout

if TYPE_CHECKING:
    from clvr_jax.pipelines.sdxl.pipeline import SDXLPipeline

Settings = TypeVar("Settings")
Solver = Literal["euler", "ddim", "lcm"]

XL, ONE_ENCODER = "StableDiffusionXLPipeline", "StableDiffusionPipeline"
# The UNet of a latent consistency model takes the guidance scale as an input; the rest is Stable Diffusion.
CLASSES = (XL, ONE_ENCODER, "LatentConsistencyModelPipeline")
# Scheduler class -> (class to read its configuration as, solver). PNDM solves the same ODE as DDIM and extrapolates
# from the last four predictions; DDIM keeps no state between steps and converges to the same solution. The ancestral
# Euler of SDXL-Turbo adds noise between steps, so that with Turbo's one step it is Euler.
_SCHEDULERS: dict[str, tuple[str, Solver]] = {
    "EulerDiscreteScheduler": ("EulerDiscreteScheduler", "euler"),
    "EulerAncestralDiscreteScheduler": ("EulerDiscreteScheduler", "euler"),
    "DDIMScheduler": ("DDIMScheduler", "ddim"),
    "PNDMScheduler": ("PNDMScheduler", "ddim"),
    "LCMScheduler": ("LCMScheduler", "lcm"),
}
_ENCODERS = {"text_encoder": CLIP_TEXT, "text_encoder_2": CLIP_TEXT_PROJECTED}
_TOKENIZERS = ("tokenizer", "tokenizer_2")
# Components of diffusers' pipelines that do not change the image; ours are saved without them.
_ABSENT = {
    XL: ("feature_extractor", "image_encoder"),
    ONE_ENCODER: ("feature_extractor", "image_encoder", "safety_checker"),
}


def load_sdxl(
    model: str,
    dtype: DTypeLike | None,
    settings_class: type[Settings],
    layout: MeshLayout | None = None,
    lora: Sequence[LoRA] = (),
    ignore_text_encoder: bool = False,
) -> tuple[UNet2DCondition, AutoencoderKL, tuple[CLIPText, ...], tuple[Tokenizer, ...], UncheckedJSON, Settings]:
    """Loads the components of a Stable Diffusion pipeline on the active layout; see `SDXLPipeline.from_pretrained`."""
    path, _ = resolve(model)
    index = read_json(path / "model_index.json")
    kind = class_of(path)
    if kind not in CLASSES:
        raise ClvrError(f"{path}: a {kind}, not a {', '.join(CLASSES[:-1])} or {CLASSES[-1]}")
    count = 2 if kind == XL else 1
    encoders, tokenizers = list(_ENCODERS)[:count], _TOKENIZERS[:count]
    needed = ["unet", "vae", *encoders, *tokenizers, "scheduler"]
    missing = [name for name in needed if not _is_named(index.get(name)) or not (path / name).is_dir()]
    if missing:
        raise ClvrError(f"{path}: a {kind} without {', '.join(missing)}; copy them from the original model")
    scheduler = read_json(path / "scheduler" / "scheduler_config.json")
    if kind != XL:  # as diffusers reads the old files of Stable Diffusion 1
        scheduler = {**scheduler, "steps_offset": 1, "clip_sample": False}
    heads = unet_heads(UNET.config_from_dict(read_json(path / "unet" / "config.json")))
    check_heads(layout, heads, is_causal=False)
    dtype = resolve_dtype(dtype, path / "unet")
    loras = read_loras(path / "unet", UNET, lora, ignore_text_encoder)
    unet = load_model(path / "unet", UNET, dtype, loras=loras)
    given = read_settings(path, "sdxl")
    fields = {**_defaults(kind, scheduler, unet), **given.get("sdxl", {})}
    if "force_zeros_for_empty_prompt" in index:
        fields["force_zeros_for_empty_prompt"] = index["force_zeros_for_empty_prompt"]
    # SDXL's autoencoder overflows in float16.
    vae_dtype = jnp.float32 if dtype == jnp.float16 else dtype
    return (
        unet,
        load_model(path / "vae", AUTOENCODER_KL, vae_dtype),
        tuple(load_model(path / name, _ENCODERS[name], dtype) for name in encoders),
        tuple(load_tokenizer(path / name) for name in tokenizers),
        scheduler,
        from_known_fields(settings_class, fields),
    )


def unet_heads(config: UNet2DConditionConfig) -> dict[str, int]:
    """Returns the attention heads of the UNet's blocks; the small text encoders need not be sharded evenly."""
    kinds = enumerate(zip(config.down_block_types, config.heads, strict=True))
    heads = {f"block {number} of unet": own for number, (kind, own) in kinds if kind == "CrossAttnDownBlock2D"}
    return heads or {"unet": config.heads[-1]}


def read_scheduler(scheduler: UncheckedJSON) -> tuple[NoiseSchedule, Solver]:
    """Returns the noise schedule of `scheduler_config.json`, and the solver of diffusers' class or the closest one.

    Raises: ClvrError for a class or setting that is not supported.
    """
    name = str(scheduler.get("_class_name"))
    if name not in _SCHEDULERS:
        known = ", ".join(_SCHEDULERS)
        raise ClvrError(f"scheduler_config.json: {name:.80} is not supported; use the configuration of one of {known}")
    read_as, solver = _SCHEDULERS[name]
    return NoiseSchedule.from_config(scheduler, read_as), solver


def save_sdxl(path: str | Path, pipeline: "SDXLPipeline", dtype: str) -> None:
    """Writes a pipeline directory, which appears only when it is complete."""
    settings = dataclasses.asdict(pipeline.settings)
    force_zeros = settings.pop("force_zeros_for_empty_prompt")
    kind = XL if len(pipeline.text_encoders) == 2 else ONE_ENCODER
    encoders = dict(zip(_ENCODERS, pipeline.text_encoders, strict=False))
    tokenizers = dict(zip(_TOKENIZERS, pipeline.tokenizers, strict=False))
    index = {
        "_class_name": kind,
        "_diffusers_version": "0.37.0",
        **({"force_zeros_for_empty_prompt": force_zeros} if kind == XL else {"requires_safety_checker": False}),
        **{name: [None, None] for name in _ABSENT[kind]},
        "scheduler": ["diffusers", pipeline.scheduler["_class_name"]],
        **{name: ["transformers", _ENCODERS[name].torch_class] for name in encoders},
        **{name: ["transformers", "CLIPTokenizer"] for name in tokenizers},
        "unet": ["diffusers", UNET.torch_class],
        "vae": ["diffusers", AUTOENCODER_KL.torch_class],
    }
    with atomic_directory(Path(path)) as temporary:
        save_model(temporary / "unet", pipeline.unet, UNET, dtype)
        save_model(temporary / "vae", pipeline.vae, AUTOENCODER_KL, dtype)
        for name, encoder in encoders.items():
            save_model(temporary / name, encoder, _ENCODERS[name], dtype)
        for name, tokenizer in tokenizers.items():
            tokenizer.save_pretrained(str(temporary / name))
            # vocab.json and merges.txt, which the CLIPTokenizer of transformers 4 reads.
            tokenizer.backend_tokenizer.model.save(str(temporary / name))
        write_json(temporary / "scheduler" / "scheduler_config.json", dict(pipeline.scheduler))
        write_json(temporary / "clvr.json", {"sdxl": settings})
        write_json(temporary / "model_index.json", index)
        card_of_pipeline(temporary, Path(path).name, "SDXLPipeline.save_pretrained", dtype)


def _is_named(entry: object) -> bool:
    """Returns whether model_index.json has library and class of a component; both are null if it is absent."""
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(name, str) for name in entry)


def _defaults(kind: str, scheduler: UncheckedJSON, unet: UNet2DCondition) -> dict[str, JSON]:
    """Returns the default steps and guidance of diffusers' pipelines, which no file contains."""
    if scheduler.get("_class_name") == "LCMScheduler":
        return {
            "num_inference_steps": 4,
            "guidance_scale": 8.5 if unet.config.time_cond_proj_dim is not None else 1.0,
        }
    return {"num_inference_steps": 50, "guidance_scale": 5.0 if kind == XL else 7.5}
