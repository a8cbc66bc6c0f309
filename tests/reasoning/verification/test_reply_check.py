import numpy as np
import pytest

from clvr_jax.reasoning.conversation.protocols import Conversation
from clvr_jax.reasoning.verification.reply_check import agrees_with_report

PLAN = "Plan: red star top; blue cross left; green circle right. Draw a red star at the top.<|image_gen|>"
IMAGE = np.zeros((4, 4, 3), np.uint8)


def conversation(report: str, plan: str = PLAN) -> Conversation:
    return Conversation("p", (plan,), (IMAGE,), report=report)


def reply(*unmet: str) -> str:
    return f"I see it. Unmet: {'; '.join(unmet) or 'nothing'}. Mend it.<|image_gen|>"


SEEN = "I see red star top; something unclear left; black cross bottom. Unmet: blue cross; three objects."


@pytest.mark.parametrize(
    ("unmet", "expected"),
    [
        (("blue cross left", "green circle right"), True),
        (("blue cross left", "green circle right", "no black cross bottom"), True),
        (("green circle right", "no black cross bottom", "blue cross left"), True),  # in any order
        (("green circle right",), False),  # what is unclear is unmet
        (("blue cross left", "green circle right", "red star top"), False),  # is there
        (("blue cross bottom", "green circle right"), False),  # not an item of the plan
        (("blue cross left", "green circle right", "no red star top"), False),  # planned
        (("blue cross left", "green circle right", "no black cross right"), False),  # not there
        ((), False),
    ],
)
def test_what_a_reply_lists_is_what_plan_and_description_differ_in(unmet, expected):
    assert agrees_with_report(conversation(SEEN), reply(*unmet)) is expected


def test_an_unclear_thing_nobody_asked_for_may_be_denied():
    seen = "I see red star top; blue cross left; something unclear bottom. Unmet: green circle; three objects."
    assert agrees_with_report(conversation(seen), reply("green circle right", "nothing unclear bottom"))
    assert not agrees_with_report(conversation(seen), reply("green circle right", "nothing unclear top"))


@pytest.mark.parametrize(
    "known",
    [
        conversation(""),  # no verifier
        conversation("Unmet: blue cross; three objects."),  # a verifier that does not describe
        conversation("I see a red star at the top of a white page. Unmet: blue cross."),  # one in free words
        conversation(SEEN, "Plan: a red star above a blue cross. Draw them.<|image_gen|>"),
        conversation(SEEN, "Draw a red star at the top.<|image_gen|>"),  # no plan
        conversation("I see red star top; blue cross left; green circle right. Unmet: red star bottom."),  # wrong plan
        Conversation("p"),  # the first reply
    ],
)
def test_without_anything_to_hold_it_against_a_reply_agrees(known):
    assert agrees_with_report(known, reply("anything"))


def test_a_reply_that_breaks_the_contract_does_not_agree():
    assert not agrees_with_report(conversation(SEEN), "I see it. Mend it.<|image_gen|>")


def test_an_empty_image_lacks_the_whole_plan():
    empty = conversation("I see nothing. Unmet: red star; blue cross; three objects.")
    assert agrees_with_report(empty, reply("red star top", "blue cross left", "green circle right"))
    assert not agrees_with_report(empty, reply("red star top"))
