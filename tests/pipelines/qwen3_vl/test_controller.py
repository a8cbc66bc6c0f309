"""The loop's own controller, over a model that thinks before it replies."""

import numpy as np
import pytest

from clvr_jax.pipelines.closed_loop import VLMController
from clvr_jax.pipelines.qwen3_vl import ChatAnswer
from clvr_jax.reasoning import Budget, Conversation, run
from clvr_jax.reasoning.trajectories.trajectory import UNPARSEABLE
from tests.reasoning.scripted import CountingDrawer


class Thinker:
    """A chat pipeline that gives the same answer to everything."""

    def __init__(self, text):
        self.text = text

    def answer_all(self, conversations, images, max_new_tokens, temperature, seeds):
        return [ChatAnswer(self.text, 10, 20) for _ in conversations]


@pytest.mark.parametrize(
    ("text", "reply"),
    [
        ("Draw a cat. <|image_gen|>", "Draw a cat. <|image_gen|>"),
        ("<think>\nDraw a dog? <|image_gen|>\n</think>\n\nDraw a cat. <|image_gen|>", "Draw a cat. <|image_gen|>"),
        ("Draw a dog? <|image_gen|></think>Draw a cat. <|image_gen|>", "Draw a cat. <|image_gen|>"),
        ("<think>\nI could draw a dog. <|image_gen|>", ""),
    ],
)
def test_a_reply_is_what_stands_behind_the_thought(text, reply):
    controller = VLMController(Thinker(text))
    assert controller.reply([Conversation("a cat"), Conversation("a cat", attempt=1)]) == [reply] * 2
    assert controller.usage.output_tokens == 40


def test_a_draft_in_an_unfinished_thought_is_never_carried_out():
    image_generator = CountingDrawer()
    controller = VLMController(Thinker("<think>\nI could draw a dog. <|image_gen|>"))
    (trajectory,) = run(["a cat"], controller, image_generator, Budget(max_parse_retries=1), verification="controller")
    assert trajectory.outcome == UNPARSEABLE
    assert not image_generator.calls


class Sampler:
    """A chat pipeline that says its texts one after the other, and the last one from then on."""

    def __init__(self, *texts):
        self.texts, self.calls = list(texts), []

    def answer_all(self, conversations, images, max_new_tokens, temperature, seeds):
        self.calls.append((temperature, tuple(seeds)))
        return [ChatAnswer(self.texts.pop(0) if len(self.texts) > 1 else self.texts[0], 10, 20) for _ in conversations]


def test_replies_of_one_temperature_share_a_call_and_plans_get_hotter_than_others():
    model = Sampler("Plan: red star top. Draw a red star at the top.<|image_gen|>")
    VLMController(model).reply([Conversation("p", attempt=attempt, seed=attempt) for attempt in (9, 0, 2, 12, 0)])
    assert model.calls == [(0.0, (0, 0)), (0.8, (2,)), (1.5, (9, 12))]
    image = np.zeros((4, 4, 3), np.uint8)
    VLMController(model).reply([Conversation("p", ("Draw.<|image_gen|>",), (image,), attempt=9, seed=1)])
    assert model.calls[3] == (1.0, (1,))


WRONG = "I see red star top. Unmet: red star top. Add a red star at the top.<|image_gen|>"
RIGHT = "I see red star top. Unmet: blue cross left. Add a blue cross at the left.<|image_gen|>"


def test_a_reply_that_disagrees_with_the_report_is_sampled_again():
    plan = "Plan: red star top; blue cross left. Draw a red star at the top.<|image_gen|>"
    report = "I see red star top. Unmet: blue cross."
    due = Conversation("p", (plan,), (np.zeros((4, 4, 3), np.uint8),), report=report, seed=7)
    model = Sampler(WRONG, "no reply at all", WRONG, RIGHT, RIGHT + " ")
    assert VLMController(model).reply([due]) == [RIGHT]
    temperatures, seeds = zip(*model.calls, strict=True)
    assert temperatures[0] == 0 < min(temperatures[1:])
    assert [len(each) for each in seeds] == [1, 1, 1, 2]  # attempts 2 and 3 share a batch
    assert len({seed for each in seeds for seed in each}) == 5
    stubborn = Sampler(WRONG)
    assert VLMController(stubborn, agreement_retries=2).reply([due]) == [WRONG]
    assert len(stubborn.calls) == 3
    instructed = Sampler(WRONG)
    VLMController(instructed, "You are a controller.").reply([due])
    assert len(instructed.calls) == 1, "a model that was not trained to may say it in other words"
