"""The small Qwen3-VL of the shapes world in its two roles, verifier and controller: its sizes and its training."""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from clvr_jax.convert.architectures import QWEN3_VL
from clvr_jax.convert.models import load_model, save_model
from clvr_jax.data.preprocessing.conversations import IMAGE_PAD
from clvr_jax.data.preprocessing.qwen3_vl_images import processor_to_dict
from clvr_jax.data.preprocessing.text import load_tokenizer
from clvr_jax.errors import UsageError
from clvr_jax.files.atomic_io import write_json
from clvr_jax.models.common.abstract import abstract_module
from clvr_jax.models.flux2 import AutoencoderKLFlux2
from clvr_jax.models.qwen3_vl import Qwen3VL, Qwen3VLConfig, Qwen3VLTextConfig, Qwen3VLVisionConfig
from clvr_jax.pipelines.flux2.io import load_vae
from clvr_jax.pipelines.qwen3_vl.verifier import TRAINED_FOR_LOOP
from clvr_jax.tasks.shapes.cell_queries import CellQueries
from clvr_jax.tasks.shapes.controller_batches import (
    PROCESSOR,
    ROWS_DECODED,
    ControllerBatches,
    ControllerData,
    Reconstruct,
)
from clvr_jax.tasks.shapes.sizes import TEXT_ENCODER, TEXT_START
from clvr_jax.training.expansion import with_identity_blocks
from clvr_jax.training.objectives import next_token_loss
from clvr_jax.training.optimization.initialization import scaled
from clvr_jax.training.trainer import Task
from clvr_jax.trees import Batch, Params

TEXT = Qwen3VLTextConfig(
    vocab_size=640,
    hidden_size=TEXT_ENCODER.hidden_size,  # TEXT_START is for this width
    intermediate_size=384,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    rope_theta=10_000.0,
    mrope_section=(6, 5, 5),
    max_position_embeddings=2048,
)
VISION = Qwen3VLVisionConfig(
    depth=4,
    hidden_size=128,
    intermediate_size=256,
    num_heads=4,
    patch_size=PROCESSOR.patch_size,
    out_hidden_size=TEXT.hidden_size,
    num_position_embeddings=64,
    deepstack_visual_indexes=(1, 2),
)
Trained = Literal["all", "vision", "language"]
TRAINED_WEIGHTS: dict[Trained, nnx.filterlib.Filter] = {
    "all": nnx.Everything(),
    "vision": nnx.PathContains("visual"),
    "language": nnx.Not(nnx.PathContains("visual")),
}
GRID = (1, 64 // PROCESSOR.patch_size, 64 // PROCESSOR.patch_size)


def reconstruction(vae: AutoencoderKLFlux2, noise: float) -> Reconstruct:
    """Returns a function of images, uint8 (n, 64, 64, 3), and a seed: their reconstructions from noisy latents."""
    graphdef, state = nnx.split(vae)

    @jax.jit
    def decode(state: Params, images: jax.Array, key: jax.Array) -> jax.Array:
        vae = nnx.merge(graphdef, state)
        tokens = vae.encode_tokens(images.astype(jnp.float32) / 127.5 - 1)
        decoded = vae.decode_tokens(tokens + noise * jax.random.normal(key, tokens.shape))
        return jnp.round(jnp.clip(decoded / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)

    def apply(images: np.ndarray, seed: int) -> np.ndarray:
        filled = np.zeros((ROWS_DECODED, *images.shape[1:]), np.uint8)
        filled[: len(images)] = images
        return np.asarray(decode(state, filled, jax.random.key(seed)))[: len(images)]

    return apply


def with_deeper_vision(model: Qwen3VL) -> Qwen3VL:
    """Returns the model with twice as many blocks in its vision tower, which computes the same at first."""
    vision = model.config.vision
    # The features for the language model are taken after the new block, so that they come from it too.
    indexes = tuple(2 * index + 1 for index in vision.deepstack_visual_indexes)
    deeper = dataclasses.replace(vision, depth=2 * vision.depth, deepstack_visual_indexes=indexes)
    config = dataclasses.replace(model.config, vision=deeper)
    graphdef = nnx.split(abstract_module(lambda rngs: Qwen3VL(config, rngs=rngs)))[0]
    params = nnx.state(model)
    blocks = params["model"]["visual"]["blocks"]
    params["model"]["visual"]["blocks"] = with_identity_blocks(blocks, (r"attn\.proj\.", r"mlp\.linear_fc2\."))
    deepened: Qwen3VL = nnx.merge(graphdef, params)
    return deepened


class ClarityReader(CellQueries):
    """A prediction head: nine queries, one for each cell, attend to the image tokens and predict the cell's clarity.

    The border between clear and unclear objects is a matter of a few pixels. One word for each object teaches it
    slowly; this head tells the vision tower by how much an object misses it. It is not exported.
    """

    def __init__(self, features: int, tokens: int, *, rngs: nnx.Rngs):
        super().__init__(features, rngs=rngs)
        self.positions = nnx.Param(jax.random.normal(rngs.params(), (tokens, self.width)))
        self.hidden = nnx.Linear(self.width, self.width, rngs=rngs)
        self.out = nnx.Linear(self.width, 3, rngs=rngs)

    def __call__(self, tokens_bnd: Float[Array, "b n d"]) -> Float[Array, "b 9 3"]:
        """Maps image tokens to the logit of presence and the margins of color and shape, see `detect.Examination`."""
        return self.out(nnx.gelu(self.hidden(self.read(tokens_bnd, positions_tk=self.positions[...]))))


def clarity_loss(
    read_b93: Float[Array, "b 9 3"], clarity_b93: Float[Array, "b 9 3"]
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the loss of `ClarityReader`: presence, and the margins where something is present and they are not NaN.

    The metric is the share of present objects whose reading, clear or unclear, is right.
    """
    present = clarity_b93[..., 0]
    is_known = jnp.isfinite(clarity_b93[..., 1:])
    wanted = jnp.where(is_known, clarity_b93[..., 1:], read_b93[..., 1:])
    presence = optax.sigmoid_binary_cross_entropy(read_b93[..., 0], present).mean()
    count = jnp.maximum(present.sum(), 1)
    margins = (optax.huber_loss(read_b93[..., 1:], wanted).sum(-1) * present).sum() / count
    is_clear, is_read_clear = (values.min(-1) >= 0 for values in (wanted, read_b93[..., 1:]))
    right = ((is_clear == is_read_clear) * present).sum() / count
    return presence + margins, {"clarity_loss": presence + margins, "clarity_accuracy": right}


def controller_task(
    tokenizer: Path,
    vae: Path,
    data: ControllerData,
    *,
    vae_noise: float,
    start: Path | None,
    trained: Trained,
    deepen_vision: bool,
    seed: int,
) -> Task:
    """Returns the task of training the controller.

    Args:
      tokenizer: directory of the tokenizer.
      vae: directory of the autoencoder that images pass through.
      data: what the batches contain.
      vae_noise: noise added to the latents, whose scale is 1.
      start: controller to continue from; None trains from random weights.
      trained: "vision" trains the vision tower alone, from batches with images; "language" trains all but the tower.
      deepen_vision: insert a block after each block of the vision tower.
      seed: of the initial weights and of the batches.
    Raises: UsageError if a kind of batches would teach nothing to the weights that are trained.
    """
    words = load_tokenizer(tokenizer)
    model_config = Qwen3VLConfig(
        text=TEXT,
        vision=VISION,
        tie_word_embeddings=False,
        image_token_id=words.convert_tokens_to_ids(IMAGE_PAD),
        video_token_id=words.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=words.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=words.convert_tokens_to_ids("<|vision_end|>"),
    )
    if trained == "vision" and (blind := sorted({"prompt", "comparison"} & set(data.kinds))):
        raise UsageError(
            f"--trained vision: batches of {' and '.join(blind)} have no images, so nothing would learn from them; "
            "give --kinds of image, clarity and conversation"
        )
    if trained == "language" and "clarity" in data.kinds:
        raise UsageError(
            "--trained language: batches of clarity teach the vision tower alone; leave them out of --kinds"
        )
    if start is None:
        graphdef, all_params = nnx.split(Qwen3VL(model_config, rngs=nnx.Rngs(seed)))
        model = nnx.merge(graphdef, scaled(all_params, TEXT_START))
    else:
        model = load_model(start, QWEN3_VL, jnp.float32)
    if deepen_vision:
        model = with_deeper_vision(model)
    is_trained = TRAINED_WEIGHTS[trained]
    graphdef, params, *others = nnx.split(model, is_trained, ...)
    (fixed,) = others
    tokens = GRID[1] * GRID[2] // model.config.vision.spatial_merge_size**2
    reader_def, reader = nnx.split(ClarityReader(model.config.vision.out_hidden_size, tokens, rngs=nnx.Rngs(seed)))

    def loss(params: Params, frozen: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        model = nnx.merge(graphdef, params["model"], frozen)
        pixel_values = batch.get("pixel_values")
        if "clarity_b93" in batch:
            read = nnx.merge(reader_def, params["reader"])(model.encode_images(pixel_values, (GRID,)).tokens_bnd)
            return clarity_loss(read, batch["clarity_b93"])
        count = 0 if pixel_values is None else pixel_values.shape[1] // (GRID[1] * GRID[2])
        logits = model(
            batch["input_ids_bt"],
            pixel_values,
            (GRID,) * count,
            batch["positions_b3t"].swapaxes(0, 1),
            batch["attention_mask_bt"],
        )
        mean, metrics = next_token_loss(logits, batch["target_ids_bt"], batch["weights_bt"])
        kind = "text" if pixel_values is None else "image" if count == 1 else "conversation"
        return mean, {**metrics, f"{kind}_loss": mean}

    def export(ema: Params, directory: Path) -> None:
        model = nnx.merge(graphdef, ema["model"], fixed)
        save_model(directory, model, QWEN3_VL, "float16")
        words.save_pretrained(str(directory))
        write_json(directory / "preprocessor_config.json", processor_to_dict(PROCESSOR))
        write_json(directory / "clvr.json", {"contract": TRAINED_FOR_LOOP})

    return Task(
        name="shapes controller",
        params={"model": params, "reader": reader},
        frozen=fixed,
        loss=loss,
        batches=ControllerBatches(data, seed, words, reconstruction(load_vae(vae), vae_noise)),
        export=export,
    )
