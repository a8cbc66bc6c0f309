"""The functions of FLUX.2 that are jitted: encode text, encode references, cache references, denoise, decode.

Pipelines, training and the planner trace the same functions. Models are passed as graph definition and state.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from clvr_jax.diffusion import classifier_free_guidance, euler_solve
from clvr_jax.models.common.layers import read_only_weights
from clvr_jax.models.flux2 import AutoencoderKLFlux2, Flux2Transformer, ReferenceCache
from clvr_jax.models.flux2.position_ids import latent_ids, reference_ids, text_ids
from clvr_jax.models.qwen3 import Qwen3
from clvr_jax.pipelines.flux2.settings import ReferenceMode
from clvr_jax.trees import Params

References = Float[Array, "b n c"] | tuple[ReferenceCache, ...]
"""What an image attends to of its references: their latent tokens, or the caches of their keys and values."""


def encode_text(
    graphdef: nnx.GraphDef[Qwen3], state: Params, ids: jax.Array, mask: jax.Array, layers: tuple[int, ...]
) -> jax.Array:
    """Returns the hidden states at `layers`, concatenated: ids and mask (b, t) -> (b, t, layers * d)."""
    return jnp.concatenate(nnx.merge(graphdef, state).hidden_states(ids, mask, layers), axis=-1)


def encode_images(graphdef: nnx.GraphDef[AutoencoderKLFlux2], state: Params, images_bhwc: jax.Array) -> jax.Array:
    """Encodes images to latent tokens: (b, h, w, 3) in [-1, 1] -> (b, h / 16, w / 16, c)."""
    return nnx.merge(graphdef, state).encode_tokens(images_bhwc)


def encode_references(
    graphdef: nnx.GraphDef[AutoencoderKLFlux2], state: Params, images_bnhwc: jax.Array, dtype: DTypeLike
) -> jax.Array:
    """Encodes n references of each row to latent tokens: uint8 (b, n, h, w, 3) -> (b, tokens of all n, c)."""

    def encode(images_bhwc: jax.Array) -> jax.Array:
        tokens_bhwc = encode_images(graphdef, state, (images_bhwc.astype(jnp.float32) / 127.5 - 1).astype(dtype))
        return tokens_bhwc.reshape(len(images_bhwc), -1, tokens_bhwc.shape[-1])

    # One reference of every row at a time: the encoder's activations for all n need more memory than all the rest.
    tokens_nbtc = jax.lax.map(encode, images_bnhwc.swapaxes(0, 1))
    number, rows, each, channels = tokens_nbtc.shape
    out: jax.Array = tokens_nbtc.swapaxes(0, 1).reshape(rows, number * each, channels)
    return out


def cache_references(
    graphdef: nnx.GraphDef[Flux2Transformer],
    state: Params,
    tokens_btc: jax.Array,
    sizes: tuple[tuple[int, int], ...],
    first: int = 0,
    earlier: tuple[ReferenceCache, ...] = (),
    quantize: bool = False,
) -> ReferenceCache:
    """Computes the keys and values of references, which attend to each other and to earlier ones.

    Args:
      graphdef, state: of the transformer.
      tokens_btc: (b, tokens of these references, c).
      sizes: (height, width) of each of them in tokens.
      first: number of earlier references.
      earlier: their caches, of b rows each.
      quantize: see `Flux2Transformer.reference_cache`.
    """
    with read_only_weights():
        transformer = nnx.merge(graphdef, state)
        ids = reference_ids(sizes, first)
        return transformer.reference_cache(tokens_btc, ids, earlier=earlier, quantize=quantize)


def attended_references(
    transformer: Flux2Transformer, tokens_btc: jax.Array, sizes: Sequence[tuple[int, int]], mode: ReferenceMode
) -> References:
    """Returns what images attend to of their references, as a model of this mode does; it can be differentiated.

    Args:
      transformer: the model.
      tokens_btc: (b, tokens of all references, c).
      sizes: (height, width) of each reference in tokens.
      mode: see `ReferenceMode`.
    """
    if mode == "none" or not sizes:
        return tokens_btc
    lengths = [height * width for height, width in sizes] if mode == "loop" else ()
    return (transformer.reference_cache(tokens_btc, reference_ids(list(sizes)), lengths=lengths),)


def decode(graphdef: nnx.GraphDef[AutoencoderKLFlux2], state: Params, tokens_bhwc: jax.Array) -> jax.Array:
    """Decodes latent tokens to images: (b, h / 16, w / 16, c) -> float32 (b, h, w, 3) in [0, 1]."""
    images = nnx.merge(graphdef, state).decode_tokens(tokens_bhwc)
    return jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0, 1)


def velocity_field(
    transformer: Flux2Transformer,
    references: References,
    grid: tuple[int, int],
    reference_sizes: Sequence[tuple[int, int]],
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Returns the velocity function of an image's tokens, given its references.

    Args:
      transformer: the model.
      references: (b, tokens of all references, c), possibly none, or their caches, of b rows each.
      grid: (height, width) of the image in tokens.
      reference_sizes: (height, width) of each reference in tokens; not used with caches, whose keys are rotated.
    Returns: (latents_btc, timesteps (b,), text_btd) -> (b, t, c). The number of rows may be a multiple of b; the
      references are repeated.
    """
    cached, tokens_btc = (references, None) if isinstance(references, tuple) else ((), references)
    image_ids = latent_ids(*grid)
    if tokens_btc is not None:
        image_ids = np.concatenate([image_ids, reference_ids(list(reference_sizes))])

    def velocity(latents_btc: jax.Array, timestep_b: jax.Array, text_btd: jax.Array) -> jax.Array:
        tokens, rows = latents_btc, latents_btc.shape[0]
        if tokens_btc is not None:
            repeated = jnp.tile(tokens_btc, (rows // max(tokens_btc.shape[0], 1), 1, 1)).astype(latents_btc.dtype)
            tokens = jnp.concatenate([latents_btc, repeated], axis=1)
        caches = tuple(cache.repeated(rows // cache.rows) for cache in cached)
        out = transformer(tokens, text_btd, timestep_b, image_ids, text_ids(text_btd.shape[1]), cached=caches)
        assert isinstance(out, jax.Array)
        return out[:, : latents_btc.shape[1]]

    return velocity


def packed_velocity_field(
    transformer: Flux2Transformer, references_btc: jax.Array, grid: tuple[int, int], seen_bn: jax.Array
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Returns the velocity function of n images of each trajectory, which share the keys and values of references.

    Reference k attends to references 1 to k, as in the mode "loop", so one computation of each serves all later images.

    Args:
      transformer: the model.
      references_btc: (b, tokens of all references, c), in order and all of one size.
      grid: (height, width) of each image and each reference in tokens.
      seen_bn: (b, n) number of references that an image attends to, the first ones.
    Returns: (latents_btc, timesteps (b * n,), text_btd) -> (b * n, t, c); the n images of a trajectory follow each
      other.
    """
    tokens, number = grid[0] * grid[1], references_btc.shape[1] // (grid[0] * grid[1])
    cached = attended_references(transformer, references_btc, [grid] * number, "loop")
    caches = cached if isinstance(cached, tuple) else ()
    mask_bk = jnp.arange(number * tokens) < seen_bn.reshape(-1, 1) * tokens if number else None

    def velocity(latents_btc: jax.Array, timestep_b: jax.Array, text_btd: jax.Array) -> jax.Array:
        ids = latent_ids(*grid), text_ids(text_btd.shape[1])
        out = transformer(latents_btc, text_btd, timestep_b, *ids, cached=caches, cached_mask_bk=mask_bk)
        assert isinstance(out, jax.Array)
        return out

    return velocity


def denoise(
    graphdef: nnx.GraphDef[Flux2Transformer],
    state: Params,
    latents_btc: jax.Array,
    text_btd: jax.Array,
    references: References,
    sigmas: jax.Array,
    guidance: jax.Array,
    grid: tuple[int, int],
    reference_sizes: tuple[tuple[int, int], ...],
    bounds: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Integrates the flow from noise to images.

    Args:
      graphdef, state: of the transformer.
      latents_btc: noise, or the result of earlier steps.
      text_btd: conditions (b, ...), or (2 b, ...) with the unconditional ones first, for guidance.
      references: see `velocity_field`.
      sigmas: (steps + 1,) noise levels, from 1 to 0.
      guidance: scalar, the guidance scale; not used without unconditional rows.
      grid, reference_sizes: see `velocity_field`.
      bounds: the steps to take, see `euler_solve`; all of them if None.
    Returns: (b, t, c) latents, clean ones after the last step.
    """
    field = velocity_field(nnx.merge(graphdef, state), references, grid, reference_sizes)

    def velocity(x: jax.Array, sigma: jax.Array, text: jax.Array) -> jax.Array:
        return field(x, jnp.full(x.shape[0], sigma), text)

    with read_only_weights():
        if text_btd.shape[0] == latents_btc.shape[0]:
            return euler_solve(lambda x, sigma: velocity(x, sigma, text_btd), latents_btc, sigmas, bounds)
        unconditional, conditional = jnp.split(text_btd, 2)
        return euler_solve(
            classifier_free_guidance(velocity, conditional, unconditional, guidance), latents_btc, sigmas, bounds
        )
