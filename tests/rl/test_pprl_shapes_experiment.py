"""The experiment's account: what is told of single drawings and over seeds, and the command lines it is made of."""

import json

import numpy as np
import pytest

from clvr_jax import cli
from clvr_jax.evaluation import shapes_checker
from clvr_jax.evaluation.systems.models import Oracle
from clvr_jax.reasoning import Budget, GeneratedImage
from clvr_jax.reasoning import run as run_loop
from clvr_jax.scripts import pprl_shapes_experiment as experiment
from clvr_jax.worlds.shapes.detect import detect
from clvr_jax.worlds.shapes.oracle import apply_edits, parse_edits
from clvr_jax.worlds.shapes.prompts import evaluation_prompts
from clvr_jax.worlds.shapes.render import render
from clvr_jax.worlds.shapes.scene import Scene, place
from tests.evaluation.runs import run_function

PROMPTS = evaluation_prompts("dense")[::30]
BUDGET = Budget(max_steps=5, max_rollbacks=0)


class Forgetful:
    """Forgets each object of the new canvas with the same chance, and remembers where it forgot one."""

    def __init__(self, chance, seed=0):
        self.rng, self.chance, self.forgotten = np.random.default_rng(seed), chance, {}

    def generate(self, requests):
        return [self._one(request) for request in requests]

    def _one(self, request):
        before = detect(request.images[-1]) if request.images else ()
        edits = parse_edits(request.replies[-1])
        things = {item: self.rng.random() < self.chance for item in apply_edits(before, edits)}
        named = {edit.cell for edit in edits}
        lost = [item.cell in named for item, is_lost in things.items() if is_lost]
        self.forgotten[request.seed] = (not any(lost), all(lost) if request.images else None)
        kept = [place(item.color, item.shape, item.cell, self.rng) for item, is_lost in things.items() if not is_lost]
        return GeneratedImage(render(Scene(tuple(kept))), 4)


def loop(image_generator):
    return lambda prompts, seeds: run_loop(prompts, Oracle(PROMPTS), image_generator, BUDGET, seeds)


def test_a_drawing_is_told_by_its_edits_and_by_all_else():
    image_generator = Forgetful(0.1)
    seen = []
    for trajectory in loop(image_generator)([entry["prompt"] for entry in PROMPTS], list(range(len(PROMPTS)))):
        found = [(each.success, each.preservation) for each in experiment.marks(trajectory)]
        assert found == [image_generator.forgotten[step.seed] for step in trajectory.generated]
        seen += found
    assert {(True, True), (False, True), (True, False), (True, None)} <= set(seen)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An experiment whose parts are all done: three systems, two seeds."""
    out = tmp_path_factory.mktemp("experiment")
    (out / "dataset").mkdir()
    for name, chance in (("sft", 0.1), ("pprl", 0.0), ("simple", 0.02)):
        for seed in (0, 1):
            (out / f"{name}-{seed}" / "export").mkdir(parents=True)
            pictures = out / "eval" / f"{name}-dense-{seed}"
            draw_all = loop(Forgetful(chance, seed))
            run_function(PROMPTS, draw_all, pictures, shapes_checker(), settings={"name": name}, seed=seed)
    return out


def test_seeds_are_no_more_prompts_and_every_system_is_held_against_the_first_arm(finished, capsys):
    experiment.main(finished, seeds=(0, 1), splits=("dense",))
    told = json.loads((finished / "report.json").read_text())["dense"]
    assert set(told) == {"steps", "sft and pprl", "simple and pprl"}
    overall = told["sft and pprl"]["overall"]
    assert (overall["prompts"], overall["second"]) == (len(PROMPTS), 1.0)
    assert overall["difference"] > told["simple and pprl"]["overall"]["difference"] > 0
    assert told["steps"]["pprl"]["success"] == told["steps"]["pprl"]["preservation"] == 1
    assert told["steps"]["sft"]["preservation"] < told["steps"]["simple"]["preservation"] < 1
    page = capsys.readouterr().out
    assert page.rstrip() == (finished / "report.md").read_text().rstrip()
    assert "| pprl | 1.000, 1.000 | 1.0000 | 1.0000 |" in page


@pytest.mark.parametrize("arm", experiment.ARMS)
def test_the_command_lines_are_ones_that_clvr_takes(arm, tmp_path):
    trained = cli.parse(experiment.training("shapes-tiny", tmp_path / "d", arm, 3, tmp_path / "run"))
    config = trained.config_with_overrides
    assert (config.train.seed, trained.resume, trained.out) == (3, True, tmp_path / "run")
    assert (config.simple, config.train.algorithm) == (arm == "simple", "grpo" if arm == "grpo" else "nft")
    drawn = cli.parse(experiment.evaluation("shapes-tiny", "dense", 3, 5, tmp_path / "eval"))
    assert (drawn.split, drawn.out) == ("dense", tmp_path / "eval")
