"""Metrics of verifiers against values computed by hand."""

import numpy as np
import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.statistics import clustered_interval, wilson_interval
from clvr_jax.evaluation.verifier.cases import Case
from clvr_jax.evaluation.verifier.metrics import CheckedCase, calibration_error, roc_auc, summarize
from clvr_jax.evaluation.verifier.reading import Agreement, agreement, read_description
from clvr_jax.reasoning.verification.verification import Requirement, Verification


def checked(prompt, label, accepted, probability=None, **case):
    requirement = Requirement("a thing", accepted, probability)
    requirements = () if accepted is None else (requirement,)
    case = {"kind": "right" if label else "missing", "group": "renderings", **case}
    description = case.pop("said", "")
    mode = case.pop("mode", "describe")
    return CheckedCase(Case(prompt, np.zeros(0), label, **case), Verification(requirements, description, mode))


def test_roc_auc_by_hand():
    assert roc_auc([True, False], [0.9, 0.1]) == 1
    assert roc_auc([True, False], [0.1, 0.9]) == 0
    assert roc_auc([True, False, True, False], [0.5, 0.5, 0.5, 0.5]) == 0.5
    # Pairs (right, wrong): .8 > .3, .8 > .6, .6 > .3 count 1, .6 = .6 counts half.
    assert roc_auc([True, True, False, False], [0.8, 0.6, 0.6, 0.3]) == 3.5 / 4
    assert roc_auc([True, True], [0.8, 0.6]) is None
    assert roc_auc([], []) is None
    with pytest.raises(ClvrError, match="1 labels but 2 scores"):
        roc_auc([True], [0.1, 0.2])


def test_roc_auc_is_the_share_of_ordered_pairs():
    rng = np.random.default_rng(0)
    labels, scores = rng.random(60) < 0.4, np.round(rng.random(60), 1)
    pairs = [(a > b) + (a == b) / 2 for a in scores[labels] for b in scores[~labels]]
    assert roc_auc(labels.tolist(), scores.tolist()) == pytest.approx(np.mean(pairs))


def test_calibration_error_by_hand():
    assert calibration_error([True, False], [1.0, 0.0]) == 0
    assert calibration_error([False, True], [1.0, 0.0]) == 1
    # Bin .9: probabilities .9 and 1, one of two right: |.95 - .5|. Bin .1: .15, none right: |.15 - 0|.
    assert calibration_error([True, False, False], [0.9, 1.0, 0.15]) == pytest.approx(2 / 3 * 0.45 + 1 / 3 * 0.15)
    # One bin holds all: errors of both directions cancel.
    assert calibration_error([True, False], [0.5, 0.5]) == 0
    assert calibration_error([], []) is None
    with pytest.raises(ClvrError, match="between 0 and 1"):
        calibration_error([True], [1.5])
    with pytest.raises(ClvrError, match="2 labels but 1"):
        calibration_error([True, False], [0.5])


def test_descriptions_are_read_cell_by_cell():
    assert read_description("I see red star top left; something unclear top; blue cross bottom right.") == (
        {"top left": "red star", "top": "something unclear", "bottom right": "blue cross"},
        0,
    )
    assert read_description("I see nothing.") == ({}, 0)
    assert read_description(" I see  red   star left") == ({"left": "red star"}, 0)
    assert read_description("I see red star left; blue star left.") == ({"left": "red star"}, 1)
    assert read_description("I see pink star left; red star somewhere; red left.") == ({}, 3)
    assert read_description("I see nothing; red star left.") == ({"left": "red star"}, 1)
    assert read_description("A photo of a dog.")[1] == 1
    assert read_description("")[1] == 1


def test_agreement_by_hand():
    exact = "I see red star top left; blue cross center."
    assert agreement(exact, exact) == Agreement(True, 2, 2)
    assert agreement("I see blue cross center; red star top left.", exact) == Agreement(True, 2, 2)
    assert agreement("I see red star top left.", exact) == Agreement(False, 1, 2)
    assert agreement("I see red star top left; blue circle center; red star left.", exact) == Agreement(False, 1, 3)
    assert agreement("I see red star top left; blue cross center; a dog.", exact) == Agreement(False, 2, 3)
    assert agreement("I see nothing.", "I see nothing.") == Agreement(True, 0, 0)


def test_summary_by_hand():
    exact = "I see red star left."
    cases = [
        checked("a", True, True, 0.9, tier=3, has_held_out=True, description=exact, said=exact),
        checked("b", True, False, 0.4, tier=4, has_held_out=False, description=exact, said="I see red star top."),
        checked("a", False, True, 0.6, tier=3, has_held_out=True, description=exact, said=exact),
        checked("b", False, False, 0.1, tier=4, has_held_out=False, description=exact, said=exact, kind="extra"),
        checked("c", False, None, group="images", kind="other"),
    ]
    requirements = ("red star", "one object")
    derived = [
        (Case("a", np.zeros(0), True, "right", "renderings", requirements=requirements), ("one object", "red star")),
        (Case("b", np.zeros(0), True, "right", "renderings", requirements=requirements), ("red star",)),
        (Case("c", np.zeros(0), True, "right", "renderings", requirements=requirements), None),
    ]
    summary = summarize(cases, derived)
    group = summary["groups"]["renderings"]
    half = wilson_interval(1, 2)
    assert group["false_accept"] == {"count": 1, "of": 2, "rate": 0.5, "interval": [half.low, half.high]}
    assert group["false_reject"] == group["false_accept"]
    assert (group["images"], group["without_verdict"], group["with_probability"]) == (4, 0, 4)
    assert group["roc_auc"] == 0.75  # .9 above both, .4 above .1 but not above .6
    # Each probability is alone in its bin: |.9 - 1|, |.4 - 1|, |.6 - 0|, |.1 - 0|.
    assert group["calibration_error"] == pytest.approx((0.1 + 0.6 + 0.6 + 0.1) / 4)
    assert (group["read_exactly"]["count"], group["read_exactly"]["of"]) == (3, 4)
    assert group["cells_read"] == {"count": 3, "of": 5, "rate": 0.6, "interval": None}
    assert group["kinds"]["missing"]["false_accept"]["rate"] == 1
    assert group["kinds"]["extra"]["false_accept"]["rate"] == 0
    assert group["kinds"]["extra"]["false_reject"] is None
    assert group["objects"]["3"]["false_accept"]["rate"] == 1
    assert group["objects"]["4"]["false_reject"]["rate"] == 1
    assert group["held_out"]["held_out"]["false_reject"]["rate"] == 0
    assert group["held_out"]["others"]["false_accept"]["rate"] == 0
    images = summary["groups"]["images"]
    assert (images["without_verdict"], images["false_accept"]["rate"]) == (1, 0)
    assert images["roc_auc"] is images["calibration_error"] is images["read_exactly"] is images["false_reject"] is None
    assert (images["objects"], images["held_out"]) == ({}, {})
    assert summary["all"]["false_accept"]["of"] == 3
    assert (summary["requirements"]["exact"]["count"], summary["requirements"]["exact"]["of"]) == (1, 3)
    assert summary["requirements"]["not_derived"] == 1


def test_intervals_take_the_images_of_a_prompt_together():
    outcomes = [(str(index // 4), index % 8 < 4) for index in range(80)]
    cases = [checked(prompt, False, accepted) for prompt, accepted in outcomes]
    found = summarize(cases, [])["all"]["false_accept"]
    expected = clustered_interval([[float(index % 2 == 0)] * 4 for index in range(20)])
    assert found["interval"] == pytest.approx([expected.low, expected.high])
    assert summarize(cases, [])["requirements"] is None
    # Prompts with different numbers of images: as many effective images as fully dependent ones give.
    uneven = [checked("a", False, False)] * 3 + [checked("b", False, False)]
    effective = wilson_interval(0, 4 / (10 / 4))
    assert summarize(uneven, [])["all"]["false_accept"]["interval"] == pytest.approx([0, effective.high])


def test_answers_without_descriptions_have_no_reading_accuracy():
    summary = summarize([checked("a", True, True, mode="ask", description="I see nothing.")], [])
    assert summary["all"]["read_exactly"] is None
    assert summary["all"]["cells_read"] is None
