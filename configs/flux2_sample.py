"""Sampling with FLUX.2 klein: prompts and reference images to images, as one program to be planned.

clvr plan configs/flux2_sample.py --preset klein-4b --topology v6e:2x4

The program encodes prompts and references, runs the solver's steps and decodes; it is compiled from shapes alone. Every
9B variant of FLUX.2 klein is for non-commercial use only.
"""

import dataclasses
from typing import Literal

from clvr_jax.sharding import MeshConfig
from clvr_jax.tasks import flux2
from clvr_jax.training.plan import Program


@dataclasses.dataclass(frozen=True)
class Config:
    """Configuration of the program that `clvr plan` compiles."""

    mesh: MeshConfig = MeshConfig(data=-1, fsdp=1)
    """Configuration of the device mesh."""
    preset: Literal["klein-4b", "klein-9b"] = "klein-4b"
    """Plan for this size of FLUX.2 klein."""
    batch_size: int = 8
    """Number of images generated in a call, over all devices."""
    size: int = 1024
    """Generate images with sides of this many pixels."""
    references: int = 0
    """Number of reference images given with each prompt, of the same size as the generated image."""
    steps: int = 4
    """Number of sampler steps."""
    guided: bool = False
    """Use classifier-free guidance: two network evaluations in each step, which base models need and distilled models
    do not."""


CONFIG = Config()


def program(config: Config) -> Program:
    """Returns all of a call, from token ids to pixels."""
    return flux2.sampling_program(
        config.preset,
        flux2.Flux2Models.abstract(config.preset, "bfloat16"),
        batch_size=config.batch_size,
        size=config.size,
        references=config.references,
        steps=config.steps,
        guided=config.guided,
    )
