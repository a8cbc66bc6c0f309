"""Judging with a Qwen3-VL (UnifiedReward is one): images and a question to a verdict, as a program to be planned.

clvr plan configs/qwen3_vl_judge.py --preset qwen3-vl-8b --topology v6e:2x4

The program reads the conversations and writes the answers; it is compiled from shapes alone. Every answer has its
maximum length, so the planned time is an upper bound: in use a call ends with its longest answer.
"""

import dataclasses

from clvr_jax.sharding import MeshConfig
from clvr_jax.tasks.qwen3_vl import JudgingConfig, judging_program
from clvr_jax.training.plan import Program


@dataclasses.dataclass(frozen=True)
class Config(JudgingConfig):
    """Configuration of the program that `clvr plan` compiles."""

    mesh: MeshConfig = MeshConfig(fsdp=-1)
    """Configuration of the device mesh."""


CONFIG = Config()


def program(config: Config) -> Program:
    """Returns all of a call, from token ids and patches to token ids."""
    return judging_program(config)
