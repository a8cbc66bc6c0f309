"""Logits before a token is drawn are those of transformers' processors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from clvr_jax.errors import ClvrError
from clvr_jax.models.common.decoding import generate
from clvr_jax.models.common.sampling import Sampling, filter_logits, occurrences, penalize
from tests.models.common.test_decoding import Coin

VOCABULARY = 500
LOGITS = np.random.default_rng(0).normal(scale=3, size=(6, VOCABULARY)).astype(np.float32)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(top_k=20),
        Sampling(top_k=1000),
        Sampling(top_p=0.8),
        Sampling(top_p=1e-4),
        Sampling(top_k=20, top_p=0.8),
        Sampling(top_k=50, top_p=0.95),
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.5])
def test_top_k_and_top_p_keep_what_transformers_keeps(sampling, temperature):
    expected = torch.tensor(LOGITS) / temperature
    if sampling.top_k:
        expected = TopKLogitsWarper(sampling.top_k)(None, expected)
    if sampling.top_p < 1:
        expected = TopPLogitsWarper(sampling.top_p)(None, expected)
    found = jax.vmap(lambda logits_v: filter_logits(logits_v / temperature, sampling))(LOGITS)
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert np.isfinite(found).any(axis=1).all()


def test_the_repetition_penalty_is_that_of_transformers():
    tokens = np.random.default_rng(1).integers(VOCABULARY, size=(6, 40)).astype(np.int32)
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor(tokens, dtype=torch.long), torch.tensor(LOGITS))
    occurred = occurrences(tokens, np.ones(tokens.shape, bool), VOCABULARY)
    np.testing.assert_allclose(penalize(LOGITS, occurred, 1.3), expected, rtol=1e-6)
    assert not occurrences(tokens, np.zeros(tokens.shape, bool), VOCABULARY).any()


def test_a_row_is_penalized_for_its_own_prompt_and_reply_alone():
    """Greedy: every token that was said falls behind the next one; padding is nobody's word."""
    coin = Coin(np.array([1.0, 2.0, 3.0, 4.0]))
    prompts = {"input_ids_bt": np.array([[3, 0], [1, 1]], np.int32)}
    masked = {**prompts, "attention_mask_bt": np.array([[True, False], [True, True]])}
    sampling = Sampling(repetition_penalty=10.0)
    tokens = generate(_Masked(coin.logits[...]), masked, max_new_tokens=4, sampling=sampling).tokens_bn
    assert tokens.tolist() == [[2, 1, 0, 3], [3, 2, 0, 3]]
    assert (generate(coin, prompts, max_new_tokens=4).tokens_bn == 3).all()


class _Masked(Coin):
    def prefill(self, input_ids_bt, *, attention_mask_bt, cache_length):
        return super().prefill(input_ids_bt, cache_length=cache_length)


def test_only_tokens_that_were_kept_are_drawn():
    coin, prompts = Coin(jnp.arange(10) / 4), {"input_ids_bt": np.zeros((40, 3), np.int32)}

    def drawn(sampling):
        options = {"max_new_tokens": 50, "temperature": 1.0, "key": jax.random.key(0), "sampling": sampling}
        return set(np.asarray(generate(coin, prompts, **options).tokens_bn).ravel().tolist())

    assert drawn(Sampling()) == set(range(10))
    assert drawn(Sampling(top_k=3)) == {7, 8, 9}
    assert drawn(Sampling(top_k=3, top_p=0.5)) == {8, 9}


@pytest.mark.parametrize("field", [{"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"repetition_penalty": 0.0}])
def test_settings_that_make_no_sense_are_refused(field):
    with pytest.raises(ClvrError, match=r"top_p in \(0, 1\]"):
        Sampling(**field)
