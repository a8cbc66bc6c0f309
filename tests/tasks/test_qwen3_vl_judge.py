"""The judge's program that is planned is the decoding that is run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clvr_jax.configs import pprl_flux2, qwen3_vl_judge
from clvr_jax.errors import UsageError
from clvr_jax.models.common.decoding import generate
from clvr_jax.models.qwen3_vl import Qwen3VL
from clvr_jax.models.qwen3_vl.positions import Conversation, batch_conversations
from clvr_jax.tasks.qwen3_vl import PRESETS
from tests.helpers.models import random_module
from tests.models.qwen3_vl.reference import SMALL, conversation

GRIDS = ((1, 8, 8), (1, 8, 8))


@pytest.mark.slow
def test_it_says_what_decoding_says(monkeypatch):
    sizes = dataclasses.replace(SMALL, tie_word_embeddings=False)
    monkeypatch.setitem(PRESETS, "qwen3-vl-8b", sizes)
    rng = np.random.default_rng(0)
    chats = [Conversation(*conversation(rng, GRIDS, text), GRIDS) for text in (9, 20)]
    batch = batch_conversations(chats, image_token_id=SMALL.image_token_id, merge=SMALL.vision.spatial_merge_size)
    dtypes = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}  # as the program computes
    model = random_module(lambda rngs: Qwen3VL(sizes, rngs=rngs, **dtypes))
    length = batch["input_ids_bt"].shape[1]
    config = qwen3_vl_judge.Config(batch_size=2, images=2, size=64, text=length - 2 * 16, answer=6)
    program = qwen3_vl_judge.program(config)
    data = {
        "ids": batch["input_ids_bt"],
        "mask": batch["attention_mask_bt"],
        "positions_b3t": batch["positions_3bt"].swapaxes(0, 1),
        "patches": batch["pixel_values"],
    }
    assert {name: leaf.shape for name, leaf in data.items()} == {
        name: leaf.shape for name, leaf in program.data.items()
    }
    said = jax.jit(program.function)({"judge": nnx.state(model)}, data)
    assert np.array_equal(said, generate(model, batch, max_new_tokens=6).tokens_bn)


def test_the_judge_of_a_call_of_pprl_has_a_row_for_each_picture():
    config = dataclasses.replace(pprl_flux2.CONFIG, planned="reward")
    program = pprl_flux2.program(config)
    rows = config.train.microbatch_size
    said = jax.eval_shape(program.function, program.weights, program.data)
    assert said.shape == (rows, 128)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(program.weights))
    read = program.data["ids"].shape[1]
    # Two for each parameter and token; less, since the table of tokens is looked up, and read without logits.
    assert 0.7 < program.flops / (2 * parameters * rows * (read + 128)) < 1.2


def test_pictures_are_whole_tokens():
    with pytest.raises(UsageError, match="multiple of 32"):
        qwen3_vl_judge.program(qwen3_vl_judge.Config(size=100))
