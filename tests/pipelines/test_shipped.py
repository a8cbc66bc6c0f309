import jax
import numpy as np
import pytest

from clvr_jax.data.text import load_tokenizer
from clvr_jax.pipelines.folder import load_vae
from clvr_jax.pipelines.registry import SHIPPED
from clvr_jax.worlds.shapes.detect import detect
from clvr_jax.worlds.shapes.grammar import vocabulary
from clvr_jax.worlds.shapes.render import render
from clvr_jax.worlds.shapes.scene import sample_scene_random

FOLDER = SHIPPED / "shapes-tiny"


@pytest.mark.slow
def test_scenes_survive_the_autoencoder():
    """2,000 scenes, held-out pairs among them, are read back exactly from what the decoder makes of their latents."""
    vae = load_vae(FOLDER / "vae")
    reconstruct = jax.jit(lambda images: vae.decode_tokens(vae.encode_tokens(images)))
    rng = np.random.default_rng(2_000)
    exact = 0
    for _ in range(20):
        scenes = [sample_scene_random(rng, allow_held_out=True) for _ in range(100)]
        images = np.stack([render(scene) for scene in scenes]).astype(np.float32) / 127.5 - 1
        decoded = np.asarray(reconstruct(images))
        decoded = np.clip(np.round((decoded + 1) * 127.5), 0, 255).astype(np.uint8)
        for scene, image in zip(scenes, decoded, strict=True):
            reading = detect(image)
            wanted = {(item.color, item.shape, item.cell) for item in scene.objects}
            found = {(item.color, item.shape, item.cell) for item in reading.objects}
            exact += wanted == found and not reading.unclear
    print(f"{exact} of 2000 read back exactly")
    assert exact >= 1990


def test_every_word_of_the_world_is_one_token():
    tokenizer = load_tokenizer(FOLDER / "tokenizer")

    def length(word: str) -> int:  # some words only begin a prompt, the others follow a space
        return min(len(tokenizer(text)["input_ids"]) for text in (word, f" {word}"))

    assert [word for word in sorted(vocabulary()) if length(word) > 1] == []


def test_shipped_files_are_small():
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) < 25e6
