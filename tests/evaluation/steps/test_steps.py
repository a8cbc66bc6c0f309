"""The steps benchmark tells a generator that does what is requested from one that does not."""

import json

import numpy as np
import pytest

from clvr_jax.commands.eval.steps import EvalSteps
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.evaluation import steps
from clvr_jax.evaluation.steps.results import CONTROL, read_earlier
from clvr_jax.evaluation.steps.run import generate_steps
from clvr_jax.evaluation.steps.states import KINDS, fingerprint
from clvr_jax.reasoning.conversation.protocols import GeneratedImage, ImageGenerator
from clvr_jax.worlds.shapes.detect import Reading, detect
from clvr_jax.worlds.shapes.layout import PlannedObject
from clvr_jax.worlds.shapes.oracle import apply_edits, parse_edits, parse_plan
from clvr_jax.worlds.shapes.render import render
from clvr_jax.worlds.shapes.scene import Scene, place

STATES = steps.rendered_states(40, seed=3)


def rendered(objects, seed=0):
    rng = np.random.default_rng(seed)
    return render(Scene(tuple(place(item.color, item.shape, item.cell, rng) for item in objects)))


class Renderer(ImageGenerator):
    """Renders what is requested on what the last reference shows; `spoil` changes the objects first."""

    def __init__(self, spoil=None):
        self.spoil = spoil or (lambda request, objects: objects)

    def generate(self, requests):
        return [GeneratedImage(self._image(request), 1) for request in requests]

    def _image(self, request):
        before = detect(request.images[-1]) if request.images else Reading()
        objects = apply_edits(before, parse_edits(request.replies[-1]))
        return rendered(self.spoil(request, objects), request.seed)


def results(generator, states=STATES, noises=2, **options):
    scores, control = generate_steps(generator, states, noises, batch_size=16)
    settings = {"model": "scripted", "histories": "rendered", "seed": 0, "noises": noises}
    return steps.step_results(states, scores, control, settings, **options)


def rate(found, group, score):
    return found["summary"][group][score]["rate"]


@pytest.mark.slow
def test_states_are_balanced_and_the_same_for_a_seed():
    counts = {kind: sum(state.kind == kind for state in STATES) for kind in KINDS}
    assert sum(counts.values()) == 40
    assert min(counts.values()) >= 6
    assert all(len(state.replies) == len(state.images) + 1 for state in STATES)
    assert fingerprint(steps.rendered_states(40, seed=3)) == fingerprint(STATES)
    assert fingerprint(steps.rendered_states(40, seed=4)) != fingerprint(STATES)


def test_a_generator_that_does_what_is_requested_is_right_and_the_control_is_not():
    found = results(Renderer())
    assert (rate(found, "all", "right"), rate(found, "all", "drawn_early")) == (1, 0)
    assert rate(found, CONTROL, "right") < 0.1
    assert steps.steps_table(found).title == "Steps benchmark: scripted"
    text = steps.markdown(json.loads(json.dumps(found)))
    assert "| all | 1.000 [" in text
    assert "of 40 |" in text


def test_one_image_is_scored_cell_by_cell():
    state = next(state for state in STATES if state.kind == "edit 1" and len(_rest(state)) > 0)
    wanted = apply_edits(detect(state.images[-1]), state.edits)
    assert steps.score_step(rendered(wanted), state) == steps.StepScore(True, True, True, False)
    assert steps.score_step(rendered(()), state) == steps.StepScore(False, False, False, False)
    without_edit = [item for item in wanted if item.cell != state.edits[0].cell]
    assert steps.score_step(rendered(without_edit), state) == steps.StepScore(False, False, True, False)


def test_a_generator_that_copies_the_last_reference_makes_no_edit():
    def without_edits(request, objects):
        named = {edit.cell for edit in parse_edits(request.replies[-1])}
        before = apply_edits(detect(request.images[-1]), ()) if request.images else ()
        return [item for item in before if item.cell not in named] + [item for item in before if item.cell in named]

    found = results(Renderer(without_edits))
    assert (rate(found, "all", "right"), rate(found, "all", "edits_made")) == (0, 0)
    assert rate(found, "edits", "rest_preserved") == 1


def test_what_changes_beside_the_edits_is_not_preserved():
    def recolored(request, objects):
        named = {edit.cell for edit in parse_edits(request.replies[-1])}
        return [
            item
            if item.cell in named
            else PlannedObject("red" if item.color != "red" else "blue", item.shape, item.cell)
            for item in objects
        ]

    states = [state for state in STATES if apply_edits(detect(state.images[-1]) if state.images else (), state.edits)]
    changed = [state for state in states if _rest(state)]
    found = results(Renderer(recolored), changed)
    assert (rate(found, "all", "edits_made"), rate(found, "all", "rest_preserved")) == (1, 0)


def _rest(state):
    """What the request leaves as it is."""
    named = {edit.cell for edit in state.edits}
    return [item for item in (detect(state.images[-1]).objects if state.images else ()) if item.cell not in named]


def test_a_planned_object_that_is_drawn_early_is_neither_an_edit_nor_a_change():
    def whole_plan(request, objects):
        shown = {item.cell for item in objects}
        named = {edit.cell for edit in parse_edits(request.replies[-1])}
        early = [item for item in parse_plan(request.replies[0]) if item.cell not in shown | named]
        return [*objects, *early]

    first = [state for state in STATES if state.kind == "first" and len(state.plan) > len(state.edits)]
    found = results(Renderer(whole_plan), first)
    assert found["summary"]["all"]["right"]["states"] >= 4
    measured = [rate(found, "all", score) for score in ("right", "edits_made", "rest_preserved", "drawn_early")]
    assert measured == [0, 1, 1, 1]


def test_an_object_that_nobody_planned_is_a_change():
    def one_more(request, objects):
        taken = {item.cell for item in (*objects, *parse_plan(request.replies[0]))}
        taken |= {edit.cell for edit in parse_edits(request.replies[-1])}
        free = next(cell for cell in ("top left", "top", "top right", "left", "center", "right") if cell not in taken)
        return [*objects, PlannedObject("red", "star", free)]

    first = [state for state in STATES if state.kind == "first" and len(state.plan) < 6]
    found = results(Renderer(one_more), first)
    assert [rate(found, "all", score) for score in ("edits_made", "rest_preserved", "drawn_early")] == [1, 0, 0]


def test_two_runs_are_compared_state_by_state(tmp_path):
    def without_later_edits(request, objects):
        return () if len(request.images) > 1 else objects

    path = tmp_path / "results.json"
    path.write_text(json.dumps(results(Renderer(without_later_edits))))
    found = results(Renderer(), earlier=read_earlier(tmp_path, 2))
    difference = found["differences"]["all"]
    assert difference["difference"] == pytest.approx(1 - rate(json.loads(path.read_text()), "all", "right"))
    several = sum(len(state.images) > 1 for state in STATES)
    assert (difference["better"], difference["worse"]) == (several, 0)
    assert difference["p_value"] < 1e-5
    assert found["differences"]["first"]["interval"] == [0, 0]
    assert f"{several} better, 0 worse" in steps.markdown(found)


@pytest.mark.slow
def test_runs_that_cannot_be_paired_are_refused(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(results(Renderer())))
    with pytest.raises(ClvrError, match="was measured on other states"):
        read_earlier(tmp_path, 2).check(steps.rendered_states(40, seed=4))
    with pytest.raises(ClvrError, match="has 2 images of a state, not 3"):
        read_earlier(tmp_path, 3)
    (tmp_path / "results.json").write_text(json.dumps({"benchmark": "planning"}))
    with pytest.raises(ClvrError, match="has results of the benchmark 'planning'"):
        read_earlier(tmp_path, 2)


def test_an_earlier_run_is_not_replaced_by_the_one_that_is_compared_with_it(tmp_path):
    with pytest.raises(UsageError, match="--against and --out are both"):
        EvalSteps(out=tmp_path / "run", against=tmp_path / "other" / ".." / "run")


def test_histories_of_a_generator_have_its_images():
    seen = []

    def remember(request, objects):
        seen.append(request)
        return objects

    states = steps.rollout_states(Renderer(remember), 12, seed=1)
    assert {state.kind for state in states} >= {"first", "edit 1"}
    assert all(detect(image).objects for state in states for image in state.images)
    assert {state.prompt for state in states} <= {request.prompt for request in seen}


def test_images_of_another_size_are_refused():
    class Large(ImageGenerator):
        def generate(self, requests):
            return [GeneratedImage(np.zeros((128, 96, 3), np.uint8), 1) for _ in requests]

    with pytest.raises(ClvrError, match="96 x 128 pixels, not of the shapes world"):
        generate_steps(Large(), STATES[:1], 1)
