"""Caches of references that a loop keeps, beside implementations that compute everything again."""

import dataclasses

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers.models.transformers import transformer_flux2
from PIL import Image

from clvr_jax.errors import UsageError
from clvr_jax.models.flux2 import Flux2Transformer
from clvr_jax.pipelines.closed_loop import ClosedLoopPipeline
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.pipelines.flux2.kept_latents import Reference, history_keys
from clvr_jax.pipelines.flux2.references import ReferenceStore
from clvr_jax.pipelines.images import to_pil
from clvr_jax.pipelines.sdxl import SDXLPipeline
from clvr_jax.reasoning.loop.budget import Budget
from clvr_jax.sharding import MeshConfig
from tests.helpers.models import random_module
from tests.pipelines.flux2.settings import LENGTH
from tests.reasoning.scripted import NoisyController

PROMPT = "a red circle"
OPTIONS = {"height": 64, "width": 72, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def pipe(folder):
    """A pipeline with "loop", whose programs several tests share; each begins with an empty store."""
    return Flux2Pipeline.from_pretrained(str(folder), reference_cache="loop")


@pytest.fixture(autouse=True)
def empty_store(pipe):
    pipe.kept_references.clear()


class CountedCalls:
    """A program of a pipeline that counts its calls."""

    def __init__(self, program):
        self.program, self.count = program, 0

    def __call__(self, *arguments):
        self.count += 1
        return self.program(*arguments)


@pytest.fixture
def computed(pipe, monkeypatch):
    """Counts the references that are computed."""
    counted = CountedCalls(pipe._cache_references)
    monkeypatch.setattr(pipe, "_cache_references", counted)
    return counted


class NothingKept(ReferenceStore):
    """A store that finds nothing, so that every reference is computed again in every generation."""

    def get(self, key):
        return None


def photo(seed, width=72, height=64):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def noise(seed, rows=1):
    return np.random.default_rng(seed).normal(size=(rows, 16, 8, 9)).astype(np.float32)


@pytest.fixture
def block_causal(folder, monkeypatch):
    """diffusers' KV pipeline with its attention replaced: reference k attends to references 1 to k.

    It keeps nothing between two generations. Set `sizes` to the numbers of tokens of the references.
    """
    pipeline = diffusers.Flux2KleinKVPipeline(
        **diffusers.Flux2KleinPipeline.from_pretrained(str(folder)).components, is_distilled=True
    )
    pipeline.set_progress_bar_config(disable=True)
    plain = transformer_flux2._flux2_kv_causal_attention

    def attention(query, key, value, text, references, kv_cache=None, backend=None):
        if not references:
            return plain(query, key, value, text, references, kv_cache, backend)
        block = torch.repeat_interleave(torch.arange(len(pipeline.sizes)), torch.tensor(pipeline.sizes))
        allowed = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool)
        own = slice(text, text + references)
        allowed[own] = False
        allowed[own, own] = block[:, None] >= block[None]
        heads = (x.transpose(1, 2) for x in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=allowed).transpose(1, 2)

    monkeypatch.setattr(transformer_flux2, "_flux2_kv_causal_attention", attention)

    def run(images, latents):
        pipeline.sizes = [image.width // 8 * (image.height // 8) for image in images]
        return pipeline(
            prompt=[PROMPT] * len(latents), image=list(images) or None, latents=torch.tensor(latents),
            max_sequence_length=LENGTH, text_encoder_out_layers=(1, 2, 3), output_type="np", **OPTIONS,
        ).images  # fmt: skip

    return run


@pytest.mark.slow
def test_a_loop_with_roll_back_and_candidates_equals_one_that_computes_all_again(pipe, block_causal, computed):
    """In PyTorch, from scratch for each generation, by full attention with a mask."""

    def generated(images, seed, rows=1):
        latents = noise(seed, rows)
        ours = pipe([PROMPT] * rows, images, latents=latents, guidance_scale=1.0, output_type="np", **OPTIONS).images
        np.testing.assert_allclose(ours, block_causal(images, latents), atol=1e-4)
        return [to_pil(image) for image in ours]

    own = photo(0, 64, 64)
    (first,) = generated([own], 1)
    assert computed.count == 1
    (second,) = generated([own, first], 2)
    generated([own, first, second], 3)
    assert computed.count == 3  # each reference once
    (other,) = generated([own, first], 4)  # the second image is rolled back
    assert computed.count == 3
    candidates = generated([own, first, other], 5, rows=2)
    assert computed.count == 4
    (last,) = generated([own, first, other, candidates[1]], 6)
    generated([own, first, other, candidates[0]], 7)  # the other candidate, after all
    generated([own, first, other, candidates[0], last], 8)
    generated([first, own], 9)  # the same images in another order
    assert computed.count == 4 + 3 + 2


@pytest.mark.slow
def test_loops_that_roll_back_have_the_images_of_uncached_ones(pipe, monkeypatch):
    """Three loops together, of two candidates a step, with replies and verdicts at random."""
    budget = Budget(max_steps=6, candidates=2)

    def trajectories():
        loop = ClosedLoopPipeline(pipe, NoisyController())
        own = [[], [np.asarray(photo(5))], [np.asarray(photo(5))]]
        return loop.run([PROMPT] * 3, [3, 4, 5], budget, verification="controller", images=own, nfe=2)

    kept, kept_again = trajectories(), trajectories()
    assert any(step.rolled_back for trajectory in kept for step in trajectory.steps)
    monkeypatch.setattr(pipe, "kept_references", NothingKept())
    uncached = trajectories()
    for found, expected in zip([*kept, *kept_again], uncached * 2, strict=True):
        assert [step.references for step in found.steps] == [step.references for step in expected.steps]
        for one, other in zip(found.steps, expected.steps, strict=True):
            np.testing.assert_array_equal(np.asarray(one.image), np.asarray(other.image))


@pytest.mark.slow
def test_rows_of_several_histories_share_calls(pipe, computed):
    """One row has its first reference already; the images are those of single calls."""
    histories = [[photo(0), photo(1)], [photo(2), photo(3)], [photo(0), photo(4)]]
    pipe.generate_each([PROMPT], histories[:1], [1], num_inference_steps=1)
    together = pipe.generate_each([PROMPT] * 3, histories, [1, 2, 3], num_inference_steps=2)
    pipe.kept_references.clear()
    for row, history in enumerate(histories):
        alone = pipe.generate_each([PROMPT], [history], [1 + row], num_inference_steps=2)
        assert np.abs(np.asarray(together.images[row], int) - np.asarray(alone.images[0], int)).max() <= 1
    before = computed.count
    pipe.generate_each([PROMPT] * 3, histories, [1, 2, 3], num_inference_steps=2)
    assert computed.count == before


def test_with_rows_per_call_an_image_has_the_same_bytes_with_kept_references(pipe):
    histories = [[photo(0), photo(1)], [photo(2), photo(3)]]
    options = {"num_inference_steps": 2, "rows_per_call": 2}
    expected = pipe.generate_each([PROMPT] * 2, histories, [1, 2], **options).images
    pipe.kept_references.clear()
    for row, history in enumerate(histories):
        pipe.generate_each([PROMPT], [history[:1]], [8], **options)
        (image,) = pipe.generate_each([PROMPT], [history], [1 + row], **options).images
        np.testing.assert_array_equal(image, expected[row])


@pytest.mark.slow
def test_other_weights_or_another_mesh_drop_what_is_kept(folder, computed, pipe):
    arguments = {"images": [photo(0)], "guidance_scale": 1.0, "output_type": "np", **OPTIONS}
    first = pipe(PROMPT, **arguments).images
    trained = pipe.transformer
    try:
        pipe.transformer = random_module(lambda rngs: Flux2Transformer(trained.config, rngs=rngs), seed=8)
        other = pipe(PROMPT, **arguments).images
        assert computed.count == 2
        kernel = pipe.transformer.x_embedder.kernel
        kernel[...] = kernel[...] * 1.5
        changed = pipe(PROMPT, **arguments).images
        assert computed.count == 3
        pipe.kept_references.clear()
        np.testing.assert_array_equal(pipe(PROMPT, **arguments).images, changed)
        statistics = pipe.vae.bn.running_mean
        before = statistics[...]
        statistics[...] = before + 1
        pipe(PROMPT, **arguments)
        assert computed.count == 5
        statistics[...] = before
        assert min(np.abs(first - other).max(), np.abs(other - changed).max()) > 1e-3
    finally:
        pipe.transformer = trained
    np.testing.assert_array_equal(pipe(PROMPT, **arguments).images, first)
    assert len(pipe.kept_references) == 1
    sharded = Flux2Pipeline.from_pretrained(str(folder), mesh=MeshConfig(tensor=2, devices=2), reference_cache="loop")
    sharded.kept_references = pipe.kept_references
    found = sharded(PROMPT, **arguments).images
    np.testing.assert_allclose(found, first, atol=1e-4)
    (cache,) = sharded.kept_references._caches.values()
    assert len(cache.double.key.sharding.device_set) == 2


def test_another_resolution_is_another_reference(pipe, computed):
    whole, part = photo(0), photo(0).crop((0, 0, 64, 64))
    first = pipe(PROMPT, [part], guidance_scale=1.0, output_type="np", **OPTIONS).images
    pipe(PROMPT, [whole], guidance_scale=1.0, output_type="np", **OPTIONS)
    assert computed.count == 2
    np.testing.assert_array_equal(pipe(PROMPT, [part], guidance_scale=1.0, output_type="np", **OPTIONS).images, first)
    assert computed.count == 2
    pixels = [Reference(size, np.zeros((*size, 3), np.float32)) for size in ((2, 3), (3, 2))]
    keys = {key for image in pixels for key in history_keys([image])} | set(history_keys(pixels))
    assert len(keys) == 3


def test_the_least_recently_used_caches_are_dropped(pipe):
    one = None
    for seed in range(4):
        pipe(PROMPT, [photo(seed)], guidance_scale=1.0, **OPTIONS)
        one = one or pipe.kept_references.nbytes
    assert pipe.kept_references.nbytes == 4 * one
    pipe.kept_references.max_bytes, before = 2 * one, pipe.kept_references.max_bytes
    try:
        pipe(PROMPT, [photo(1)], guidance_scale=1.0, **OPTIONS)
        pixels = [np.asarray(photo(seed), np.float32) / 255 * 2 - 1 for seed in (3, 1)]
        kept = [history_keys([Reference(image.shape[:2], image)])[0] for image in pixels]
        assert list(pipe.kept_references._caches) == kept
        pipe(PROMPT, [photo(seed) for seed in range(5, 8)], guidance_scale=1.0, **OPTIONS)
        assert len(pipe.kept_references) == 3  # those of the last call always stay
    finally:
        pipe.kept_references.max_bytes = before


@pytest.mark.slow
def test_bfloat16_loops_are_near_float32(folder, pipe):
    half = Flux2Pipeline.from_pretrained(str(folder), "bfloat16", reference_cache="loop")
    history = [photo(0), photo(1)]
    arguments = {"guidance_scale": 1.0, "output_type": "np", "latents": noise(1), **OPTIONS}
    assert np.abs(half(PROMPT, history, **arguments).images - pipe(PROMPT, history, **arguments).images).mean() < 0.02
    assert 2 * half.kept_references.nbytes == pipe.kept_references.nbytes


@pytest.mark.slow
def test_another_setting_than_the_models_own_is_said_once(folder, capsys):
    Flux2Pipeline.from_pretrained(str(folder), reference_cache="none")
    assert capsys.readouterr().err == ""
    pipe = Flux2Pipeline.from_pretrained(str(folder), reference_cache="image")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "was trained with none" in said
    pipe(PROMPT, [photo(0)], num_inference_steps=1)
    assert capsys.readouterr().err == ""
    assert pipe.settings.reference_cache == "none"  # what a saved model says
    with pytest.raises(UsageError, match="reference_cache 'images': choose one of none, image, loop"):
        Flux2Pipeline.from_pretrained(str(folder), reference_cache="images")


@pytest.mark.slow
def test_the_setting_of_a_model_is_used_and_saved(pipe, folder, tmp_path, capsys):
    trained = Flux2Pipeline.from_pretrained(str(folder))
    trained.settings = dataclasses.replace(trained.settings, reference_cache="loop")
    trained.save_pretrained(str(tmp_path / "loop"))
    capsys.readouterr()
    again = Flux2Pipeline.from_pretrained(str(tmp_path / "loop"))
    assert capsys.readouterr().err == ""
    assert again.reference_cache == "loop"
    arguments = {"images": [photo(0), photo(1)], "guidance_scale": 1.0, "output_type": "np", **OPTIONS}
    np.testing.assert_array_equal(again(PROMPT, **arguments).images, pipe(PROMPT, **arguments).images)


@pytest.mark.slow
def test_offloaded_weights_are_the_same_weights_in_the_next_call(folder, pipe, monkeypatch):
    arguments = {"images": [photo(0), photo(1)], "guidance_scale": 1.0, "output_type": "np", **OPTIONS}
    offloaded = Flux2Pipeline.from_pretrained(str(folder), offload="components", reference_cache="loop")
    counted = CountedCalls(offloaded._cache_references)
    monkeypatch.setattr(offloaded, "_cache_references", counted)
    for _ in range(2):
        np.testing.assert_allclose(offloaded(PROMPT, **arguments).images, pipe(PROMPT, **arguments).images, atol=1e-5)
    assert counted.count == 2


def test_stable_diffusion_takes_no_references():
    with pytest.raises(UsageError, match="reference_cache: somewhere is a Stable Diffusion model"):
        SDXLPipeline.from_pretrained("somewhere", reference_cache="loop")


@pytest.mark.parametrize("failures", [1, 2])
def test_without_memory_other_histories_are_dropped_and_then_references_are_computed_for_each_image(
    folder, monkeypatch, capsys, failures
):
    pipe = Flux2Pipeline.from_pretrained(str(folder), reference_cache="loop")
    first = pipe.generate_each([PROMPT], [[]], [0], **OPTIONS).images[0]
    other = pipe.generate_each([PROMPT], [[]], [1], **OPTIONS).images[0]
    pipe.generate_each([PROMPT], [[other]], [2], **OPTIONS)
    expected = Flux2Pipeline.from_pretrained(str(folder), reference_cache="loop" if failures == 1 else "image")
    capsys.readouterr()
    program, calls = pipe._cache_references, []

    def full(*arguments):
        calls.append(len(pipe.kept_references))
        if len(calls) <= failures:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")
        return program(*arguments)

    monkeypatch.setattr(pipe, "_cache_references", full)
    found = pipe.generate_each([PROMPT], [[first]], [3], **OPTIONS).images[0]
    alone = expected.generate_each([PROMPT], [[first]], [3], **OPTIONS).images[0]
    np.testing.assert_array_equal(np.asarray(found), np.asarray(alone))
    assert calls[:2] == [1, 0]  # the other history is dropped before the second attempt
    message = capsys.readouterr().err
    assert ("no memory for the keys and values of 1 references; image from now on" in message) == (failures == 2)
    assert pipe.reference_cache == ("loop" if failures == 1 else "image")


def test_another_fault_of_the_device_is_not_taken_for_lack_of_memory(folder, monkeypatch):
    pipe = Flux2Pipeline.from_pretrained(str(folder), reference_cache="loop")
    first = pipe.generate_each([PROMPT], [[]], [0], **OPTIONS).images[0]

    def broken(*arguments):
        raise jax.errors.JaxRuntimeError("INTERNAL: broken")

    monkeypatch.setattr(pipe, "_cache_references", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        pipe.generate_each([PROMPT], [[first]], [3], **OPTIONS)
