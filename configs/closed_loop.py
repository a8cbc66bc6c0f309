"""A plan of a closed loop at full size: all programs of a few generations, with all models in memory together.

clvr plan closed_loop --preset klein-4b --controller qwen3-vl-8b --topology v6e-8

The controller replies before each generation, reading all images so far; the image is generated with all earlier ones
as references, and then verified by the controller's model. Programs are compiled from shapes alone. Every 9B variant of
FLUX.2 klein is for non-commercial use only.
"""

import dataclasses
from typing import Literal

from clvr_jax.sharding import MeshConfig
from clvr_jax.tasks.closed_loop import LoopConfig, loop_programs
from clvr_jax.training.plan import Program


@dataclasses.dataclass(frozen=True)
class Config:
    """Configuration of the loop that `clvr plan` compiles."""

    mesh: MeshConfig = MeshConfig(fsdp=1, tensor=-1)
    """Configuration of the device mesh; the default shards heads and channels over all devices,
    because one image has no batch to shard."""
    preset: Literal["klein-4b", "klein-9b"] = "klein-4b"
    """Plan for this size of FLUX.2 klein."""
    controller: Literal["qwen3-vl-2b", "qwen3-vl-4b", "qwen3-vl-8b"] = "qwen3-vl-8b"
    """Plan for this size of Qwen3-VL as the controller and the verifier."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Plan for weights and computation in this dtype."""
    quantize: Literal["int8"] | None = None
    """Plan for weights of transformer, text encoder and controller as 8-bit integers; in the dtype if not given."""
    generations: int = 3
    """Number of images that are generated, one after the other."""
    size: int = 1024
    """Generate images with sides of this many pixels."""
    steps: int = 4
    """Number of sampler steps, each of which is one network evaluation."""
    reference_cache: Literal["none", "image", "loop"] = "none"
    """Plan for this way to attend to earlier images: as tokens of every step, by keys and values that are computed once
    for each image, or by those that are kept during the loop."""
    reference_cache_dtype: Literal["int8"] | None = None
    """Plan for cached keys and values of references as 8-bit integers; in the dtype if not given."""
    batch_size: int = 1
    """Number of loops that run together, over all devices."""
    prompt_tokens: int = 192
    """Number of tokens of the prompt, chat template included."""
    reply_tokens: int = 192
    """Number of tokens of each reply of the controller."""
    verification_tokens: int = 96
    """Number of tokens of each reply of the verifier; 0 plans a loop without verification."""
    stages: str = ""
    """Plan only the stages whose name contains a match of this regular expression; plan all if it is empty."""


CONFIG = Config()


def program(config: Config) -> list[Program]:
    """Returns the programs of the loop."""
    return loop_programs(
        LoopConfig(
            preset=config.preset,
            controller=config.controller,
            dtype=config.dtype,
            quantize=config.quantize,
            generations=config.generations,
            size=config.size,
            steps=config.steps,
            batch=config.batch_size,
            prompt_tokens=config.prompt_tokens,
            reply_tokens=config.reply_tokens,
            verification_tokens=config.verification_tokens,
            reference_cache=config.reference_cache,
            reference_cache_dtype=config.reference_cache_dtype,
        ),
        config.stages,
    )
