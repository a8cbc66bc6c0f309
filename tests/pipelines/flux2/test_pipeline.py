import copy
import dataclasses
import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from clvr_jax.convert.architectures import FLUX2_TRANSFORMER
from clvr_jax.convert.models import save_model
from clvr_jax.data.preprocessing.text import load_tokenizer
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.models.flux2 import Flux2Transformer
from clvr_jax.pipelines.closed_loop import ClosedLoopPipeline
from clvr_jax.pipelines.flux2 import Flux2Output, Flux2Pipeline
from clvr_jax.pipelines.flux2.image_generator import Flux2ImageGenerator
from clvr_jax.reasoning import GenerationRequest
from tests.helpers.models import random_module
from tests.pipelines.flux2.settings import LENGTH, SETTINGS
from tests.reasoning.scripted import ScriptedController

LONG = "a red circle\nPlan: a red circle, a blue star.<IMG_GEN_1>\nUnmet: star.<IMG_GEN_2>\nAdd a star."
"""A text of the second bucket."""


@pytest.fixture(scope="module")
def shared(folder):
    """A pipeline whose programs several tests share; they change nothing of it."""
    return Flux2Pipeline.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def theirs(folder):
    """The pipeline of diffusers; tests change nothing of it."""
    pipeline = diffusers.Flux2KleinPipeline.from_pretrained(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(seed, width, height):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.slow
@pytest.mark.parametrize("references", [(), ((64, 64),), ((72, 80), (101, 67))])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_pixels_are_those_of_diffusers(shared, theirs, references, guidance):
    images = [picture(i, *size) for i, size in enumerate(references)]
    prompts = ["a red circle", "two blue squares above a green star"]
    latents = np.random.default_rng(5).normal(size=(2, 16, 6, 9)).astype(np.float32)
    expected = theirs(
        prompt=prompts, image=images or None, height=48, width=72, num_inference_steps=8, guidance_scale=guidance,
        latents=torch.tensor(latents), max_sequence_length=LENGTH, text_encoder_out_layers=(1, 2, 3), output_type="np",
    ).images  # fmt: skip
    made = shared(
        prompts, images, height=48, width=72, num_inference_steps=8, guidance_scale=guidance, latents=latents,
        output_type="np",
    )  # fmt: skip
    assert made.images.shape == expected.shape
    assert np.abs(made.images - expected).max() < 1 / 255
    assert made.nfe == (8 if guidance == 1.0 else 16)


@pytest.mark.slow
def test_a_static_shift_in_the_scheduler_is_obeyed_as_in_diffusers(folder, shared, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(folder, path)
    file = path / "scheduler" / "scheduler_config.json"
    fields = {**json.loads(file.read_text()), "use_dynamic_shifting": False, "shift": 7.0}
    file.write_text(json.dumps(fields))
    ours, theirs = Flux2Pipeline.from_pretrained(str(path)), diffusers.Flux2KleinPipeline.from_pretrained(str(path))
    theirs.set_progress_bar_config(disable=True)
    latents = np.random.default_rng(1).normal(size=(1, 16, 8, 8)).astype(np.float32)
    options = {"num_inference_steps": 3, "guidance_scale": 1.0, "height": 64, "width": 64}
    found = ours("a red circle", latents=latents, output_type="np", **options).images
    expected = theirs(
        prompt="a red circle", latents=torch.tensor(latents), output_type="np", max_sequence_length=LENGTH,
        text_encoder_out_layers=(1, 2, 3), **options,
    ).images  # fmt: skip
    assert np.abs(found - expected).max() < 1e-3
    published = shared("a red circle", latents=latents, output_type="np", **options)
    assert np.abs(published.images - expected).max() > 1e-2
    ours.save_pretrained(str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved" / "scheduler" / file.name).read_text())["shift"] == 7.0


def test_a_written_folder_comes_back_bit_for_bit(folder, tmp_path):
    first = Flux2Pipeline.from_pretrained(str(folder))
    first.save_pretrained(str(tmp_path / "again"))
    for name in ("transformer", "vae"):
        file = "diffusion_pytorch_model.safetensors"
        assert (folder / name / file).read_bytes() == (tmp_path / "again" / name / file).read_bytes()
    file = "text_encoder/model.safetensors"  # of which only three of four layers were read
    assert not first.text_encoder.is_whole
    assert (folder / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    again = Flux2Pipeline.from_pretrained(str(tmp_path / "again"))
    assert again.settings == first.settings
    first.text_encoder_source = None
    with pytest.raises(ClvrError, match="does not exist to copy them from"):
        first.save_pretrained(str(tmp_path / "third"))
    assert not (tmp_path / "third").exists()


@pytest.mark.slow
def test_a_row_does_not_depend_on_its_batch(shared):
    prompts = ["a red circle", "a blue star", "a green cross above it"]
    together = shared.generate_each(prompts, [[], [picture(0, 64, 64)], []], [4, 5, 6], num_inference_steps=2)
    for index, prompt in enumerate(prompts):
        images = [picture(0, 64, 64)] if index == 1 else []
        alone = shared.generate_each([prompt], [images], [4 + index], num_inference_steps=2)
        difference = np.abs(np.asarray(together.images[index], int) - np.asarray(alone.images[0], int))
        assert difference.max() <= 1


LATENTS = np.random.default_rng(5).normal(size=(2, 16, 4, 4)).astype(np.float32)
SMALL = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "np"}


@pytest.mark.slow
def test_a_long_history_is_read_as_diffusers_reads_it_at_its_bucket(shared, theirs):
    made = shared(LONG, latents=LATENTS[:1], **SMALL).images
    expected, cut = (
        theirs(
            prompt=LONG, latents=torch.tensor(LATENTS[:1]), text_encoder_out_layers=(1, 2, 3),
            max_sequence_length=length, **SMALL,
        ).images
        for length in (2 * LENGTH, LENGTH)
    )  # fmt: skip
    assert np.abs(made - expected).max() < 1e-3
    assert np.abs(cut - expected).max() > 5e-3


def test_a_short_text_is_not_padded_to_a_long_one_beside_it(shared):
    """Padding is attended to, so it would be another image."""
    prompts = ["a red circle", LONG]
    together = shared(prompts, latents=LATENTS, **SMALL).images
    assert together.shape == (2, 32, 32, 3)
    for row, prompt in enumerate(prompts):
        alone = shared(prompt, latents=LATENTS[row : row + 1], **SMALL).images[0]
        np.testing.assert_array_equal(together[row], alone)
    with pytest.raises(UsageError, match="2 prompts but noise for 1"):
        shared(prompts, latents=LATENTS[:1], **SMALL)
    longer = copy.copy(shared)
    longer.settings = dataclasses.replace(SETTINGS, text_buckets=(2 * LENGTH,))
    padded = longer("a red circle", latents=LATENTS[:1], **SMALL).images[0]
    assert np.abs(together[0] - padded).max() > 1e-3


def test_the_last_instruction_decides_at_any_length(shared):
    for rounds in (0, 1, 3, 9):
        earlier = [f"Unmet: {number}. Add it." for number in range(rounds)]
        fitted = [shared.fit_history("a red circle", [*earlier, last]) for last in ("Add a star.", "Add a cat.")]
        first, second = (shared._text([history.text], use_guidance=False) for history in fitted)
        assert first.shape == second.shape
        assert np.abs(first - second).max() > 1e-2
        assert bool(fitted[0].left_out) == (rounds == 9)


def test_what_a_history_lost_is_told(shared):
    read = []

    class Generator:
        fit_history, with_latents = shared.fit_history, shared.with_latents

        def generate_each(self, texts, references, seeds, **options):
            read.extend(texts)
            return Flux2Output([picture(0, 16, 16) for _ in texts], 4)

    reply = "Unmet: a blue star. Add it.<|image_gen|>"
    requests = [
        GenerationRequest("a red circle", (reply,) * count, (picture(0, 16, 16),) * (count - 1)) for count in (6, 1)
    ]
    generated = Flux2ImageGenerator(Generator()).generate(requests)
    fitted = [shared.fit_history(request.prompt, request.replies) for request in requests]
    assert read == [history.text for history in fitted]
    assert [generated_image.left_out for generated_image in generated] == [history.left_out for history in fitted]
    assert generated[0].left_out > generated[1].left_out == 0


def test_a_prompt_that_is_too_long_is_refused_before_the_controller_works(shared):
    pipeline = ClosedLoopPipeline(shared, ScriptedController({}))
    with pytest.raises(ClvrError, match=r"the text takes \d+ tokens, more than the 128 that are read; shorten it"):
        pipeline.run(["a red circle " * 100], verification="controller")


def test_a_second_call_of_the_same_shape_compiles_nothing(folder):
    pipeline = Flux2Pipeline.from_pretrained(str(folder))
    pipeline("a red circle", num_inference_steps=2)
    compiled = pipeline._denoise._cache_size()
    pipeline("a blue star", num_inference_steps=2, seed=9, guidance_scale=2.0)
    assert pipeline._denoise._cache_size() == compiled


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_steps_one_by_one_give_the_same_image(shared, guidance):
    """The caller looks between two steps; the image has the same bytes as that of a single call."""
    told = []
    options = {"num_inference_steps": 3, "guidance_scale": guidance}
    rows = ["a red circle", "a blue star"], [[], [picture(0, 16, 16)]], [4, 5]
    whole = shared.generate_each(*rows, **options)
    compiled = shared._denoise._cache_size()
    stepwise = shared.generate_each(*rows, **options, on_step=lambda *step: told.append(step) or True)
    assert shared._denoise._cache_size() == compiled, "one program takes all steps or one of them"
    assert told == [(row, done, 3) for row in (0, 1) for done in range(4)]
    for one, other in zip(whole.images, stepwise.images, strict=True):
        np.testing.assert_array_equal(one, other)
    assert stepwise.nfe == whole.nfe


@pytest.mark.slow
def test_a_generation_is_abandoned_between_steps(shared):
    told = []

    def on_step(row, done, steps):
        told.append((row, done))
        return (row, done) not in {(0, 2), (1, 0)}

    prompts = ["a red circle", "a red star", "a red cross"]
    output = shared.generate_each(prompts, [[]] * 3, [1, 2, 3], num_inference_steps=4, rows_per_call=1, on_step=on_step)
    assert told == [(0, 0), (0, 1), (0, 2), (1, 0), *[(2, done) for done in range(5)]]
    assert output.images[:2] == [None, None]
    alone = shared.generate_each(prompts[2:], [[]], [3], num_inference_steps=4, rows_per_call=1)
    np.testing.assert_array_equal(output.images[2], alone.images[0])
    assert output.nfe == alone.nfe

    # Rows of one call are computed together: it goes on while one of them is wanted.
    told.clear()
    output = shared.generate_each(
        prompts[:2], [[]] * 2, [1, 2], num_inference_steps=4, rows_per_call=2, on_step=on_step
    )
    assert told == [(row, done) for done in range(5) for row in (0, 1)]
    assert None not in output.images


def test_bad_input_is_named(shared, tmp_path):
    with pytest.raises(ClvrError, match="prompt is empty"):
        shared("  ")
    with pytest.raises(ClvrError, match="100,000 characters"):
        shared("x" * 100_000)
    with pytest.raises(UsageError, match="multiples of 8"):
        shared("a red circle", height=50, width=64)
    with pytest.raises(UsageError, match="latents have shape"):
        shared("a red circle", latents=np.zeros((1, 16, 3, 3), np.float32))
    with pytest.raises(ClvrError, match="no such model"):
        Flux2Pipeline.from_pretrained("nowhere")
    with pytest.raises(ClvrError, match=r"model_index\.json is missing"):
        Flux2Pipeline.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("damage", ["truncate", "foreign", "shape"])
def test_damaged_weights_are_named(folder, shared, tmp_path, damage):
    path = tmp_path / "model"
    shutil.copytree(folder, path)
    file = path / "transformer" / "diffusion_pytorch_model.safetensors"
    if damage == "truncate":
        file.write_bytes(file.read_bytes()[:5000])
        message = "not a complete safetensors file"
    elif damage == "foreign":
        file.write_bytes((path / "vae" / file.name).read_bytes())
        message = r"missing: .*unexpected: "
    else:
        config = dataclasses.replace(shared.transformer.config, joint_attention_dim=80)
        other = random_module(lambda rngs: Flux2Transformer(config, rngs=rngs))
        save_model(tmp_path / "other", other, FLUX2_TRANSFORMER)
        file.write_bytes((tmp_path / "other" / file.name).read_bytes())
        message = r"context_embedder\.weight \(expected \(64, 96\), found \(64, 80\)\)"
    with pytest.raises(ClvrError, match=message):
        Flux2Pipeline.from_pretrained(str(path))


def test_a_saved_tokenizer_reads_long_texts_whole(shared, tmp_path):
    long = "a red circle " * (10 * 2 * LENGTH)
    shared("a red circle", num_inference_steps=1)  # padding and cutting are no state of the tokenizer
    shared.save_pretrained(str(tmp_path / "saved"))
    tokens = load_tokenizer(tmp_path / "saved" / "tokenizer")(long)["input_ids"]
    assert len(tokens) > 10 * 2 * LENGTH
