"""Loops whose cached references are 8-bit integers."""

import jax
import numpy as np
import pytest
from PIL import Image

from clvr_jax.errors import UsageError
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.pipelines.sdxl import SDXLPipeline
from clvr_jax.sharding import MeshConfig

PROMPT = "a red circle"
OPTIONS = {"height": 64, "width": 64, "num_inference_steps": 2}


def photo(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8))


HISTORY = [photo(0), photo(1)]


@pytest.fixture(scope="module")
def pipe(folder):
    """A pipeline with quantized caches, whose programs several tests share."""
    return Flux2Pipeline.from_pretrained(str(folder), reference_cache="loop", reference_cache_dtype="int8")


def array_of(pipe, history, **options):
    return pipe(PROMPT, history, output_type="np", **OPTIONS, **options).images


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["image", "loop"])
def test_images_are_near_those_of_unquantized_caches(folder, pipe, mode):
    pipe.choose_reference_cache(mode, "it", "int8")
    exact = Flux2Pipeline.from_pretrained(str(folder), reference_cache=mode)
    try:
        for guidance in (1.0, 3.0):
            found, expected = (array_of(each, HISTORY, guidance_scale=guidance) for each in (pipe, exact))
            assert 0 < np.abs(found - expected).mean() < 0.01
            without = array_of(exact, HISTORY[:1], guidance_scale=guidance)
            assert np.abs(without - expected).mean() > 10 * np.abs(found - expected).mean()
    finally:
        pipe.choose_reference_cache("loop", "it", "int8")


@pytest.mark.slow
def test_kept_caches_are_found_joined_and_split(pipe):
    """Rows of a batch whose first references are kept already are those of single calls, byte for byte."""
    pipe.kept_references.clear()
    histories, options = [HISTORY, [photo(2), photo(3)]], {"num_inference_steps": 2, "rows_per_call": 2}
    expected = pipe.generate_each([PROMPT] * 2, histories, [1, 2], **options).images
    config = pipe.transformer.config
    blocks, of_a_head = config.num_layers + config.num_single_layers, config.attention_head_dim + 4
    assert pipe.kept_references.nbytes == 4 * 2 * blocks * 64 * config.num_attention_heads * of_a_head
    pipe.kept_references.clear()
    for row, history in enumerate(histories):
        pipe.generate_each([PROMPT], [history[:1]], [8], **options)
        (image,) = pipe.generate_each([PROMPT], [history], [1 + row], **options).images
        np.testing.assert_array_equal(np.asarray(image), np.asarray(expected[row]))


@pytest.mark.slow
def test_caches_of_another_format_are_not_used(pipe):
    pipe.kept_references.clear()  # another test has computed them in a batch, which rounds otherwise
    quantized = array_of(pipe, HISTORY)
    try:
        pipe.choose_reference_cache("loop", "it")
        exact = array_of(pipe, HISTORY)
        dtypes = {leaf.dtype.name for cache in pipe.kept_references._caches.values() for leaf in jax.tree.leaves(cache)}
        assert dtypes == {"float32"}
        assert np.abs(exact - quantized).max() > 0
    finally:
        pipe.choose_reference_cache("loop", "it", "int8")
    np.testing.assert_array_equal(array_of(pipe, HISTORY), quantized)


@pytest.mark.slow
def test_a_mesh_of_eight_devices_computes_the_same(folder, pipe):
    options = {"reference_cache": "loop", "reference_cache_dtype": "int8"}
    sharded = Flux2Pipeline.from_pretrained(str(folder), mesh=MeshConfig(fsdp=2, tensor=4), **options)
    np.testing.assert_allclose(array_of(sharded, HISTORY), array_of(pipe, HISTORY), atol=2e-3)
    cache = next(iter(sharded.kept_references._caches.values()))
    assert len(cache.single.key.sharding.device_set) == 8


def test_a_format_without_caches_is_refused(pipe):
    with pytest.raises(UsageError, match="reference_cache_dtype int8: with reference_cache none there are no caches"):
        pipe.choose_reference_cache(None, "it", "int8")  # the model's own mode
    with pytest.raises(UsageError, match="reference_cache_dtype 'int4': choose int8, or leave it out"):
        pipe.choose_reference_cache("loop", "it", "int4")
    assert (pipe.reference_cache, pipe.reference_cache_dtype) == ("loop", "int8")
    with pytest.raises(UsageError, match="reference_cache_dtype: somewhere is a Stable Diffusion model"):
        SDXLPipeline.from_pretrained("somewhere", reference_cache_dtype="int8")
