"""The small Stable Diffusion of the shapes world, from its first step to a folder that diffusers draws with."""

import diffusers
import jax
import numpy as np
import pytest
import torch

from clvr_jax.configs import shapes_sd
from clvr_jax.data.preprocessing.clip_tokens import encode_clip, make_clip_tokenizer
from clvr_jax.data.shapes import generation_example
from clvr_jax.pipelines.flux2.io import load_vae
from clvr_jax.pipelines.sdxl import SDXLPipeline
from clvr_jax.pipelines.world import unseen_words
from clvr_jax.tasks.shapes.stable_diffusion import LENGTH, SETTINGS, text_image_batch, without_batch_norm
from clvr_jax.training.optimization.step import TrainState, make_train_step
from clvr_jax.worlds.shapes.language.grammar import vocabulary
from tests.models.parity import run_jitted


@pytest.fixture(scope="module")
def task():
    return shapes_sd.task(shapes_sd.CONFIG)


@pytest.mark.slow
def test_a_step_has_the_shapes_of_its_state(task):
    optimizer = shapes_sd.CONFIG.train.optimizer()
    state = jax.eval_shape(lambda params: TrainState.create(params, optimizer), task.params)
    step = make_train_step(task.loss, optimizer, shapes_sd.CONFIG.train.step)
    following, metrics = jax.eval_shape(step, state, task.frozen, task.batches(0))
    assert jax.tree.map(lambda leaf: leaf.shape, following) == jax.tree.map(lambda leaf: leaf.shape, state)
    assert metrics["loss"].shape == ()


@pytest.mark.slow
def test_the_export_draws_the_same_here_and_in_diffusers(task, tmp_path):
    """With weights as those of a run that has begun: at its start many are zero, and so is what it draws."""
    random = np.random.default_rng(1)
    begun = jax.tree.map(
        lambda leaf: np.asarray(leaf) + 0.02 * random.normal(size=leaf.shape).astype(leaf.dtype), task.params
    )
    task.export(begun, tmp_path / "export")
    folder = str(tmp_path / "export")
    ours, theirs = SDXLPipeline.from_pretrained(folder), diffusers.StableDiffusionPipeline.from_pretrained(folder)
    assert ours.settings == SETTINGS
    assert unseen_words(folder, "a red zebra") == ["zebra"]
    options = {"prompt": "a red circle and a blue star", "guidance_scale": 2.0, "num_inference_steps": 3}
    latents = np.random.default_rng(0).normal(size=(1, 8, 8, 8)).astype(np.float32)
    expected = theirs(**options, latents=torch.tensor(latents), output_type="np").images
    assert expected.std() > 0.02
    assert np.abs(ours(**options, latents=latents, output_type="np").images - expected).max() < 1 / 255


@pytest.mark.slow
def test_the_autoencoder_without_batch_norm_is_the_same_with_latents_of_unit_variance():
    flux = load_vae(shapes_sd.CONFIG.vae)
    plain = without_batch_norm(flux)
    rng = np.random.default_rng(0)
    pictures = np.stack([generation_example(rng).target for _ in range(64)]).astype(np.float32) / 127.5 - 1
    latents = run_jitted(lambda vae, images: vae.encode_scaled(images), plain, pictures)
    assert np.asarray(latents).std() == pytest.approx(1, abs=0.1)
    assert np.array_equal(*(run_jitted(lambda vae, images: vae.encode(images), vae, pictures) for vae in (plain, flux)))
    decoded = run_jitted(lambda vae, latents: vae.decode_scaled(latents), plain, latents)
    assert np.abs(decoded - pictures).mean() < 0.02


def test_a_batch_follows_from_its_step():
    tokenizer = make_clip_tokenizer(vocabulary(), LENGTH)
    first, again, other = (text_image_batch(step, 0, 32, 0.1, tokenizer) for step in (5, 5, 6))
    assert jax.tree.all(jax.tree.map(np.array_equal, first, again))
    assert not np.array_equal(first["ids"], other["ids"])
    # Start and end of text, and what lies between: every prompt fits, and every word is one token.
    assert (first["ids"][:, -1] == tokenizer.eos_token_id).all()
    prompt = "There is an orange triangle, and there is a black star!"
    assert len(tokenizer(prompt)["input_ids"]) == 11 + 2 + 2


def test_a_long_text_is_cut_and_still_ends():
    tokenizer = make_clip_tokenizer(["red"], 5)
    ids = encode_clip(tokenizer, ["red", "red " * 9, ""], 5)
    start, red, end = tokenizer.bos_token_id, ids[0, 1], tokenizer.eos_token_id
    assert ids.tolist() == [[start, red, end, end, end], [start, red, red, red, end], [start, *[end] * 4]]
    tokenizer.pad_token = "!"
    assert encode_clip(tokenizer, ["red"], 4)[0, -1] == tokenizer.convert_tokens_to_ids("!")


def test_the_tokens_are_the_same_in_every_run():
    words = ["star", "start", "tart", "cross", "aaaa"]
    first, second = (make_clip_tokenizer(given, 8).get_vocab() for given in (words, reversed(words)))
    assert first == second
    # "ta" is the most frequent pair, three times. "ar" occurs twice: at the end of a word, "r" is another token.
    merged = [
        token
        for token in sorted(first, key=first.get)
        if len(token.removesuffix("</w>")) > 1 and not token.startswith("<")
    ]
    assert merged[0] == "ta"
    assert {f"{word}</w>" for word in words} <= set(merged)
