"""Training of the autoencoder of the shapes world."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from clvr_jax.convert.architectures import FLUX2_VAE
from clvr_jax.convert.models import save_model
from clvr_jax.models.flux2 import AutoencoderKLFlux2
from clvr_jax.models.flux2.autoencoder_kl import patchify
from clvr_jax.tasks.shapes.sizes import VAE
from clvr_jax.training.objectives.losses import autoencoder_loss
from clvr_jax.training.trainer import Task
from clvr_jax.trees import Params
from clvr_jax.worlds.shapes.render import render
from clvr_jax.worlds.shapes.scene import sample_scene_random


def sample_images(seed: int, step: int, count: int) -> np.ndarray:
    """Returns (count, 64, 64, 3) float32 in [-1, 1]: random scenes of 0 to 6 objects without held-out pairs."""
    rng = np.random.default_rng((seed, step))
    images = [render(sample_scene_random(rng, 0 if rng.random() < 0.02 else None)) for _ in range(count)]
    return np.stack(images).astype(np.float32) / 127.5 - 1


def vae_task(*, batch_size: int, kl_weight: float, statistics: int, seed: int) -> Task:
    """Returns the task of training the autoencoder from random weights.

    Args:
      batch_size: number of images in a step.
      kl_weight: weight of the KL divergence of the posterior from a unit normal, in nats for each pixel value.
      statistics: number of images from which the statistics of the exported model are computed.
      seed: of the initial weights and of the batches.
    """
    model = AutoencoderKLFlux2(VAE, rngs=nnx.Rngs(seed))
    graphdef, params, *rest = nnx.split(model, nnx.Param, nnx.BatchStat)
    (batch_statistics,) = rest

    def loss(
        params: Params, frozen: Params, batch: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        vae = nnx.merge(graphdef, params, frozen)
        return autoencoder_loss(vae.moments, vae.decode, batch, key, kl_weight)

    def export(ema: Params, directory: Path) -> None:
        vae = nnx.merge(graphdef, ema, batch_statistics)
        encode = jax.jit(lambda images: patchify(vae.encode(images)))
        chunks = range(0, statistics, 64)
        tokens = jnp.concatenate([encode(sample_images(seed + 1, i, 64)) for i in chunks])
        vae.bn.running_mean[...] = tokens.mean((0, 1, 2))
        vae.bn.running_var[...] = tokens.var((0, 1, 2))
        vae.bn.num_batches_tracked[...] = jnp.asarray(len(chunks), jnp.int32)
        save_model(directory / "vae", vae, FLUX2_VAE, "float16")

    return Task(
        name="shapes autoencoder",
        params=params,
        frozen=batch_statistics,
        loss=loss,
        batches=partial(sample_images, seed, count=batch_size),
        export=export,
    )
