"""The models and the data of FLUX.2's tasks: loaded, or as shapes for the planner."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from clvr_jax.convert.architectures import FLUX2_TRANSFORMER, FLUX2_VAE, qwen3_hidden_states
from clvr_jax.cost_model.flops import Flops, flux2_flops, qwen3_flops, reference_cache_flops
from clvr_jax.cost_model.flops_images import encoder_flops
from clvr_jax.data.image_pairs import PairExamples
from clvr_jax.data.preprocessing.text import encode_prompts
from clvr_jax.data.sft_examples import GenerationExamples, PackedExamples
from clvr_jax.data.sft_input import Batches, BatchLoader
from clvr_jax.data.trajectories.dataset import TrajectoryDataset
from clvr_jax.interfaces.tokenizer import Tokenizer
from clvr_jax.models.common.abstract import abstract_module
from clvr_jax.models.flux2 import AutoencoderKLFlux2Config, Flux2Transformer, Flux2TransformerConfig
from clvr_jax.models.qwen3 import Qwen3Config
from clvr_jax.pipelines.flux2 import KLEIN, Flux2Pipeline, Flux2Settings
from clvr_jax.pipelines.flux2.settings import ReferenceMode
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
    def of(cls, pipe: Flux2Pipeline, reference_cache: ReferenceMode | None = None) -> "Flux2Models":
        """Returns the models of a loaded pipeline.

        reference_cache: how images attend to references from now on; as the model's settings say if None.
        """
        mode = reference_cache or pipe.settings.reference_cache
        return cls(
            dataclasses.replace(pipe.settings, reference_cache=mode),
            ModelBundle.of(pipe.transformer),
            ModelBundle.of(pipe.text_encoder),
            ModelBundle.of(pipe.vae),
            pipe.tokenizer,
        )

    @classmethod
    def abstract(
        cls, preset: str, dtype: DTypeLike, quantize: Quantized = None, reference_cache: ReferenceMode | None = None
    ) -> "Flux2Models":
        """Returns the models of a published size, a name in `KLEIN`, without values.

        `quantize` is the format of the weights of the transformer and the text encoder, see `ModelBundle.abstract`;
        reference_cache: see `of`.
        """
        transformer, text_encoder = KLEIN[preset]
        settings = Flux2Settings()
        if reference_cache:
            settings = dataclasses.replace(settings, reference_cache=reference_cache)
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

    def abstract_packed_batches(self, rows: int, side: int, images: int) -> Callable[[int], Batch]:
        """Returns the shapes of batches of packed trajectories, see `PackedExamples`; every image is a target.

        Args:
          rows: number of trajectories. side: see `abstract_batches`. images: number of images of a trajectory.
        """
        single = self.abstract_batches(rows, side, images - 1)(0)

        def packed(name: str) -> jax.ShapeDtypeStruct:
            shape = single[name].shape
            return jax.ShapeDtypeStruct((rows, images, *shape[1:]), single[name].dtype)

        batch = {name: packed(name) for name in ("ids", "mask", "target")} | {
            "references": single["references"],
            "seen": jax.ShapeDtypeStruct((rows, images), jnp.int32),
        }
        return lambda step: batch

    def training_graphdef(self, dtype: DTypeLike, remat: str) -> nnx.GraphDef[Flux2Transformer]:
        """Returns the transformer's graph definition with a compute dtype and a rematerialization policy."""
        config = self.transformer.config
        graphdef, _ = nnx.split(
            abstract_module(lambda rngs: Flux2Transformer(config, rngs=rngs, dtype=dtype, remat=remat))
        )
        return graphdef

    @property
    def counts(self) -> "BatchCounts":
        """The tokens and FLOPs of a batch."""
        layers = max(self.settings.text_encoder_out_layers)
        mode = self.settings.reference_cache
        return BatchCounts(self.transformer.config, self.text_encoder.config, self.vae.config, layers, mode)


@dataclass(frozen=True)
class BatchCounts:
    """Tokens and FLOPs of a batch of the form of `Flux2Models.abstract_batches`, or of packed trajectories.

    layers: number of layers of the text encoder that are computed. mode: how images attend to references.
    """

    transformer: Flux2TransformerConfig
    text_encoder: Qwen3Config
    vae: AutoencoderKLFlux2Config
    layers: int
    mode: ReferenceMode = "none"

    def image_tokens(self, batch: Batch) -> int:
        """Returns the number of tokens of one image."""
        side: int = batch["target"].shape[-2]
        return (side // self.vae.token_pixels) ** 2

    def targets(self, batch: Batch) -> int:
        """Returns the number of target images of each row."""
        return int(batch["target"].shape[1]) if has_packed_rows(batch) else 1

    def tokens(self, batch: Batch) -> int:
        """Returns the number of tokens of texts, targets and references of all rows."""
        rows, references = batch["references"].shape[:2]
        target = batch["ids"].shape[-1] + self.image_tokens(batch)
        return int(rows * (self.targets(batch) * target + references * self.image_tokens(batch)))

    def evaluation(self, batch: Batch) -> Flops:
        """Returns the FLOPs of one evaluation of the transformer for each target."""
        (rows, references), image = batch["references"].shape[:2], self.image_tokens(batch)
        targets, text = rows * self.targets(batch), batch["ids"].shape[-1]
        if self.mode == "none":
            return flux2_flops(self.transformer, targets, text=text, image=image, references=references * image)
        found = flux2_flops(self.transformer, targets, text=text, image=image, cached=references * image)
        if self.mode == "image":
            return found + reference_cache_flops(self.transformer, rows, references=references * image)
        for number in range(references):
            found += reference_cache_flops(self.transformer, rows, references=image, earlier=number * image)
        return found

    def encoders(self, batch: Batch, images: int) -> Flops:
        """Returns the FLOPs of the text encoder and of the VAE's encoder for `images` images of each row."""
        rows, side = len(batch["target"]), batch["target"].shape[-2]
        texts = rows * self.targets(batch)
        text = qwen3_flops(self.text_encoder, texts, batch["ids"].shape[-1], layers=self.layers, logits=0)
        return text + encoder_flops(self.vae, rows * images, side, side)


def has_packed_rows(batch: Batch) -> bool:
    """Returns whether the rows of a batch are trajectories with several targets, see `PackedExamples`."""
    return "seen" in batch


def trajectory_batches(
    pipe: Flux2Pipeline, dataset: Path, batch_size: int, seed: int, dropout: float, *, is_packed: bool = False
) -> Batches:
    """Returns batches of the target images of a dataset of trajectories, each under everything before it.

    Args:
      pipe: its tokenizer and text buckets are used.
      dataset: directory that `clvr synth` wrote.
      batch_size: number of target images, or of trajectories if they are packed.
      seed: of order and dropout.
      dropout: fraction of texts that are replaced by the empty text.
      is_packed: whether a row has all targets of a trajectory, see `PackedExamples`.
    Raises: ClvrError if there is no dataset.
    """
    examples = GenerationExamples(
        TrajectoryDataset(dataset), pipe.tokenizer, dropout=dropout, text_buckets=pipe.settings.text_buckets
    )
    return Batches(BatchLoader(PackedExamples(examples) if is_packed else examples, batch_size, seed=seed))


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
