"""Tokenizers are read as `AutoTokenizer` reads them, without the libraries that it imports."""

import json
import shutil
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from clvr_jax.data.preprocessing.text import load_tokenizer
from clvr_jax.pipelines.registry import SHIPPED

TOKENIZER = SHIPPED / "shapes-tiny" / "tokenizer"


@pytest.mark.parametrize("model", [None, {"model_type": "qwen3_vl"}, {"model_type": "gpt2"}])
@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast", None])
def test_a_tokenizer_is_the_one_that_auto_tokenizer_reads(tmp_path, name, model):
    directory = tmp_path / "tokenizer"
    shutil.copytree(TOKENIZER, directory)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": name, "origin": "elsewhere"}  # our own ones are read without transformers
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if model is not None:
        (directory / "config.json").write_text(json.dumps(model))
    expected = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    found = load_tokenizer(directory)
    assert type(found) is type(expected)
    assert found.init_kwargs == expected.init_kwargs
    assert found.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()
    assert found.special_tokens_map == expected.special_tokens_map


def test_the_tokenizers_of_a_shipped_model_are_read_without_pytorch():
    """PyTorch takes 2 seconds to import, which the start of a server would wait for."""
    code = (
        "import sys; from pathlib import Path; from clvr_jax.data.preprocessing.text import load_tokenizer\n"
        f"for name in ('tokenizer', 'controller'): load_tokenizer(Path({str(TOKENIZER.parent)!r}) / name)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout == "False\n"
