"""A LoRA of FLUX.2 klein from a directory of image-caption pairs or of edit pairs, on one GPU or a mesh.

clvr train flux2_lora --model black-forest-labs/FLUX.2-klein-base-4B --dataset photos --out runs/lora
clvr sample "a photo of sks dog" --model black-forest-labs/FLUX.2-klein-4B --lora runs/lora/export

This recipe has never run on the real weights, because there was no accelerator. The tests run it on a small random
model of the same classes.
A LoRA of a 9B variant of FLUX.2 klein is for non-commercial use only, as its base is.
"""

import dataclasses
from pathlib import Path

from clvr_jax.convert.lora.writing import LoRANames
from clvr_jax.errors import ClvrError
from clvr_jax.models.common.lora import LoRAConfig
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.sharding import MeshConfig
from clvr_jax.tasks import flux2
from clvr_jax.tasks.bundles import check_model_given, no_export
from clvr_jax.training.trainer import Task, TrainConfig


@dataclasses.dataclass(frozen=True)
class Config(flux2.FlowMatchingConfig):
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
    check_model_given("flux2_lora", config.model, "FLUX.2 klein")
    if not config.lora.rank or not config.formats:
        raise ClvrError("flux2_lora: --lora.rank must be at least 1, and --formats must name one format or more")
    pipe = Flux2Pipeline.from_pretrained(config.model, config.train.compute_dtype)
    batches = flux2.pair_batches(
        pipe, config.dataset, config.size, config.batch_size, config.train.seed, config.dropout
    )
    models = flux2.Flux2Models.of(pipe)
    export = flux2.lora_export(models, config.formats)
    return flux2.lora_sft_task(models, config, config.lora, config.train, batches, export)


def abstract_task(config: Config) -> Task:
    """Returns the same task with shapes in place of arrays, to trace, compile and plan its step."""
    models = flux2.Flux2Models.abstract(config.preset, config.train.compute_dtype)
    batches = models.abstract_batches(config.batch_size, config.size, config.references)
    return flux2.lora_sft_task(models, config, config.lora, config.train, batches, no_export)
