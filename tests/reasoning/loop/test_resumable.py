"""Loops that are saved between two works and continue in another process."""

import json
import random

import numpy as np
import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.files.json_input import JsonObject
from clvr_jax.reasoning import Budget, Trajectory
from clvr_jax.reasoning.loop.editable import branch_off
from clvr_jax.reasoning.loop.resumable import ResumablePromptState
from clvr_jax.reasoning.loop.work import ReplyWork, Roles, perform
from clvr_jax.reasoning.trajectories.edits import EditError
from clvr_jax.reasoning.verification.verification import Requirement, Verification
from tests.reasoning.scripted import NoisyController, NoisyDrawer, picture, value_of

GIVEN = (picture(9),)


class NoisyVerifier:
    """Finds what follows from the value of an image, or from the length of a plan."""

    name = "noisy"

    def derive(self, prompts):
        return [("one", "two", "three")] * len(prompts)

    def check(self, requirements, images):
        return [self._found(texts, value_of(image)) for texts, image in zip(requirements, images, strict=True)]

    def check_plans(self, requirements, plans):
        return [self._found(texts, len(plan)) for texts, plan in zip(requirements, plans, strict=True)]

    def _found(self, texts, value):
        marks = [(value * (n + 3) % 7) / 6 for n in range(len(texts))]
        checked = [Requirement(text, mark >= 0.5, mark, "seen") for text, mark in zip(texts, marks, strict=True)]
        return Verification(tuple(checked), "I see it.", "describe", self.name)


def new_state(budget, branch=None, seed=1):
    return ResumablePromptState(0, "p", seed, budget, lambda event: None, GIVEN, branch)


def moved(state, budget, directory):
    """Returns the state as another process has it, which knows only what was stored."""
    snapshot = json.loads(json.dumps(state.snapshot()))
    partial = state._trajectory("canceled")
    partial.save(directory)  # has the images
    other = new_state(budget, seed=state._seed)
    other.restore(JsonObject(snapshot, "snapshot"), Trajectory.load(directory))
    return other


def run(seed, budget, move, branch=None):
    """Runs a loop that is edited at random. move: returns what continues for a state between two works."""
    rng, roles = random.Random(seed), Roles(NoisyController(), NoisyDrawer(), NoisyVerifier())
    state = new_state(budget, branch, seed)
    while works := state.next_work(0.0):
        perform([(state, work) for work in works], roles)
        if rng.random() < 0.3 and not state.finished("", {}):
            edits = [
                lambda s, n: s.edit_plan(requirements=[f"r{each}" for each in range(1 + n % 5)]),
                lambda s, n: s.edit_plan(instruction=f"Do {n}."),
                lambda s, n: s.roll_back_to(n % max(1, len(s.steps))),
            ]
            try:
                rng.choice(edits)(state, rng.randrange(100))
            except EditError:
                assert not state.steps
        if not state.finished("", {}):
            state = move(state)
    return state.finished("m", {})


def content(trajectory):
    shown = trajectory.to_dict()
    return {**shown, "seconds": 0, "steps": [{**step, "seconds": 0} for step in shown["steps"]]}


@pytest.mark.parametrize("seed", range(25))
def test_a_loop_that_moves_at_every_turn_ends_as_one_that_stays(seed, tmp_path):
    rng = random.Random(seed)
    budget = Budget(max_steps=rng.randint(2, 8), max_nfe=rng.choice([None, 12]), candidates=rng.choice([1, 2, 3]))
    stayed = run(seed, budget, lambda state: state)
    went = run(seed, budget, lambda state: moved(state, budget, tmp_path / "saved"))
    assert content(went) == content(stayed)
    for one, other in zip(went.generated, stayed.generated, strict=True):
        np.testing.assert_array_equal(one.image, other.image)
    if stayed.best is None:
        return  # no reply could be read
    branch = branch_off("loop_a", stayed.steps, stayed.best, instruction="Do more.")
    there = run(seed, budget, lambda state: state, branch)
    assert content(run(seed, budget, lambda state: moved(state, budget, tmp_path / "branch"), branch)) == content(there)


def test_a_damaged_snapshot_is_one_line(tmp_path):
    budget = Budget()
    state, roles = new_state(budget), Roles(NoisyController(), NoisyDrawer(), NoisyVerifier())
    while not (state.steps and isinstance(state.next_work(0.0)[0], ReplyWork)):
        perform([(state, work) for work in state.next_work(0.0)], roles)
    good = json.loads(json.dumps(state.snapshot()))
    state._trajectory("canceled").save(tmp_path)
    trajectory = Trajectory.load(tmp_path)
    new_state(budget).restore(JsonObject(good, "s"), trajectory)
    for name, value in [
        ("format", 2), ("history", [5]), ("history", "x"), ("candidates", [[9, None]]), ("candidates", [1]),
        ("plans", [["x", 1, {}]]), ("account", [1, 2, 3, 4]), ("attempts", [["x", 1]]), ("pending", 3),
        ("pending", {"reply": 1}), ("seconds", -1), ("num_wanted", None), ("required", [1]),
    ]:  # fmt: skip
        with pytest.raises(ClvrError) as caught:
            new_state(budget).restore(JsonObject({**good, name: value}, "s"), trajectory)
        assert "\n" not in str(caught.value), name
    with pytest.raises(ClvrError, match="lacks"):
        new_state(budget).restore(JsonObject({"format": 1}, "s"), trajectory)
