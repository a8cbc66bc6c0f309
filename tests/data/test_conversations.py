import numpy as np
import pytest

from clvr_jax.data.conversations import collate_conversations, read_conversation, supervised_conversation
from clvr_jax.data.qwen3_vl_images import Qwen3VLImageProcessor
from clvr_jax.data.text import load_tokenizer
from clvr_jax.errors import UsageError
from clvr_jax.pipelines.registry import SHIPPED
from clvr_jax.reasoning.context import chat_messages

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


def pictures(count):
    return list(np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), np.uint8))


def test_only_what_the_assistant_says_is_learned(tokenizer):
    messages = chat_messages(PROMPT, REPLIES, 2, system="You direct a painter.")
    conversation, weights = supervised_conversation(tokenizer, PROCESSOR, messages, pictures(2))
    learned = tokenizer.decode(np.asarray(conversation.input_ids)[weights > 0])
    assert learned == "".join(f"{reply}<|im_end|>" for reply in REPLIES)
    assert conversation.grid_thw == ((1, 8, 8),) * 2


def test_what_is_learned_follows_what_inference_reads(tokenizer):
    """Up to the last reply a training conversation has the very tokens of the prompt that asks for this reply."""
    whole, weights = supervised_conversation(tokenizer, PROCESSOR, chat_messages(PROMPT, REPLIES, 2), pictures(2))
    asked = read_conversation(tokenizer, PROCESSOR, chat_messages(PROMPT, REPLIES[:2], 2), pictures(2))
    assert whole.input_ids[: len(asked.input_ids)] == asked.input_ids
    assert weights[len(asked.input_ids)] == 1
    assert weights[len(asked.input_ids) - 1] == 0
    assert np.array_equal(whole.pixel_values, asked.pixel_values)


def test_weights_stay_with_their_tokens_in_a_batch(tokenizer):
    examples = [
        supervised_conversation(tokenizer, PROCESSOR, chat_messages(PROMPT, REPLIES[: n + 1], n), pictures(n))
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


def test_pictures_and_image_parts_must_agree(tokenizer):
    with pytest.raises(UsageError, match="2 image parts, 1 pictures"):
        read_conversation(tokenizer, PROCESSOR, chat_messages(PROMPT, REPLIES, 2), pictures(1))
