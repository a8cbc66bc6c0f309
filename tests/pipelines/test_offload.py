"""Offloading: the same results, with one of the large models on the device at a time."""

import jax
import numpy as np
import pytest
from flax import nnx

from clvr_jax.errors import UsageError
from clvr_jax.models.common.quantization import weight_bytes
from clvr_jax.pipelines.closed_loop import ClosedLoopPipeline
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.pipelines.offload import HOST, Offloader
from clvr_jax.pipelines.qwen3_vl import Qwen3VLPipeline
from clvr_jax.pipelines.sdxl import SDXLPipeline
from clvr_jax.sharding import MeshConfig

OPTIONS = {"height": 32, "width": 64, "num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "np"}


def kinds(module):
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(nnx.state(module))}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [None, MeshConfig(fsdp=2, devices=2)])
def test_images_are_those_of_a_pipeline_on_the_device(folder, mesh):
    expected = Flux2Pipeline.from_pretrained(str(folder), mesh=mesh)("a red circle", **OPTIONS).images
    pipeline = Flux2Pipeline.from_pretrained(str(folder), mesh=mesh, offload="components")
    assert kinds(pipeline.transformer) == kinds(pipeline.text_encoder) == {HOST}
    assert HOST not in kinds(pipeline.vae)
    for _ in range(2):
        assert np.array_equal(pipeline("a red circle", **OPTIONS).images, expected)


@pytest.mark.slow
def test_one_model_is_on_the_device_at_a_time(folder, small_qwen3_vl, monkeypatch):
    before = {id(array) for array in jax.live_arrays()}
    loop = ClosedLoopPipeline.from_pretrained(str(folder), controller=str(small_qwen3_vl), offload="components")
    models = (loop.flux.transformer, loop.flux.text_encoder, loop.controller._vlm.model)
    largest = max(weight_bytes(nnx.state(model)) for model in models)
    vae = weight_bytes(nnx.state(loop.flux.vae))
    on_device, swapped = [], []

    def measured(self, weights, real=Offloader.on_device):
        swapped.append(weight_bytes(weights))
        copy = real(self, weights)
        own = [array for array in jax.live_arrays() if id(array) not in before and array.size > 100]
        on_device.append(sum(array.nbytes for array in own if array.sharding.memory_kind != HOST))
        return copy

    monkeypatch.setattr(Offloader, "on_device", measured)
    loop.flux("a red circle", **OPTIONS)
    chat = [{"role": "user", "content": "a red circle"}]
    loop.controller._vlm.chat(chat, max_new_tokens=2)
    loop.flux("a red circle", **OPTIONS)
    assert len(set(swapped)) == 3
    activations = 200_000
    assert max(on_device) < vae + largest + activations
    assert largest + activations < sum(weight_bytes(nnx.state(model)) for model in models)


def test_replies_are_those_of_a_model_on_the_device(small_qwen3_vl):
    chat = [{"role": "user", "content": "a red circle"}]
    plain, offloaded = (
        Qwen3VLPipeline.from_pretrained(small_qwen3_vl, offload=offload).chat(chat, max_new_tokens=4)
        for offload in (None, "components")
    )
    assert plain == offloaded


def test_other_choices_are_refused(folder):
    with pytest.raises(UsageError, match="the only choice is components"):
        Flux2Pipeline.from_pretrained(str(folder), offload="layers")
    with pytest.raises(UsageError, match="stays on the devices"):
        SDXLPipeline.from_pretrained("somewhere", offload="components")
