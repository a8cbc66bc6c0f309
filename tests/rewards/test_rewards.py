"""Tests of rewards: sums of scores, missing scores, judges that cannot be reached."""

import json
import math
import threading
import time

import numpy as np
import pytest

from clvr_jax.data.trajectories.record import ProxyPrompts
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.interfaces import ChatModel, ChatResponse, ProviderError
from clvr_jax.rewards import (
    LastTextReward,
    MeshReward,
    ProxyReward,
    RewardInput,
    Score,
    Scores,
    UnifiedReward,
    UnifiedRewardEdit,
    WeightedReward,
)
from clvr_jax.rewards.unified_reward import AXES

IMAGE = np.zeros((4, 4, 3), np.uint8)


def gray(value):
    return np.full((4, 4, 3), value, np.uint8)


class Judge:
    """Scores an image by its brightness over 100, an edit by that of the source; 255 gives no score."""

    def __init__(self):
        self.texts = []

    def score_image(self, image, text):
        self.texts.append(text)
        return Score(math.nan if image[0, 0, 0] == 255 else image[0, 0, 0] / 100, {"style": 3.0})

    def score_edit(self, source, edited, instruction):
        self.texts.append(instruction)
        return Score(math.nan if source[0, 0, 0] == 255 else source[0, 0, 0] / 100, {"success": source[0, 0, 0] / 10})


def generated_image(value=50, last_text="the last text"):
    return RewardInput(gray(value), ProxyPrompts("whole"), last_text=last_text)


def edit(value, *sources):
    proxies = ProxyPrompts("whole", "change", tuple(range(len(sources))))
    return RewardInput(gray(value), proxies, [gray(source) for source in sources])


def test_a_first_image_is_scored_by_its_text_and_an_edit_half_by_the_mean_over_its_sources():
    found = ProxyReward(Judge(), Judge()).scores([generated_image(50), edit(50, 10, 30), edit(20, 90)])
    np.testing.assert_allclose(found.values, [0.5, 0.5 * 0.5 + 0.5 * 0.2, 0.5 * 0.2 + 0.5 * 0.9])
    np.testing.assert_allclose(found.parts["t2i"], [0.5, 0.5, 0.2])
    np.testing.assert_allclose(found.parts["i2i"], [np.nan, 0.2, 0.9])
    np.testing.assert_allclose(found.parts["i2i/success"], [np.nan, 2.0, 9.0])
    np.testing.assert_allclose(found.parts["t2i/style"], [3.0, 3.0, 3.0])


class ScriptedJudge(ChatModel):
    """Replies in the format of UnifiedReward, as a function of images and text; `calls` has the texts of each call."""

    name = "judge"

    def __init__(self):
        self.calls = []

    def chat(self, question):
        return self._reply(question)

    def chat_all(self, questions):
        self.calls.append([question.messages[0]["content"][-1]["text"] for question in questions])
        return [self._reply(question) for question in questions]

    def _reply(self, question):
        shades = [int(image[0, 0, 0]) for image in question.images]
        if question.is_json:
            return ChatResponse(f'{{"score": [{sum(shades) % 26}, {shades[-1] % 20}]}}')
        text = question.messages[0]["content"][-1]["text"]
        scores = (shades[0] % 7, 1 + shades[0] % 3, 1 + len(text) % 5)  # only 1 to 5 are valid
        return ChatResponse("".join(f"{axis} Score (1-5): {score}\n" for axis, score in zip(AXES, scores, strict=True)))


@pytest.mark.parametrize("quality", [0.0, 0.5])
def test_a_judge_on_the_mesh_gives_the_same_scores_with_one_call_per_batch(quality):
    cases = [generated_image(24), edit(33, 10, 30), edit(4, 90), generated_image(70), edit(24, 24)]
    judges = UnifiedReward(ScriptedJudge()), UnifiedRewardEdit(ScriptedJudge(), quality)
    expected = ProxyReward(*judges).scores(cases)
    reward = MeshReward(*judges)
    found = reward.scores(cases)
    np.testing.assert_array_equal(found.values, expected.values)
    assert 0 < np.isnan(found.values).sum() < len(cases)
    assert found.parts.keys() == expected.parts.keys()
    for name, part in found.parts.items():
        np.testing.assert_array_equal(part, expected.parts[name])
    assert [len(call) for call in judges[0].model.calls] == [5]
    assert [len(call) for call in judges[1].model.calls] == [4 * (1 + bool(quality))]
    assert len(reward.scores([]).values) == 0
    simple = MeshReward(judges[0]).scores(cases)
    np.testing.assert_array_equal(simple.values, LastTextReward(judges[0]).scores(cases).values)
    assert judges[0].model.calls[-1][0].endswith("Text Caption: [the last text]")


def test_rewards_on_the_mesh_are_not_mixed_with_others():
    mesh_reward = MeshReward(UnifiedReward(ScriptedJudge()))
    assert WeightedReward({"one": (1.0, mesh_reward), "two": (0.5, mesh_reward)}).runs_on_devices
    with pytest.raises(UsageError, match="not mixed"):
        WeightedReward({"one": (1.0, mesh_reward), "two": (1.0, LastTextReward(Judge()))})


def test_scores_round_trip_through_json():
    scores = Scores(np.array([0.1, np.nan, 1 / 3]), {"t2i": np.array([np.inf, np.nan, 2.0])})
    found = Scores.from_json(json.loads(json.dumps(scores.to_json())))
    np.testing.assert_array_equal(found.values, scores.values)
    np.testing.assert_array_equal(found.parts["t2i"], scores.parts["t2i"])


def test_missing_scores_are_never_zero():
    found = ProxyReward(Judge(), Judge()).scores(
        [generated_image(255), edit(50, 10, 255), edit(255, 10), generated_image(0)]
    )
    np.testing.assert_array_equal(np.isnan(found.values), [True, True, True, False])
    assert found.values[3] == 0
    weighted = WeightedReward({"one": (2.0, ProxyReward(Judge(), Judge())), "two": (0.0, LastTextReward(Judge()))})
    found = weighted.scores([generated_image(255), generated_image(50)])
    np.testing.assert_array_equal(found.values, [np.nan, 1.0])
    assert {"one", "two", "one/t2i", "one/t2i/style", "two/t2i"} <= set(found.parts)


def test_the_ablation_uses_the_last_text_alone():
    judge = Judge()
    found = LastTextReward(judge).scores([generated_image(40, "draw a circle"), edit(40, 10)])
    assert sorted(judge.texts) == ["", "draw a circle"]
    np.testing.assert_allclose(found.values, [0.4, 0.4])


def test_judges_are_called_concurrently():
    together = threading.Barrier(6, timeout=20)

    class Waiting(Judge):
        def score_image(self, image, text):
            together.wait()
            return Score(1.0)

        def score_edit(self, source, edited, instruction):
            together.wait()
            return Score(0.0)

    found = ProxyReward(Waiting(), Waiting(), in_flight=6).scores([generated_image(), edit(1, 2, 3), edit(1, 2)])
    np.testing.assert_allclose(found.values, [1.0, 0.5, 0.5])


def test_a_judge_that_is_down_gets_no_further_calls():
    class Down(Judge):
        def score_image(self, image, text):
            self.texts.append(text)
            time.sleep(0.01)  # as a call takes, in which the calls that wait are canceled
            raise ProviderError("judge (localhost): cannot be reached", "down")

    judge = Down()
    with pytest.raises(ProviderError, match="cannot be reached"):
        ProxyReward(judge, judge, in_flight=1).scores([generated_image()] * 200)
    assert len(judge.texts) < 200


def test_concatenated_scores_have_nan_for_missing_parts():
    joined = Scores.concatenate([Scores(np.array([1.0]), {"a": np.array([2.0])}), Scores(np.array([3.0, 4.0]))])
    np.testing.assert_array_equal(joined.values, [1, 3, 4])
    np.testing.assert_array_equal(joined.parts["a"], [2, np.nan, np.nan])


def test_invalid_arguments_are_errors():
    with pytest.raises(ClvrError, match="0 references for 1"):
        RewardInput(IMAGE, ProxyPrompts("whole", "change", (0,)))
    with pytest.raises(UsageError, match="at least one reward"):
        WeightedReward({})
    with pytest.raises(UsageError, match="in_flight"):
        LastTextReward(Judge(), in_flight=0)
    with pytest.raises(ClvrError, match=r"must be \(n,\)"):
        Scores(np.zeros(2), {"a": np.zeros(3)})
