"""The autoencoder of the shapes world: 64 x 64 images <-> 16 tokens of 32 channels.

clvr train configs/shapes_vae.py --out runs/shapes_vae
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from clvr_jax.convert.architectures import FLUX2_VAE
from clvr_jax.convert.models import save_model
from clvr_jax.models.autoencoder_kl_flux2 import AutoencoderKLFlux2, AutoencoderKLFlux2Config, patchify
from clvr_jax.training.objectives import autoencoder_loss
from clvr_jax.training.trainer import Task, TrainConfig
from clvr_jax.worlds.shapes.render import render
from clvr_jax.worlds.shapes.scene import sample_scene_random

# 32 pixels to a transformer's 32 latent channels would be FLUX.2's own ratio; an image here needs far fewer.
MODEL = AutoencoderKLFlux2Config(
    block_out_channels=(16, 16, 32, 64),
    layers_per_block=1,
    latent_channels=8,
    norm_num_groups=8,
    sample_size=64,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Configuration of the run."""

    train: TrainConfig = TrainConfig(steps=3000, learning_rate=2e-3, weight_decay=0.0, ema_decay=0.998)
    """Configuration of the training."""
    batch_size: int = 32
    """Number of images in a step, over all devices."""
    kl_weight: float = 3e-3
    """Weight of the KL divergence of the posterior from a unit normal, in nats for each pixel value."""
    statistics: int = 4096
    """Compute the statistics that normalize the latents over this many images."""


CONFIG = Config()


def pictures(seed: int, step: int, count: int) -> np.ndarray:
    """(count, 64, 64, 3) float32 in [-1, 1]: random scenes of 0 to 6 objects without held-out pairs."""
    rng = np.random.default_rng((seed, step))
    images = [render(sample_scene_random(rng, 0 if rng.random() < 0.02 else None)) for _ in range(count)]
    return np.stack(images).astype(np.float32) / 127.5 - 1


def task(config: Config) -> Task:
    """The run as the trainer takes it."""
    model = AutoencoderKLFlux2(MODEL, rngs=nnx.Rngs(config.train.seed))
    graphdef, params, *rest = nnx.split(model, nnx.Param, nnx.BatchStat)
    (statistics,) = rest

    def loss(params: Any, frozen: Any, batch: jax.Array, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        vae = nnx.merge(graphdef, params, frozen)
        return autoencoder_loss(vae.moments, vae.decode, batch, key, config.kl_weight)

    def export(ema: Any, directory: Path) -> None:
        vae = nnx.merge(graphdef, ema, statistics)
        encode = jax.jit(lambda images: patchify(vae.encode(images)))
        chunks = range(0, config.statistics, 64)
        tokens = jnp.concatenate([encode(pictures(config.train.seed + 1, i, 64)) for i in chunks])
        vae.bn.running_mean[...] = tokens.mean((0, 1, 2))
        vae.bn.running_var[...] = tokens.var((0, 1, 2))
        vae.bn.num_batches_tracked[...] = jnp.asarray(len(chunks), jnp.int32)
        save_model(directory / "vae", vae, FLUX2_VAE, "float16")

    return Task(
        name="shapes autoencoder",
        params=params,
        frozen=statistics,
        loss=loss,
        batches=partial(pictures, config.train.seed, count=config.batch_size),
        export=export,
    )
