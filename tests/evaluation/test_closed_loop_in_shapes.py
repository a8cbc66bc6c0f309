"""The loop, the shapes world's oracle and the benchmark together: they share nothing but the words of the contract."""

import numpy as np

from clvr_jax.evaluation import compare, shapes_checker
from clvr_jax.reasoning import Budget, GeneratedImage, parse
from clvr_jax.reasoning import run as run_loop
from clvr_jax.worlds.shapes.detect import detect
from clvr_jax.worlds.shapes.oracle import OracleController, apply_edits, parse_edits
from clvr_jax.worlds.shapes.prompts import evaluation_prompts
from clvr_jax.worlds.shapes.render import render
from clvr_jax.worlds.shapes.scene import Scene, place
from tests.evaluation.runs import run_function

METADATA = evaluation_prompts("complex")[::10]


class Oracle:
    def __init__(self):
        self.oracle = OracleController({entry["prompt"]: entry for entry in METADATA})

    def reply(self, conversations):
        return [self.oracle.reply(each.prompt, each.replies, each.images) for each in conversations]


class ClumsyDrawer:
    """Does the edits it reads but forgets an object of the new canvas now and then."""

    def generate(self, requests):
        return [self._one(request) for request in requests]

    def _one(self, request):
        rng = np.random.default_rng(request.seed)
        before = detect(request.images[-1]) if request.images else ()
        objects = apply_edits(before, parse_edits(request.replies[-1]))
        kept = [item for item in objects if rng.random() > 0.15]
        return GeneratedImage(render(Scene(tuple(place(item.color, item.shape, item.cell, rng) for item in kept))), 4)


def test_closed_loop_mends_what_a_clumsy_drawer_does(tmp_path):
    def draw_all(max_steps):
        budget = Budget(max_steps=max_steps)
        return lambda prompts, seeds: run_loop(prompts, Oracle(), ClumsyDrawer(), budget, seeds)

    judge = shapes_checker()
    once, loop = (
        run_function(METADATA, draw_all(steps), tmp_path / str(steps), judge, settings={"max_steps": steps})
        for steps in (3, 20)
    )
    for entry in loop["pictures"]:
        assert (entry["outcome"] == "accepted") == entry["correct"]
        assert entry["steps"] <= 20
    part = compare(once, loop)["overall"]
    assert part["second"] > 0.9
    assert part["difference"] > 0.3
    assert part["p_value"] < 0.01


def test_oracle_speaks_the_words_of_the_contract():
    for entry in METADATA:
        text = OracleController({entry["prompt"]: entry}).reply(entry["prompt"], [], [])
        assert parse(text, has_image=False).text == text
