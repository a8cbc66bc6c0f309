"""Tests of conditioning texts of histories that are too long."""

import pytest

from clvr_jax.data.preprocessing.histories import fit_history, token_count
from clvr_jax.data.preprocessing.text import encode_prompts, load_tokenizer
from clvr_jax.errors import ClvrError
from clvr_jax.pipelines.registry import SHIPPED
from clvr_jax.reasoning.conversation.context import conditioning_text

PROMPT = "a red star above a blue circle"
REPLIES = [f"Unmet: a {color} cross at the top. Add it. <|image_gen|>" for color in ("red", "blue", "green", "cyan")]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(SHIPPED / "shapes-tiny" / "tokenizer")


def test_a_history_that_fits_is_complete(tokenizer):
    whole = conditioning_text(PROMPT, REPLIES)
    for limit in (token_count(tokenizer, whole), None):
        fitted = fit_history(tokenizer, PROMPT, REPLIES, limit)
        assert (fitted.text, fitted.left_out) == (whole, 0)


def test_the_oldest_replies_are_left_out_first_and_no_more_than_needed(tokenizer):
    lengths = [token_count(tokenizer, conditioning_text(PROMPT, REPLIES, left_out)) for left_out in range(4)]
    assert lengths == sorted(lengths, reverse=True)
    for left_out in (1, 2, 3):
        for limit in (lengths[left_out], lengths[left_out - 1] - 1):
            fitted = fit_history(tokenizer, PROMPT, REPLIES, limit)
            assert (fitted.left_out, fitted.length) == (left_out, lengths[left_out])
            assert fitted.text == conditioning_text(PROMPT, REPLIES, left_out)


def test_a_prompt_that_does_not_fit_is_an_error(tokenizer):
    needed = token_count(tokenizer, conditioning_text(PROMPT, REPLIES, 3))
    message = rf"the prompt and the current instruction take {needed} tokens, more than the {needed - 1} .*shorten"
    with pytest.raises(ClvrError, match=message) as caught:
        fit_history(tokenizer, PROMPT, REPLIES, needed - 1)
    assert f"the prompt alone takes {token_count(tokenizer, PROMPT)}" in str(caught.value)
    with pytest.raises(ClvrError, match="no reply"):
        fit_history(tokenizer, PROMPT, [], 512)


@pytest.mark.parametrize("rounds", [0, 1, 2, 3, 8, 40])
def test_histories_of_any_length_differ_if_their_last_instruction_does(tokenizer, rounds):
    earlier = [f"Unmet: {n} red stars. Add them." for n in range(rounds)]
    ids = []
    for last in ("Add a blue circle.", "Add a red circle."):
        fitted = fit_history(tokenizer, PROMPT, [*earlier, last], 512)
        found, _ = encode_prompts(tokenizer, [fitted.text], (64, 128, 256, 512))
        ids.append(found[0].tolist())
        assert fitted.text.startswith(PROMPT)
        assert fitted.text.endswith(f"\n{last}")
    assert len(ids[0]) == len(ids[1])
    assert ids[0] != ids[1]
    assert bool(fitted.left_out) == (rounds == 40)


def test_nothing_is_truncated_silently(tokenizer):
    needed = token_count(tokenizer, PROMPT)
    assert encode_prompts(tokenizer, [PROMPT], (8, needed))[0].shape == (1, needed)
    with pytest.raises(ClvrError, match=f"takes {needed} tokens, more than the {needed - 1} that are read; shorten"):
        encode_prompts(tokenizer, [PROMPT], (8, needed - 1))
