"""The FLUX.2 transformer (klein 4B and 9B, dev): predicts the velocity of latent tokens, given text and references.

Double-stream blocks (text and image side by side) come first, then single-stream blocks over both. Shift, scale and
gate depend on the timestep and are shared by all blocks of one kind. Reference images are further image tokens with
their own ids (`position_ids`), or are attended to through a cache of their keys and values (`reference_cache`).

Source: FLUX.2 by Black Forest Labs, `Flux2Transformer2DModel` (diffusers); attribute names are its keys.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from clvr_jax.errors import ClvrError
from clvr_jax.models.common.layers import scan_blocks, stack_blocks
from clvr_jax.models.flux2.blocks import (
    Modulation,
    OutputNorm,
    Precision,
    Rotary,
    SingleTransformerBlock,
    TimestepGuidanceEmbeddings,
    TransformerBlock,
    linear,
)
from clvr_jax.models.flux2.config import Flux2TransformerConfig
from clvr_jax.models.flux2.position_ids import host_ids, rotary_tables
from clvr_jax.models.flux2.reference_cache import (
    Attend,
    CachedKeyValue,
    KeyValue,
    ReferenceCache,
    attend,
    attend_to_earlier,
    expected_arrays,
)
from clvr_jax.sharding import with_logical_constraint


class Flux2HiddenStates(NamedTuple):
    """The residual stream after every block, layer axis first."""

    image_lbtd: Float[Array, "l b t d"]
    """(num_layers, b, image tokens, d) after each double-stream block."""
    text_lbtd: Float[Array, "l b s d"]
    """(num_layers, b, text tokens, d) after each double-stream block."""
    joint_lbtd: Float[Array, "m b n d"]
    """(num_single_layers, b, text + image tokens, d) after each single-stream block."""


class Flux2Transformer(nnx.Module):
    """The FLUX.2 transformer. Blocks are stacked along a leading layer axis and run by `lax.scan`.

    Args:
      config: see the presets of `Flux2TransformerConfig`.
      rngs: random streams for the initial weights.
      dtype: dtype of the computation; norms, rotations and softmax are float32 inside.
      param_dtype: dtype of the weights.
      remat: rematerialization policy of the blocks, a name in `layers.REMAT`.
    """

    def __init__(
        self,
        config: Flux2TransformerConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        remat: str = "dots",
    ) -> None:
        precision = Precision(dtype, param_dtype)
        self.config = config
        self.dtype = precision.dtype
        self.remat = remat
        self.time_guidance_embed = TimestepGuidanceEmbeddings(config, precision, rngs)
        self.double_stream_modulation_img = Modulation(config, 2, precision, rngs)
        self.double_stream_modulation_txt = Modulation(config, 2, precision, rngs)
        self.single_stream_modulation = Modulation(config, 1, precision, rngs)
        self.x_embedder = linear(config.in_channels, config.inner_dim, precision, rngs)
        self.context_embedder = linear(config.joint_attention_dim, config.inner_dim, precision, rngs)
        self.transformer_blocks = stack_blocks(
            lambda block_rngs: TransformerBlock(config, precision, block_rngs), config.num_layers, rngs
        )
        self.single_transformer_blocks = stack_blocks(
            lambda block_rngs: SingleTransformerBlock(config, precision, block_rngs), config.num_single_layers, rngs
        )
        self.norm_out = OutputNorm(config, precision, rngs)
        self.proj_out = linear(config.inner_dim, config.token_channels, precision, rngs)

    def __call__(
        self,
        hidden_states_btc: Float[Array, "b t c"],
        encoder_hidden_states_btd: Float[Array, "b s d"],
        timestep_b: Float[Array, " b"],
        img_ids: Int[np.ndarray, "... t axes"],
        txt_ids: Int[np.ndarray, "... s axes"],
        guidance_b: Float[Array, " b"] | None = None,
        *,
        mask_bt: Bool[Array, "b s+t"] | None = None,
        cached: Sequence[ReferenceCache] = (),
        cached_mask_bk: Bool[Array, "b k"] | None = None,
        return_hidden_states: bool = False,
    ) -> Float[Array, "b t p"] | tuple[Float[Array, "b t p"], Flux2HiddenStates]:
        """Predicts the velocity of every image token, references included (the caller drops those).

        Args:
          hidden_states_btc: (b, image tokens, in_channels) noisy latents, then references if any.
          encoder_hidden_states_btd: (b, text tokens, joint_attention_dim).
          timestep_b: (b,) in [0, 1], 1 is noise. Rounded to the compute dtype before it is multiplied by 1000, as
            diffusers does: to eight bits in bfloat16.
          img_ids, txt_ids: (tokens, 4) host arrays, see `position_ids`; a leading axis of equal rows is accepted.
          guidance_b: (b,) guidance scale, required if the model embeds guidance and an error otherwise.
          mask_bt: (b, text + image tokens) boolean, False at padding that no token may attend to. The published models
            are run without it: they attend to all 512 text positions.
          cached: references that text and image attend to, from `reference_cache`, instead of reference tokens. Of r
            times fewer rows than the batch, each row of them serves r consecutive rows.
          cached_mask_bk: (b, tokens of all of them) boolean, False at tokens that a row does not attend to.
          return_hidden_states: also return the residual stream after every block.
        Returns: (b, image tokens, patch_size ** 2 * out_channels) in the compute dtype, or that and the hidden states.
        Raises: ClvrError if shapes disagree, ids are traced, a cache is of another model, dtype or batch, or guidance
          is missing or not supported.
        """
        self._check(hidden_states_btc, guidance_b, cached, cached_mask_bk)
        _check_features("encoder_hidden_states", encoder_hidden_states_btd, self.config.joint_attention_dim)
        text = encoder_hidden_states_btd.shape[1]
        rotary = self._rotary(("txt_ids", txt_ids, text), ("img_ids", img_ids, hidden_states_btc.shape[1]))

        embedding_bd = self.time_guidance_embed(timestep_b, guidance_b)
        image_modulation = self.double_stream_modulation_img(embedding_bd)
        text_modulation = self.double_stream_modulation_txt(embedding_bd)
        modulation = self.single_stream_modulation(embedding_bd)

        def attention_to(references: tuple[CachedKeyValue, ...]) -> Attend:
            return partial(attend, references=references, mask_bt=mask_bt, reference_mask_bk=cached_mask_bk)

        def double(
            block: TransformerBlock, carry: tuple[jax.Array, jax.Array], references: tuple[CachedKeyValue, ...]
        ) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array] | None]:
            image, text = block(*carry, image_modulation, text_modulation, rotary, attention_to(references))
            carry = (
                with_logical_constraint(image, "batch", "tokens", None),
                with_logical_constraint(text, "batch", "tokens", None),
            )
            return carry, carry if return_hidden_states else None

        def single(
            block: SingleTransformerBlock, x_btd: jax.Array, references: tuple[CachedKeyValue, ...]
        ) -> tuple[jax.Array, jax.Array | None]:
            x_btd, _ = block(x_btd, modulation, rotary, attention_to(references))
            x_btd = with_logical_constraint(x_btd, "batch", "tokens", None)
            return x_btd, x_btd if return_hidden_states else None

        streams = self.x_embedder(hidden_states_btc), self.context_embedder(encoder_hidden_states_btd)
        of_double, of_single = tuple(cache.double for cache in cached), tuple(cache.single for cache in cached)
        (image_btd, text_btd), double_states = scan_blocks(
            self.transformer_blocks, double, streams, of_double, remat=self.remat
        )
        joint_btd = jnp.concatenate([text_btd, image_btd], axis=1)
        joint_btd, joint_states = scan_blocks(
            self.single_transformer_blocks, single, joint_btd, of_single, remat=self.remat
        )
        velocity = self.proj_out(self.norm_out(joint_btd[:, text:], embedding_bd))
        if double_states is None or joint_states is None:
            return velocity
        image_lbtd, text_lbtd = double_states
        return velocity, Flux2HiddenStates(image_lbtd, text_lbtd, joint_states)

    def reference_cache(
        self,
        hidden_states_btc: Float[Array, "b n c"],
        img_ids: Int[np.ndarray, "... n axes"],
        guidance_b: Float[Array, " b"] | None = None,
        *,
        earlier: Sequence[ReferenceCache] = (),
        lengths: Sequence[int] = (),
        quantize: bool = False,
    ) -> ReferenceCache:
        """Returns the keys and values of reference tokens, which depend on nothing but the references.

        The tokens attend to each other and to earlier references, not to text or image, and are modulated as at
        timestep 0.

        Args:
          hidden_states_btc: (b, tokens, in_channels) latents of the references.
          img_ids: (tokens, 4), see `position_ids.reference_ids`.
          guidance_b: as in a call.
          earlier: caches of earlier references, which these attend to as well.
          lengths: number of tokens of each reference, if reference k attends to references 1 to k only; () lets all
            tokens attend to each other.
          quantize: return keys and values as 8-bit integers. The tokens attend to their own before these are rounded.
        Raises: ClvrError as a call does, and if the lengths are of another number of tokens.
        Source: the extraction at the first step of `Flux2KleinKVPipeline` (diffusers).
        """
        self._check(hidden_states_btc, guidance_b, earlier)
        if lengths and sum(lengths) != hidden_states_btc.shape[1]:
            raise ClvrError(f"reference cache: lengths {tuple(lengths)} for {hidden_states_btc.shape[1]} tokens")
        rotary = self._rotary(("img_ids", img_ids, hidden_states_btc.shape[1]))
        embedding_bd = self.time_guidance_embed(jnp.zeros(len(hidden_states_btc)), guidance_b)
        image_modulation = self.double_stream_modulation_img(embedding_bd)
        modulation = self.single_stream_modulation(embedding_bd)

        def attention_to(references: tuple[CachedKeyValue, ...]) -> Attend:
            return partial(attend_to_earlier, references=references, lengths=lengths)

        def stored(own: KeyValue) -> CachedKeyValue:
            return own.quantized() if quantize else own.constrained()

        def double(
            block: TransformerBlock, x_btd: jax.Array, references: tuple[CachedKeyValue, ...]
        ) -> tuple[jax.Array, CachedKeyValue]:
            x_btd, own = block.references(x_btd, image_modulation, rotary, attention_to(references))
            return with_logical_constraint(x_btd, "batch", "tokens", None), stored(own)

        def single(
            block: SingleTransformerBlock, x_btd: jax.Array, references: tuple[CachedKeyValue, ...]
        ) -> tuple[jax.Array, CachedKeyValue]:
            x_btd, own = block(x_btd, modulation, rotary, attention_to(references))
            return with_logical_constraint(x_btd, "batch", "tokens", None), stored(own)

        of_double, of_single = tuple(cache.double for cache in earlier), tuple(cache.single for cache in earlier)
        x_btd, double_cache = scan_blocks(
            self.transformer_blocks, double, self.x_embedder(hidden_states_btc), of_double, remat=self.remat
        )
        _, single_cache = scan_blocks(self.single_transformer_blocks, single, x_btd, of_single, remat=self.remat)
        return ReferenceCache(double_cache, single_cache)

    def _rotary(self, *streams: tuple[str, np.ndarray, int]) -> Rotary:
        """Returns cosines and sines, each (tokens of all streams, head_dim / 2).

        streams: name of the ids, ids, and number of tokens of each stream, in the order of attention.
        """
        axes, checked = self.config.axes_dims_rope, []
        for name, ids, tokens in streams:
            checked.append(host_ids(ids, len(axes), name))
            if len(checked[-1]) != tokens:
                raise ClvrError(f"{name}: ids are for {len(checked[-1])} tokens; got {tokens}")
        cos, sin = rotary_tables(np.concatenate(checked), axes, self.config.rope_theta)
        return jnp.asarray(cos), jnp.asarray(sin)

    def _check(
        self,
        tokens: jax.Array,
        guidance_b: jax.Array | None,
        cached: Sequence[ReferenceCache],
        cached_mask_bk: jax.Array | None = None,
    ) -> None:
        _check_features("hidden_states", tokens, self.config.in_channels)
        if self.config.guidance_embeds and guidance_b is None:
            raise ClvrError("this FLUX.2 model embeds a guidance scale; pass guidance_b")
        if not self.config.guidance_embeds and guidance_b is not None:
            raise ClvrError(
                "this FLUX.2 model embeds no guidance scale; omit guidance_b and use classifier_free_guidance"
            )
        rows, size = len(tokens), (self.config.num_attention_heads, self.config.attention_head_dim)
        number = sum(cache.tokens for cache in cached)
        if cached_mask_bk is not None and cached_mask_bk.shape != (rows, number):
            raise ClvrError(f"cached_mask_bk has shape {cached_mask_bk.shape}; expected {(rows, number)}")
        for cache in cached:
            shared = cache.rows if cache.rows and not rows % cache.rows else rows
            for name, depth in (("double", self.config.num_layers), ("single", self.config.num_single_layers)):
                own = getattr(cache, name)
                needed = expected_arrays(own, (depth, shared, cache.tokens, *size), self.dtype)
                for array, (shape, dtype) in zip(own, needed, strict=True):
                    if array.shape != shape or array.dtype != dtype:
                        raise ClvrError(
                            f"reference cache: {name} is {array.dtype} {array.shape}; this model takes "
                            f"{dtype} {shape} (layers, rows, tokens, heads, head_dim)"
                        )


def _check_features(name: str, array: jax.Array, features: int) -> None:
    if array.ndim != 3 or array.shape[-1] != features:
        raise ClvrError(f"{name} has shape {array.shape}; expected (batch, tokens, {features})")
