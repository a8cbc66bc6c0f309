"""A prompt after a prefix gives what the whole prompt gives: logits, keys, values and positions."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.models.common.decoding import Prefix, generate
from clvr_jax.models.common.sampling import Sampling
from clvr_jax.models.qwen3_vl import Qwen3VL
from clvr_jax.models.qwen3_vl.image_buckets import bucket_conversations, bucket_suffixes
from clvr_jax.models.qwen3_vl.positions import Conversation, part_of
from tests.helpers.models import random_module
from tests.models.parity import relative_error
from tests.models.qwen3_vl.reference import SMALL, compiled, conversation

PLACES: dict[str, int] = {"image_token_id": SMALL.image_token_id, "merge": SMALL.vision.spatial_merge_size}
SQUARE, WIDE = (1, 8, 8), (1, 4, 14)
PREFIX_TOKENS, SLOTS = 96, 256
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model():
    # An untied head, so that replies do not repeat one token.
    config = dataclasses.replace(SMALL, tie_word_embeddings=False)
    return random_module(lambda rngs: Qwen3VL(config, rngs=rngs))


def make(grids, text, seed=0):
    return Conversation(*conversation(np.random.default_rng(seed), grids, text), grids)


def prefix_of(model: Qwen3VL, conversations: list[Conversation], starts: list[int]) -> Prefix:
    """Returns the first tokens of each conversation, processed row by row, with garbage after the tokens."""
    shape = (len(conversations), PREFIX_TOKENS)
    ids, valid_mask = np.full(shape, 7, np.int32), np.arange(PREFIX_TOKENS) < np.array(starts)[:, None]
    past: list[np.ndarray] = []
    for row, (whole, start) in enumerate(zip(conversations, starts, strict=True)):
        cache = np.full((2, SMALL.text.num_hidden_layers, PREFIX_TOKENS, 2, SMALL.text.head_dim), 3, np.float32)
        if start:
            ids[row, :start] = whole.input_ids[:start]
            part = bucket_conversations([part_of(whole, 0, start, **PLACES)], **PLACES)
            _, own = compiled(model, "prefill", **part, cache_length=SLOTS)
            cache[:, :, :start] = np.stack([own.key, own.value])[:, :, 0, :, :start].swapaxes(2, 3)
        past.append(cache)
    key, value = np.stack(past, axis=2)
    return Prefix(key, value, valid_mask, ids)


def tokens_of(cache: Any, row: int, tokens: int) -> np.ndarray:
    """Returns the keys and values of a row's tokens without its padding, (2, layers, kv_heads, tokens, head_dim)."""
    filled = np.asarray(cache.filled_bs[row])
    found = np.stack([cache.key, cache.value])[:, :, row][:, :, :, filled]
    assert found.shape[3] == tokens
    return found


# A conversation of two images: 9 words, 18 tokens of a square image with its marks, 9 words, 16 of a wide one, 9 words.
TWO = (SQUARE, WIDE)
CASES = {
    "text": ([((), 40)], [25]),
    "one token is left": ([((), 40)], [39]),
    "before an image": ([((SQUARE,), 9)], [10]),
    "after an image": ([((SQUARE,), 9)], [26]),
    "between images": ([(TWO, 9)], [30]),
    "after all images": ([(TWO, 9)], [55]),
    "ragged": ([(TWO, 9), ((), 50), ((SQUARE, SQUARE), 11), ((WIDE,), 6)], [36, 17, 0, 7]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_prompt_after_a_prefix_equals_the_whole_prompt(model, name):
    rows, starts = CASES[name]
    conversations = [make(grids, text, seed) for seed, (grids, text) in enumerate(rows)]
    logits, cache = compiled(model, "prefill", **bucket_conversations(conversations, **PLACES), cache_length=SLOTS)
    suffixes = bucket_suffixes(conversations, starts, **PLACES)
    prefix = prefix_of(model, conversations, starts)
    ours, own = compiled(model, "prefill", **suffixes, prefix=prefix, cache_length=SLOTS)
    assert relative_error(ours, logits) < TOLERANCE
    np.testing.assert_array_equal(own.position_b, cache.position_b)
    assert own.slot == PREFIX_TOKENS + suffixes["input_ids_bt"].shape[1]
    for row, whole in enumerate(conversations):
        tokens = len(whole.input_ids)
        assert relative_error(tokens_of(own, row, tokens), tokens_of(cache, row, tokens)) < TOLERANCE


@pytest.mark.slow
def test_positions_or_images_of_another_prefix_change_the_logits(model):
    """The comparison above could fail: the prefix and the positions do matter."""
    whole, other = make(TWO, 9), make(TWO, 9, seed=1)
    suffixes = bucket_suffixes([whole], [30], **PLACES)
    prefix = prefix_of(model, [whole], [30])
    expected, _ = compiled(model, "prefill", **suffixes, prefix=prefix, cache_length=SLOTS)
    changed = whole.pixel_values.copy()
    changed[:64] = other.pixel_values[:64]
    image = prefix_of(model, [dataclasses.replace(whole, pixel_values=changed)], [30])
    restarted = {**suffixes, "positions_3bt": suffixes["positions_3bt"] - suffixes["positions_3bt"][0, 0, 0]}
    for arguments in ({**suffixes, "prefix": image}, {**restarted, "prefix": prefix}):
        found, _ = compiled(model, "prefill", **arguments, cache_length=SLOTS)
        assert relative_error(found, expected) > 100 * TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_replies_after_a_prefix_are_equal_and_end_in_the_cache(model, penalty):
    """The repetition penalty counts the tokens of the prefix as well."""
    rows, starts = CASES["ragged"]
    conversations = [make(grids, text, seed) for seed, (grids, text) in enumerate(rows)]
    options = {"max_new_tokens": 24, "sampling": Sampling(repetition_penalty=penalty)}
    expected = generate(model, bucket_conversations(conversations, **PLACES), **options)
    suffixes = {**bucket_suffixes(conversations, starts, **PLACES), "prefix": prefix_of(model, conversations, starts)}
    found = generate(model, suffixes, **options, return_cache=True)
    np.testing.assert_array_equal(found.tokens_bn, expected.tokens_bn)
    assert expected.cache is None
    # The cache has all but the last token: those of a prompt that continues with the reply.
    longer = [
        dataclasses.replace(whole, input_ids=[*whole.input_ids, *np.asarray(reply[:-1]).tolist()])
        for whole, reply in zip(conversations, found.tokens_bn, strict=True)
    ]
    _, cache = compiled(model, "prefill", **bucket_conversations(longer, **PLACES), cache_length=SLOTS)
    for row, whole in enumerate(longer):
        tokens = len(whole.input_ids)
        assert relative_error(tokens_of(found.cache, row, tokens), tokens_of(cache, row, tokens)) < TOLERANCE


def test_mistakes_are_named(model):
    whole = make((SQUARE,), 9)
    for start, message in ((20, "inside an image"), (len(whole.input_ids), "has no part")):
        with pytest.raises(ClvrError, match=message):
            bucket_suffixes([whole], [start], **PLACES)
    suffixes = bucket_suffixes([whole], [10], **PLACES)
    prefix = jax.eval_shape(lambda: prefix_of(model, [whole], [0]))
    with pytest.raises(ClvrError, match="does not fit"):
        model.prefill(**suffixes, prefix=prefix, cache_length=PREFIX_TOKENS)
    del suffixes["positions_3bt"]
    with pytest.raises(ClvrError, match="needs the positions"):
        model.prefill(**suffixes, prefix=prefix, cache_length=SLOTS)
