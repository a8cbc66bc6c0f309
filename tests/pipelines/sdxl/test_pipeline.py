"""Stable Diffusion XL and 1.5 beside diffusers' pipelines: the same folder, noise and prompts give the same picture."""

import copy
import functools
import json
import shutil

import diffusers
import jax
import numpy as np
import pytest
import torch
from PIL import Image

from clvr_jax.cli import main
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.pipelines.registry import load_pipeline
from clvr_jax.pipelines.sdxl import SDXLPipeline, SDXLSettings
from clvr_jax.pipelines.sdxl.pipeline import guidance_embedding, step_noise
from tests.models.parity import TOLERANCE, relative_error

# The last has more tokens than CLIP reads, the first has padding.
PROMPTS = ["a red circle", "two blue squares above a green star", "a red circle left of a blue star! a red star, zebra"]


@functools.cache
def ours(folder):
    """Returns our pipeline of a directory, whose programs the tests share; they change nothing of it."""
    return SDXLPipeline.from_pretrained(str(folder))


@functools.cache
def _theirs(folder):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(folder, **options):
    """Returns diffusers' pipeline of a directory, and a function that samples; its scheduler may be replaced."""
    pipeline = copy.copy(_theirs(folder))
    latents = torch.tensor(options.pop("latents"))
    return pipeline, lambda output: pipeline(latents=latents, output_type=output, **options).images


def noise(batch, size=(5, 7), seed=5):
    return np.random.default_rng(seed).normal(size=(batch, 4, *size)).astype(np.float32)


def check(folder, scheduler=None, changes=None, **options):
    """Our latents and pixels against theirs, with their scheduler changed if one is given."""
    solver = options.pop("solver", None)
    reference, run = theirs(folder, **options)
    if scheduler:
        reference.scheduler = scheduler.from_config(reference.scheduler.config, **(changes or {}))
    options.update(solver=solver)
    latents = ours(folder)(**options, output_type="latent")
    assert relative_error(latents.images, run("latent")) < TOLERANCE
    expected = run("np")
    pixels = ours(folder)(**options, output_type="np").images
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected).max() < 1 / 255
    assert expected.std() > 0.1  # not all black
    return latents.nfe


@pytest.mark.slow
@pytest.mark.parametrize(
    ("guidance", "negative"), [(1.0, None), (4.0, None), (4.0, ["a blue star", "", "red, red, red"])]
)
def test_sdxl_is_that_of_diffusers(folders, guidance, negative):
    nfe = check(
        folders(True, "euler"), prompt=PROMPTS, negative_prompt=negative, guidance_scale=guidance, height=40, width=56,
        num_inference_steps=6, latents=noise(3),
    )  # fmt: skip
    assert nfe == (6 if guidance == 1 else 12)


@pytest.mark.slow
def test_an_empty_negative_prompt_is_not_none(folders):
    check(
        folders(True, "euler"), prompt=["a star"] * 3, negative_prompt=[""] * 3, guidance_scale=3.0, height=40,
        width=56, num_inference_steps=6, latents=noise(3),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("guidance", "negative"), [(0.0, None), (4.0, None), (4.0, "a blue star")])
def test_stable_diffusion_1_is_that_of_diffusers_with_ddim(folders, guidance, negative):
    check(
        folders(False, "pndm"), diffusers.DDIMScheduler, {"clip_sample": False}, prompt="a red circle",
        negative_prompt=negative,
        guidance_scale=guidance, height=72, width=40, num_inference_steps=7, latents=noise(1, (9, 5)),
    )  # fmt: skip


@pytest.mark.slow
def test_another_solver_is_that_scheduler_on_the_same_noise_levels(folders):
    check(
        folders(False, "pndm"), diffusers.EulerDiscreteScheduler, solver="euler", prompt=PROMPTS[:2], height=40,
        guidance_scale=3.0, width=40, num_inference_steps=5, latents=noise(2, (5, 5)),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("xl", [False, True])
def test_latent_consistency_is_that_of_diffusers(folders, monkeypatch, xl):
    fresh = []

    def our_noise(*_, **__):
        return torch.tensor(fresh.pop(0))

    monkeypatch.setattr(diffusers.schedulers.scheduling_lcm, "randn_tensor", our_noise)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(9), i))(np.arange(2))
    options = {"prompt": PROMPTS[:2], "guidance_scale": 8.5, "height": 40, "width": 56, "num_inference_steps": 4}
    pipeline = ours(folders(xl, "lcm", True))
    made = pipeline(**options, seed=9, latents=noise(2), output_type="latent")
    fresh += list(np.asarray(step_noise(keys, 4, (5, 7, 4))).transpose(0, 1, 4, 2, 3))
    _, run = theirs(folders(xl, "lcm", True), latents=noise(2), **options)
    assert relative_error(made.images, run("latent")) < TOLERANCE
    assert fresh == []
    assert made.nfe == 4
    assert pipeline.settings == SDXLSettings(4, 8.5)


@pytest.mark.parametrize("features", [10, 256, 7])
def test_the_embedding_of_the_guidance_is_that_of_diffusers(folders, features):
    reference, _ = theirs(folders(False, "lcm", True), latents=noise(1))
    expected = reference.get_guidance_scale_embedding(torch.tensor([6.5]), features)[0]
    # Angles go up to thousands, whose last digit in float32 is worth half a thousandth.
    np.testing.assert_allclose(guidance_embedding(7.5, features), expected, atol=1e-3)


@pytest.mark.parametrize(("xl", "scheduler"), [(True, "euler"), (False, "pndm")])
def test_what_is_written_draws_the_same_in_diffusers(folders, tmp_path, xl, scheduler):
    source = folders(xl, scheduler)
    pipeline = ours(source)
    pipeline.save_pretrained(str(tmp_path / "back"))
    options = {"prompt": PROMPTS, "guidance_scale": 3.0, "height": 40, "width": 40, "num_inference_steps": 3}
    latents = noise(3, (5, 5))
    (_, before), (_, after) = (theirs(folder, latents=latents, **options) for folder in (source, tmp_path / "back"))
    assert np.array_equal(before("np"), after("np"))
    again = SDXLPipeline.from_pretrained(str(tmp_path / "back"))
    assert again.settings == pipeline.settings
    assert (again.scheduler, again.solver) == (pipeline.scheduler, pipeline.solver)
    assert [pad.pad_token for pad in again.tokenizers] == ["<|endoftext|>", "!"][: 1 + xl]


@pytest.mark.slow
def test_a_row_does_not_depend_on_its_batch(folders):
    pipeline = SDXLPipeline.from_pretrained(str(folders(True, "lcm")))
    prompts = ["a star", "a red circle", "a blue star"]
    together = pipeline(prompts, seed=4, output_type="latent").images
    assert together.shape == (3, 4, 8, 8)
    for count in (1, 2):
        alone = pipeline(prompts[:count], seed=4, output_type="latent").images
        assert relative_error(together[:count], alone) < TOLERANCE
    assert relative_error(pipeline("a star", seed=5, output_type="latent").images, together[:1]) > 0.1


@pytest.mark.slow
def test_a_second_call_of_the_same_shape_compiles_nothing(folders):
    pipeline = SDXLPipeline.from_pretrained(str(folders(True, "euler")))
    programs = (pipeline._encode_text, pipeline._denoise, pipeline._decode)
    pipeline("a star", num_inference_steps=2)
    compiled = [program._cache_size() for program in programs]
    pipeline.unet = SDXLPipeline.from_pretrained(str(folders(True, "euler"))).unet
    pipeline("a red circle", num_inference_steps=2, seed=9, guidance_scale=2.0)
    assert [program._cache_size() for program in programs] == compiled


@pytest.mark.slow
def test_half_precision_draws_about_the_same_picture(folders):
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "np"}
    exact, half, eighth = (
        SDXLPipeline.from_pretrained(str(folders(False, "pndm")), dtype)("a star", **options).images
        for dtype in ("float32", "float16", "bfloat16")
    )
    assert exact.dtype == half.dtype == eighth.dtype == np.float32
    assert np.abs(half - exact).mean() < 0.01
    assert np.abs(eighth - exact).mean() < 0.05


@pytest.mark.slow
def test_the_command_line_draws_with_either_kind_of_folder(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "star.png"
    model = str(folders(False, "pndm"))
    assert main(["sample", "a star", "--model", model, "--steps", "2", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["nfe"] == 4
    assert Image.open(out).size == (64, 64)
    assert isinstance(load_pipeline(model), SDXLPipeline)
    assert isinstance(load_pipeline("shapes-tiny"), Flux2Pipeline)


def test_what_is_not_a_whole_pipeline_is_refused_in_one_line(folders, tmp_path):
    def changed(name, **fields):
        folder = tmp_path / name
        shutil.copytree(folders(False, "pndm"), folder)
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, **fields}))
        return str(folder)

    with pytest.raises(ClvrError, match="a StableDiffusionPipeline without vae; copy"):
        SDXLPipeline.from_pretrained(changed("no_vae", vae=[None, None]))
    with pytest.raises(ClvrError, match="without text_encoder_2, tokenizer_2; copy"):
        SDXLPipeline.from_pretrained(changed("not_xl", _class_name="StableDiffusionXLPipeline"))
    with pytest.raises(ClvrError, match="a StableDiffusionInpaintPipeline, not a"):
        SDXLPipeline.from_pretrained(changed("inpaint", _class_name="StableDiffusionInpaintPipeline"))
    with pytest.raises(ClvrError, match="a KandinskyPipeline, which is not supported; the supported pipelines are"):
        load_pipeline(changed("other", _class_name="KandinskyPipeline"))
    solver = changed("solver")
    (tmp_path / "solver" / "scheduler" / "scheduler_config.json").write_text(
        '{"_class_name": "UniPCMultistepScheduler"}'
    )
    with pytest.raises(ClvrError, match="UniPCMultistepScheduler is not supported"):
        SDXLPipeline.from_pretrained(solver)
    mixed = changed("mixed")
    shutil.rmtree(tmp_path / "mixed" / "unet")
    shutil.copytree(folders(True, "euler") / "unet", tmp_path / "mixed" / "unet")
    with pytest.raises(ClvrError, match="1 text encoders and 1 tokenizers"):
        SDXLPipeline.from_pretrained(mixed)


def test_bad_input_is_named(folders):
    pipeline = ours(folders(False, "pndm"))
    with pytest.raises(ClvrError, match="prompt is empty"):
        pipeline(" ")
    with pytest.raises(UsageError, match="2 negative prompts for 1"):
        pipeline("a star", ["a", "b"])
    with pytest.raises(UsageError, match="multiples of 8"):
        pipeline("a star", height=44)
    with pytest.raises(UsageError, match="latents have shape"):
        pipeline("a star", latents=noise(1, (3, 3)))
    with pytest.raises(UsageError, match="solver 'heun'"):
        pipeline("a star", solver="heun")
