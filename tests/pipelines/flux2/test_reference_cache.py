"""Pipelines of models whose references are cached, against `Flux2KleinKVPipeline` of diffusers."""

import dataclasses
import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from clvr_jax.cli import main
from clvr_jax.commands.generation.model_options import ControllerOptions
from clvr_jax.convert.streaming.conversion import convert
from clvr_jax.convert.streaming.planning import plan
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.pipelines.registry import SHIPPED, load_pipeline
from tests.models.parity import relative_error
from tests.pipelines.flux2.settings import LENGTH, SETTINGS

CLOSE = 1e-5
OPTIONS = {"height": 48, "width": 72, "num_inference_steps": 4}
PROMPT = "a red circle"
REFERENCES = ((64, 64), (72, 80), (101, 67))


@pytest.fixture(scope="module")
def kv_folder(folder, tmp_path_factory):
    """The directory of a KV model as others publish it: only the class says that references are cached."""
    path = tmp_path_factory.mktemp("kv") / "model"
    shutil.copytree(folder, path)
    components = json.loads((path / "model_index.json").read_text())
    del components["is_distilled"]
    (path / "model_index.json").write_text(json.dumps({**components, "_class_name": "Flux2KleinKVPipeline"}))
    small = ("text_encoder_out_layers", "text_buckets", "sample_size")
    sizes = {name: value for name, value in dataclasses.asdict(SETTINGS).items() if name in small}
    (path / "clvr.json").write_text(json.dumps({"flux2": sizes}))
    return path


@pytest.fixture(scope="module")
def ours(kv_folder):
    """A pipeline whose programs several tests share; they change nothing of it."""
    return load_pipeline(str(kv_folder))


def photo(seed, width, height):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def final_latents(pipeline, monkeypatch, *arguments, **options):
    """The tokens that a call of our pipeline decodes, and its output."""
    decode, seen = pipeline._decode, []
    monkeypatch.setattr(pipeline, "_decode", lambda *given: seen.append(given[2]) or decode(*given))
    output = pipeline(*arguments, output_type="np", **options)
    monkeypatch.undo()
    (tokens,) = seen
    return np.asarray(tokens), output


@pytest.mark.slow
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_latents_and_pixels_are_those_of_the_kv_pipeline(kv_folder, ours, monkeypatch, count):
    theirs = diffusers.Flux2KleinKVPipeline.from_pretrained(str(kv_folder))
    theirs.set_progress_bar_config(disable=True)
    images = [photo(seed, *size) for seed, size in enumerate(REFERENCES[:count])]
    prompts = [PROMPT, "two blue squares above a green star"]
    latents = np.random.default_rng(5).normal(size=(2, 16, 6, 9)).astype(np.float32)
    steps = []
    expected = theirs(
        prompt=prompts, image=images or None, latents=torch.tensor(latents), max_sequence_length=LENGTH,
        text_encoder_out_layers=(1, 2, 3), output_type="np", **OPTIONS,
        callback_on_step_end=lambda pipe, index, timestep, state: steps.append(state["latents"]) or state,
    ).images  # fmt: skip
    tokens, made = final_latents(ours, monkeypatch, prompts, images, latents=latents, **OPTIONS)
    assert relative_error(tokens.reshape(steps[-1].shape), steps[-1]) < CLOSE
    assert np.abs(made.images - expected).max() < 1e-4
    assert made.nfe == len(steps) == 4


def test_the_class_says_how_the_model_samples(ours):
    found = ours.settings
    assert (found.reference_cache, found.is_distilled, found.num_inference_steps) == ("image", True, 4)
    assert found.text_buckets == SETTINGS.text_buckets


@pytest.mark.slow
def test_a_model_without_the_class_attends_to_reference_tokens(folder, ours):
    plain = Flux2Pipeline.from_pretrained(str(folder))
    assert plain.settings.reference_cache == "none"
    arguments = {"images": [photo(0, 64, 64)], "guidance_scale": 1.0, "output_type": "np", **OPTIONS}
    difference = np.abs(plain(PROMPT, **arguments).images - ours(PROMPT, **arguments).images).max()
    assert difference > 1e-2
    arguments["images"] = []
    np.testing.assert_array_equal(plain(PROMPT, **arguments).images, ours(PROMPT, **arguments).images)


@pytest.mark.slow
def test_guidance_sees_the_references_on_both_sides(folder, tmp_path):
    """With the same text on both sides, guidance changes nothing, if both sides see the references of their row."""
    path = tmp_path / "guided"
    shutil.copytree(folder, path)
    clvr = json.loads((path / "clvr.json").read_text())
    clvr["flux2"]["reference_cache"] = "image"
    (path / "clvr.json").write_text(json.dumps(clvr))
    guided = Flux2Pipeline.from_pretrained(str(path))
    rows = [PROMPT, "a blue star"], [[photo(0, 64, 64)], [photo(1, 64, 64)]], [4, 5]
    once = guided.generate_each(*rows, num_inference_steps=2, guidance_scale=1.0)
    guided._text = lambda prompts, use_guidance, text=guided._text: np.concatenate([text(prompts, False)] * 2)
    twice = guided.generate_each(*rows, num_inference_steps=2, guidance_scale=3.0)
    assert twice.nfe == 2 * once.nfe
    for one, other in zip(once.images, twice.images, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


@pytest.mark.slow
def test_a_row_does_not_depend_on_its_batch(ours):
    prompts, references = [PROMPT, "a blue star", PROMPT], [[photo(0, 64, 64)], [photo(1, 64, 64)], []]
    together = ours.generate_each(prompts, references, [4, 5, 6], num_inference_steps=2)
    for row, prompt in enumerate(prompts):
        alone = ours.generate_each([prompt], references[row : row + 1], [4 + row], num_inference_steps=2)
        assert np.abs(np.asarray(together.images[row], int) - np.asarray(alone.images[0], int)).max() <= 1


def test_a_saved_pipeline_is_one_of_the_kv_class(ours, tmp_path):
    ours.save_pretrained(str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved" / "model_index.json").read_text())["_class_name"] == "Flux2KleinKVPipeline"
    assert Flux2Pipeline.from_pretrained(str(tmp_path / "saved")).settings == ours.settings
    diffusers.Flux2KleinKVPipeline.from_pretrained(str(tmp_path / "saved"))


def test_conversion_keeps_the_class_both_ways(kv_folder, ours, tmp_path):
    convert(plan(kv_folder, "jax"), tmp_path / "jax")
    convert(plan(tmp_path / "jax", "torch"), tmp_path / "torch")
    again = load_pipeline(str(tmp_path / "jax"))
    assert again.settings == ours.settings
    index = "model_index.json"
    assert (tmp_path / "torch" / index).read_bytes() == (kv_folder / index).read_bytes()
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "torch" / weights).read_bytes() == (kv_folder / weights).read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("own_directories")
def test_the_commands_take_its_directories(kv_folder, ours, tmp_path):
    photo(0, 64, 64).save("photo.png")
    options = ["--image", "photo.png", "--seed", "3", "--out", "made.png"]
    assert main(["sample", PROMPT, "--model", str(kv_folder), *options]) == 0
    expected = ours(PROMPT, [photo(0, 64, 64)], seed=3).images[0]
    assert np.abs(np.asarray(Image.open("made.png"), int) - np.asarray(expected, int)).max() <= 1
    ControllerOptions(controller=str(SHIPPED / "shapes-tiny" / "controller")).check(str(kv_folder))
    assert main(["convert", str(kv_folder), "jax", "--to", "jax"]) == 0
    assert main(["sample", PROMPT, "--model", "jax", *options[:-1], "again.png"]) == 0
    assert Image.open("again.png").tobytes() == Image.open("made.png").tobytes()
