import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.reasoning import Conversation, GenerationRequest, chat_messages, conditioning_text
from tests.reasoning.scripted import picture


def test_drawing_text_marks_every_earlier_image():
    text = conditioning_text("a cat", ["Plan.<|image_gen|>", "Unmet: b.<|image_gen|>", "Unmet: c. Add c.<|image_gen|>"])
    assert text == "a cat\nPlan.<IMG_GEN_1>\nUnmet: b.<IMG_GEN_2>\nUnmet: c. Add c."


def test_drawing_text_of_first_picture_has_no_mark():
    assert conditioning_text("a cat", ["Plan."]) == "a cat\nPlan."
    with pytest.raises(ClvrError, match="no reply"):
        conditioning_text("a cat", [])


def test_chat_alternates_and_ends_with_the_picture_to_judge():
    messages = chat_messages("a cat", ["one<|image_gen|>", "two<|image_gen|>"], 2, system="rules")
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert messages[2]["content"] == "one<|image_gen|>"
    assert messages[-1]["content"] == [{"type": "image"}]


def test_chat_as_training_sample_ends_with_the_reply():
    messages = chat_messages("a cat", ["one", "two"], 1)
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant"]
    assert chat_messages("a cat", [], 0) == [{"role": "user", "content": "a cat"}]


def test_requirements_are_listed_below_the_prompt():
    messages = chat_messages("a cat", ["one"], 1, requirements=("cat", "one object"))
    assert messages[0]["content"] == "a cat\nRequired: cat; one object."
    assert messages[1:] == chat_messages("a cat", ["one"], 1)[1:]


@pytest.mark.parametrize(("replies", "images"), [(2, 0), (1, 2), (0, -1)])
def test_images_must_go_with_replies(replies, images):
    with pytest.raises(ClvrError, match="images"):
        chat_messages("a cat", ["r"] * replies, images)


def test_requests_check_their_images():
    with pytest.raises(ClvrError, match="each reply has one"):
        Conversation("a", ("r",), ())
    with pytest.raises(ClvrError, match="one image less"):
        GenerationRequest("a", ("r",), (picture(0),))
    assert GenerationRequest("a", ("r", "s<|image_gen|>"), (picture(0),)).text == "a\nr<IMG_GEN_1>\ns"
    assert len(Conversation("a", ("r",), (picture(0),)).messages("rules")) == 4


def test_a_reply_that_is_left_out_leaves_the_mark_of_its_image():
    replies = ["Plan.<|image_gen|>", "Unmet: b.<|image_gen|>", "Unmet: c. Add c.<|image_gen|>"]
    assert (
        conditioning_text("a cat", replies, left_out=1) == "a cat\n<IMG_GEN_1>\nUnmet: b.<IMG_GEN_2>\nUnmet: c. Add c."
    )
    assert conditioning_text("a cat", replies, left_out=2) == "a cat\n<IMG_GEN_1>\n<IMG_GEN_2>\nUnmet: c. Add c."
    with pytest.raises(ClvrError, match="3 of 3 replies left out"):
        conditioning_text("a cat", replies, left_out=3)


def test_the_users_own_images_come_first_and_are_no_results():
    conversation = Conversation("a cat", ("r",), (picture(7), picture(8), picture(0)), num_given=2)
    messages = conversation.messages("rules")
    assert messages[0]["content"].startswith("rules\n")
    assert "do not judge them" in messages[0]["content"]
    assert messages[1]["content"] == [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "a cat"}]
    assert messages[-1]["content"] == [{"type": "image"}]
    assert GenerationRequest("a", ("r", "s"), (picture(7), picture(0)), num_given=1).text == "a\nr<IMG_GEN_1>\ns"
    with pytest.raises(ClvrError, match="each reply has one"):
        Conversation("a", ("r",), (picture(0),), num_given=1)
