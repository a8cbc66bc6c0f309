"""Tests of Edit-RRM: points, judgments in the published form, and replies that have no score."""

import json
import math

import numpy as np
import pytest

from clvr_jax.data.trajectories.record import ProxyPrompts
from clvr_jax.interfaces import ChatModel, ChatResponse, ProviderError
from clvr_jax.interfaces.answers import AnswerError
from clvr_jax.rewards import EditRRM, FirmGen, MeshReward, ProxyReward, RewardInput
from clvr_jax.rewards.edit_rrm import CATEGORIES, Point, read_judgment, read_points
from tests.rewards.test_unified_reward import Model

IMAGE = np.zeros((8, 8, 3), np.uint8)
FOLLOW, KEEP, QUALITY = CATEGORIES
POINTS = (
    Point("Is there a green star at the right?", FOLLOW),
    Point('Does the sign say "OPEN [{2}]"?', KEEP),
    Point("Is the red circle as it was?", KEEP),
    Point("Are the outlines clean?", QUALITY),
)
WRITTEN = json.dumps([{"question": one.question, "category": one.category} for one in POINTS])
# Reasoning, with a draft of the list; then single quotes, as the published form has them.
JUDGMENT = """First point: [{'question': 'star', 'score': 0}]? No, the star is at [420, 88, 500, 160]. Score: 1.
The circle is 40 pixels to the left of where it was. Score: 0.

[{'question': 'Is there a green star at the right?', 'score': 1}, {'question': 'the sign', 'score': 1},
{'question': 'Is the red circle as it was?', 'score': 0}, {'question': 'Are the outlines clean?', 'score': 1}],
{"average_score": 0.75} <score>6.5<\\score>"""


def test_points_and_judgment_are_parsed():
    assert read_points(WRITTEN) == POINTS
    assert read_points(f"<think>A draft: [{{}}]</think>\n```json\n{WRITTEN}\n```") == POINTS
    score = read_judgment(JUDGMENT, POINTS)
    assert score.value == 0.65
    assert score.parts == {"final": 6.5, "follow": 1, "keep": 0.5, "quality": 1}
    thought = f"<think>{JUDGMENT}</think>" + JUDGMENT.replace("6.5<\\score>", " 10 </score>")
    assert read_judgment(thought, POINTS).value == 1


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("The star must be there.", "JSON array"),
        (WRITTEN[:-1], "no JSON array"),
        ('[{"question": "", "category": "Image Quality"}]', "point 1 must have a question"),
        (json.dumps([{"question": "x" * 501, "category": FOLLOW}]), "at most 500 characters"),
        ('[{"question": "x", "category": "Beauty"}]', "category must be"),
        ('[{"question": "x", "category": "Image Quality"}]', "no point has the category"),
        (json.dumps([{"question": "x", "category": FOLLOW}] * 21), "21 points"),
        (f"<think>{WRITTEN}", "within a thought"),
    ],
)
def test_invalid_points_have_one_clear_line(answer, reason):
    with pytest.raises(AnswerError, match=reason) as raised:
        read_points(answer)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (JUDGMENT.replace("<score>", ""), "must have one"),
        (f"{JUDGMENT} <score>7</score>", "must have one"),
        (JUDGMENT.replace("6.5", "11"), "from 0 to 10"),
        (JUDGMENT.replace("6.5", "-1"), "from 0 to 10"),
        (JUDGMENT.replace("6.5", "nan"), "from 0 to 10"),
        (JUDGMENT.replace("6.5", "6/10"), "from 0 to 10"),
        (JUDGMENT.replace("'score': 1}]", "'score': 2}]"), "must be 0 or 1, got '2'"),
        (JUDGMENT.replace(", {'question': 'the sign', 'score': 1}", ""), "3 scores for 4 points"),
        ("<score>8</score>", "0 scores for 4 points"),
        (f"<think>{JUDGMENT}", "within a thought"),
    ],
)
def test_invalid_judgments_have_one_clear_line(answer, reason):
    with pytest.raises(AnswerError, match=reason) as raised:
        read_judgment(answer, POINTS)
    assert "\n" not in str(raised.value)


def test_points_are_written_once_for_a_source_and_an_instruction():
    writer, judge = Model(WRITTEN, WRITTEN), Model(JUDGMENT, JUDGMENT.replace("6.5", "2"), JUDGMENT)
    edit_rrm = EditRRM(judge, writer)
    edited = np.full((8, 8, 3), 9, np.uint8)
    found = [edit_rrm.score_edit(IMAGE, one, "add a {green} star").value for one in (edited, IMAGE)]
    assert found == [0.65, 0.2]
    assert len(writer.questions) == 1
    edit_rrm.score_edit(edited, IMAGE, "add a {green} star")
    assert len(writer.questions) == 2
    (asked,) = {str(question.messages) for question in judge.questions}
    assert "add a {green} star" in asked
    assert "OPEN [{2}]" in asked
    content = judge.questions[0].messages[0]["content"]
    assert [part["type"] for part in content] == ["text", "image", "text", "image", "text"]
    np.testing.assert_array_equal(judge.questions[0].images, [IMAGE, edited])


def test_an_unreadable_list_of_points_is_no_low_score():
    score = EditRRM(Model("no idea")).score_edit(IMAGE, IMAGE, "x")
    assert math.isnan(score.value)
    assert (score.problem, "JSON array" in score.reason) == ("unreadable", True)
    refused = EditRRM(Model(WRITTEN, ProviderError("no", "refused"))).score_edit(IMAGE, IMAGE, "x")
    assert refused.problem == "refused"


class Scripted(ChatModel):
    """Replies as a function of the last image; `calls` has the number of questions of each call."""

    name = "judge"

    def __init__(self):
        self.calls = []

    def chat(self, request):
        texts = " ".join(part["text"] for part in request.messages[0]["content"] if part["type"] == "text")
        shade = int(request.images[-1][0, 0, 0])
        if "Points:" in texts:
            return ChatResponse(JUDGMENT.replace("6.5", str(shade % 11)))
        if "JSON array" in texts:
            return ChatResponse(WRITTEN)
        return ChatResponse(rf"\boxed{{{1 + shade % 5}}}")

    def chat_all(self, requests):
        self.calls.append(len(requests))
        return [self.chat(request) for request in requests]


def test_judges_on_the_mesh_give_the_same_scores_in_one_call_per_model_and_round():
    def edit(*shades):
        *sources, image = (np.full((4, 4, 3), shade, np.uint8) for shade in shades)
        names = [f"image_{number}" for number in range(len(sources))]
        return RewardInput(image, ProxyPrompts("a star", "add it" if names else "", names), sources)

    inputs = [edit(1, 2), edit(1, 7), edit(3, 5, 4), edit(6)]
    expected = ProxyReward(FirmGen(Scripted(), quality=0), EditRRM(Scripted())).scores(inputs)
    judge, writer = Scripted(), Scripted()
    reward = MeshReward(FirmGen(judge, quality=0), EditRRM(judge, writer))
    for calls in ([4, 4], [4, 4, 4, 4]):
        found = reward.scores(inputs)
        np.testing.assert_array_equal(found.values, expected.values)
        assert found.parts.keys() == expected.parts.keys()
        assert judge.calls == calls
        assert writer.calls == [4]  # none is written in the second batch
    assert np.isfinite(expected.values).all()


def test_a_judge_of_another_protocol_ends_the_run():
    names = ["image_0"]
    inputs = [RewardInput(IMAGE, ProxyPrompts("a star", "add it", names), [IMAGE]) for _ in range(8)]
    alone = [RewardInput(IMAGE, ProxyPrompts("a star"))] * 8
    other = Model(*["Final Score: 4"] * 8)
    message = r"none of the 8 replies .*judge of images.* one \\boxed.*--judge-protocol"
    with pytest.raises(ProviderError, match=message):
        ProxyReward(FirmGen(other, quality=0), EditRRM(Model()), in_flight=1).scores(alone)
    good, other = Model(*[r"\boxed{4}"] * 8), Model(*["Final Score: 4"] * 8)
    with pytest.raises(ProviderError, match=r"none of the 8 replies .*judge of edits.*JSON array"):
        ProxyReward(FirmGen(good, quality=0), EditRRM(other), in_flight=1).scores(inputs)
    good = Model(*["Final Score: 4"] * 7)
    assert np.isnan(ProxyReward(FirmGen(good, quality=0), EditRRM(Model())).scores(alone[:7]).values).all()
