"""Parts of a pipeline that do not belong together are refused when it is loaded, not after an image was generated."""

import contextlib
import json
import shutil

import pytest

from clvr_jax.data.preprocessing.text import load_tokenizer, train_tokenizer
from clvr_jax.errors import ClvrError
from clvr_jax.models.qwen3_vl import Qwen3VLConfig
from clvr_jax.models.stable_diffusion import CLIPTextConfig
from clvr_jax.pipelines.compatibility import check_clip, check_qwen3_vl
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.pipelines.flux2.io import load_schedule
from clvr_jax.pipelines.registry import SHIPPED

SHAPES = SHIPPED / "shapes-tiny"


@pytest.fixture
def model(tmp_path):
    """The shipped pipeline without its other transformers and its controller."""
    skipped = shutil.ignore_patterns("transformer_*", "controller")
    return shutil.copytree(SHAPES, tmp_path / "model", ignore=skipped)


def edit(file, **fields):
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: (m / "tokenizer" / "tokenizer.json").unlink(), "neither tokenizer.json nor vocab.json"),
        (lambda m: (m / "tokenizer" / "tokenizer.json").write_text("[]"), "no tokenizer that transformers can read"),
        (lambda m: (m / "tokenizer" / "tokenizer.json").write_text("[" * 100_000), "no tokenizer that"),
        (lambda m: without_word(m / "tokenizer"), "no tokenizer that"),  # at which tokenizers panics
        (lambda m: train_tokenizer(["a red star"] * 9, 1200, m / "tokenizer"), None),
        (lambda m: larger_vocabulary(m / "tokenizer"), "largest token id is 9000, .* below 640"),
        (lambda m: without_token(m / "tokenizer", "<|im_end|>"), r"has no token <\|im_end\|>"),
        (lambda m: edit(m / "tokenizer" / "tokenizer_config.json", chat_template=None), "no chat template"),
        (lambda m: edit(m / "clvr.json", flux2={"text_encoder_out_layers": [2, 3]}), "text features"),
        (lambda m: edit(m / "clvr.json", flux2={"text_encoder_out_layers": [2, 3, 99]}), "hidden states 0 to"),
    ],
)
def test_parts_of_a_flux2_pipeline_that_do_not_fit_are_refused_when_it_is_loaded(model, spoil, message):
    spoil(model)
    if message is None:
        Flux2Pipeline.from_pretrained(str(model))
        return
    with pytest.raises(ClvrError, match=message) as caught:
        Flux2Pipeline.from_pretrained(str(model))
    assert str(model) in str(caught.value)


def test_the_text_of_an_empty_vocabulary_is_refused(tmp_path):
    shutil.copytree(SHAPES / "tokenizer", tmp_path / "tokenizer")
    content = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())
    content["model"].update(vocab={}, merges=[])
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ClvrError, match="no token for any text"):
        load_tokenizer(tmp_path / "tokenizer")


def test_a_clip_tokenizer_ends_its_texts_where_the_encoder_pools():
    from clvr_jax.data.preprocessing.clip_tokens import make_clip_tokenizer

    tokenizer = make_clip_tokenizer(["red", "star"], 8)
    check_clip(tokenizer, CLIPTextConfig(len(tokenizer), eos_token_id=tokenizer.eos_token_id))
    check_clip(tokenizer, CLIPTextConfig(len(tokenizer), eos_token_id=2))  # the largest id, as in older files
    with pytest.raises(ClvrError, match="eos_token_id is 7"):
        check_clip(tokenizer, CLIPTextConfig(len(tokenizer), eos_token_id=7))
    with pytest.raises(ClvrError, match="largest token id"):
        check_clip(tokenizer, CLIPTextConfig(100))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"image_token_id": 1}, r"id of <\|image_pad\|> is \d+, that of config.json is 1"),
        ({"vision_end_token_id": 1}, r"id of <\|vision_end\|>"),
        ({"patch_size": 16}, "the image processor's patch_size is 16, the vision tower's 8"),
    ],
)
def test_tokenizer_and_processor_of_a_controller_are_compared_with_its_model(change, message):
    import dataclasses

    from clvr_jax.convert.architectures.qwen3_vl import config_from_dict
    from clvr_jax.data.preprocessing.qwen3_vl_images import processor_from_dict
    from clvr_jax.files.atomic_io import read_json

    folder = SHAPES / "controller"
    config: Qwen3VLConfig = config_from_dict(read_json(folder / "config.json"))
    processor = processor_from_dict(read_json(folder / "preprocessor_config.json"))
    config = dataclasses.replace(config, **{k: v for k, v in change.items() if k != "patch_size"})
    processor = dataclasses.replace(processor, **{k: v for k, v in change.items() if k == "patch_size"})
    if message is None:
        check_qwen3_vl(config, load_tokenizer(folder), processor)
        return
    with pytest.raises(ClvrError, match=message):
        check_qwen3_vl(config, load_tokenizer(folder), processor)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"_class_name": "DDIMScheduler"}, "a DDIMScheduler"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas = True is not supported"),
        ({"num_train_timesteps": 500}, "num_train_timesteps = 500"),
        ({"stretch": 2}, "unknown field 'stretch'"),
        ({"shift": "3"}, "shift is '3'"),
        ({"shift": float("nan")}, "shift is nan"),
        ({"shift_terminal": 1.5}, "shift_terminal is 1.5"),
        ({"time_shift_type": "cubic"}, "'cubic'"),
    ],
)
def test_a_scheduler_that_cannot_be_obeyed_is_refused_by_name(tmp_path, fields, message):
    shutil.copytree(SHAPES / "scheduler", tmp_path / "scheduler")
    edit(tmp_path / "scheduler" / "scheduler_config.json", **fields)
    with pytest.raises(ClvrError, match=message) as caught:
        load_schedule(tmp_path / "scheduler")
    assert "scheduler_config.json" in str(caught.value)


def larger_vocabulary(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 9000, "content": "<|more|>"})
    content["model"]["vocab"]["<|more|>"] = 9000
    (folder / "tokenizer.json").write_text(json.dumps(content))


def without_word(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    del content["model"]["vocab"]["\u0120background"]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def without_token(folder, token):
    text = (folder / "tokenizer.json").read_text().replace(token, "<|other|>")
    (folder / "tokenizer.json").write_text(text)
    config = (
        (folder / "tokenizer_config.json").read_text().replace(f'"eos_token": "{token}"', '"eos_token": "<|other|>"')
    )
    (folder / "tokenizer_config.json").write_text(config)


def test_code_in_the_directory_of_a_tokenizer_is_neither_run_nor_asked_about(tmp_path, monkeypatch):
    folder = shutil.copytree(SHAPES / "tokenizer", tmp_path / "tokenizer")
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    edit(folder / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", "own.Own"]})
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what transformers asks on a terminal
    with contextlib.suppress(ClvrError):
        load_tokenizer(folder)
    assert not (tmp_path / "ran").exists()
