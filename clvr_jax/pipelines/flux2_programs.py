"""The programs that FLUX.2 is made of, to be jitted: encode text, encode references, denoise, decode.

Pipelines, training and the planner trace the same ones. Models enter as graph and weights.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from clvr_jax.diffusion import euler_solve, guided
from clvr_jax.models.flux2_ids import latent_ids, reference_ids, text_ids
from clvr_jax.models.flux2_transformer import Flux2Transformer
from clvr_jax.models.layers import read_only_weights


def encode_text(graphdef: Any, state: Any, ids: jax.Array, mask: jax.Array, layers: tuple[int, ...]) -> jax.Array:
    """(b, t) ids and mask -> (b, t, layers * d), the hidden states at `layers` side by side."""
    return jnp.concatenate(nnx.merge(graphdef, state).hidden_states(ids, mask, layers), axis=-1)


def encode_images(graphdef: Any, state: Any, images_bhwc: jax.Array) -> jax.Array:
    """(b, h, w, 3) in [-1, 1] -> (b, h / 16, w / 16, c) latent tokens."""
    return nnx.merge(graphdef, state).encode_tokens(images_bhwc)


def encode_references(graphdef: Any, state: Any, pictures_bnhwc: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Pictures as data has them, (b, n, h, w, 3) uint8, -> (b, tokens of all n, c), as `velocity_field` takes them."""

    def encode(pictures_bhwc: jax.Array) -> jax.Array:
        tokens_bhwc = encode_images(graphdef, state, (pictures_bhwc.astype(jnp.float32) / 127.5 - 1).astype(dtype))
        return tokens_bhwc.reshape(len(pictures_bhwc), -1, tokens_bhwc.shape[-1])

    # One picture of every row after the other: large ones need more memory in the encoder than all the rest does.
    tokens_nbtc = jax.lax.map(encode, pictures_bnhwc.swapaxes(0, 1))
    number, rows, each, channels = tokens_nbtc.shape
    return tokens_nbtc.swapaxes(0, 1).reshape(rows, number * each, channels)


def decode(graphdef: Any, state: Any, tokens_bhwc: jax.Array) -> jax.Array:
    """(b, h / 16, w / 16, c) latent tokens -> (b, h, w, 3) in [0, 1], float32."""
    images = nnx.merge(graphdef, state).decode_tokens(tokens_bhwc)
    return jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0, 1)


def velocity_field(
    transformer: Flux2Transformer,
    references_btc: jax.Array,
    grid: tuple[int, int],
    reference_sizes: Sequence[tuple[int, int]],
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """The velocity of a picture's tokens beside its references.

    Args:
      transformer: the model.
      references_btc: (b, tokens of all references, c), possibly none.
      grid: (height, width) of the picture in tokens.
      reference_sizes: the same of each reference.
    Returns: (latents_btc, timesteps (b,), text_btd) -> (b, t, c). Rows beyond b repeat the references.
    """
    image_ids = np.concatenate([latent_ids(*grid), reference_ids(list(reference_sizes))])

    def velocity(latents_btc: jax.Array, timestep_b: jax.Array, text_btd: jax.Array) -> jax.Array:
        repeats = latents_btc.shape[0] // max(references_btc.shape[0], 1)
        references = jnp.tile(references_btc, (repeats, 1, 1)).astype(latents_btc.dtype)
        tokens = jnp.concatenate([latents_btc, references], axis=1)
        out: Any = transformer(tokens, text_btd, timestep_b, image_ids, text_ids(text_btd.shape[1]))
        return out[:, : latents_btc.shape[1]]

    return velocity


def denoise(
    graphdef: Any,
    state: Any,
    latents_btc: jax.Array,
    text_btd: jax.Array,
    references_btc: jax.Array,
    sigmas: jax.Array,
    guidance: jax.Array,
    grid: tuple[int, int],
    reference_sizes: tuple[tuple[int, int], ...],
) -> jax.Array:
    """Solves the flow from noise to pictures.

    Args:
      graphdef, state: the transformer, split.
      latents_btc: noise. text_btd: conditions, b of them, or 2 b, unconditional ones first, for guidance.
      references_btc: tokens of all references. sigmas: (steps + 1,), 1 to 0. guidance: scalar, unused without.
      grid, reference_sizes: see `velocity_field`.
    Returns: (b, t, c) clean latents.
    """
    field = velocity_field(nnx.merge(graphdef, state), references_btc, grid, reference_sizes)

    def velocity(x: jax.Array, sigma: jax.Array, text: jax.Array) -> jax.Array:
        return field(x, jnp.full(x.shape[0], sigma), text)

    with read_only_weights():
        if text_btd.shape[0] == latents_btc.shape[0]:
            return euler_solve(lambda x, sigma: velocity(x, sigma, text_btd), latents_btc, sigmas)
        unconditional, conditional = jnp.split(text_btd, 2)
        return euler_solve(guided(velocity, conditional, unconditional, guidance), latents_btc, sigmas)
