"""Tests of the replies of reward models: parsing, scores, and the failures that end a run."""

import math

import numpy as np
import pytest

from clvr_jax.data.trajectories.record import ProxyPrompts
from clvr_jax.errors import UsageError
from clvr_jax.interfaces import ChatResponse, ProviderError
from clvr_jax.providers.failures import NoReplyError
from clvr_jax.rewards import UnifiedReward, UnifiedRewardEdit
from clvr_jax.rewards.proxy import LastTextReward
from clvr_jax.rewards.reward import RewardInput, Scores
from clvr_jax.rewards.unified_reward import read_acs, read_edit, read_final, read_quality

ACS = "Alignment Score (1-5): 4\nCoherence Score (1-5): 3.5\nStyle Score (1-5): 1"
IMAGE = np.zeros((8, 8, 3), np.uint8)


class Model:
    """Returns the given replies one after the other; raises those that are exceptions."""

    name = "model"

    def __init__(self, *answers):
        self.answers, self.questions = list(answers), []

    def chat(self, question):
        self.questions.append(question)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return ChatResponse(answer)


def test_valid_replies_are_parsed():
    score = read_acs(f"I see a cat.\n{ACS}\n")
    assert score.value == pytest.approx(((4 + 3.5 + 1) / 3 - 1) / 4)
    assert score.parts == {"alignment": 4, "coherence": 3.5, "style": 1}
    assert read_final("Good.\nFinal Score: 5").value == 1
    assert read_final("Final Score: 2.0.").value == 0.25
    made = read_edit('```json\n{"reasoning": "done", "score": [20, 25]}\n```')
    assert made.value == pytest.approx((0.6 * 20 + 0.4 * 25) / 25)
    assert made.parts == {"success": 20, "minimality": 25}
    assert read_quality('{"reasoning": "", "score": [10, 20.5]}').value == pytest.approx(30.5 / 50)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "a nice picture, 5 of 5",
        ACS.replace("Style Score (1-5): 1", ""),
        ACS.replace("3.5", "5.5"),
        ACS.replace("3.5", "0"),
        ACS.replace("3.5", "three"),
        ACS.replace("3.5", "3.5.1"),
        ACS.replace("3.5", "-3.5"),
        f"{ACS}\nAlignment Score (1-5): 5",
        f"Alignment Score (1-5): X\n{ACS}",  # repeats the form
    ],
)
def test_invalid_acs_replies_have_no_score(answer):
    assert math.isnan(read_acs(answer).value)


@pytest.mark.parametrize("answer", ["Final Score: 6", "Final Score: 3/5 Final Score: 4", "Score: 3", "Final Score: 33"])
def test_invalid_final_replies_have_no_score(answer):
    assert math.isnan(read_final(answer).value)


@pytest.mark.parametrize(
    "answer",
    [
        "done, 20 and 25",
        '{"score": [20, 25]',
        '{"score": [20]}',
        '{"score": [20, 26]}',
        '{"score": [-1, 5]}',
        '{"score": ["20", 5]}',
        '{"score": [true, 5]}',
        '{"score": [20, 5, 1]}',
        '{"score": 20}',
        '{"score": [NaN, 5]}',
        '{"scores": [20, 5]}',
    ],
)
def test_invalid_edit_replies_have_no_score(answer):
    assert math.isnan(read_edit(answer).value)


def test_questions_are_one_turn_with_the_images_first():
    model = Model(ACS, '{"score": [25, 25]}', '{"score": [0, 0]}')
    assert UnifiedReward(model).score_image(IMAGE, "a {red} circle").value > 0
    score = UnifiedRewardEdit(model, quality=0.25).score_edit(IMAGE, IMAGE, "add a star")
    assert score.value == pytest.approx(0.75)
    assert set(score.parts) == {"success", "minimality", "naturalness", "artifacts"}
    shown = [len(question.images) for question in model.questions]
    assert shown == [1, 2, 1]
    for question, count in zip(model.questions, shown, strict=True):
        (turn,) = question.messages
        assert [part["type"] for part in turn["content"]] == ["image"] * count + ["text"]
        assert question.temperature == 0
    assert "Text Caption: [a {red} circle]" in model.questions[0].messages[0]["content"][-1]["text"]


def test_an_invalid_reply_is_no_score_and_an_unreachable_endpoint_is_an_error():
    for fault in ("malformed", "refused"):
        assert math.isnan(UnifiedReward(Model(ProviderError("no", fault))).score_image(IMAGE, "x").value)
    for fault in ("down", "limited", "rejected"):
        with pytest.raises(ProviderError):
            UnifiedRewardEdit(Model(ProviderError("no", fault))).score_edit(IMAGE, IMAGE, "x")


def test_no_reply_a_refusal_an_unreadable_reply_and_a_low_score_differ():
    no_reply = NoReplyError("model: the answer is truncated at max_tokens=512", "down")
    found = [
        UnifiedReward(Model(answer), form="final").score_image(IMAGE, "x")
        for answer in (no_reply, ProviderError("no", "refused"), "a nice picture", "Final Score: 1")
    ]
    assert [score.problem for score in found] == ["no_reply", "refused", "unreadable", None]
    assert [score.value for score in found[:3]] == pytest.approx([math.nan] * 3, nan_ok=True)
    assert found[3].value == 0
    scores = Scores.stack(found)
    assert scores.parts["no_reply"].tolist() == [1, 0, 0, 0]
    assert scores.parts["unreadable"].tolist() == [0, 0, 1, 0]


def test_a_judge_that_never_replies_ends_the_run():
    cases = [RewardInput(IMAGE, ProxyPrompts("a circle"), last_text="x") for _ in range(3)]
    no_reply = NoReplyError("model: the answer is empty", "down")
    reward = LastTextReward(UnifiedReward(Model(no_reply, no_reply, no_reply)), in_flight=1)
    with pytest.raises(ProviderError, match="no reply to any of 3 questions"):
        reward.scores(cases)
    some = LastTextReward(UnifiedReward(Model(no_reply, ACS, no_reply)), in_flight=1).scores(cases)
    assert np.isnan(some.values).tolist() == [True, False, True]


def test_invalid_options_are_errors():
    with pytest.raises(UsageError, match="form"):
        UnifiedReward(Model(), form="best")
    with pytest.raises(UsageError, match="quality"):
        UnifiedRewardEdit(Model(), quality=2)
