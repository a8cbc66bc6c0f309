"""A text encoder without the layers that nobody reads: the same hidden states, and a whole model when it is saved."""

import dataclasses
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from clvr_jax.checkpoint_io.tensors import StoredTensor, stored_tensors
from clvr_jax.convert import shards
from clvr_jax.convert.architectures import QWEN3
from clvr_jax.convert.models import save_model
from clvr_jax.convert.rules import leaves_of
from clvr_jax.errors import ClvrError
from clvr_jax.models.qwen3 import Qwen3, Qwen3Config
from clvr_jax.pipelines.flux2.io import load_text_encoder, save_text_encoder
from tests.helpers.models import random_module

CONFIG = Qwen3Config(64, 16, 24, 5, 2, 1, 8)
IDS = np.arange(12, dtype=np.int32).reshape(2, 6)
MASK = np.array([[1] * 6, [1] * 4 + [0] * 2], np.int32)


@pytest.fixture(scope="module", params=[False, True], ids=["head", "tied"])
def directory(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "text_encoder"
    config = dataclasses.replace(CONFIG, tie_word_embeddings=request.param)
    save_model(path, random_module(lambda rngs: Qwen3(config, rngs=rngs)), QWEN3)
    return path


@pytest.fixture
def opened(monkeypatch):
    """The keys of the tensors whose bytes were asked for."""
    keys = set()
    read, opened = shards._read_bytes, StoredTensor.open
    monkeypatch.setattr(shards, "_read_bytes", lambda tensor, *rest: (keys.add(tensor.key), read(tensor, *rest))[1])
    monkeypatch.setattr(StoredTensor, "open", lambda self: (keys.add(self.key), opened(self))[1])
    return keys


def test_layers_above_are_neither_read_nor_held_and_change_nothing(directory, opened):
    whole = load_text_encoder(directory)
    expected = whole.hidden_states(IDS, MASK, (1, 3))
    opened.clear()
    part = load_text_encoder(directory, layers=(1, 3))
    needed = {key for key in stored_tensors(directory) if key.startswith(("model.embed", *_layers(3)))}
    assert opened == needed
    held = leaves_of(part)
    assert {leaf.shape[0] for path, leaf in held.items() if "layers" in path} == {3}
    assert not any({"norm", "lm_head"} & {str(name) for name in path[:2]} for path in held)
    for found, one in zip(part.hidden_states(IDS, MASK, (1, 3)), expected, strict=True):
        np.testing.assert_array_equal(found, one)
    assert not part.is_whole
    with pytest.raises(ClvrError, match="has 3 of 5 layers and no head"):
        part(jnp.asarray(IDS))
    with pytest.raises(ClvrError, match=r"indices in 0\.\.3"):
        part.hidden_states(IDS, MASK, (4,))


def test_the_last_hidden_state_needs_the_norm_but_no_head(directory):
    whole, part = load_text_encoder(directory), load_text_encoder(directory, layers=(2, 5))
    for found, one in zip(part.hidden_states(IDS, MASK, (2, 5)), whole.hidden_states(IDS, MASK, (2, 5)), strict=True):
        np.testing.assert_array_equal(found, one)
    assert part.is_whole == whole.config.tie_word_embeddings


def test_a_saved_encoder_is_whole_again(directory, tmp_path):
    part = load_text_encoder(directory, layers=(1, 3))
    save_text_encoder(tmp_path / "saved", part, directory, "float32")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "saved" / name).read_bytes() == (directory / name).read_bytes()
    save_text_encoder(tmp_path / "half", part, directory, "bfloat16")
    assert {tensor.dtype for tensor in stored_tensors(tmp_path / "half").values()} == {np.dtype(jnp.bfloat16)}


def test_weights_are_never_lost_silently(directory, tmp_path):
    part = load_text_encoder(directory, layers=(1, 3))
    for source in (None, tmp_path / "gone"):
        with pytest.raises(ClvrError, match="does not exist to copy them from; nothing is written"):
            save_text_encoder(tmp_path / "saved", part, source, "float32")
    shutil.copytree(directory, tmp_path / "other")
    other = dataclasses.replace(part.config, num_hidden_layers=4)
    save_model(tmp_path / "other", random_module(lambda rngs: Qwen3(other, rngs=rngs)), QWEN3)
    with pytest.raises(ClvrError, match="not the model that the text encoder was loaded from any more"):
        save_text_encoder(tmp_path / "saved", part, tmp_path / "other", "float32")
    assert not (tmp_path / "saved").exists()


def _layers(count):
    return [f"model.layers.{layer}." for layer in range(count)]
