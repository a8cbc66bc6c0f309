"""FLUX.2 klein: supervised fine-tuning of all weights or of a LoRA, few-step distillation, and PPRL."""

from clvr_jax.tasks.flux2.distill import distill_task, pipeline_distill_task
from clvr_jax.tasks.flux2.lora import LORA_FILES, lora_export, lora_sft_task
from clvr_jax.tasks.flux2.models import Flux2Models, pair_batches, pipeline_export, trajectory_batches
from clvr_jax.tasks.flux2.rl import LORA_TARGETS, Sampler, flux2_policy, planned_policy, pprl_task
from clvr_jax.tasks.flux2.sampling import sampling_program
from clvr_jax.tasks.flux2.sft import FlowMatchingConfig, flow_matching_task, sft_task

__all__ = [
    "LORA_FILES",
    "LORA_TARGETS",
    "FlowMatchingConfig",
    "Flux2Models",
    "Sampler",
    "distill_task",
    "flow_matching_task",
    "flux2_policy",
    "lora_export",
    "lora_sft_task",
    "pair_batches",
    "pipeline_distill_task",
    "pipeline_export",
    "planned_policy",
    "pprl_task",
    "sampling_program",
    "sft_task",
    "trajectory_batches",
]
