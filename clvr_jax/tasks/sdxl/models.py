"""The models of the tasks of Stable Diffusion: loaded, or as shapes for the planner."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from clvr_jax.convert.architectures import AUTOENCODER_KL, CLIP_TEXT, CLIP_TEXT_PROJECTED, UNET
from clvr_jax.data.preprocessing.clip_tokens import encode_clip
from clvr_jax.diffusion import NoiseSchedule
from clvr_jax.errors import ClvrError
from clvr_jax.interfaces.tokenizer import Tokenizer
from clvr_jax.models.common.abstract import abstract_module
from clvr_jax.models.stable_diffusion import AutoencoderKLConfig, CLIPTextConfig, UNet2DCondition, UNet2DConditionConfig
from clvr_jax.pipelines.sdxl import SDXLPipeline, SDXLSettings
from clvr_jax.tasks.bundles import Export, ModelBundle, allgathered
from clvr_jax.trees import Params


@dataclass(frozen=True)
class SDXLModels:
    """The models of a Stable Diffusion pipeline. tokenizers: one for each text encoder; none if weights are shapes."""

    settings: SDXLSettings
    schedule: NoiseSchedule
    unet: ModelBundle[UNet2DConditionConfig]
    vae: ModelBundle[AutoencoderKLConfig]
    text_encoders: tuple[ModelBundle[CLIPTextConfig], ...]
    tokenizers: tuple[Tokenizer, ...] = ()

    @classmethod
    def of(cls, pipe: SDXLPipeline) -> "SDXLModels":
        """Returns the models of a loaded pipeline.

        Raises: ClvrError for a latent consistency model, which is distilled and takes the guidance as an input.
        """
        if pipe.unet.config.time_cond_proj_dim is not None:
            raise ClvrError("this UNet is distilled with guidance (time_cond_proj_dim); give its base model")
        encoders = tuple(map(ModelBundle.of, pipe.text_encoders))
        unet, vae = ModelBundle.of(pipe.unet), ModelBundle.of(pipe.vae)
        return cls(pipe.settings, pipe.schedule, unet, vae, encoders, pipe.tokenizers)

    @classmethod
    def abstract(cls, dtype: DTypeLike) -> "SDXLModels":
        """Returns the models of SDXL without values."""
        return cls(
            SDXLSettings(),
            NoiseSchedule(steps_offset=1),
            ModelBundle.abstract(UNET, UNet2DConditionConfig.sdxl(), dtype),
            ModelBundle.abstract(AUTOENCODER_KL, AutoencoderKLConfig.sdxl(), dtype),
            (
                ModelBundle.abstract(CLIP_TEXT, CLIPTextConfig.clip_vit_l(), dtype),
                ModelBundle.abstract(CLIP_TEXT_PROJECTED, CLIPTextConfig.open_clip_vit_bigg(), dtype),
            ),
        )

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of tokens of a text for each text encoder."""
        longest = tuple(encoder.config.max_position_embeddings for encoder in self.text_encoders)
        if not self.tokenizers:
            return longest
        return tuple(
            min(tokenizer.model_max_length, length) for tokenizer, length in zip(self.tokenizers, longest, strict=True)
        )

    def encode_ids(self, texts: Sequence[str]) -> tuple[np.ndarray, ...]:
        """Returns token ids (b, length) for each text encoder; longer texts are truncated, as in the pipeline."""
        return tuple(
            encode_clip(tokenizer, texts, length)
            for tokenizer, length in zip(self.tokenizers, self.lengths, strict=True)
        )

    def training_graphdef(self, dtype: DTypeLike, remat: str) -> nnx.GraphDef[UNet2DCondition]:
        """Returns the UNet's graph definition with a compute dtype and a rematerialization policy."""
        config = self.unet.config
        graphdef, _ = nnx.split(
            abstract_module(lambda rngs: UNet2DCondition(config, rngs=rngs, dtype=jnp.dtype(dtype), remat=remat))
        )
        return graphdef


def pipeline_export(pipe: SDXLPipeline, dtype: str) -> Export:
    """Returns the export of a pipeline with a trained UNet; the other components are those of `pipe`.

    Args:
      pipe: the initial model; the weights of its UNet are not kept.
      dtype: of the written weights.
    """
    graphdef = nnx.graphdef(pipe.unet)
    # Gathered here, where all processes are: one process alone exports.
    frozen = allgathered(pipe.vae), tuple(map(allgathered, pipe.text_encoders)), pipe.tokenizers
    scheduler, settings = pipe.scheduler, pipe.settings

    def export(weights: Params, directory: Path) -> None:
        trained = SDXLPipeline(nnx.merge(graphdef, weights), *frozen, scheduler, settings)
        trained.save_pretrained(str(directory), dtype=dtype)

    return export
