"""What a checkpoint's generation_config.json asks for is obeyed, or refused by name."""

import json

import numpy as np
import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.models.common.sampling import Sampling
from clvr_jax.pipelines.qwen3_vl import Qwen3VLPipeline
from clvr_jax.pipelines.qwen3_vl.generation_config import GenerationConfig
from clvr_jax.pipelines.registry import SHIPPED

QWEN3_VL = {
    "bos_token_id": 151643,
    "pad_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "top_p": 0.8,
    "top_k": 20,
    "temperature": 0.7,
    "repetition_penalty": 1.05,
    "transformers_version": "4.56.0",
}
"""As the published checkpoints have it, with another penalty."""


def read(folder, **fields):
    (folder / "generation_config.json").write_text(json.dumps({**QWEN3_VL, **fields}))
    return GenerationConfig.read(folder, 151936)


def test_the_published_file_is_obeyed_and_written_again(tmp_path):
    found = read(tmp_path)
    assert found.stop_tokens == (151645, 151643)
    assert found.sampling == Sampling(20, 0.8, 1.05)
    (tmp_path / "again").mkdir()
    found.write(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text()) == QWEN3_VL
    assert read(tmp_path, eos_token_id=7, top_k=None).stop_tokens == (7,)
    assert read(tmp_path, eos_token_id=None, min_p=0.0, num_beams=1).stop_tokens == ()
    (tmp_path / "none").mkdir()
    assert GenerationConfig.read(tmp_path / "none", 10) == GenerationConfig()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_p": 0.1}, "min_p is 0.1, which is not supported"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size is 3"),
        ({"top_k": 1.5}, "top_k must be an integer"),
        ({"top_p": 1.5}, "top_p in \\(0, 1\\]"),
        ({"eos_token_id": 151936}, "eos_token_id must be an integer from 0 to 151935"),
        ({"eos_token_id": ["x"]}, "eos_token_id must be a list of integers"),
    ],
)
def test_what_cannot_be_obeyed_is_refused_by_name(tmp_path, fields, message):
    with pytest.raises(ClvrError, match=message) as caught:
        read(tmp_path, **fields)
    assert str(tmp_path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_reply_ends_at_the_checkpoints_own_stop_tokens():
    chat = Qwen3VLPipeline.from_pretrained(SHIPPED / "shapes-tiny" / "controller")
    messages = [{"role": "user", "content": "a red circle"}]
    (whole,) = chat.answer_all([messages], [[]], 12)
    ids = chat.tokenizer(whole.text)["input_ids"]
    chat.generation = GenerationConfig(stop_tokens=(ids[3],))
    (cut,) = chat.answer_all([messages], [[]], 12)
    assert (cut.is_complete, cut.output_tokens) == (True, ids.index(ids[3]) + 1)
    assert cut.text == chat.tokenizer.decode(ids[: ids.index(ids[3])])
    assert whole.text.startswith(cut.text)


def test_a_thought_that_the_template_opens_is_part_of_the_text():
    chat = Qwen3VLPipeline.from_pretrained(SHIPPED / "shapes-tiny" / "controller")
    opened = chat.tokenizer("<|im_start|>assistant\n<think>\n")["input_ids"]
    assert chat._opened_thought(opened).strip() == "<think>"
    assert chat._opened_thought(chat.tokenizer("<think>\n\n</think>\n\n")["input_ids"]) == ""
    plain = np.asarray(chat.prepare([{"role": "user", "content": "a <think>"}], []).input_ids)
    assert chat._opened_thought(plain) == ""
