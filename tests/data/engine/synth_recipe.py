"""A synthesis recipe of the shapes world with an image generator that makes some mistakes; a log lists the prompts."""

import dataclasses
import time
from pathlib import Path

import numpy as np

from clvr_jax.data.engine.recipes import SynthConfig
from clvr_jax.data.engine.roles.base import PromptItem
from clvr_jax.data.engine.roles.shapes import correct_images, make_shapes_roles, needed_corrections
from clvr_jax.reasoning.seeds import derive_seed
from clvr_jax.worlds.shapes.prompts import train_prompt
from tests.data.engine.exact_generator import ExactGenerator


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


class SlowGenerator(ExactGenerator):
    def __init__(self, config):
        super().__init__()
        self.config = config

    def generate(self, task):
        time.sleep(self.config.seconds)
        # One of nine images is wrong, by its seed; the k-th image would depend on the order of prompts.
        is_wrong = derive_seed(task.seed, "wrong") % 9 == 0
        return ExactGenerator(wrong=1 if is_wrong else 0).generate(task)


class GeneratorContext:
    def __init__(self, config):
        self.config, self.image_model = config, SlowGenerator(config)

    def roles(self, item, tracker):
        with self.config.log.open("a") as log:
            log.write(item.id + "\n")
        return make_shapes_roles(item)


def worker_context(config):
    return GeneratorContext(config)
