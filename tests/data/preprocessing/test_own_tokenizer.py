"""The tokenizer that we train, read without transformers, is what transformers reads."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from transformers import Qwen2Tokenizer

from clvr_jax.data.preprocessing.chat_templates import CHAT_TEMPLATE, render_chats
from clvr_jax.data.preprocessing.own_tokenizer import CONFIG, OwnTokenizer
from clvr_jax.data.preprocessing.text import SPECIAL_TOKENS, load_tokenizer, train_tokenizer
from clvr_jax.errors import ClvrError
from clvr_jax.pipelines.registry import SHIPPED

SHAPES = SHIPPED / "shapes-tiny"
TRUNCATION = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
TEXTS = [
    "a red circle left of a blue star, and 12 green squares",
    "",
    " ",
    "\n\n  two  spaces\tand a tab \r\n",
    "Ärger, naïve, e\u0301 and \u00e9, Å, ﬁ, 漢字かな한국어, 🎨👩‍🎨, \u200b\ufeff",
    "I'm it's WE'LL ''quotes'' -- <|im_start|>user\n<|im_end|> <think>x</think> <IMG_GEN_3> <|vision_start|>",
    "<|im_start|><|im_start|>  <|endoftext|>a<|image_pad|><|image_pad|>",
    "\0\x7f\x85\u2028",
]
MESSAGES = [
    [{"role": "user", "content": "a red circle"}],
    [{"role": "system", "content": ""}, {"role": "user", "content": "<|im_end|>\n"}],
    [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " x\n"}, {"type": "image"}]},
        {"role": "assistant", "content": "y"},
        {"role": "user", "content": []},
    ],
]


def random_texts(count):
    rng = np.random.default_rng(0)
    pieces = [*SPECIAL_TOKENS, *"abc ABC 0123 \n\t.,;'\"!?-_()éßñ漢🎨", "  ", "circle", "'s", "\r\n"]
    return ["".join(rng.choice(pieces, rng.integers(1, 40))) for _ in range(count)]


@pytest.fixture(scope="module", params=["tokenizer", "controller"])
def both(request):
    return load_tokenizer(SHAPES / request.param), Qwen2Tokenizer.from_pretrained(str(SHAPES / request.param))


def test_texts_have_the_tokens_of_transformers(both):
    ours, theirs = both
    assert isinstance(ours, OwnTokenizer)
    texts = [*TEXTS, *random_texts(2000)]
    assert ours(texts)["input_ids"] == theirs(texts)["input_ids"]
    for text in texts[:200]:
        found, expected = (each(text, return_offsets_mapping=True) for each in both)
        assert found["input_ids"] == expected["input_ids"] == ours.encode(text)
        assert found["offset_mapping"] == expected["offset_mapping"]
        assert ours.tokenize(text) == theirs.tokenize(text)


def test_tokens_have_the_texts_of_transformers(both):
    ours, theirs = both
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, len(ours), rng.integers(0, 30)) for _ in range(500)]
    for row in rows:  # also bytes that are no text
        assert ours.decode(row) == theirs.decode(row)
        assert ours.decode(row.tolist(), skip_special_tokens=True) == theirs.decode(row, skip_special_tokens=True)


def test_attributes_are_those_of_transformers(both):
    ours, theirs = both
    names = ("chat_template", "model_max_length", "pad_token_id", "eos_token_id", "special_tokens_map")
    assert [getattr(ours, name) for name in names] == [getattr(theirs, name) for name in names]
    assert len(ours) == len(theirs)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.get_chat_template() == theirs.get_chat_template()
    tokens = ["<|image_pad|>", "a", "Ġa", "no token"]
    assert ours.convert_tokens_to_ids(tokens) == theirs.convert_tokens_to_ids(tokens)
    assert ours.convert_tokens_to_ids("<|im_end|>") == theirs.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize("options", [{}, {"add_generation_prompt": True}, {"enable_thinking": False}, None], ids=str)
def test_conversations_are_rendered_as_by_the_template(both, options):
    options = {"add_generation_prompt": True, "enable_thinking": False} if options is None else options
    for messages in MESSAGES:
        expected = both[1].apply_chat_template(messages, tokenize=False, **options)
        assert both[0].apply_chat_template(messages, **options) == expected


def test_what_it_writes_is_read_by_both(tmp_path):
    train_tokenizer(["a red circle", "a blue star"], 320, tmp_path / "trained")
    ours = load_tokenizer(tmp_path / "trained")
    ours.save_pretrained(str(tmp_path / "saved"))
    again, theirs = load_tokenizer(tmp_path / "saved"), Qwen2Tokenizer.from_pretrained(str(tmp_path / "saved"))
    assert isinstance(again, OwnTokenizer)
    text = "a red star <|im_end|>"
    assert again(text)["input_ids"] == ours(text)["input_ids"] == theirs(text)["input_ids"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "trained" / name).read_bytes()


def change(name, **fields):
    def write(directory):
        path = directory / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return write


@pytest.mark.parametrize(
    "write",
    [
        change("tokenizer_config.json", add_prefix_space=True),
        change("tokenizer_config.json", chat_template=CHAT_TEMPLATE + " "),
        change("tokenizer_config.json", extra=1),
        change("tokenizer.json", normalizer=None),
        change("tokenizer.json", truncation=TRUNCATION),
        lambda directory: (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE),
        lambda directory: (directory / "added_tokens.json").write_text("{}"),
        lambda directory: (directory / "config.json").write_text('{"model_type": "qwen2"}'),
    ],
    ids=["prefix", "template", "field", "normalizer", "truncation", "template file", "added tokens", "model"],
)  # fmt: skip
def test_anything_else_is_left_to_transformers(tmp_path, write):
    shutil.copytree(SHAPES / "tokenizer", tmp_path / "tokenizer")
    assert json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text()) == CONFIG
    write(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    assert isinstance(tokenizer, OwnTokenizer) == (tmp_path / "tokenizer" / "config.json").exists()


def test_no_slow_library_is_imported_before_a_shipped_model_is_loaded():
    program = (
        "import sys; from clvr_jax.pipelines.closed_loop import ClosedLoopPipeline; "
        "ClosedLoopPipeline.from_pretrained('shapes-tiny'); "
        "print({'transformers', 'torch', 'huggingface_hub', 'scipy', 'jinja2'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_another_template_is_rendered_as_any_other_and_saved(tmp_path):
    ours = load_tokenizer(SHAPES / "tokenizer")
    ours.chat_template = "{{ messages | length }}"
    assert render_chats(ours, MESSAGES) == ["1", "2", "3"]
    with pytest.raises(ValueError, match="another chat template"):
        ours.apply_chat_template(MESSAGES[0])
    ours.save_pretrained(str(tmp_path))
    saved = load_tokenizer(tmp_path)
    assert not isinstance(saved, OwnTokenizer)
    assert saved.chat_template == ours.chat_template
    ours.chat_template = None
    with pytest.raises(ClvrError, match="no chat template"):
        render_chats(ours, MESSAGES)
    assert load_tokenizer(SHAPES / "tokenizer").chat_template == CHAT_TEMPLATE
