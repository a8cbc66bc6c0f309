"""The models and the data of FLUX.2's tasks: loaded, or as shapes for the planner."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from clvr_jax.convert.architectures import FLUX2_TRANSFORMER, FLUX2_VAE, qwen3_hidden_states
from clvr_jax.cost_model.flops import Flops, flux2_flops, qwen3_flops
from clvr_jax.cost_model.flops_images import encoder_flops
from clvr_jax.data.image_pairs import PairExamples
from clvr_jax.data.preprocessing.text import encode_prompts
from clvr_jax.data.sft_examples import GenerationExamples
from clvr_jax.data.sft_input import Batches, BatchLoader
from clvr_jax.data.trajectories.dataset import TrajectoryDataset
from clvr_jax.errors import ClvrError
from clvr_jax.interfaces.tokenizer import Tokenizer
from clvr_jax.models.flux2 import AutoencoderKLFlux2Config, Flux2Transformer, Flux2TransformerConfig
from clvr_jax.models.qwen3 import Qwen3Config
from clvr_jax.pipelines.flux2 import KLEIN, Flux2Pipeline, Flux2Settings
from clvr_jax.tasks.bundles import Export, ModelBundle, Quantized, allgathered
from clvr_jax.trees import Batch, Params


@dataclass(frozen=True)
class Flux2Models:
    """The models of a FLUX.2 pipeline. tokenizer: None if the weights are shapes.

    The functions of a task keep configurations and graph definitions, not the bundle, so that weights that are not
    trained in their own dtype are freed once the task is built.
    """

    settings: Flux2Settings
    transformer: ModelBundle[Flux2TransformerConfig]
    text_encoder: ModelBundle[Qwen3Config]
    vae: ModelBundle[AutoencoderKLFlux2Config]
    tokenizer: Tokenizer | None = None

    @classmethod
    def of(cls, pipe: Flux2Pipeline) -> "Flux2Models":
        """Returns the models of a loaded pipeline. Raises: ClvrError for one whose references are cached."""
        if pipe.settings.reference_cache != "none":
            raise ClvrError(
                f"references of the model are cached (reference_cache {pipe.settings.reference_cache}), which training "
                "does not support; train a model with reference_cache none"
            )
        return cls(
            pipe.settings,
            ModelBundle.of(pipe.transformer),
            ModelBundle.of(pipe.text_encoder),
            ModelBundle.of(pipe.vae),
            pipe.tokenizer,
        )

    @classmethod
    def abstract(cls, preset: str, dtype: DTypeLike, quantize: Quantized = None) -> "Flux2Models":
        """Returns the models of a published size, a name in `KLEIN`, without values.

        `quantize` is the format of the weights of the transformer and the text encoder, see `ModelBundle.abstract`.
        """
        transformer, text_encoder = KLEIN[preset]
        settings = Flux2Settings()
        return cls(
            settings,
            ModelBundle.abstract(FLUX2_TRANSFORMER, transformer, dtype, quantize),
            ModelBundle.abstract(qwen3_hidden_states(settings.text_encoder_out_layers), text_encoder, dtype, quantize),
            ModelBundle.abstract(FLUX2_VAE, AutoencoderKLFlux2Config(), dtype),
        )

    @property
    def empty_text(self) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
        """Function of a length: ids and mask (1, length) of the empty text, or values of these shapes."""
        tokenizer = self.tokenizer
        if tokenizer is None:
            return lambda length: (np.zeros((1, length), np.int32), np.ones((1, length), np.int32))
        return lambda length: encode_prompts(tokenizer, [""], (length,))

    def abstract_batches(
        self, rows: int, side: int, references: int
    ) -> Callable[[int], dict[str, jax.ShapeDtypeStruct]]:
        """Returns the shapes of batches as a function of the step; texts have the length of the first bucket.

        Args:
          rows: number of target images. side: height and width of all images in pixels. references: number for a row.
        """
        text = self.settings.text_buckets[0]
        batch = {
            "ids": jax.ShapeDtypeStruct((rows, text), jnp.int32),
            "mask": jax.ShapeDtypeStruct((rows, text), jnp.int32),
            "target": jax.ShapeDtypeStruct((rows, side, side, 3), jnp.uint8),
            "references": jax.ShapeDtypeStruct((rows, references, side, side, 3), jnp.uint8),
        }
        return lambda step: batch

    def training_graphdef(self, dtype: DTypeLike, remat: str) -> nnx.GraphDef[Flux2Transformer]:
        """Returns the transformer's graph definition with a compute dtype and a rematerialization policy."""
        config = self.transformer.config
        graphdef, _ = nnx.split(
            nnx.eval_shape(lambda: Flux2Transformer(config, rngs=nnx.Rngs(0), dtype=dtype, remat=remat))
        )
        return graphdef

    @property
    def counts(self) -> "BatchCounts":
        """The tokens and FLOPs of a batch."""
        layers = max(self.settings.text_encoder_out_layers)
        return BatchCounts(self.transformer.config, self.text_encoder.config, self.vae.config, layers)


@dataclass(frozen=True)
class BatchCounts:
    """Tokens and FLOPs of a batch of the form of `Flux2Models.abstract_batches`.

    layers: number of layers of the text encoder that are computed.
    """

    transformer: Flux2TransformerConfig
    text_encoder: Qwen3Config
    vae: AutoencoderKLFlux2Config
    layers: int

    def image_tokens(self, batch: Batch) -> int:
        """Returns the number of tokens of one image."""
        side: int = batch["target"].shape[1]
        return (side // self.vae.token_pixels) ** 2

    def tokens(self, batch: Batch) -> int:
        """Returns the number of tokens of text, target and references of all rows."""
        rows, references = batch["references"].shape[:2]
        return int(rows * (batch["ids"].shape[1] + (1 + references) * self.image_tokens(batch)))

    def evaluation(self, batch: Batch) -> Flops:
        """Returns the FLOPs of one evaluation of the transformer for each row."""
        (rows, references), image = batch["references"].shape[:2], self.image_tokens(batch)
        text = batch["ids"].shape[1]
        return flux2_flops(self.transformer, rows, text=text, image=image, references=references * image)

    def encoders(self, batch: Batch, images: int) -> Flops:
        """Returns the FLOPs of the text encoder and of the VAE's encoder for `images` images of each row."""
        rows, side = batch["target"].shape[:2]
        text = qwen3_flops(self.text_encoder, rows, batch["ids"].shape[1], layers=self.layers, logits=0)
        return text + encoder_flops(self.vae, rows * images, side, side)


def trajectory_batches(pipe: Flux2Pipeline, dataset: Path, batch_size: int, seed: int, dropout: float) -> Batches:
    """Returns batches of the target images of a dataset of trajectories, each under everything before it.

    Args:
      pipe: its tokenizer and text buckets are used.
      dataset: directory that `clvr synth` wrote.
      batch_size: number of target images.
      seed: of order and dropout.
      dropout: fraction of texts that are replaced by the empty text.
    Raises: ClvrError if there is no dataset.
    """
    examples = GenerationExamples(
        TrajectoryDataset(dataset), pipe.tokenizer, dropout=dropout, text_buckets=pipe.settings.text_buckets
    )
    return Batches(BatchLoader(examples, batch_size, seed=seed))


def pair_batches(
    pipe: Flux2Pipeline, directory: Path, size: int, batch_size: int, seed: int, dropout: float
) -> Batches:
    """Returns batches of image-caption pairs or edit pairs.

    Args:
      pipe: its tokenizer, text buckets and token size are used.
      directory: see `PairExamples`.
      size: the area of an image is at most this many pixels squared.
      batch_size: number of target images.
      seed: of order and dropout.
      dropout: fraction of texts that are replaced by the empty text.
    Raises: ClvrError if there is no such directory.
    """
    examples = PairExamples(
        directory,
        pipe.tokenizer,
        side=size,
        token_pixels=pipe.vae.config.token_pixels,
        text_buckets=pipe.settings.text_buckets,
        dropout=dropout,
    )
    return Batches(BatchLoader(examples, batch_size, seed=seed))


def pipeline_export(pipe: Flux2Pipeline, dtype: str, settings: Flux2Settings | None = None) -> Export:
    """Returns the export of a pipeline with a trained transformer; text encoder and VAE are those of `pipe`.

    Args:
      pipe: the initial model; the weights of its transformer are not kept.
      dtype: of the written weights.
      settings: of the written pipeline; those of `pipe` if not given.
    """
    graphdef = nnx.graphdef(pipe.transformer)
    # Gathered here, where all processes are: one process alone exports.
    frozen = allgathered(pipe.vae), allgathered(pipe.text_encoder), pipe.tokenizer
    settings, schedule, source = settings or pipe.settings, pipe.schedule, pipe.text_encoder_source

    def export(weights: Params, directory: Path) -> None:
        trained = Flux2Pipeline(nnx.merge(graphdef, weights), *frozen, settings, schedule, source)
        trained.save_pretrained(str(directory), dtype=dtype)

    return export
