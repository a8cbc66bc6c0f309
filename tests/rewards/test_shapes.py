"""Tests of the program's scores of images that are right, wrong, partly right, or have additional objects."""

import math

import numpy as np
import pytest

from clvr_jax.data.engine.roles.shapes import make_shapes_roles
from clvr_jax.rewards import LastTextReward, ProxyReward, RewardInput, ShapesJudge
from clvr_jax.rewards.shapes import parse_description
from clvr_jax.worlds.shapes.layout import PlannedObject
from clvr_jax.worlds.shapes.render import render
from clvr_jax.worlds.shapes.scene import BACKGROUND, Scene, place
from tests.data.engine.test_engine import ExactGenerator, item

JUDGE = ShapesJudge()
RED, BLUE, CYAN = ("red", "circle", "top"), ("blue", "square", "left"), ("cyan", "star", "bottom right")


def rendered(*objects):
    rng = np.random.default_rng(0)
    return render(Scene(tuple(place(*each, rng) for each in objects)))


@pytest.mark.parametrize(
    ("objects", "score"),
    [
        ([RED, BLUE], 1.0),
        ([RED], 1 / 2),
        ([RED, BLUE, CYAN], 2 / 3),
        ([RED, ("green", "square", "left")], 1 / 2),
        ([RED, ("blue", "square", "right")], 1 / 3),  # one right, one missing, one extra
        ([], 0.0),
    ],
)
def test_an_image_is_scored_by_its_share_of_right_objects(objects, score):
    text = "a red circle at the top, a blue square at the left"
    found = JUDGE.score_image(rendered(*objects), text)
    assert found.value == pytest.approx(score)
    assert found.parts == {"right": score == 1}


def test_an_empty_image_may_be_requested():
    assert JUDGE.score_image(rendered(), "an empty picture").value == 1
    assert JUDGE.score_image(rendered(RED), "an empty picture").value == 0


@pytest.mark.parametrize(
    ("objects", "success", "preservation"),
    [
        ([RED, CYAN], 1, 1),
        ([RED, BLUE, CYAN], 1 / 2, 1),
        ([CYAN], 1, 0),
        ([RED, BLUE], 0, 1),
        ([("red", "star", "top"), CYAN], 1, 0),
        ([RED, CYAN, ("black", "cross", "center")], 1, 1 / 2),
    ],
)
def test_an_edit_is_scored_by_success_and_preservation(objects, success, preservation):
    instruction = "Remove the blue square at the left. Add a cyan star at the bottom right."
    found = JUDGE.score_edit(rendered(RED, BLUE), rendered(*objects), instruction)
    assert found.parts == {"success": pytest.approx(success), "preservation": pytest.approx(preservation)}
    assert found.value == pytest.approx(0.6 * success + 0.4 * preservation)


def test_unclear_cells_of_the_source_need_not_be_preserved():
    unclear = rendered(RED)
    unclear[43:64, 43:64] = BACKGROUND
    unclear[48:60, 44:50], unclear[48:60, 50:56] = (220, 40, 40), (40, 80, 220)
    for after in (rendered(RED, BLUE), unclear):
        found = JUDGE.score_edit(unclear, after, "Add a blue square at the left.")
        assert found.parts["preservation"] == 1
    assert JUDGE.score_image(unclear, "a red circle at the top").value == 1 / 2


@pytest.mark.parametrize("text", ["a cat", "", "a red circle", "a red circle at the top, and so on"])
def test_texts_outside_the_grammar_have_no_score(text):
    assert parse_description(text) is None
    assert math.isnan(JUDGE.score_image(rendered(RED), text).value)
    assert math.isnan(JUDGE.score_edit(rendered(RED), rendered(RED), text).value)
    assert math.isnan(JUDGE.score_edit(rendered(RED), rendered(RED), "Clear the top. And more.").value)


def test_descriptions_are_parsed_to_the_last_word():
    assert parse_description("an orange cross at the top left") == (PlannedObject("orange", "cross", "top left"),)


@pytest.mark.parametrize("number", range(6))
def test_images_of_the_data_engine_have_full_scores_for_its_proxies(number):
    """Checks also that a last text gives the full score to an image with its edits, whatever else the image shows."""
    from clvr_jax.data.engine.engine import synthesize

    one = item(number)
    record = synthesize(one, make_shapes_roles(one, judges=0), ExactGenerator(), seed=1).record
    steps = record.trajectory.steps
    cases = [
        RewardInput(step.image, proxies, [steps[at].image for at in proxies.i_ref], step.reasoning)
        for step, proxies in zip(steps, record.proxies, strict=True)
        if proxies is not None
    ]
    np.testing.assert_array_equal(ProxyReward(JUDGE, JUDGE).scores(cases).values, 1)
    np.testing.assert_array_equal(LastTextReward(JUDGE).scores(cases).values, 1)
    wrong = [RewardInput(rendered(("black", "cross", "center")), case.proxies, case.references) for case in cases]
    assert (ProxyReward(JUDGE, JUDGE).scores(wrong).values < 1).all()
