"""Supervised fine-tuning of a LoRA of FLUX.2's transformer."""

from collections.abc import Sequence
from pathlib import Path

import jax

from clvr_jax.convert.architectures import FLUX2_TRANSFORMER
from clvr_jax.convert.lora.files import FILE_NAME
from clvr_jax.convert.lora.trees import save_lora
from clvr_jax.convert.lora.writing import LoRANames
from clvr_jax.models.common.lora import LoRAConfig
from clvr_jax.tasks.bundles import Export
from clvr_jax.tasks.flux2.models import Flux2Models
from clvr_jax.tasks.flux2.sft import FlowMatchingConfig, flow_matching_task
from clvr_jax.training.lora import lora_task
from clvr_jax.training.prefetch import Batches
from clvr_jax.training.trainer import Task, TrainConfig
from clvr_jax.trees import Params

LORA_FILES: dict[LoRANames, str] = {
    "diffusers": FILE_NAME,
    "comfyui": "comfyui_lora.safetensors",
    "kohya": "kohya_lora.safetensors",
}
"""Names of tensors -> the file that is written with them."""


def lora_sft_task(
    models: Flux2Models,
    config: FlowMatchingConfig,
    lora: LoRAConfig,
    train: TrainConfig,
    batches: Batches,
    export: Export,
) -> Task:
    """Returns the task of training a LoRA; the transformer stays in the dtype of `models`. See `sft_task`."""
    full = flow_matching_task(models, models.transformer.weights, config, train, batches, export)
    return lora_task(full, lora, train.seed)


def lora_export(models: Flux2Models, formats: Sequence[LoRANames]) -> Export:
    """Returns the export of a LoRA: one file in each of the formats."""
    key_mapping = FLUX2_TRANSFORMER.key_mapping(models.transformer.config)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), models.transformer.weights)

    def export(lora: Params, directory: Path) -> None:
        for name in formats:
            save_lora(directory / LORA_FILES[name], lora, key_mapping, shapes, names=name)

    return export
