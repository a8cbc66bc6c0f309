"""Flow matching with a very small FLUX.2 transformer on random tokens: the program of a real recipe, at no cost."""

import dataclasses

import jax
import numpy as np
from flax import nnx

from clvr_jax.cost_model.flops import flux2_flops
from clvr_jax.models.flux2 import Flux2Transformer, Flux2TransformerConfig
from clvr_jax.models.flux2.position_ids import latent_ids, text_ids
from clvr_jax.training.objectives.losses import flow_matching_loss
from clvr_jax.training.trainer import Task, TrainConfig
from tests.helpers.models import random_module


@dataclasses.dataclass(frozen=True)
class Config:
    """side: tokens of a side. depth: double-stream blocks, and as many single-stream ones. head_dim: of four heads."""

    train: TrainConfig = TrainConfig(steps=20, learning_rate=3e-3, log_every=1)
    batch_size: int = 16
    side: int = 4
    depth: int = 2
    head_dim: int = 16
    remat: str = "dots"

    @property
    def sizes(self) -> Flux2TransformerConfig:
        """Of the transformer."""
        return Flux2TransformerConfig(
            in_channels=16,
            num_layers=self.depth,
            num_single_layers=self.depth,
            attention_head_dim=self.head_dim,
            num_attention_heads=4,
            joint_attention_dim=24,
            timestep_guidance_channels=16,
            axes_dims_rope=(self.head_dim // 4,) * 4,
            guidance_embeds=False,
        )


CONFIG = Config()


def task(config: Config) -> Task:
    """The run as the trainer takes it."""
    model = random_module(lambda rngs: Flux2Transformer(config.sizes, rngs=rngs, remat=config.remat))
    graphdef, params = nnx.split(model)
    params = jax.device_get(params)  # a mesh takes its parts of NumPy's without a program for each shape
    tokens, side = config.side**2, config.side

    def loss(params, frozen, batch, key):
        def velocity(x, t):
            return nnx.merge(graphdef, params)(x, batch["text"], t, latent_ids(side, side), text_ids(8))

        return flow_matching_loss(velocity, batch["tokens"], key, 2.0), {}

    def batches(step):
        rng = np.random.default_rng(step)
        return {
            "tokens": rng.normal(size=(config.batch_size, tokens, 16)).astype(np.float32),
            "text": rng.normal(size=(config.batch_size, 8, 24)).astype(np.float32),
        }

    def flops(batch):
        return flux2_flops(config.sizes, len(batch["tokens"]), text=8, image=tokens).training

    return Task("drawing", params, {}, loss, batches, lambda ema, folder: None, flops)
