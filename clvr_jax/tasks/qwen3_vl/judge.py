"""Judging with a Qwen3-VL as one program for the planner: images and a question to the tokens of an answer."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from clvr_jax.convert.architectures import QWEN3_VL
from clvr_jax.cost_model.flops import Flops, decoder_flops, qwen3_vl_flops
from clvr_jax.errors import UsageError
from clvr_jax.models.qwen3_vl.model import DecodeCache
from clvr_jax.tasks.bundles import ModelBundle
from clvr_jax.tasks.qwen3_vl.models import PRESETS, token_side
from clvr_jax.training.plan import Program
from clvr_jax.trees import Batch, Params


@dataclasses.dataclass(frozen=True)
class JudgingConfig:
    """Sizes of a call of a judge."""

    preset: Literal["qwen3-vl-2b", "qwen3-vl-4b", "qwen3-vl-8b"] = "qwen3-vl-8b"
    """Plan for this size of Qwen3-VL; UnifiedReward 2.0 is an 8B."""
    batch_size: int = 16
    """Number of questions answered in a call, over all devices."""
    images: int = 2
    """Number of images in a question; judging an edit takes two."""
    size: int = 512
    """Plan for images with sides of this many pixels."""
    text: int = 256
    """Number of tokens of a question, without its images."""
    answer: int = 128
    """Number of tokens of an answer."""

    def __post_init__(self) -> None:
        if min(self.batch_size, self.images, self.size, self.text, self.answer) < 1:
            raise UsageError("qwen3_vl_judge: batch_size, images, size, text and answer must be at least 1")


def judging_program(config: JudgingConfig) -> Program:
    """Returns all of a call, from token ids and patches to token ids; every answer has its maximum length.

    Raises: UsageError for a size that is no whole number of tokens.
    """
    sizes, vision = PRESETS[config.preset], PRESETS[config.preset].vision
    side = token_side(vision)
    if config.size % side:
        raise UsageError(f"qwen3_vl_judge: size {config.size} must be a multiple of {side} pixels, a token's side")
    grids = ((1, config.size // vision.patch_size, config.size // vision.patch_size),) * config.images
    b, read = config.batch_size, config.text + config.images * (config.size // side) ** 2
    bundle = ModelBundle.abstract(QWEN3_VL, sizes, jnp.bfloat16)

    def judge(weights: Params, data: Batch) -> jax.Array:
        model = nnx.merge(bundle.graphdef, weights["judge"])
        positions_3bt = data["positions_b3t"].swapaxes(0, 1)
        logits_bv, cache = model.prefill(
            data["ids"], data["patches"], grids, positions_3bt, data["mask"], cache_length=read + config.answer
        )

        def step(carry: tuple[jax.Array, DecodeCache], _: None) -> tuple[tuple[jax.Array, DecodeCache], jax.Array]:
            token_b = jnp.argmax(carry[0], axis=-1).astype(jnp.int32)
            return model.decode_step(carry[1], token_b), token_b

        return jax.lax.scan(step, (logits_bv, cache), length=config.answer)[1].T

    shape = jax.ShapeDtypeStruct
    data = {
        "ids": shape((b, read), jnp.int32),
        "mask": shape((b, read), jnp.bool),
        "positions_b3t": shape((b, 3, read), jnp.int32),
        "patches": shape((b, sum(h * w for _, h, w in grids), vision.patch_features), jnp.float32),
    }
    text = sizes.text
    logits = Flops(outside=2.0 * b * config.answer * text.hidden_size * text.vocab_size)
    written = decoder_flops(text, text.num_hidden_layers, b, config.answer, read + config.answer // 2) + logits
    return Program(
        name=f"{config.preset}, {b} questions of {read} tokens, answers of {config.answer}",
        function=judge,
        weights={"judge": bundle.weights},
        data=data,
        reads={"judge": 1 + config.answer},
        flops=(qwen3_vl_flops(sizes, b, read, grids, logits=1) + written).forward,
    )
