"""Trajectories of the shapes world, drawn by a program that errs now and then; a log says for which prompts."""

import dataclasses
import time
from pathlib import Path

import numpy as np

from clvr_jax.data.engine.recipes import SynthConfig
from clvr_jax.data.engine.roles import PromptItem
from clvr_jax.data.engine.shapes_roles import correct_images, make_shapes_roles, needed_corrections
from clvr_jax.reasoning.seeds import derive_seed
from clvr_jax.worlds.shapes.prompts import train_prompt
from tests.data.engine.painter import Painter


@dataclasses.dataclass(frozen=True)
class Config:
    synth: SynthConfig = SynthConfig(in_flight=4)
    count: int = 12
    seconds: float = 0.0
    log: Path = Path("/dev/null")


CONFIG = Config()
audit = correct_images
corrections = needed_corrections


def prompts(config):
    for number in range(config.count):
        metadata = train_prompt(np.random.default_rng((0, number)))
        yield PromptItem(f"p-{number:03d}", metadata["prompt"], metadata)


class SlowPainter(Painter):
    def __init__(self, config):
        super().__init__()
        self.config = config

    def generate(self, task):
        time.sleep(self.config.seconds)
        # One of nine pictures is wrong, whichever and whenever; not the k-th, which would depend on the others.
        is_wrong = derive_seed(task.seed, "wrong") % 9 == 0
        return Painter(wrong=1 if is_wrong else 0).generate(task)


class PainterContext:
    def __init__(self, config):
        self.config, self.image_model = config, SlowPainter(config)

    def roles(self, item, tracker):
        with self.config.log.open("a") as log:
            log.write(item.id + "\n")
        return make_shapes_roles(item)


def worker_context(config):
    return PainterContext(config)
