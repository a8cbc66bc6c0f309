"""The small models of the shapes world: an autoencoder, a text encoder, FLUX.2 from nothing and by SFT, a UNet, and
a Qwen3-VL as verifier and controller."""

from clvr_jax.tasks.shapes.base import base_task
from clvr_jax.tasks.shapes.batches import BASE_KINDS, Kind, batch, examples
from clvr_jax.tasks.shapes.controller import controller_task
from clvr_jax.tasks.shapes.controller_batches import ControllerBatches, ControllerData
from clvr_jax.tasks.shapes.sft import SFT_KINDS, recorded_examples, recorded_kinds, rollout_kinds, sft_task
from clvr_jax.tasks.shapes.sizes import SETTINGS
from clvr_jax.tasks.shapes.stable_diffusion import stable_diffusion_task
from clvr_jax.tasks.shapes.text_encoder import text_encoder_task
from clvr_jax.tasks.shapes.vae import vae_task

__all__ = [
    "BASE_KINDS",
    "SETTINGS",
    "SFT_KINDS",
    "ControllerBatches",
    "ControllerData",
    "Kind",
    "base_task",
    "batch",
    "controller_task",
    "examples",
    "recorded_examples",
    "recorded_kinds",
    "rollout_kinds",
    "sft_task",
    "stable_diffusion_task",
    "text_encoder_task",
    "vae_task",
]
