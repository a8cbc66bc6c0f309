"""Supervised fine-tuning of Qwen3-VL on conversations: it learns the replies of the assistant."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from clvr_jax.cost_model.flops import Flops, qwen3_vl_flops, qwen3_vl_vision_flops
from clvr_jax.data.sft_examples import ConversationExamples, StaticGrids
from clvr_jax.data.sft_input import Batches, BatchLoader
from clvr_jax.data.trajectories.dataset import VERIFICATION, TrajectoryDataset
from clvr_jax.errors import UsageError
from clvr_jax.models.common.abstract import abstract_module
from clvr_jax.models.qwen3_vl import Qwen3VL, Qwen3VLConfig
from clvr_jax.pipelines.qwen3_vl import Qwen3VLPipeline
from clvr_jax.sharding import process_allgather
from clvr_jax.tasks.bundles import Export, ModelBundle, cast_weights, no_export
from clvr_jax.tasks.qwen3_vl.models import token_side
from clvr_jax.training import prefetch
from clvr_jax.training.objectives.sft import conversation_loss
from clvr_jax.training.trainer import Task, TrainConfig
from clvr_jax.trees import Batch, KeyPath, Params


@dataclasses.dataclass(frozen=True)
class ConversationConfig:
    """Options of the recipe that trains Qwen3-VL on conversations."""

    model: str = ""
    """Start from this Qwen3-VL: a directory or Hugging Face id of the model, or of a pipeline with a `controller/`; it
    must be given to train."""
    batch_size: int = 64
    """Number of conversations in a step, over all devices."""
    train_vision: bool = False
    """Train the vision tower as well; it stays frozen by default."""
    remat: str = "attention"
    """Choose what the backward pass keeps of each block: "dots" keeps all matrix products, "attention" only the outputs
    of attention, and "full" nothing, which takes the least memory and the most time."""
    loss_block: int = 1024
    """Compute the logits of this many tokens at a time on each device (chunked cross entropy), which bounds their
    memory."""
    preset: Literal["qwen3-vl-2b", "qwen3-vl-4b", "qwen3-vl-8b"] = "qwen3-vl-8b"
    """With `clvr plan` only: plan for this size of Qwen3-VL."""
    text: int = 2048
    """With `clvr plan` only: plan for conversations with this many text tokens."""
    learned: int = 1536
    """With `clvr plan` only: this many of the text tokens are in the loss."""
    images: int = 4
    """With `clvr plan` only: plan for conversations with this many images."""
    size: int = 1024
    """With `clvr plan` only: plan for images with sides of this many pixels."""

    def __post_init__(self) -> None:
        if min(self.batch_size, self.loss_block, self.text, self.learned, self.size) < 1 or self.images < 0:
            raise UsageError("qwen3_vl_sft: batch_size, loss_block, text, learned and size must be at least 1")


def sft_task(
    model: ModelBundle[Qwen3VLConfig],
    config: ConversationConfig,
    train: TrainConfig,
    batches: prefetch.Batches,
    pipe: Qwen3VLPipeline | None = None,
) -> Task:
    """Returns the task of training the language model, and the vision tower if the options say so.

    Args:
      model: the initial model in float32, loaded or abstract. A frozen vision tower is cast to the compute dtype.
      config, train: options of the run.
      batches: of the form of `abstract_conversations`.
      pipe: its tokenizer, image processor and generation options are exported with the trained model; None for an
        abstract model, which exports nothing.
    """
    model_config, graphdef = model.config, _training_graphdef(model.config, config.remat, train.compute_dtype)
    params, frozen = _trained_and_frozen(model.weights, config.train_vision, train.compute_dtype)

    def loss(params: Params, frozen: Params, data: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        model = nnx.merge(graphdef, params, *frozen)
        states_btd = model.final_states(
            data["input_ids_bt"],
            data.get("pixel_values"),
            data.get("grid_thw", ()),
            data["positions_b3t"].swapaxes(0, 1),
            data["attention_mask_bt"],
        )
        return conversation_loss(states_btd, model.head_dv, data, config.loss_block)

    def counted(batch: Batch) -> tuple[Flops, Flops, Flops]:
        """Returns the FLOPs of the language model's blocks, of the logits, and of the vision tower."""
        (rows, length), learned = batch["input_ids_bt"].shape, batch["learned_bk"].shape[1]
        head = Flops(outside=2.0 * rows * learned * model_config.text.hidden_size * model_config.text.vocab_size)
        vision = qwen3_vl_vision_flops(model_config.vision, batch.get("grid_thw", ())) * rows
        return qwen3_vl_flops(model_config, rows, length, logits=0), head, vision

    def flops(batch: Batch) -> float:
        language, head, vision = counted(batch)
        return (language + head).training + (vision.training if config.train_vision else vision.forward)

    def hardware_flops(batch: Batch) -> float:
        language, head, vision = counted(batch)
        seen = vision.hardware(config.remat, flash=True) if config.train_vision else vision.forward
        # The logits are computed again in the backward pass, whatever is kept of the blocks.
        return language.hardware(config.remat, flash=True) + head.training + head.forward + seen

    return Task(
        name=f"Qwen3-VL SFT, {model_config.text.num_hidden_layers} layers",
        params=params,
        frozen=frozen,
        loss=loss,
        batches=batches,
        export=no_export if pipe is None else _pipeline_export(pipe, graphdef, process_allgather(frozen)),
        flops=flops,
        hardware_flops=hardware_flops,
        tokens=lambda batch: int(batch["input_ids_bt"].size),
    )


def conversation_batches(
    pipe: Qwen3VLPipeline, directory: Path, batch_size: int, seed: int, *, verification: bool
) -> Batches:
    """Returns batches of the conversations of a dataset of trajectories.

    Args:
      pipe: its tokenizer and image processor are used.
      directory: dataset that `clvr synth` wrote.
      batch_size: number of conversations.
      seed: of the order.
      verification: whether verification examples of the dataset are learned as well, if it has any.
    Raises: ClvrError if there is no dataset.
    """
    dataset = TrajectoryDataset(directory)
    has_verification = verification and dataset.has_verification
    examples = ConversationExamples(
        dataset,
        pipe.tokenizer,
        pipe.image_processor,
        verification=TrajectoryDataset(directory, VERIFICATION) if has_verification else None,
    )
    return Batches(BatchLoader(examples, batch_size, seed=seed))


AbstractConversations = dict[str, jax.ShapeDtypeStruct | StaticGrids]
"""The shapes of a batch of conversations, and the grids of its images."""


def abstract_conversations(
    model_config: Qwen3VLConfig, config: ConversationConfig
) -> Callable[[int], AbstractConversations]:
    """Returns the shapes of batches as a function of the step.

    Raises: UsageError for a size that is no whole number of tokens.
    """
    vision = model_config.vision
    side = token_side(vision)
    if config.size % side:
        raise UsageError(f"qwen3_vl_sft: size {config.size} must be a multiple of {side} pixels, a token's side")
    grids = StaticGrids(((1, config.size // vision.patch_size, config.size // vision.patch_size),) * config.images)
    b, t = config.batch_size, config.text + config.images * (config.size // side) ** 2
    batch: AbstractConversations = {
        "input_ids_bt": jax.ShapeDtypeStruct((b, t), jnp.int32),
        "attention_mask_bt": jax.ShapeDtypeStruct((b, t), jnp.bool),
        "positions_b3t": jax.ShapeDtypeStruct((b, 3, t), jnp.int32),
        "weights_bt": jax.ShapeDtypeStruct((b, t), jnp.float32),
        "learned_bk": jax.ShapeDtypeStruct((b, config.learned), jnp.int32),
    }
    if grids:
        patches = sum(rows * columns for _, rows, columns in grids)
        batch |= {
            "pixel_values": jax.ShapeDtypeStruct((b, patches, vision.patch_features), jnp.float32),
            "grid_thw": grids,
        }
    return lambda step: batch


def _training_graphdef(model_config: Qwen3VLConfig, remat: str, dtype: str) -> nnx.GraphDef[Qwen3VL]:
    graphdef, _ = nnx.split(
        abstract_module(lambda rngs: Qwen3VL(model_config, rngs=rngs, dtype=jnp.dtype(dtype), remat=remat))
    )
    return graphdef


def _is_vision(path: KeyPath, leaf: object) -> bool:
    return path[:2] == ("model", "visual")


def _trained_and_frozen(weights: Params, train_vision: bool, dtype: str) -> tuple[Params, tuple[Params, ...]]:
    """Returns the trained parameters in float32, and the frozen ones in the compute dtype."""
    if train_vision:
        return weights, ()
    vision, language = nnx.split_state(weights, _is_vision, ...)
    return language, (cast_weights(vision, dtype),)


def _pipeline_export(pipe: Qwen3VLPipeline, graphdef: nnx.GraphDef[Qwen3VL], frozen: tuple[Params, ...]) -> Export:
    tokenizer, image_processor, generation = pipe.tokenizer, pipe.image_processor, pipe.generation

    def export(params: Params, directory: Path) -> None:
        model = nnx.merge(graphdef, params, *frozen)
        Qwen3VLPipeline(model, tokenizer, image_processor, generation).save_pretrained(directory, "bfloat16")

    return export
