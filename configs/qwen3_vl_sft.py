"""Full-parameter fine-tuning of the controller, Qwen3-VL, on verified trajectories: it learns the replies of the
assistant.

clvr train configs/qwen3_vl_sft.py --model Qwen/Qwen3-VL-8B-Instruct --dataset data/trajectories

A trajectory is one conversation with all its images; the verdicts on wrong images and the corrections are learned, too.
If the dataset has verification examples (`clvr synth` makes them), the verdict of each is learned as well. The paper
does not give the controller's learning rate; 1e-5 is usual for models of this size. The vision tower is frozen unless
`train_vision` is set.

Never run on the real weights: there was no accelerator. The tests run it on the controller of `shapes-tiny`, a model of
the same class, and trace the step of the full sizes.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from clvr_jax.convert.architectures import QWEN3_VL
from clvr_jax.convert.hub import local_directory
from clvr_jax.cost_model.flops import Flops, qwen3_vl_flops, qwen3_vl_vision_flops
from clvr_jax.data.sft_examples import ConversationExamples, StaticGrids
from clvr_jax.data.sft_input import Batches, BatchLoader
from clvr_jax.data.trajectory_dataset import VERIFICATION, TrajectoryDataset
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.models.qwen3_vl import Qwen3VL, Qwen3VLConfig
from clvr_jax.pipelines.registry import MODELS, resolve
from clvr_jax.pipelines.vlm import Qwen3VLPipeline
from clvr_jax.sharding import MeshConfig, process_allgather
from clvr_jax.training.checkpoint import CheckpointConfig
from clvr_jax.training.sft import conversation_loss
from clvr_jax.training.trainer import Task, TrainConfig

PRESETS = {
    "qwen3-vl-2b": Qwen3VLConfig.qwen3_vl_2b(),
    "qwen3-vl-4b": Qwen3VLConfig.qwen3_vl_4b(),
    "qwen3-vl-8b": Qwen3VLConfig.qwen3_vl_8b(),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Configuration of the run, and of what `clvr plan` compiles."""

    train: TrainConfig = TrainConfig(
        steps=2000,
        learning_rate=1e-5,
        b2=0.999,
        warmup=0.05,
        ema_decay=0.99,
        compute_dtype="bfloat16",
        mesh=MeshConfig(fsdp=-1),
        checkpoint=CheckpointConfig(save_interval_minutes=20),
    )
    """Configuration of the training."""
    model: str = ""
    """Start from this Qwen3-VL: a directory or Hugging Face id of the model, or of a pipeline with a `controller/`; it
    must be given to train."""
    dataset: Path = Path("data/trajectories")
    """Train on this dataset of trajectories, a directory that `clvr synth` wrote."""
    verification: bool = True
    """Train on the verification examples of the dataset as well, if it has any."""
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


CONFIG = Config()


def task(config: Config) -> Task:
    """Returns the task for the trainer."""
    if not config.model:
        raise ClvrError("qwen3_vl_sft: --model is missing; give a directory or a Hugging Face id of Qwen3-VL")
    pipe = Qwen3VLPipeline.from_pretrained(_folder(config.model), "float32")
    dataset = TrajectoryDataset(config.dataset)
    has_verification = config.verification and dataset.has_verification
    verification = TrajectoryDataset(config.dataset, VERIFICATION) if has_verification else None
    examples = ConversationExamples(dataset, pipe.tokenizer, pipe.image_processor, verification=verification)
    params, frozen = _parts(nnx.state(pipe.model), config)
    unchanged = process_allgather(frozen)
    model_config, tokenizer, image_processor = pipe.model.config, pipe.tokenizer, pipe.image_processor
    generation = pipe.generation

    def export(ema: Any, directory: Path) -> None:
        model = nnx.merge(_graph(model_config, config), ema, *unchanged)
        Qwen3VLPipeline(model, tokenizer, image_processor, generation).save_pretrained(directory, "bfloat16")

    batches = Batches(BatchLoader(examples, config.batch_size, seed=config.train.seed))
    return _task(config, model_config, params, frozen, batches, export)


def abstract_task(config: Config) -> Task:
    """Returns the same task with shapes in place of arrays, to trace, compile and plan its step."""
    model_config = PRESETS[config.preset]
    vision = model_config.vision
    side = vision.patch_size * vision.spatial_merge_size
    if config.size % side:
        raise UsageError(f"qwen3_vl_sft: size {config.size} must be a multiple of {side} pixels, a token's side")
    grids = StaticGrids(((1, config.size // vision.patch_size, config.size // vision.patch_size),) * config.images)
    b, t = config.batch_size, config.text + config.images * (config.size // side) ** 2
    batch: dict[str, Any] = {
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
    params, frozen = _parts(QWEN3_VL.split(QWEN3_VL.config_to_dict(model_config))[1], config)
    return _task(config, model_config, params, frozen, lambda step: batch, lambda ema, directory: None)


def _folder(model: str) -> Path:
    directory = resolve(model)[0] if model in MODELS else local_directory(model)
    return directory / "controller" if (directory / "controller").is_dir() else directory


def _graph(model_config: Qwen3VLConfig, config: Config) -> Any:
    dtype = jnp.dtype(config.train.compute_dtype)
    graphdef, _ = nnx.split(
        nnx.eval_shape(lambda: Qwen3VL(model_config, rngs=nnx.Rngs(0), dtype=dtype, remat=config.remat))
    )
    return graphdef


def _is_vision(path: tuple[Any, ...], leaf: Any) -> bool:
    return path[:2] == ("model", "visual")


def _parts(state: nnx.State, config: Config) -> tuple[nnx.State, tuple[nnx.State, ...]]:
    """Returns the trained parameters in float32, and the frozen ones in the compute dtype."""
    if config.train_vision:
        return state, ()
    vision, language = nnx.split_state(state, _is_vision, ...)
    dtype = config.train.compute_dtype
    return language, (jax.tree.map(lambda leaf: _cast(leaf, dtype), vision),)


def _cast(leaf: Any, dtype: str) -> Any:
    """An array, or the shape of one, in another dtype."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype))
    return leaf.astype(dtype)


def _task(
    config: Config,
    model_config: Qwen3VLConfig,
    params: nnx.State,
    frozen: tuple[nnx.State, ...],
    batches: Any,
    export: Callable[[Any, Path], None],
) -> Task:
    graphdef = _graph(model_config, config)

    def loss(params: Any, frozen: Any, data: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        model = nnx.merge(graphdef, params, *frozen)
        states_btd = model.final_states(
            data["input_ids_bt"],
            data.get("pixel_values"),
            data.get("grid_thw", ()),
            data["positions_b3t"].swapaxes(0, 1),
            data["attention_mask_bt"],
        )
        return conversation_loss(states_btd, model.head_dv, data, config.loss_block)

    def counted(batch: Any) -> tuple[Flops, Flops, Flops]:
        """Returns the FLOPs of the language model's blocks, of the logits, and of the vision tower."""
        (rows, length), said = batch["input_ids_bt"].shape, batch["learned_bk"].shape[1]
        head = Flops(outside=2.0 * rows * said * model_config.text.hidden_size * model_config.text.vocab_size)
        vision = qwen3_vl_vision_flops(model_config.vision, batch.get("grid_thw", ())) * rows
        return qwen3_vl_flops(model_config, rows, length, logits=0), head, vision

    def flops(batch: Any) -> float:
        language, head, vision = counted(batch)
        return (language + head).training + (vision.training if config.train_vision else vision.forward)

    def hardware_flops(batch: Any) -> float:
        language, head, vision = counted(batch)
        seen = vision.hardware(config.remat, flash=True) if config.train_vision else vision.forward
        # The logits are made once more in the backward pass, whatever is kept of the blocks.
        return language.hardware(config.remat, flash=True) + head.training + head.forward + seen

    return Task(
        name=f"Qwen3-VL SFT, {model_config.text.num_hidden_layers} layers",
        params=params,
        frozen=frozen,
        loss=loss,
        batches=batches,
        export=export,
        flops=flops,
        hardware_flops=hardware_flops,
        tokens=lambda batch: int(batch["input_ids_bt"].size),
    )
