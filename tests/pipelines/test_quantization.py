"""int8 weights: half the memory, and what the shipped models answer and generate stays the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clvr_jax.convert.architectures import FLUX2_TRANSFORMER, QWEN3, QWEN3_VL, qwen3_hidden_states
from clvr_jax.convert.models import load_model
from clvr_jax.convert.rules import leaves_of
from clvr_jax.convert.streaming.conversion import convert
from clvr_jax.convert.streaming.planning import plan
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.models.common.quantization import quantize, quantize_layers, weight_bytes
from clvr_jax.pipelines.closed_loop import ClosedLoopPipeline
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.pipelines.loading import computing_on, layout_of, quantization_of
from clvr_jax.pipelines.qwen3_vl import Qwen3VLPipeline
from clvr_jax.pipelines.registry import SHIPPED
from clvr_jax.pipelines.sdxl import SDXLPipeline
from clvr_jax.reasoning.conversation.context import chat_messages
from clvr_jax.sharding import MeshConfig
from clvr_jax.worlds.shapes.prompts import train_prompt

SHAPES = SHIPPED / "shapes-tiny"
PARTS = {
    "transformer": FLUX2_TRANSFORMER,
    "text_encoder": qwen3_hidden_states((1, 2, 4)),
    "controller": QWEN3_VL,
}


def test_a_weight_is_off_by_at_most_half_a_step_of_its_channel():
    weights = np.random.default_rng(0).normal(size=(3, 20, 7)).astype(np.float32)
    weights[1, :, 2] = 0
    rounded, scale = quantize(jnp.asarray(weights), axis=1)
    assert rounded.dtype == jnp.int8
    assert np.array_equal(np.abs(np.asarray(rounded)).max(axis=1) == 127, np.asarray(scale) > 0)
    error = np.abs(np.asarray(rounded) * np.asarray(scale)[:, None] - weights)
    assert (error <= np.asarray(scale)[:, None] * 0.501).all()


@pytest.mark.parametrize("part", PARTS)
def test_a_quantized_model_needs_at_most_55_percent_of_the_memory_in_bfloat16(part):
    held, quantized = (
        weight_bytes(nnx.state(load_model(SHAPES / part, PARTS[part], jnp.bfloat16, quantize=format)))
        for format in (None, "int8")
    )
    assert quantized <= 0.55 * held


@functools.cache
def quantized_in_memory(part):
    """The leaves of a shipped model that is quantized after it was loaded."""
    graphdef, state = nnx.split(load_model(SHAPES / part, PARTS[part]))
    return leaves_of(jax.jit(lambda state: nnx.state(quantize_layers(nnx.merge(graphdef, state))))(state))


@pytest.mark.parametrize("mesh", [None, MeshConfig(fsdp=2, tensor=2, devices=4), MeshConfig(fsdp=8)])
@pytest.mark.parametrize("part", PARTS)
def test_weights_are_quantized_on_loading_as_in_memory(part, mesh):
    """On a mesh as well, whatever axis of a weight is sharded: a scale belongs to a whole channel."""
    expected = quantized_in_memory(part)
    with computing_on(layout_of(mesh)):
        found = leaves_of(load_model(SHAPES / part, PARTS[part], quantize="int8"))
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        assert leaf.dtype == expected[path].dtype, path
        if leaf.dtype == jnp.int8:  # a value halfway between two integers may be rounded to either
            difference = np.abs(np.asarray(leaf, np.int32) - np.asarray(expected[path], np.int32))
            assert difference.max() <= 1, path
            assert difference.mean() < 1e-3, path
        else:
            np.testing.assert_allclose(leaf, expected[path], rtol=1e-6, err_msg=str(path))


def test_weights_stored_as_orbax_arrays_are_quantized_too(tmp_path):
    convert(plan(SHAPES / "text_encoder", "jax"), tmp_path / "model")
    found = leaves_of(load_model(tmp_path / "model", QWEN3, quantize="int8"))
    expected = leaves_of(load_model(SHAPES / "text_encoder", QWEN3, quantize="int8"))
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        np.testing.assert_allclose(
            np.asarray(leaf, np.float32), np.asarray(expected[path], np.float32), atol=leaf.dtype == jnp.int8, rtol=1e-6
        )


@pytest.mark.slow
def test_a_quantized_pipeline_on_a_mesh_generates_what_one_device_generates(folder):
    options = {"height": 32, "width": 64, "num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "np"}
    alone = Flux2Pipeline.from_pretrained(str(folder), quantize="int8")("a red circle", **options).images
    mesh = MeshConfig(fsdp=2, tensor=2, devices=4)
    spread = Flux2Pipeline.from_pretrained(str(folder), quantize="int8", mesh=mesh)("a red circle", **options).images
    np.testing.assert_allclose(spread, alone, atol=1e-5)


@pytest.mark.slow
def test_plans_of_the_shipped_controller_stay_the_same():
    """The first 48 tokens of 16 plans; benchmarks/int8_accuracy.py compares 200 replies and 32 images."""
    rng = np.random.default_rng(5)
    conversations = [chat_messages(train_prompt(rng)["prompt"], [], 0) for _ in range(16)]
    plain, quantized = (
        Qwen3VLPipeline.from_pretrained(SHAPES / "controller", quantize=format).chat_all(
            conversations, [[]] * 16, max_new_tokens=48
        )
        for format in (None, "int8")
    )
    assert sum(one == other for one, other in zip(plain, quantized, strict=True)) >= 15


def test_models_are_chosen_one_by_one(folder):
    pipeline = Flux2Pipeline.from_pretrained(str(folder), quantize={"text_encoder": "int8"})
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(pipeline.transformer))} == {jnp.dtype("float32")}
    assert jnp.dtype("int8") in {leaf.dtype for leaf in jax.tree.leaves(nnx.state(pipeline.text_encoder))}
    assert quantization_of(None) == {}
    assert quantization_of("int8") == dict.fromkeys(("transformer", "text_encoder", "controller"), "int8")


def test_a_quantized_pipeline_is_not_saved(folder, tmp_path):
    pipeline = Flux2Pipeline.from_pretrained(str(folder), quantize={"transformer": "int8"})
    with pytest.raises(ClvrError, match="quantized; load it without quantize to save it"):
        pipeline.save_pretrained(str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("wrong", ["int4", {"vae": "int8"}, {"transformer": "fp8"}, {"controller": "int8"}])
def test_other_formats_and_models_are_refused_before_weights_are_read(folder, wrong, monkeypatch):
    """So is a format for the controller where none is loaded: the directory has no controller."""
    monkeypatch.setattr("clvr_jax.pipelines.flux2.io.load_model", None)
    for pipeline in (ClosedLoopPipeline, Flux2Pipeline):
        with pytest.raises(UsageError, match=r"the formats are int8, the models transformer, text_encoder$"):
            pipeline.from_pretrained(str(folder), quantize=wrong)


def test_stable_diffusion_is_not_quantized():
    with pytest.raises(UsageError, match=r"cannot be quantized; FLUX\.2 models can"):
        SDXLPipeline.from_pretrained("somewhere", quantize="int8")
