"""An exact image generator of the shapes world, and prompts for it."""

import numpy as np

from clvr_jax.data.engine.roles.base import PromptItem
from clvr_jax.interfaces import ImageResponse, Usage
from clvr_jax.worlds.shapes.detect import detect
from clvr_jax.worlds.shapes.oracle import apply_edits, parse_edits
from clvr_jax.worlds.shapes.prompts import train_prompt
from clvr_jax.worlds.shapes.render import render
from clvr_jax.worlds.shapes.scene import COLORS, Scene, place


def item(number, tag="complex"):
    """Returns a training prompt of the tag."""
    rng = np.random.default_rng(number)
    while (metadata := train_prompt(rng))["tag"] != tag:
        pass
    return PromptItem(f"{tag}-{number}", metadata["prompt"], metadata)


class ExactGenerator:
    """Applies the edits of the text's last line to the last reference; each `wrong`-th object has a wrong color."""

    def __init__(self, wrong=0):
        self.wrong, self.calls, self.objects = wrong, [], 0

    name = "exact"

    def generate(self, task):
        self.calls.append((task.prompt, len(task.references), task.seed))
        before = detect(task.references[-1]) if task.references else ()
        rng, objects = np.random.default_rng(task.seed), []
        for one in apply_edits(before, parse_edits(task.prompt.splitlines()[-1])):
            self.objects += 1
            is_wrong = self.wrong and self.objects % self.wrong == 0
            color = next(name for name in COLORS if name != one.color) if is_wrong else one.color
            objects.append(place(color, one.shape, one.cell, rng))
        return ImageResponse(render(Scene(tuple(objects))), Usage(calls=1, pictures=1, nfe=4))


class MistakesAt(ExactGenerator):
    """Generates a wrong last object in the calls of these indices, from 0."""

    def __init__(self, *numbers):
        super().__init__()
        self.numbers = numbers

    def generate(self, task):
        is_wrong = len(self.calls) in self.numbers
        response = super().generate(task)
        return ExactGenerator(wrong=len(detect(response.image).objects)).generate(task) if is_wrong else response
