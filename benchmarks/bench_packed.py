"""Trajectories with all images trained on at once beside one image after the other, for a FLUX.2 transformer.

Both sides compute the loss and the gradient of the same 8 images of a trajectory. One by one, every image has its own
references as tokens, as FLUX.2 klein is trained; packed, the images share the keys and values of references, as in the
mode "loop". Text and image have the proportions of klein at 1024 x 1024, with 1/32 of the tokens; weights are random,
8 + 24 million in 2 + 6 blocks. The target is 2 trajectories in the time of one.

python benchmarks/bench_packed.py
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from contest import contest, show
from flax import nnx

from clvr_jax.models.flux2 import Flux2Transformer, Flux2TransformerConfig
from clvr_jax.pipelines.flux2.programs import packed_velocity_field, velocity_field

IMAGES, TEXT, GRID = 8, 16, (8, 16)
TARGET = 2.0
CONFIG = Flux2TransformerConfig(
    in_channels=32,
    num_layers=2,
    num_single_layers=6,
    attention_head_dim=64,
    num_attention_heads=8,
    joint_attention_dim=512,
    timestep_guidance_channels=256,
    axes_dims_rope=(16, 16, 16, 16),
    guidance_embeds=False,
)


def main() -> None:
    """One line: seconds of a trajectory, both ways."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    graphdef, weights = nnx.split(Flux2Transformer(CONFIG, rngs=nnx.Rngs(0)))
    random, tokens = np.random.default_rng(0), GRID[0] * GRID[1]
    latents = random.normal(size=(IMAGES, tokens, CONFIG.in_channels)).astype(np.float32)
    text = random.normal(size=(IMAGES, TEXT, CONFIG.joint_attention_dim)).astype(np.float32)
    times = random.uniform(size=IMAGES).astype(np.float32)
    references = latents[:-1].reshape(1, -1, CONFIG.in_channels)
    seen = jnp.arange(IMAGES)[None]

    @jax.jit
    @jax.grad
    def packed(weights):
        field = packed_velocity_field(nnx.merge(graphdef, weights), references, GRID, seen)
        return jnp.mean(jnp.square(field(latents, times, text)))

    def single(weights, image):
        own = slice(image, image + 1)
        field = velocity_field(nnx.merge(graphdef, weights), references[:, : image * tokens], GRID, [GRID] * image)
        return jnp.mean(jnp.square(field(latents[own], times[own], text[own])))

    steps = jax.jit(jax.grad(single), static_argnums=1)
    count = IMAGES * (TEXT + tokens)
    print(
        f"tokens of a trajectory of {IMAGES} images: packed {count + (IMAGES - 1) * tokens:,}, one by one "
        f"{count + IMAGES * (IMAGES - 1) // 2 * tokens:,}"
    )
    result = contest(
        lambda: jax.block_until_ready(packed(weights)),
        lambda: jax.block_until_ready([steps(weights, image) for image in range(IMAGES)]),
        options.rounds,
    )
    show(f"loss and gradient of {IMAGES} images", result, TARGET)


if __name__ == "__main__":
    main()
