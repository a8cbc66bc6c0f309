"""Programs that are made ahead: the calls of a pipeline find them, and give what they give without a store."""

import jax
import numpy as np
import pytest
from PIL import Image

from clvr_jax.errors import UsageError
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.pipelines.flux2.kept_latents import LatentReference
from clvr_jax.pipelines.sdxl import SDXLPipeline
from clvr_jax.pipelines.warming import make_programs, warm_calls
from clvr_jax.programs import ProgramStore, making_programs, program_store
from clvr_jax.programs.function import drop_programs

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8))


@pytest.fixture
def store(tmp_path):
    made = ProgramStore(tmp_path / "store", 10**9)
    assert made.prepare()
    return made


@pytest.fixture
def traced():
    """Names of the functions that were traced."""
    found = []

    def listen(event, seconds, fun_name=None, **_):
        if event.endswith("jaxpr_trace_duration"):
            found.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def made_ahead(store, pipe, calls):
    """Makes the programs of calls; returns their names."""
    reports = []
    with program_store(store), making_programs(reports.append):
        assert list(make_programs(pipe, calls, steps=2)) == calls
    drop_programs()
    assert all(each.is_new and each.nbytes for each in reports)
    return [each.name for each in reports]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "dtype", "latents"),
    [("none", None, "encoded"), ("image", None, "kept"), ("loop", None, "encoded"), ("loop", "int8", "kept")],
)
def test_each_way_to_attend_to_references_finds_its_programs(folder, store, traced, mode, dtype, latents):
    options = {"reference_cache": mode, "reference_cache_dtype": dtype, "reference_latents": latents}
    pipe = Flux2Pipeline.from_pretrained(str(folder), **options)
    calls = warm_calls(pipe, [(32, 64)], [2], [40])
    names = made_ahead(store, pipe, calls)
    assert ("cache_references" in names) == (mode != "none")
    assert ("_encode_tokens" in names) == (latents == "encoded")
    options = {"height": 32, "width": 64, "num_inference_steps": 2, "output_type": "np"}
    photos = [PHOTO, PHOTO.transpose(Image.Transpose.ROTATE_180)]
    if latents == "kept":
        random = np.random.default_rng(1).normal(size=(2, 4 * 8, pipe.vae.config.token_channels)).astype(np.float32)
        photos = [LatentReference(photo, each) for photo, each in zip(photos, random, strict=True)]

    def generate():
        pipe.kept_references.clear()
        return pipe("a red circle", photos, **options).images

    expected = generate()
    traced.clear()
    with program_store(store):
        found = generate()
    assert not set(names) & set(traced) - {"_row_keys"}
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
def test_stable_diffusion_finds_its_programs(folders, store, traced):
    pipe = SDXLPipeline.from_pretrained(str(folders(True, "euler")))
    calls = warm_calls(pipe, [(64, 48)], [0])
    with pytest.raises(UsageError, match="takes no references"):
        warm_calls(pipe, [(64, 48)], range(2))
    names = made_ahead(store, pipe, calls)
    assert {"encode_text", "_denoise", "decode"} <= set(names)

    def generate():
        return pipe("a red circle", height=64, width=48, num_inference_steps=2, output_type="np").images

    expected = generate()
    traced.clear()
    with program_store(store):
        found = generate()
    assert not set(names) & set(traced)
    np.testing.assert_array_equal(found, expected)
