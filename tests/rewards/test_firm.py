"""Tests of FIRM's judges: replies in the forms that its public code reads, scores, and replies that have none."""

import math

import numpy as np
import pytest

from clvr_jax.errors import UsageError
from clvr_jax.interfaces.answers import AnswerError
from clvr_jax.rewards import FirmEdit, FirmGen
from clvr_jax.rewards.firm import read_alignment, read_looks, read_rating
from tests.rewards.test_unified_reward import Model

IMAGE = np.zeros((8, 8, 3), np.uint8)
ALIGNMENT = r"""Let's evaluate the image against the Original Prompt:

1. **A red circle**:
- There is one red circle at the left.

2. **Two green stars**:
- Only one star is green; the other one is blue.

**Final Analysis**:
The circle is right, one of the two stars has the wrong color.

**Final Alignment Rating: 4**
\boxed{4}"""
LOOKS = '{\n  "score" : [4, 5, 3],\n  "reasoning" : "Sharp, but the shadows disagree."\n}'
EXECUTION = '{\n"reasoning" : "The star was added where it should be.",\n"score" : [5]\n}'
CONSISTENCY = '{"reasoning": "The circle moved a little.", "score": 3}'


def test_replies_are_parsed():
    assert read_alignment(ALIGNMENT) == 4
    assert read_alignment(r"**Final Alignment Rating: [5]** \boxed{[5]}") == 5
    assert read_alignment(r"\boxed{{2}}") == 2
    assert read_looks(f"```json\n{LOOKS}\n```") == (4, 5, 3)
    assert read_rating(EXECUTION) == 5
    assert read_rating(CONSISTENCY) == 3


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("A very good image.", "must have one"),
        (ALIGNMENT + "\n\\boxed{4}", "must have one"),
        (ALIGNMENT.replace("boxed{4}", "boxed{6}"), "from 1 to 5"),
        (ALIGNMENT.replace("boxed{4}", "boxed{4.5}"), "from 1 to 5"),
        (ALIGNMENT.replace("boxed{4}", "boxed{[Rating]}"), "from 1 to 5"),
        (ALIGNMENT.replace("boxed{4}", "boxed{}"), "from 1 to 5"),
        (ALIGNMENT.replace("boxed{4}", "boxed{3}"), "two ratings, 4 and 3"),
    ],
)
def test_invalid_alignment_has_one_clear_line(answer, reason):
    with pytest.raises(AnswerError, match=reason) as raised:
        read_alignment(answer)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "answer",
    [
        "5",
        '{"score": []}',
        '{"score": [0]}',
        '{"score": [6]}',
        '{"score": 3.5}',
        '{"score": "4"}',
        '{"score": true}',
        '{"score": [4, 4]}',
        '{"score": NaN}',
        '{"rating": 4}',
        '{"score": [4',
    ],
)
def test_invalid_ratings_are_errors(answer):
    with pytest.raises(AnswerError):
        read_rating(answer)
    with pytest.raises(AnswerError):
        read_looks(answer)


def test_alignment_is_weighted_by_the_worst_of_the_looks():
    model = Model(ALIGNMENT, LOOKS)
    score = FirmGen(model).score_image(IMAGE, "a {red} circle and two green stars")
    assert score.value == pytest.approx(0.75 * (0.4 + 0.6 * 0.5))
    assert score.parts == {"alignment": 4, "aesthetics": 4, "quality": 5, "structure": 3}
    assert "a {red} circle and two green stars" in model.questions[0].messages[0]["content"][-1]["text"]
    assert "green stars" not in model.questions[1].messages[0]["content"][-1]["text"]
    assert [len(asked.images) for asked in model.questions] == [1, 1]
    assert FirmGen(Model(ALIGNMENT), quality=0).score_image(IMAGE, "x").value == 0.75


def test_an_edit_that_was_not_carried_out_scores_nothing_however_consistent():
    score = FirmEdit(Model(EXECUTION, CONSISTENCY)).score_edit(IMAGE, IMAGE, "add a {green} star")
    assert score.value == pytest.approx(1 * (0.6 + 0.4 * 0.5))
    assert score.parts == {"execution": 5, "consistency": 3}
    undone = FirmEdit(Model('{"score": [1]}', '{"score": [5]}')).score_edit(IMAGE, IMAGE, "x")
    assert undone.value == 0
    model = Model(EXECUTION)
    assert FirmEdit(model, consistency=0).score_edit(IMAGE, IMAGE, "x").value == 1
    assert [len(asked.images) for asked in model.questions] == [2]
    assert [part["type"] for part in model.questions[0].messages[0]["content"]] == ["image", "image", "text"]


def test_a_reply_without_a_score_is_no_low_score_and_says_why():
    score = FirmEdit(Model(EXECUTION, "It is consistent.")).score_edit(IMAGE, IMAGE, "x")
    assert math.isnan(score.value)
    assert score.problem == "unreadable"
    assert "no JSON object" in score.reason
    empty = FirmGen(Model(ALIGNMENT, "")).score_image(IMAGE, "x")
    assert (empty.problem, math.isnan(empty.value)) == ("no_reply", True)


def test_invalid_options_are_errors():
    with pytest.raises(UsageError, match="quality"):
        FirmGen(Model(), quality=-0.1)
    with pytest.raises(UsageError, match="consistency"):
        FirmEdit(Model(), consistency=1.1)
