"""Greedy decoding of the controller beside transformers: the same weights, conversations and number of tokens.

python benchmarks/bench_decoding.py
"""

import numpy as np
import torch
from contest import arguments, contest, folder_of, show
from transformers import Qwen3VLForConditionalGeneration

from clvr_jax.data.preprocessing.conversations import IMAGE_PAD
from clvr_jax.data.shapes import simulate_trajectory
from clvr_jax.models.common.decoding import generate
from clvr_jax.models.qwen3_vl.positions import Conversation, batch_conversations
from clvr_jax.pipelines.qwen3_vl import Qwen3VLPipeline
from clvr_jax.reasoning.conversation.context import chat_messages

NEW_TOKENS = 96


def conversations(pipeline: Qwen3VLPipeline, count: int) -> list[Conversation]:
    """Trajectories with two pictures, the next reply due."""
    rng = np.random.default_rng(0)
    found: list[Conversation] = []
    while len(found) < count:
        told = simulate_trajectory(rng)
        if len(told.canvases) >= 2:
            messages = chat_messages(told.prompt, told.replies[:2], 2)
            found.append(pipeline.prepare(messages, told.canvases[:2]))
    return found


def main() -> None:
    """One conversation, and sixteen in a batch."""
    options = arguments(__doc__)
    folder = folder_of(options.model) / "controller"
    pipeline = Qwen3VLPipeline.from_pretrained(folder)
    theirs = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    image_token = pipeline.tokenizer.convert_tokens_to_ids(IMAGE_PAD)
    print("greedy decoding: clvr-jax beside transformers")
    for count in (1, 16):
        rows = conversations(pipeline, count)
        batch = batch_conversations(rows, image_token_id=image_token, merge=pipeline.image_processor.merge_size)
        length = max(len(row.input_ids) for row in rows)
        ids = np.zeros((count, length), np.int64)
        mask = np.zeros((count, length), np.int64)
        for number, row in enumerate(rows):  # transformers continues prompts that are padded on the left
            ids[number, length - len(row.input_ids) :] = row.input_ids
            mask[number, length - len(row.input_ids) :] = 1
        inputs = {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.tensor(mask),
            "pixel_values": torch.tensor(np.concatenate([row.pixel_values for row in rows])),
            "image_grid_thw": torch.tensor([grid for row in rows for grid in row.grid_thw]),
            "mm_token_type_ids": torch.tensor((ids == image_token).astype(np.int32)),
        }

        def decode(batch: dict = batch) -> np.ndarray:
            return np.asarray(generate(pipeline.model, batch, max_new_tokens=NEW_TOKENS).tokens_bn)

        def decode_theirs(inputs: dict = inputs, length: int = length) -> np.ndarray:
            with torch.no_grad():
                tokens = theirs.generate(
                    **inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
                )
            return tokens[:, length:].numpy()

        result = contest(decode, decode_theirs, options.rounds)
        show(f"{options.model}/controller, {count} rows, {NEW_TOKENS} tokens", result, 1.5)


if __name__ == "__main__":
    main()
