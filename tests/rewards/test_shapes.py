"""The program's marks: by hand for pictures that are right, wrong, half right and overdone."""

import math

import numpy as np
import pytest

from clvr_jax.data.engine.shapes_roles import make_shapes_roles
from clvr_jax.rewards import Case, LastTextReward, ProxyReward, ShapesJudge
from clvr_jax.rewards.shapes import described
from clvr_jax.worlds.shapes.layout import PlannedObject
from clvr_jax.worlds.shapes.render import render
from clvr_jax.worlds.shapes.scene import BACKGROUND, Scene, place
from tests.data.engine.test_engine import Painter, item

JUDGE = ShapesJudge()
RED, BLUE, CYAN = ("red", "circle", "top"), ("blue", "square", "left"), ("cyan", "star", "bottom right")


def drawn(*things):
    rng = np.random.default_rng(0)
    return render(Scene(tuple(place(*thing, rng) for thing in things)))


@pytest.mark.parametrize(
    ("things", "mark"),
    [
        ([RED, BLUE], 1.0),
        ([RED], 1 / 2),
        ([RED, BLUE, CYAN], 2 / 3),
        ([RED, ("green", "square", "left")], 1 / 2),
        ([RED, ("blue", "square", "right")], 1 / 3),  # one right, one missing, one extra
        ([], 0.0),
    ],
)
def test_a_picture_is_marked_by_what_is_right_of_what_is_asked_for_or_extra(things, mark):
    text = "a red circle at the top, a blue square at the left"
    found = JUDGE.picture(drawn(*things), text)
    assert found.value == pytest.approx(mark)
    assert found.parts == {"right": mark == 1}


def test_an_empty_picture_may_be_asked_for():
    assert JUDGE.picture(drawn(), "an empty picture").value == 1
    assert JUDGE.picture(drawn(RED), "an empty picture").value == 0


@pytest.mark.parametrize(
    ("things", "success", "preservation"),
    [
        ([RED, CYAN], 1, 1),
        ([RED, BLUE, CYAN], 1 / 2, 1),
        ([CYAN], 1, 0),
        ([RED, BLUE], 0, 1),
        ([("red", "star", "top"), CYAN], 1, 0),
        ([RED, CYAN, ("black", "cross", "center")], 1, 1 / 2),
    ],
)
def test_an_edit_is_marked_by_what_was_done_and_what_was_left_alone(things, success, preservation):
    asked = "Remove the blue square at the left. Add a cyan star at the bottom right."
    found = JUDGE.edit(drawn(RED, BLUE), drawn(*things), asked)
    assert found.parts == {"success": pytest.approx(success), "preservation": pytest.approx(preservation)}
    assert found.value == pytest.approx(0.6 * success + 0.4 * preservation)


def test_what_was_unclear_in_the_source_need_not_stay():
    smudged = drawn(RED)
    smudged[43:64, 43:64] = BACKGROUND
    smudged[48:60, 44:50], smudged[48:60, 50:56] = (220, 40, 40), (40, 80, 220)
    for after in (drawn(RED, BLUE), smudged):
        found = JUDGE.edit(smudged, after, "Add a blue square at the left.")
        assert found.parts["preservation"] == 1
    assert JUDGE.picture(smudged, "a red circle at the top").value == 1 / 2


@pytest.mark.parametrize("text", ["a cat", "", "a red circle", "a red circle at the top, and so on"])
def test_texts_of_another_language_cannot_be_marked(text):
    assert described(text) is None
    assert math.isnan(JUDGE.picture(drawn(RED), text).value)
    assert math.isnan(JUDGE.edit(drawn(RED), drawn(RED), text).value)
    assert math.isnan(JUDGE.edit(drawn(RED), drawn(RED), "Clear the top. And more.").value)


def test_descriptions_are_read_to_the_last_word():
    assert described("an orange cross at the top left") == (PlannedObject("orange", "cross", "top left"),)


@pytest.mark.parametrize("number", range(6))
def test_the_data_engine_s_proxies_give_its_own_pictures_full_marks(number):
    """And a last text gives what it asks for full marks, whatever else is there."""
    from clvr_jax.data.engine.engine import synthesize

    one = item(number)
    record = synthesize(one, make_shapes_roles(one, judges=0), Painter(), seed=1).record
    steps = record.trajectory.steps
    cases = [
        Case(step.image, proxies, [steps[at].image for at in proxies.i_ref], step.reasoning)
        for step, proxies in zip(steps, record.proxies, strict=True)
        if proxies is not None
    ]
    np.testing.assert_array_equal(ProxyReward(JUDGE, JUDGE).scores(cases).values, 1)
    np.testing.assert_array_equal(LastTextReward(JUDGE).scores(cases).values, 1)
    wrong = [Case(drawn(("black", "cross", "center")), case.proxies, case.references) for case in cases]
    assert (ProxyReward(JUDGE, JUDGE).scores(wrong).values < 1).all()
