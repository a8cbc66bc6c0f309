import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.reasoning.conversation.actions import (
    IMAGE_GEN,
    SYSTEM_PROMPT,
    TERMINATE,
    ParseError,
    Reply,
    parse,
    plan_items,
    strip_action,
    unmet_span,
)


def test_first_reply_has_no_verdict():
    reply = parse(" Plan: red circle left. Draw a red circle at the left. <|image_gen|>\n", has_image=False)
    assert reply == Reply("Plan: red circle left. Draw a red circle at the left.", IMAGE_GEN, None)
    assert reply.text == "Plan: red circle left. Draw a red circle at the left.<|image_gen|>"


@pytest.mark.parametrize(
    ("sentence", "unmet"),
    [
        ("Unmet: nothing.", ()),
        ("Unmet: Nothing", ()),
        ("**Unmet:** none.", ()),
        ("Unmet: green star bottom right.", ("green star bottom right",)),
        (
            "Unmet: blue square center; green star bottom right. Add it.",
            ("blue square center", "green star bottom right"),
        ),
        ("Unmet: no yellow star left.", ("no yellow star left",)),
        ("Unmet: nothing unclear right. Clear the right.", ("nothing unclear right",)),
        ("Unmet: a red car;\nthen more.", ("a red car",)),
        ("Unmet: a 2.5 m wide door. Widen it.", ("a 2.5 m wide door",)),
        ("Unmet: red dot; red dot.", ("red dot", "red dot")),
        ("nothing more.\nUnmet: a", ("a",)),
    ],
)
def test_verdict_sentence(sentence, unmet):
    for action in (IMAGE_GEN, TERMINATE):
        assert parse(f"I see red circle top left. {sentence}{action}", has_image=True).unmet == unmet


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no action token"),
        ("I see nothing. Unmet: nothing.", "no action token"),
        ("I see. Unmet: nothing.<|image_gen|><|terminate|>", "2 action tokens"),
        ("I see. Unmet: nothing.<|terminate|> So I stop.", "text after"),
        ("I see everything.<|terminate|>", "no sentence"),
        ("I see everything, Unmet nothing.<|terminate|>", "no sentence"),
        ("Unmet: a. Unmet: nothing.<|terminate|>", "2 sentences"),
        ("Unmet: .<|terminate|>", "lists nothing"),
        ("Unmet:<|terminate|>", "lists nothing"),
        ("Unmet:\n- a lamp\n- a door<|image_gen|>", "lists nothing"),
        ("Unmet: nothing; red circle.<|terminate|>", "and other items"),
    ],
)
def test_broken_replies_are_no_verdicts(text, complaint):
    with pytest.raises(ParseError, match=complaint) as caught:
        parse(text, has_image=True)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ClvrError)


def test_first_reply_must_say_what_to_draw():
    with pytest.raises(ParseError, match="without an instruction"):
        parse("  <|image_gen|>", has_image=False)
    assert parse("<|terminate|>", has_image=False).action == TERMINATE


def test_end_of_turn_tokens_are_ignored():
    assert parse("Unmet: nothing.<|terminate|><|im_end|>\n", has_image=True).unmet == ()


def test_long_broken_reply_is_quoted_shortly():
    with pytest.raises(ParseError) as caught:
        parse("word " * 1000, has_image=False)
    assert len(str(caught.value)) < 200


def test_plan_items_and_spans():
    text = "Plan: red circle top left; two cars. Draw them."
    assert plan_items(text) == ("red circle top left", "two cars")
    assert plan_items("Draw it.") == ()
    judged = "I see a. Unmet: b. Add b."
    start, end = unmet_span(judged)
    assert judged[start:end] == "Unmet: b."
    assert unmet_span("I see a.") is None
    assert strip_action(" a b.<|image_gen|>") == "a b."


def test_examples_in_system_prompt_keep_the_contract():
    examples = SYSTEM_PROMPT.split("Example of a ")[1:]
    assert len(examples) == 3
    for number, example in enumerate(examples):
        reply = parse(example.split(":\n", 1)[1], has_image=number > 0)
        assert reply.action == (TERMINATE if number == 2 else IMAGE_GEN)
        assert (reply.unmet == ()) == (number == 2)


def test_unknown_action_is_refused():
    with pytest.raises(ParseError, match="action"):
        Reply("text", "<|draw|>")
