"""Decoding gives the tokens that transformers' `generate` gives, stops where it should, and draws what it should."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from clvr_jax.errors import ClvrError
from clvr_jax.models.common import decoding
from clvr_jax.models.common.abstract import abstract_module
from clvr_jax.models.common.decoding import generate
from clvr_jax.models.qwen3_vl import Qwen3VL
from clvr_jax.models.qwen3_vl.positions import Conversation, batch_conversations
from tests.models.parity import TOLERANCE, relative_error
from tests.models.qwen3_vl.reference import SMALL, compiled, conversation, make_pair, pad, reference_inputs

SQUARE = ((1, 8, 8),)
ODD = ((1, 8, 8), (1, 6, 10), (1, 12, 4), (1, 14, 18))
NEW = 40
PLACES = {"image_token_id": SMALL.image_token_id, "merge": SMALL.vision.spatial_merge_size}


@pytest.fixture(scope="module")
def pair():
    # With a tied head and random weights a model says one word for ever, which a broken cache would get right too.
    return make_pair(dataclasses.replace(SMALL, tie_word_embeddings=False), seed=1)


def make_conversations(grids, texts, seed=0):
    rng = np.random.default_rng(seed)
    return [Conversation(*conversation(rng, own, text), own) for own, text in zip(grids, texts, strict=True)]


def reference_tokens(reference, conversations, new=NEW, **options):
    """Greedy tokens (b, new) of the PyTorch model, whose batches are padded on the left."""
    ids_bt, mask_bt = pad([list(c.input_ids) for c in conversations], "left")
    patches = np.concatenate([c.pixel_values for c in conversations if c.grid_thw])
    inputs = reference_inputs(ids_bt, patches, sum((c.grid_thw for c in conversations), ()), mask_bt)
    with torch.no_grad():
        tokens = reference.generate(**inputs, max_new_tokens=new, do_sample=False, pad_token_id=0, **options)
    return tokens[:, ids_bt.shape[1] :].numpy()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("grids", "texts"),
    [
        ([SQUARE * 3], [7]),
        ([ODD], [140]),
        ([SQUARE, SQUARE * 3, ()], [30, 4, 75]),
        ([ODD, ODD[1:3], ODD[:1]], [9, 40, 21]),
    ],
    ids=["three images", "long", "lengths", "mixed"],
)
def test_greedy_tokens_equal_transformers(pair, grids, texts):
    model, reference = pair
    conversations = make_conversations(grids, texts)
    ours = generate(model, batch_conversations(conversations, **PLACES), max_new_tokens=NEW)
    np.testing.assert_array_equal(ours.tokens_bn, reference_tokens(reference, conversations))
    assert ours.length_b.tolist() == [NEW] * len(grids)
    assert not ours.stopped_b.any()
    assert len(set(np.asarray(ours.tokens_bn[0]).tolist())) > 5


@pytest.mark.slow
def test_left_padding_and_no_mask_give_the_same_tokens(pair):
    model, _ = pair
    conversations = make_conversations([SQUARE, SQUARE * 2], [9, 4])
    right = batch_conversations(conversations, **PLACES, length_multiple=1)
    length, own = right["input_ids_bt"].shape[1], right["attention_mask_bt"].sum(1)
    turn = (np.arange(length) - (length - own)[:, None]) % length
    left = {
        **right,
        "input_ids_bt": np.take_along_axis(right["input_ids_bt"], turn, 1),
        "attention_mask_bt": np.take_along_axis(right["attention_mask_bt"], turn, 1),
        "positions_3bt": np.take_along_axis(right["positions_3bt"], turn[None], 2),
    }
    assert not left["attention_mask_bt"].all()
    assert left["attention_mask_bt"][:, -1].all()
    expected = generate(model, right, max_new_tokens=NEW).tokens_bn
    np.testing.assert_array_equal(generate(model, left, max_new_tokens=NEW).tokens_bn, expected)
    alone = batch_conversations(conversations[1:], **PLACES, length_multiple=1)
    del alone["attention_mask_bt"]
    np.testing.assert_array_equal(generate(model, alone, max_new_tokens=NEW).tokens_bn[0], expected[1])


@pytest.mark.slow
def test_steps_with_a_cache_equal_the_whole_sequence(pair):
    model, _ = pair
    (whole,) = make_conversations([ODD], [20])
    batch = batch_conversations([whole], **PLACES, length_multiple=1)
    logits = compiled(model, **batch)
    prompt = len(whole.input_ids) - 6
    start = {name: batch[name][..., :prompt] for name in ("input_ids_bt", "attention_mask_bt", "positions_3bt")}
    images = {name: batch[name] for name in ("pixel_values", "grid_thw")}
    step, cache = compiled(model, "prefill", **start, **images, cache_length=prompt + 8)
    read = jax.jit(lambda cache, token_b: model.decode_step(cache, token_b))
    for token in range(prompt, prompt + 6):
        assert relative_error(step, logits[:, token - 1]) < TOLERANCE
        step, cache = read(cache, jnp.asarray(batch["input_ids_bt"][:, token]))
    assert relative_error(step, logits[:, -1]) < TOLERANCE


@pytest.mark.slow
def test_rows_stop_at_their_own_stop_tokens(pair):
    model, reference = pair
    conversations = make_conversations([SQUARE, SQUARE * 2, SQUARE], [12, 5, 31])
    prompts = batch_conversations(conversations, **PLACES)
    free = np.asarray(generate(model, prompts, max_new_tokens=NEW).tokens_bn)
    stops = (int(free[0, 5]), int(free[1, 11]))
    ours = generate(model, prompts, max_new_tokens=NEW, stop_tokens=stops)
    for row, tokens in enumerate(free):
        at = next((i for i, token in enumerate(tokens) if token in stops), NEW - 1)
        assert ours.length_b[row] == at + 1
        assert ours.stopped_b[row] == (tokens[at] in stops)
        np.testing.assert_array_equal(ours.tokens_bn[row], [*tokens[: at + 1], *[0] * (NEW - at - 1)])
    expected = reference_tokens(reference, conversations, eos_token_id=list(stops))
    np.testing.assert_array_equal(ours.tokens_bn[:, : expected.shape[1]], expected)


class Coin(nnx.Module):
    """A decoder whose next-token logits are fixed, whatever it reads."""

    def __init__(self, logits):
        self.logits = nnx.Param(jnp.asarray(logits, jnp.float32))

    def prefill(self, input_ids_bt, *, cache_length):
        return jnp.tile(self.logits[...], (input_ids_bt.shape[0], 1)), jnp.int32(0)

    def decode_step(self, cache, token_b):
        return jnp.tile(self.logits[...], (token_b.shape[0], 1)), cache + 1


def test_tokens_are_drawn_from_the_tempered_softmax():
    logits = np.array([0.0, 1.0, 2.0, -1.0])
    prompts = {"input_ids_bt": np.zeros((50, 3), np.int32)}
    for temperature in (0.5, 1.0, 2.0):
        drawn = generate(
            Coin(logits), prompts, max_new_tokens=400, temperature=temperature, key=jax.random.key(0)
        ).tokens_bn
        frequencies = np.bincount(np.asarray(drawn).ravel(), minlength=4) / drawn.size
        expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
        np.testing.assert_allclose(frequencies, expected, atol=4 * np.sqrt(0.25 / drawn.size))
    cold = generate(Coin(logits), prompts, max_new_tokens=9, temperature=1e-4, key=jax.random.key(0))
    assert (cold.tokens_bn == 2).all()


def test_a_row_s_draws_depend_on_the_key_and_not_on_other_rows():
    coin = Coin(np.zeros(50))

    def drawn(rows, seed):
        prompts = {"input_ids_bt": np.zeros((rows, 3), np.int32)}
        key = jax.random.key(seed)
        return np.asarray(generate(coin, prompts, max_new_tokens=30, temperature=1.0, key=key).tokens_bn)

    few, many = drawn(2, 0), drawn(5, 0)
    np.testing.assert_array_equal(few, many[:2])
    assert (few[0] != few[1]).any()
    assert (few != drawn(2, 1)).any()


def test_rows_with_keys_of_their_own_sample_as_if_alone():
    coin = Coin(np.zeros(50))

    def sampled(*seeds):
        prompts = {"input_ids_bt": np.zeros((len(seeds), 3), np.int32)}
        keys = jnp.stack([jax.random.key(seed) for seed in seeds])
        return np.asarray(generate(coin, prompts, max_new_tokens=30, temperature=1.0, key=keys).tokens_bn)

    together = sampled(7, 8, 9)
    for row, seed in enumerate((7, 8, 9)):
        np.testing.assert_array_equal(together[row], sampled(seed)[0])
    assert (together[0] != together[1]).any()


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_token_probabilities_are_those_of_the_untempered_softmax(temperature):
    logits = np.array([0.5, 3.0, -1.0, 2.0, 0.0])
    prompts = {"input_ids_bt": np.zeros((2, 3), np.int32)}
    found = generate(
        Coin(logits), prompts, max_new_tokens=4, temperature=temperature, key=jax.random.key(0), top_logprobs=3
    )
    expected = np.asarray(jax.nn.log_softmax(logits))
    np.testing.assert_allclose(found.logprobs.chosen_bn, expected[np.asarray(found.tokens_bn)], rtol=1e-6)
    assert (found.logprobs.top_tokens_bnk == np.array([1, 3, 0])).all()
    np.testing.assert_allclose(found.logprobs.top_bnk, np.broadcast_to(expected[[1, 3, 0]], (2, 4, 3)), rtol=1e-6)
    assert generate(Coin(logits), prompts, max_new_tokens=1).logprobs is None


def test_temperature_key_and_weights_need_no_new_program():
    prompts = {"input_ids_bt": np.zeros((2, 3), np.int32)}
    before = decoding._generate._cache_size()
    for seed, temperature in enumerate((0.3, 0.7, 1.5)):
        coin = Coin(np.arange(seed, seed + 11))
        generate(coin, prompts, max_new_tokens=3, temperature=temperature, key=jax.random.key(seed))
    assert decoding._generate._cache_size() == before + 1


def test_requests_that_make_no_sense_are_refused():
    prompts = {"input_ids_bt": np.zeros((1, 3), np.int32)}
    for options, message in (
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 3, "temperature": -1.0}, "negative"),
        ({"max_new_tokens": 3, "temperature": 1.0}, "key"),
    ):
        with pytest.raises(ClvrError, match=message):
            generate(Coin(np.zeros(3)), prompts, **options)


@pytest.mark.slow
def test_a_bfloat16_model_decodes(pair):
    trained, _ = pair
    model = abstract_module(lambda rngs: Qwen3VL(trained.config, rngs=rngs, dtype=jnp.bfloat16))
    nnx.update(model, nnx.state(trained))
    prompts = batch_conversations(make_conversations([SQUARE], [8]), **PLACES)
    tokens = generate(model, prompts, max_new_tokens=4).tokens_bn
    full = generate(trained, prompts, max_new_tokens=4).tokens_bn
    assert tokens[0, 0] == full[0, 0]
