import diffusers
import jax
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from clvr_jax.data.preprocessing.text import encode_prompts, load_tokenizer
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.pipelines.flux2.io import load_vae
from clvr_jax.pipelines.qwen3_vl import Qwen3VLPipeline
from clvr_jax.pipelines.registry import MODELS, SHIPPED
from clvr_jax.reasoning.conversation.context import chat_messages
from clvr_jax.worlds.shapes.detect import detect
from clvr_jax.worlds.shapes.language.grammar import vocabulary
from clvr_jax.worlds.shapes.render import render
from clvr_jax.worlds.shapes.scene import Scene, place, sample_scene_random
from tests.conftest import OPTIMIZED

FOLDER = SHIPPED / "shapes-tiny"


@pytest.mark.slow
def test_scenes_survive_the_autoencoder():
    """600 scenes, held-out pairs among them, are read back exactly from what the decoder makes of their latents."""
    vae = load_vae(FOLDER / "vae")
    reconstruct = jax.jit(lambda images: vae.decode_tokens(vae.encode_tokens(images)), compiler_options=OPTIMIZED)
    rng = np.random.default_rng(2_000)
    exact = 0
    for _ in range(6):
        scenes = [sample_scene_random(rng, allow_held_out=True) for _ in range(100)]
        images = np.stack([render(scene) for scene in scenes]).astype(np.float32) / 127.5 - 1
        decoded = np.asarray(reconstruct(images))
        decoded = np.clip(np.round((decoded + 1) * 127.5), 0, 255).astype(np.uint8)
        for scene, image in zip(scenes, decoded, strict=True):
            reading = detect(image)
            wanted = {(item.color, item.shape, item.cell) for item in scene.objects}
            found = {(item.color, item.shape, item.cell) for item in reading.objects}
            exact += wanted == found and not reading.unclear
    assert exact >= 0.995 * 600


@pytest.mark.slow
@pytest.mark.parametrize("transformer", ["transformer", "transformer_base", "transformer_sft"])
def test_pytorch_draws_the_same_from_the_shipped_folder(transformer):
    """The folder as it lies there, read by diffusers, sampled as it says: to a picture and from one."""
    ours = Flux2Pipeline.from_pretrained(str(FOLDER), transformer=transformer)
    part = diffusers.Flux2Transformer2DModel.from_pretrained(FOLDER / transformer, torch_dtype=torch.float32)
    settings = ours.settings
    theirs = diffusers.Flux2KleinPipeline.from_pretrained(
        FOLDER, transformer=part, is_distilled=settings.is_distilled, torch_dtype=torch.float32
    )
    theirs.set_progress_bar_config(disable=True)
    scene = Scene((place("green", "square", "bottom", np.random.default_rng(0)),))
    latents = np.random.default_rng(7).normal(size=(1, 32, 4, 4)).astype(np.float32)
    for prompt, images in (
        ("a red star at the top left and a blue circle in the center", []),
        ("Add a red star at the top left.", [Image.fromarray(render(scene))]),
    ):
        length = encode_prompts(ours.tokenizer, [prompt], settings.text_buckets)[0].shape[1]
        expected = theirs(
            prompt=[prompt], image=images or None, height=64, width=64, latents=torch.tensor(latents), output_type="np",
            num_inference_steps=settings.num_inference_steps, guidance_scale=settings.guidance_scale,
            max_sequence_length=length, text_encoder_out_layers=settings.text_encoder_out_layers,
        ).images  # fmt: skip
        made = ours([prompt], images, latents=latents, output_type="np")
        assert np.abs(made.images - expected).max() < 1 / 255, prompt


def test_pytorch_says_the_same_from_the_shipped_controller():
    """Greedy tokens of transformers on the folder as it lies there, for a conversation with one picture."""
    scene = Scene((place("green", "square", "bottom", np.random.default_rng(0)),))
    ours = Qwen3VLPipeline.from_pretrained(FOLDER / "controller")
    messages = chat_messages("a green square and a red star", ["Plan: x.<|image_gen|>"], 1)
    row = ours.prepare(messages, [render(scene)])
    theirs = transformers.Qwen3VLForConditionalGeneration.from_pretrained(FOLDER / "controller", dtype=torch.float32)
    input_ids = torch.tensor(row.input_ids)[None]
    tokens = theirs.generate(
        input_ids=input_ids,
        mm_token_type_ids=(input_ids == theirs.config.image_token_id).int(),
        pixel_values=torch.tensor(row.pixel_values),
        image_grid_thw=torch.tensor(row.grid_thw),
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=ours.tokenizer.eos_token_id,
    )
    said = ours.tokenizer.decode(tokens[0, len(row.input_ids) :], skip_special_tokens=False)
    (answer,) = ours.answer_all([messages], [[render(scene)]], 24)
    assert said.removesuffix("<|im_end|>") == answer.text
    assert (answer.input_tokens, answer.output_tokens) == (len(row.input_ids), tokens.shape[1] - len(row.input_ids))


def test_the_default_draws_in_four_steps_and_what_it_was_made_of_in_many():
    found = {}
    for name in MODELS:
        settings = Flux2Pipeline.from_pretrained(name).settings
        found[name] = settings.is_distilled, settings.num_inference_steps, settings.guidance_scale
    assert found == {
        "shapes-tiny": (True, 4, 1.0),
        "shapes-tiny-base": (False, 28, 1.7),
        "shapes-tiny-sft": (False, 28, 1.7),
    }


def test_every_word_of_the_world_is_one_token():
    tokenizer = load_tokenizer(FOLDER / "tokenizer")

    def length(word: str) -> int:  # some words only begin a prompt, the others follow a space
        return min(len(tokenizer(text)["input_ids"]) for text in (word, f" {word}"))

    assert [word for word in sorted(vocabulary()) if length(word) > 1] == []


def test_shipped_files_are_small():
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) < 25e6
