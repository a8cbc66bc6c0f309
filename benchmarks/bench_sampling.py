"""Sampling beside diffusers: the same folder, the same prompts, steps, sizes and text length, on the same CPU.

python benchmarks/bench_sampling.py
"""

import tempfile
from functools import partial
from pathlib import Path

import diffusers
import jax
import numpy as np
import torch
from contest import arguments, contest, folder_of, show
from flax import nnx
from PIL import Image

from clvr_jax.data.preprocessing.text import bucket_for, load_tokenizer
from clvr_jax.models.flux2 import AutoencoderKLFlux2, Flux2Transformer, Flux2TransformerConfig
from clvr_jax.models.qwen3 import Qwen3, Qwen3Config
from clvr_jax.pipelines.flux2 import Flux2Pipeline, Flux2Settings
from clvr_jax.pipelines.registry import resolve
from clvr_jax.tasks.shapes.sizes import VAE

PROMPT = "a red circle at the top, a blue star in the center and a green square at the bottom right"


def random_folder(path: Path, tokenizer: Path) -> None:
    """A pipeline whose transformer has about 100 M random parameters."""
    rngs = nnx.Rngs(0)
    encoder = Qwen3Config(640, 256, 768, 4, 8, 4, 32, tie_word_embeddings=True)
    transformer = Flux2TransformerConfig(
        in_channels=VAE.token_channels,
        num_layers=2,
        num_single_layers=8,
        attention_head_dim=64,
        num_attention_heads=12,
        joint_attention_dim=3 * encoder.hidden_size,
        axes_dims_rope=(16, 16, 16, 16),
        guidance_embeds=False,
    )
    model = Flux2Transformer(transformer, rngs=rngs)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    print(f"random transformer: {parameters / 1e6:.0f} M parameters")
    Flux2Pipeline(
        model,
        AutoencoderKLFlux2(VAE, rngs=rngs),
        Qwen3(encoder, rngs=rngs),
        load_tokenizer(tokenizer),
        Flux2Settings((1, 2, 3), (128,), 256, False, 4, 2.5),
    ).save_pretrained(str(path))


def compare(title: str, model: str, batch: int, references: int, rounds: int, target: float) -> None:
    """One line: `batch` pictures in one call of each pipeline."""
    ours = Flux2Pipeline.from_pretrained(model)
    settings = ours.settings
    folder, transformer = resolve(model)
    theirs = diffusers.Flux2KleinPipeline.from_pretrained(
        folder,
        transformer=diffusers.Flux2Transformer2DModel.from_pretrained(folder / transformer, torch_dtype=torch.float32),
        is_distilled=settings.is_distilled,
        torch_dtype=torch.float32,
    )
    theirs.set_progress_bar_config(disable=True)
    tokens = len(
        ours.tokenizer.apply_chat_template(
            [{"role": "user", "content": PROMPT}], add_generation_prompt=True, enable_thinking=False
        )["input_ids"]
    )
    side = settings.sample_size
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)) for _ in range(references)]
    latents = rng.normal(size=(batch, VAE.token_channels, side // VAE.token_pixels, side // VAE.token_pixels)).astype(
        np.float32
    )
    prompts = [PROMPT] * batch
    generate = partial(
        theirs,
        prompt=prompts,
        image=images or None,
        height=side,
        width=side,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        latents=torch.tensor(latents),
        max_sequence_length=bucket_for(tokens, settings.text_buckets),
        text_encoder_out_layers=settings.text_encoder_out_layers,
        output_type="np",
    )
    made = ours(prompts, images, latents=latents, height=side, width=side, output_type="np").images
    difference = np.abs(made - generate().images).max() * 255
    result = contest(lambda: ours(prompts, images, latents=latents, height=side, width=side), generate, rounds)
    show(f"{title}, {batch} x {side} px, {references} references", result, target)
    print(f"    largest difference of a pixel: {difference:.3f} / 255")


def main() -> None:
    """The shipped model, and a larger one with random weights, with and without references."""
    options = arguments(__doc__, "shapes-tiny-sft")
    print("sampling: clvr-jax beside diffusers Flux2KleinPipeline")
    for batch, references in ((1, 0), (1, 2), (16, 0), (16, 2)):
        compare(options.model, options.model, batch, references, options.rounds, 1.5)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "random"
        random_folder(path, folder_of(options.model) / "tokenizer")
        for references in (0, 2):
            compare("random 100 M", str(path), 1, references, max(2, options.rounds // 2), 1.0)


if __name__ == "__main__":
    main()
