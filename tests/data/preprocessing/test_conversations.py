import numpy as np
import pytest

from clvr_jax.data.preprocessing.conversations import collate_conversations, read_conversation, supervised_conversation
from clvr_jax.data.preprocessing.qwen3_vl_images import Qwen3VLImageProcessor
from clvr_jax.data.preprocessing.text import load_tokenizer
from clvr_jax.errors import UsageError
from clvr_jax.pipelines.registry import SHIPPED
from clvr_jax.reasoning.conversation.context import chat_messages

PROCESSOR = Qwen3VLImageProcessor(patch_size=8, min_pixels=64 * 64, max_pixels=64 * 64)
PROMPT = "a red circle and a blue star"
REPLIES = (
    "Plan: red circle top; blue star bottom. Draw a red circle at the top.<|image_gen|>",
    "I see red circle top. Unmet: blue star bottom. Add a blue star at the bottom.<|image_gen|>",
    "I see red circle top; blue star bottom. Unmet: nothing.<|terminate|>",
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(SHIPPED / "shapes-tiny" / "tokenizer")


def images(count):
    return list(np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), np.uint8))


def test_only_the_assistants_turns_have_loss(tokenizer):
    messages = chat_messages(PROMPT, REPLIES, 2, system="You direct a painter.")
    conversation, weights = supervised_conversation(tokenizer, PROCESSOR, messages, images(2))
    learned = tokenizer.decode(np.asarray(conversation.input_ids)[weights > 0])
    assert learned == "".join(f"{reply}<|im_end|>" for reply in REPLIES)
    assert conversation.grid_thw == ((1, 8, 8),) * 2


def test_training_tokens_equal_inference_tokens(tokenizer):
    """Checks that a training conversation, up to its last reply, has the tokens of the prompt for this reply."""
    whole, weights = supervised_conversation(tokenizer, PROCESSOR, chat_messages(PROMPT, REPLIES, 2), images(2))
    asked = read_conversation(tokenizer, PROCESSOR, chat_messages(PROMPT, REPLIES[:2], 2), images(2))
    assert whole.input_ids[: len(asked.input_ids)] == asked.input_ids
    assert weights[len(asked.input_ids)] == 1
    assert weights[len(asked.input_ids) - 1] == 0
    assert np.array_equal(whole.pixel_values, asked.pixel_values)


def test_weights_belong_to_their_tokens_in_a_batch(tokenizer):
    examples = [
        supervised_conversation(tokenizer, PROCESSOR, chat_messages(PROMPT, REPLIES[: n + 1], n), images(n))
        for n in (0, 2)
    ]
    batch = collate_conversations(
        examples,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        merge=2,
        pad_token=tokenizer.pad_token_id,
        image_slots=4,
    )
    assert batch["weights_bt"].shape == batch["input_ids_bt"].shape
    assert batch["pixel_values"].shape == (2, 4 * 64, 3 * 2 * 8 * 8)
    for row, (conversation, weights) in enumerate(examples):
        assert batch["weights_bt"][row].sum() == weights.sum()
        assert batch["input_ids_bt"][row, : len(weights)].tolist() == conversation.input_ids
        assert not batch["weights_bt"][row][~batch["attention_mask_bt"][row]].any()


def test_images_and_image_parts_must_agree(tokenizer):
    with pytest.raises(UsageError, match="2 image parts, but 1 images"):
        read_conversation(tokenizer, PROCESSOR, chat_messages(PROMPT, REPLIES, 2), images(1))
