"""Qwen3-VL, a vision-language model: the language model, its inputs from the vision tower, and the decoding steps.

Image tokens replace the embeddings of their placeholders, and the features of three vision blocks are added there to
the outputs of the first language layers (DeepStack). Positions have three axes (time, row and column), interleaved over
the frequencies of the rotary embedding.

Source: `Qwen3VLForConditionalGeneration` (transformers); attribute names are its keys.
"""

from typing import Literal, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int, PyTree, Shaped

from clvr_jax.errors import ClvrError
from clvr_jax.models.common.decoding import Prefix
from clvr_jax.models.common.dtypes import Dtypes
from clvr_jax.models.common.layers import embed_tokens, scan_blocks, stack_blocks, vocabulary_logits
from clvr_jax.models.common.quantization import QuantizedEmbed, QuantizedLinear, scaled_product
from clvr_jax.models.qwen3.layers import DecoderLayer, KVCache, Rotary, attend_past, inverse_frequencies
from clvr_jax.models.qwen3_vl.config import Qwen3VLConfig, Qwen3VLTextConfig
from clvr_jax.models.qwen3_vl.image_buckets import BucketedImages, feature_indices
from clvr_jax.models.qwen3_vl.positions import Grids, mrope_axes
from clvr_jax.models.qwen3_vl.vision import Qwen3VLVision, VisionFeatures, concatenated

Pixels = Float[Array, "b n p"] | Float[Array, "n p"] | BucketedImages
"""Patches of images in one of the three formats of `Qwen3VL`."""


class DecodeCache(NamedTuple):
    """The key-value cache of a batch during decoding.

    key, value: (layers, b, kv_heads, slots, head_dim), a head's slots side by side because a step reads them all.
    All rows write their next token into the same `slot`, whatever the length of their prompts. filled_bs: whether a
    slot has a real token. position_b: rotary position of the next token of each row.
    """

    key: Float[Array, "l b k s h"]
    value: Float[Array, "l b k s h"]
    filled_bs: Bool[Array, "b s"]
    slot: Int[Array, ""]
    position_b: Int[Array, " b"]


class _LanguageModel(nnx.Module):
    def __init__(self, config: Qwen3VLTextConfig, *, rngs: nnx.Rngs, **dtypes: Unpack[Dtypes]):
        self.embed_tokens = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs, **dtypes)
        self.layers = stack_blocks(
            lambda rngs: DecoderLayer(config, rngs=rngs, **dtypes), config.num_hidden_layers, rngs
        )
        self.norm = nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, rngs=rngs, **dtypes)


class _Model(nnx.Module):
    def __init__(self, config: Qwen3VLConfig, *, rngs: nnx.Rngs, remat: str, **dtypes: Unpack[Dtypes]):
        self.visual = Qwen3VLVision(config.vision, rngs=rngs, remat=remat, **dtypes)
        self.language_model = _LanguageModel(config.text, rngs=rngs, **dtypes)


class _Injection(NamedTuple):
    """DeepStack features, and for each token the index of its feature."""

    deepstack_kgnd: jax.Array
    index_bt: jax.Array
    is_image_bt: jax.Array


class Qwen3VL(nnx.Module):
    """The vision-language model.

    All shapes are static. Prompts of a batch may have different lengths, with padding on either side, which
    attention_mask_bt excludes. There are three formats of images:
      pixel_values (b, patches, features): every conversation has images of the same static grids, `grid_thw`;
      pixel_values (patches, features): the images of all conversations one after another, `grid_thw` lists them all;
      pixel_values `BucketedImages`: the images of all conversations with traced grids, without `grid_thw`.
    In the first format a conversation with fewer images does not use the last ones.

    Args:
      config: see the presets of `Qwen3VLConfig`.
      rngs: random streams for the initial weights.
      dtype: of the computation; logits are float32. param_dtype: of the weights.
      remat: rematerialization policy of the blocks, a name in `layers.REMAT`.
    Source: `Qwen3VLForConditionalGeneration` (transformers).
    """

    def __init__(
        self,
        config: Qwen3VLConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        remat: str = "dots",
    ):
        self.config = config
        self.remat = remat
        dtypes: Dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.model = _Model(config, rngs=rngs, remat=remat, **dtypes)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else nnx.Linear(config.text.hidden_size, config.text.vocab_size, use_bias=False, rngs=rngs, **dtypes)
        )

    def __call__(
        self,
        input_ids_bt: Int[Array, "b t"],
        pixel_values: Pixels | None = None,
        grid_thw: Grids = (),
        positions_3bt: Int[Array, "3 b t"] | None = None,
        attention_mask_bt: Shaped[Array, "b t"] | None = None,
        *,
        logits_at_bk: Int[Array, "b k"] | None = None,
    ) -> Float32[Array, "b _ v"]:
        """Computes the logits of the next token at every position, for scoring, or training if they fit into memory.

        Args: see `final_states`; logits_at_bk: (b, k) positions at which to compute logits, None for all t.
        Returns: (b, t, vocab_size) or (b, k, vocab_size), float32. Logits at padding are undefined.
        Raises: ClvrError if only one of pixel_values and grid_thw is given, or they disagree.
        """
        x_btd = self.final_states(input_ids_bt, pixel_values, grid_thw, positions_3bt, attention_mask_bt)
        if logits_at_bk is not None:
            x_btd = jnp.take_along_axis(x_btd, logits_at_bk[:, :, None], axis=1)
        return self._logits(x_btd)

    def final_states(
        self,
        input_ids_bt: Int[Array, "b t"],
        pixel_values: Pixels | None = None,
        grid_thw: Grids = (),
        positions_3bt: Int[Array, "3 b t"] | None = None,
        attention_mask_bt: Shaped[Array, "b t"] | None = None,
    ) -> Float[Array, "b t d"]:
        """Returns the output of the last layer after the final norm, (b, t, hidden_size); logits are linear in it.

        Args:
          input_ids_bt: (b, t) token ids; image placeholders are repeated for each image token.
          pixel_values: patches of the images, see the class; None without images.
          grid_thw: static grids of the images.
          positions_3bt: from `mrope_positions`; None counts real tokens, which is correct only without images.
          attention_mask_bt: nonzero at real tokens; None without padding.
        Raises: ClvrError if only one of pixel_values and grid_thw is given, or they disagree.
        """
        positions_3bt = _positions(input_ids_bt, positions_3bt, attention_mask_bt)
        x_btd, injection = self._embed(input_ids_bt, pixel_values, grid_thw)
        x_btd, _ = self._layers(x_btd, self._rotary(positions_3bt), attention_mask_bt, injection)
        out: jax.Array = self.model.language_model.norm(x_btd)
        return out

    @property
    def head_dv(self) -> Float[Array, "d v"]:
        """The matrix of the head, (hidden_size, vocab_size), in the dtype of the weights: logits = states @ head."""
        if self.lm_head is None:
            return self.model.language_model.embed_tokens.embedding[...].T
        return self.lm_head.kernel[...]

    def hidden_states(
        self,
        input_ids_bt: Int[Array, "b t"],
        pixel_values: Pixels | None = None,
        grid_thw: Grids = (),
        positions_3bt: Int[Array, "3 b t"] | None = None,
        attention_mask_bt: Shaped[Array, "b t"] | None = None,
    ) -> Float[Array, "l b t d"]:
        """Returns the residual stream before the first and after each language layer, (layers + 1, b, t, hidden_size).

        Args: see `final_states`. Entry 0 is the embeddings of text and images, entry i the output of layer i - 1 with
        DeepStack features; the final norm is not applied.
        """
        positions_3bt = _positions(input_ids_bt, positions_3bt, attention_mask_bt)
        x_btd, injection = self._embed(input_ids_bt, pixel_values, grid_thw)
        _, hidden_lbtd = self._layers(x_btd, self._rotary(positions_3bt), attention_mask_bt, injection, keep="hidden")
        return jnp.concatenate([x_btd[None], hidden_lbtd])

    def encode_images(self, pixel_values: Pixels, grid_thw: Grids = ()) -> VisionFeatures:
        """Runs the vision tower. pixel_values: see the class; packed images are one row, and so are all classes."""
        visual = self.model.visual
        if isinstance(pixel_values, BucketedImages):
            classes = zip(pixel_values.pixel_values, pixel_values.grid_thw, strict=True)
            features = [visual(jnp.asarray(values), jnp.asarray(grids)).packed() for values, grids in classes]
            return features[0] if len(features) == 1 else concatenated(features)
        return visual(pixel_values[None] if pixel_values.ndim == 2 else pixel_values, grid_thw)

    def prefill(
        self,
        input_ids_bt: Int[Array, "b t"],
        pixel_values: Pixels | None = None,
        grid_thw: Grids = (),
        positions_3bt: Int[Array, "3 b t"] | None = None,
        attention_mask_bt: Shaped[Array, "b t"] | None = None,
        *,
        cache_length: int,
        prefix: Prefix | None = None,
    ) -> tuple[Float32[Array, "b v"], DecodeCache]:
        """Processes the prompts and returns a cache.

        Args: see `final_states`.
          cache_length: static number of slots, for the prefix, the prompts with padding, and the replies.
          prefix: tokens that precede the prompts, processed before. All other arguments are those of the tokens after
            it, at least one of each row; their positions, which are required, are those in the whole conversation.
        Returns: logits (b, vocab_size) float32 of the token after each prompt, and the cache for `decode_step`.
        Raises: ClvrError if the prompt does not fit into the cache, and for a prefix without positions.
        """
        b, t = input_ids_bt.shape
        past_tokens = 0 if prefix is None else prefix.key.shape[2]
        if past_tokens + t > cache_length:
            raise ClvrError(
                f"Qwen3-VL: a prompt of {past_tokens + t} tokens does not fit into a cache of {cache_length} slots"
            )
        if prefix is not None and positions_3bt is None:
            raise ClvrError("Qwen3-VL: a prompt after a prefix needs the positions of its tokens in the conversation")
        valid_mask_bt = jnp.ones((b, t), bool) if attention_mask_bt is None else attention_mask_bt != 0
        positions_3bt = _positions(input_ids_bt, positions_3bt, valid_mask_bt)
        x_btd, injection = self._embed(input_ids_bt, pixel_values, grid_thw)
        filled_bs = valid_mask_bt
        if prefix is not None:
            filled_bs = jnp.concatenate([prefix.valid_mask_bp, valid_mask_bt], axis=1)
        x_btd, past = self._layers(x_btd, self._rotary(positions_3bt), filled_bs, injection, keep="past", prefix=prefix)
        last_b = t - 1 - jnp.argmax(valid_mask_bt[:, ::-1], axis=1)
        last_b1d = self.model.language_model.norm(jnp.take_along_axis(x_btd, last_b[:, None, None], axis=1))
        logits_bv = self._logits(last_b1d)[:, 0]

        free = cache_length - past_tokens - t

        def to_slots(past_lbskh: jax.Array) -> jax.Array:
            return jnp.pad(past_lbskh.swapaxes(2, 3), [(0, 0)] * 3 + [(0, free), (0, 0)])

        cache = DecodeCache(
            key=to_slots(past.key),
            value=to_slots(past.value),
            filled_bs=jnp.pad(filled_bs, ((0, 0), (0, free))),
            slot=jnp.asarray(past_tokens + t, jnp.int32),
            position_b=jnp.max(jnp.where(valid_mask_bt, positions_3bt, -1), axis=(0, 2)).astype(jnp.int32) + 1,
        )
        return logits_bv, cache

    def decode_step(self, cache: DecodeCache, token_b: Int[Array, " b"]) -> tuple[Float32[Array, "b v"], DecodeCache]:
        """Processes one more token of every row.

        Args:
          cache: from `prefill` or an earlier step, with a free slot, which is not checked: the count is traced.
          token_b: (b,) token ids.
        Returns: logits (b, vocab_size) float32 of the next token, and the cache with this token.
        """
        rotary = self._rotary(jnp.broadcast_to(cache.position_b[None, :, None], (3, token_b.shape[0], 1)))

        def step(
            layer: DecoderLayer, x_b1d: jax.Array, past: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            query, key, value = layer.self_attn.project(layer.input_layernorm(x_b1d), rotary)
            out_b1e = attend_past(query, key, value, *past, cache.filled_bs)
            x_b1d = x_b1d + layer.self_attn.o_proj(out_b1e)
            return x_b1d + layer.mlp(layer.post_attention_layernorm(x_b1d)), (key, value)

        # The layers only read the cache; the new keys and values of all layers are written afterwards, in place.
        language = self.model.language_model
        x_b1d = embed_tokens(language.embed_tokens, token_b[:, None])
        x_b1d, new = scan_blocks(language.layers, step, x_b1d, (cache.key, cache.value))

        def write(past_lbksh: jax.Array, new_lb1kh: jax.Array) -> jax.Array:
            new = new_lb1kh.swapaxes(2, 3).astype(past_lbksh.dtype)
            return jax.lax.dynamic_update_slice_in_dim(past_lbksh, new, cache.slot, axis=3)

        filled_bs = jax.lax.dynamic_update_slice_in_dim(
            cache.filled_bs, jnp.ones_like(cache.filled_bs[:, :1]), cache.slot, 1
        )
        cache = DecodeCache(
            write(cache.key, new[0]), write(cache.value, new[1]), filled_bs, cache.slot + 1, cache.position_b + 1
        )
        return self._logits(language.norm(x_b1d))[:, 0], cache

    def _embed(
        self, input_ids_bt: jax.Array, pixel_values: Pixels | None, grid_thw: Grids
    ) -> tuple[jax.Array, _Injection | None]:
        x_btd = self.model.language_model.embed_tokens(input_ids_bt)
        is_bucketed = isinstance(pixel_values, BucketedImages)
        if (pixel_values is None or is_bucketed) != (not grid_thw):
            raise ClvrError("Qwen3-VL: pixel_values and grid_thw must both be given, or neither")
        if pixel_values is None:
            return x_btd, None
        features = self.encode_images(pixel_values, grid_thw)
        groups, tokens = features.tokens_bnd.shape[:2]
        b, t = input_ids_bt.shape
        if groups not in (1, b):
            raise ClvrError(
                f"Qwen3-VL: pixel_values have {groups} rows, input_ids {b}; they must be equal, or packed in one row"
            )
        # The i-th placeholder of a row (of the batch, if images are packed) gets the i-th image token.
        is_image_bt = input_ids_bt == self.config.image_token_id
        index_bt = (jnp.cumsum(is_image_bt.reshape(groups, -1), axis=1) - 1).reshape(b, t)
        if isinstance(pixel_values, BucketedImages):
            index_bt = feature_indices(pixel_values, index_bt)
        index_bt = jnp.clip(index_bt, 0, tokens - 1)
        injection = _Injection(features.deepstack_kbnd, index_bt, is_image_bt)
        return jnp.where(is_image_bt[:, :, None], _take(features.tokens_bnd, index_bt), x_btd), injection

    def _rotary(self, positions_3bt: jax.Array) -> Rotary:
        """Returns cosines and sines (b, t, head_dim / 2) float32 of three-axis positions."""
        config = self.config.text
        axes = mrope_axes(config.head_dim, config.mrope_section)
        positions_btf = jnp.moveaxis(positions_3bt[axes], 0, -1).astype(jnp.float32)
        angles = positions_btf * inverse_frequencies(config.head_dim, config.rope_theta)
        return jnp.cos(angles), jnp.sin(angles)

    def _layers(
        self,
        x_btd: jax.Array,
        rotary: Rotary,
        mask: jax.Array | None,
        injection: _Injection | None,
        *,
        keep: Literal["nothing", "hidden", "past"] = "nothing",
        prefix: Prefix | None = None,
    ) -> tuple[jax.Array, PyTree]:
        """Applies the language layers to prompts.

        A `prefix` of p tokens requires keep="past" and a mask (b, p + t).
        Returns: the output before the final norm, and for `keep` the outputs of all layers (layers, b, t, d), or a
        KVCache with the keys and values of prefix and prompt, each (layers, b, p + t, kv_heads, head_dim).
        """
        config, (b, t, _) = self.config.text, x_btd.shape
        past_tokens = 0 if prefix is None else prefix.key.shape[2]

        def step(
            layer: DecoderLayer, x_btd: jax.Array, own: tuple[jax.Array, KVCache | None]
        ) -> tuple[jax.Array, PyTree]:
            index, earlier = own
            empty = jnp.zeros((b, t, config.num_key_value_heads, config.head_dim), x_btd.dtype)
            cache = KVCache(empty, empty) if keep == "past" else None
            if earlier is not None:
                cache = KVCache(*(jnp.concatenate([each.astype(empty.dtype), empty], axis=1) for each in earlier))
            x_btd, past = layer(x_btd, rotary, mask, cache, past_tokens)
            if injection is not None:
                x_btd = _inject(x_btd, index, injection)
            return x_btd, {"nothing": None, "hidden": x_btd, "past": past}[keep]

        earlier = None if prefix is None else KVCache(prefix.key, prefix.value)
        own = (jnp.arange(config.num_hidden_layers), earlier)
        return scan_blocks(self.model.language_model.layers, step, x_btd, own, remat=self.remat)

    def _logits(self, x_btd: jax.Array) -> jax.Array:
        head = self.model.language_model.embed_tokens if self.lm_head is None else self.lm_head
        if isinstance(head, QuantizedEmbed):
            return self._quantized_logits(x_btd, head.embedding[...], head.embedding_scale[...], is_tied=True)
        if isinstance(head, QuantizedLinear):
            return self._quantized_logits(x_btd, head.kernel[...], head.kernel_scale[...], is_tied=False)
        if self.lm_head is None:
            return vocabulary_logits(x_btd, self.model.language_model.embed_tokens.embedding[...], is_tied=True)
        return vocabulary_logits(x_btd, self.lm_head.kernel[...], is_tied=False)

    @staticmethod
    def _quantized_logits(x_btd: jax.Array, weights: jax.Array, scale_v: jax.Array, *, is_tied: bool) -> jax.Array:
        # Decoding is a loop: without the barrier, XLA would cast all weights before the loop and store the copy.
        x_btd, weights = jax.lax.optimization_barrier((x_btd, weights))
        return scaled_product(x_btd, weights.T if is_tied else weights, scale_v)


def _take(features_gnd: jax.Array, index_bt: jax.Array) -> jax.Array:
    """Returns the feature of each token, (b, t, d), from features (g, n, d) of g = b rows, or of one row for all."""
    groups = features_gnd.shape[0]
    index_gt = index_bt.reshape(groups, -1)
    return jnp.take_along_axis(features_gnd, index_gt[:, :, None], axis=1).reshape(*index_bt.shape, -1)


def _inject(x_btd: jax.Array, index: jax.Array, injection: _Injection) -> jax.Array:
    """Adds the DeepStack features of layer `index` at image tokens; only the first layers have any.

    It branches inside one scan, because two scans over slices of the stack would copy the weights.
    """
    layers = injection.deepstack_kgnd.shape[0]

    def add(x_btd: jax.Array) -> jax.Array:
        features_gnd = jax.lax.dynamic_index_in_dim(injection.deepstack_kgnd, index, keepdims=False)
        own_btd = _take(features_gnd, injection.index_bt)
        return x_btd + jnp.where(injection.is_image_bt[:, :, None], own_btd, 0)

    out: jax.Array = jax.lax.cond(index < layers, add, lambda x_btd: x_btd, x_btd)
    return out


def _positions(
    input_ids_bt: jax.Array, positions_3bt: jax.Array | None, attention_mask_bt: jax.Array | None
) -> jax.Array:
    if positions_3bt is not None:
        return positions_3bt
    valid_mask_bt = jnp.ones(input_ids_bt.shape, bool) if attention_mask_bt is None else attention_mask_bt != 0
    counted_bt = jnp.maximum(jnp.cumsum(valid_mask_bt, axis=1) - 1, 0)
    return jnp.broadcast_to(counted_bt, (3, *input_ids_bt.shape))
