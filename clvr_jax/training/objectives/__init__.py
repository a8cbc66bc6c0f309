"""Losses: functions of a velocity, an encoder or logits, and the objectives of SFT and distillation made of them."""

from clvr_jax.training.objectives.losses import (
    autoencoder_loss,
    flow_matching_loss,
    next_token_loss,
    noise_prediction_loss,
    sample_timesteps,
)

__all__ = [
    "autoencoder_loss",
    "flow_matching_loss",
    "next_token_loss",
    "noise_prediction_loss",
    "sample_timesteps",
]
