"""The loop's own controller, over a model that thinks before it replies."""

import pytest

from clvr_jax.pipelines.closed_loop import VLMController
from clvr_jax.pipelines.qwen3_vl import ChatAnswer
from clvr_jax.reasoning import Budget, Conversation, run
from clvr_jax.reasoning.trajectory import UNPARSEABLE
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
