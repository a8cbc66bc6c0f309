"""Training of a UNet and its text encoder together by noise prediction, as Stable Diffusion is trained."""

import jax
import jax.numpy as jnp
from flax import nnx

from clvr_jax.diffusion import NoiseSchedule
from clvr_jax.models.stable_diffusion import AutoencoderKLConfig, CLIPTextConfig, UNet2DConditionConfig
from clvr_jax.tasks.bundles import Export, ModelBundle
from clvr_jax.training.objectives.losses import noise_prediction_loss
from clvr_jax.training.prefetch import Batches
from clvr_jax.training.trainer import Task
from clvr_jax.trees import Batch, Params


def noise_prediction_task(
    name: str,
    unet: ModelBundle[UNet2DConditionConfig],
    text_encoder: ModelBundle[CLIPTextConfig],
    vae: ModelBundle[AutoencoderKLConfig],
    schedule: NoiseSchedule,
    batches: Batches,
    export: Export,
) -> Task:
    """Returns the task of training the UNet and its only text encoder; the VAE is frozen.

    Args:
      name: for progress lines.
      unet, text_encoder, vae: the initial models.
      schedule: of the noise; the UNet predicts what it says, noise or v.
      batches: step -> {"ids": (b, s), "pictures": (b, h, w, 3) uint8}.
      export: of {"unet", "text_encoder"}.
    """
    unet_def, text_encoder_def, vae_def = unet.graphdef, text_encoder.graphdef, vae.graphdef

    def loss(params: Params, frozen: Params, data: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        model = nnx.merge(unet_def, params["unet"])
        text = nnx.merge(text_encoder_def, params["text_encoder"])(data["ids"]).last_hidden_state_btd
        images = data["pictures"].astype(jnp.float32) / 127.5 - 1
        latents = jax.lax.stop_gradient(nnx.merge(vae_def, frozen).encode_scaled(images))
        return noise_prediction_loss(lambda x, t: model(x, t, text), latents, key, schedule), {}

    return Task(
        name=name,
        params={"unet": unet.weights, "text_encoder": text_encoder.weights},
        frozen=vae.weights,
        loss=loss,
        batches=batches,
        export=export,
    )
