"""A LoRA of FLUX.2 klein from a directory of image-caption pairs or of edit pairs, on one GPU or a mesh.

clvr train flux2_lora --model black-forest-labs/FLUX.2-klein-base-4B --dataset photos --out runs/lora
clvr sample "a photo of sks dog" --model black-forest-labs/FLUX.2-klein-4B --lora runs/lora/export

This recipe has never run on the real weights, because there was no accelerator. The tests run it on a small random
model of the same classes.
A LoRA of a 9B variant of FLUX.2 klein is for non-commercial use only, as its base is.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from clvr_jax.configs import flux2_sft
from clvr_jax.convert.architectures import FLUX2_TRANSFORMER
from clvr_jax.convert.lora import save_lora
from clvr_jax.convert.lora_file import FILE_NAME
from clvr_jax.convert.lora_writing import LoRANames
from clvr_jax.data.image_pairs import PairExamples
from clvr_jax.data.sft_input import Batches, BatchLoader
from clvr_jax.errors import ClvrError
from clvr_jax.models.lora import LoRAConfig
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.sharding import MeshConfig
from clvr_jax.training.lora import lora_task
from clvr_jax.training.trainer import Task, TrainConfig

FILES: dict[LoRANames, str] = {
    "diffusers": FILE_NAME,
    "comfyui": "comfyui_lora.safetensors",
    "kohya": "kohya_lora.safetensors",
}


@dataclasses.dataclass(frozen=True)
class Config(flux2_sft.FlowMatchingConfig):
    """Configuration of the run, and of what `clvr plan` compiles."""

    train: TrainConfig = TrainConfig(
        steps=1000, learning_rate=1e-4, ema_decay=0.0, compute_dtype="bfloat16", mesh=MeshConfig(fsdp=-1)
    )
    """Configuration of the training."""
    lora: LoRAConfig = LoRAConfig(rank=16, alpha=16.0, targets=(r"transformer_blocks\.(attn|ff|ff_context)\.",))
    """Configuration of the LoRA that is trained; its targets are the attention and the feed-forward layers."""
    dataset: Path = Path("data/pairs")
    """Train on this directory: images with captions in text files of the same name, or metadata.jsonl, whose lines have
    file_name and text, or source, instruction and target."""
    size: int = 1024
    """Train at an area of at most this many pixels squared; each image keeps its aspect ratio, up to 2:1."""
    batch_size: int = 4
    remat: str = "full"
    formats: tuple[LoRANames, ...] = ("diffusers",)
    """Write the LoRA under these names, each to a file of its own: diffusers (and PEFT), comfyui or kohya."""
    references: int = 0
    """With `clvr plan` only: plan for this many source images."""


CONFIG = Config()


def task(config: Config) -> Task:
    """Returns the task for the trainer."""
    if not config.model:
        raise ClvrError("flux2_lora: --model is missing; give a directory or a Hugging Face id of FLUX.2 klein")
    if not config.lora.rank or not config.formats:
        raise ClvrError("flux2_lora: --lora.rank must be at least 1, and --formats must name one format or more")
    pipe = Flux2Pipeline.from_pretrained(config.model, config.train.compute_dtype)
    token, buckets = pipe.vae.config.token_pixels, pipe.settings.text_buckets
    examples = PairExamples(
        config.dataset,
        pipe.tokenizer,
        side=config.size,
        token_pixels=token,
        text_buckets=buckets,
        dropout=config.dropout,
    )
    base = nnx.state(pipe.transformer)
    key_mapping = FLUX2_TRANSFORMER.key_mapping(pipe.transformer.config)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), base)

    def export(lora: Any, directory: Path) -> None:
        for name in config.formats:
            save_lora(directory / FILES[name], lora, key_mapping, shapes, names=name)

    batches = Batches(BatchLoader(examples, config.batch_size, seed=config.train.seed))
    full = flux2_sft.pipeline_task(config, pipe, base, batches, export)
    return lora_task(full, config.lora, config.train.seed)


def abstract_task(config: Config) -> Task:
    """Returns the same task with shapes in place of arrays, to trace, compile and plan its step."""
    names = {field.name for field in dataclasses.fields(flux2_sft.Config)} & set(vars(config)) - {"dataset"}
    full = flux2_sft.abstract_task(flux2_sft.Config(**{name: getattr(config, name) for name in names}))
    dtype = config.train.compute_dtype
    base = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), full.params)
    return lora_task(dataclasses.replace(full, params=base), config.lora, config.train.seed)
