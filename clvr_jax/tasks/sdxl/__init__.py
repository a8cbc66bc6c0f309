"""Stable Diffusion XL, 1 and 2: training of the UNet with its text encoder, and PPRL of the UNet."""

from clvr_jax.tasks.sdxl.models import SDXLModels
from clvr_jax.tasks.sdxl.rl import LORA_TARGETS, Sampler, planned_policy, pprl_task, sdxl_policy
from clvr_jax.tasks.sdxl.sft import noise_prediction_task

__all__ = [
    "LORA_TARGETS",
    "SDXLModels",
    "Sampler",
    "noise_prediction_task",
    "planned_policy",
    "pprl_task",
    "sdxl_policy",
]
