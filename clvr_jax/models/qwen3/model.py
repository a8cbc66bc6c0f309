"""Qwen3: the text encoder of FLUX.2 klein, and a causal language model.

FLUX.2 is conditioned on the hidden states of the prompt after layers 9, 18 and 27, padding included; `hidden_states`
returns them and runs no layer after the last requested one.

Source: Qwen3ForCausalLM (transformers); attribute names are its keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from clvr_jax.errors import ClvrError
from clvr_jax.models.common.layers import layer_of, scan_blocks, stack_blocks
from clvr_jax.models.qwen3.layers import DecoderLayer, KVCache, Rotary, causal_mask, rotary_tables


@dataclass(frozen=True)
class Qwen3Config:
    """Configuration of a Qwen3 language model, with the field names of the transformers `config.json`."""

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 12288
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    max_position_embeddings: int = 40960
    attention_bias: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        positive = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
            "head_dim rms_norm_eps rope_theta max_position_embeddings"
        )
        for name in positive.split():
            if getattr(self, name) <= 0:
                raise ClvrError(f"Qwen3Config.{name} is {getattr(self, name)}; it must be positive")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ClvrError(
                f"Qwen3Config.num_key_value_heads {self.num_key_value_heads} must divide "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ClvrError(f"Qwen3Config.head_dim is {self.head_dim}; it must be even (rotary pairs)")

    @classmethod
    def qwen3_4b(cls) -> "Qwen3Config":
        """Returns Qwen3-4B, the text encoder of FLUX.2 klein 4B."""
        return cls(hidden_size=2560, intermediate_size=9728, tie_word_embeddings=True)

    @classmethod
    def qwen3_8b(cls) -> "Qwen3Config":
        """Returns Qwen3-8B, the text encoder of FLUX.2 klein 9B."""
        return cls()


class Qwen3Model(nnx.Module):
    """Embeddings, a stack of `depth` decoder layers with a leading layer axis, and the final norm after all layers."""

    def __init__(
        self, config: Qwen3Config, depth: int, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike
    ) -> None:
        self.embed_tokens = nnx.Embed(
            config.vocab_size, config.hidden_size, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.layers = stack_blocks(
            lambda layer_rngs: DecoderLayer(config, rngs=layer_rngs, dtype=dtype, param_dtype=param_dtype),
            depth,
            rngs,
        )
        if depth == config.num_hidden_layers:
            self.norm = nnx.RMSNorm(
                config.hidden_size, epsilon=config.rms_norm_eps, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )


class Qwen3(nnx.Module):
    """Qwen3 language model: token ids to logits, to hidden states, or to logits with a key-value cache.

    Args:
      config: see the presets of `Qwen3Config`.
      rngs: random streams for the initial weights.
      dtype: dtype of the computation; norms, rotations and softmax are float32 inside.
      param_dtype: dtype of the weights.
      remat: rematerialization policy of the blocks, a name in `layers.REMAT`.
      depth: number of first layers that the module has, without a head, for their hidden states; None has all layers.

    Attributes:
      is_whole: whether the module has all weights; otherwise only `hidden_states` can be called.
    """

    def __init__(
        self,
        config: Qwen3Config,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        remat: str = "dots",
        depth: int | None = None,
    ) -> None:
        self.config = config
        self.remat = remat
        self.depth = config.num_hidden_layers if depth is None else depth
        if not 1 <= self.depth <= config.num_hidden_layers:
            raise ClvrError(f"Qwen3: depth {depth} must be from 1 to {config.num_hidden_layers}")
        has_head = depth is None and not config.tie_word_embeddings
        self.is_whole = self.depth == config.num_hidden_layers and (has_head or config.tie_word_embeddings)
        self.model = Qwen3Model(config, self.depth, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        if has_head:
            self.lm_head = nnx.Linear(
                config.hidden_size, config.vocab_size, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

    def __call__(
        self,
        input_ids_bt: Int[Array, "b t"],
        attention_mask_bt: Shaped[Array, "b t"] | None = None,
        positions_bt: Int[Array, "#b t"] | None = None,
    ) -> Float[Array, "b t v"]:
        """Computes the logits of the next token at every position.

        Args:
          input_ids_bt: (b, t) token ids.
          attention_mask_bt: (b, t), 0 at padding; None if there is none.
          positions_bt: (b, t) rotary positions; None is 0, 1, ... even with a mask, as in transformers.
        Returns: (b, t, vocab_size) in the compute dtype.
        """
        self._check_whole()
        rotary, mask = self._tables(input_ids_bt, attention_mask_bt, positions_bt)

        def step(layer: DecoderLayer, x_btd: jax.Array, _: None) -> tuple[jax.Array, None]:
            return layer(x_btd, rotary, mask)[0], None

        embedded = self.model.embed_tokens(input_ids_bt)
        return self._logits(scan_blocks(self.model.layers, step, embedded, remat=self.remat)[0])

    def hidden_states(
        self,
        input_ids_bt: Int[Array, "b t"],
        attention_mask_bt: Shaped[Array, "b t"] | None = None,
        layers: Sequence[int] = (9, 18, 27),
    ) -> tuple[Float[Array, "b t d"], ...]:
        """Computes the residual stream after the given layers; no layer after the last of them is run.

        Args:
          input_ids_bt: (b, t) token ids.
          attention_mask_bt: (b, t), 0 at padding; states at padding attend to the real tokens only.
          layers: indices as transformers counts them: 0 is the embeddings, k the output of k layers, and
            num_hidden_layers the last output after the final norm.
        Returns: one (b, t, hidden_size) array for each of `layers`, in this order.
        Raises: ClvrError for an index that the module does not have.
        """
        if not layers or any(not 0 <= layer <= self.depth for layer in layers):
            raise ClvrError(f"hidden_states: layers {tuple(layers)} must be indices in 0..{self.depth}, at least one")
        rotary, mask = self._tables(input_ids_bt, attention_mask_bt, None)
        graphdef, stacked = nnx.split(self.model.layers)
        requested = sorted(set(layers))

        def step(x_btd: jax.Array, index: jax.Array) -> jax.Array:
            # Indexes into the whole stack: a slice of the requested layers would copy their weights.
            layer, x_btd = layer_of(stacked, index, x_btd)
            return nnx.merge(graphdef, layer)(x_btd, rotary, mask)[0]

        def keep(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            x_btd, kept_lbtd = carry
            x_btd = step(x_btd, index)
            # The slot of the next requested depth, which every layer overwrites until that one. The slot is counted: a
            # search would be a nested loop, for which XLA's compiler for GPUs fails.
            slot = jnp.sum(jnp.asarray(requested) <= index)
            return x_btd, jax.lax.dynamic_update_index_in_dim(kept_lbtd, x_btd, slot, 0)

        embedded = self.model.embed_tokens(input_ids_bt)
        kept_lbtd = jnp.broadcast_to(embedded, (len(requested), *embedded.shape))
        _, kept_lbtd = jax.lax.fori_loop(0, requested[-1], keep, (embedded, kept_lbtd))
        states = {index: kept_lbtd[slot] for slot, index in enumerate(requested)}
        if (last := self.config.num_hidden_layers) in states:
            states[last] = self.model.norm(states[last])
        return tuple(states[index] for index in layers)

    def decode(
        self,
        input_ids_bt: Int[Array, "b t"],
        cache: KVCache,
        start: Int[Array, ""] | Int[Array, " b"] | int,
        keys: int | None = None,
    ) -> tuple[Float[Array, "b t v"], KVCache]:
        """Computes the logits of t tokens that follow those in the cache; a call with start 0 processes the prompt.

        Prompts of different lengths are padded on the right; the next tokens overwrite the padding.

        Args:
          input_ids_bt: (b, t) token ids.
          cache: from `empty_cache(config, num_hidden_layers, b, max_len)` or an earlier call.
          start: number of tokens already in the cache, one integer or (b,).
          keys: number of leading cache entries to attend to, at least start + t; None is max_len.
        Returns: (b, t, vocab_size) logits and the cache with the new tokens.
        """
        self._check_whole()
        t = input_ids_bt.shape[1]
        positions_bt = jnp.reshape(jnp.asarray(start), (-1, 1)) + jnp.arange(t)
        rotary = rotary_tables(positions_bt, self.config.head_dim, self.config.rope_theta)
        mask = causal_mask(t, cache.key.shape[2] if keys is None else keys, start)

        def step(layer: DecoderLayer, x_btd: jax.Array, past: KVCache) -> tuple[jax.Array, KVCache]:
            x_btd, updated = layer(x_btd, rotary, mask, past, start)
            assert updated is not None  # a layer that is given a cache returns it
            return x_btd, updated

        x_btd, cache = scan_blocks(self.model.layers, step, self.model.embed_tokens(input_ids_bt), cache)
        return self._logits(x_btd), cache

    def _tables(
        self, input_ids_bt: jax.Array, attention_mask_bt: jax.Array | None, positions_bt: jax.Array | None
    ) -> tuple[Rotary, jax.Array | None]:
        """Returns rotary tables and attention mask; None is causal attention without padding."""
        t = input_ids_bt.shape[1]
        if attention_mask_bt is not None and attention_mask_bt.shape != input_ids_bt.shape:
            raise ClvrError(
                f"attention_mask has shape {attention_mask_bt.shape}, input_ids {input_ids_bt.shape}; they must agree"
            )
        if positions_bt is None:
            positions_bt = jnp.arange(t)[None]
        return rotary_tables(positions_bt, self.config.head_dim, self.config.rope_theta), attention_mask_bt

    def _check_whole(self) -> None:
        if not self.is_whole:
            raise ClvrError(
                f"Qwen3: this module has {self.depth} of {self.config.num_hidden_layers} layers and no head; load all "
                "layers to compute logits"
            )

    def _logits(self, x_btd: jax.Array) -> jax.Array:
        normed = self.model.norm(x_btd)
        return self.model.embed_tokens.attend(normed) if self.config.tie_word_embeddings else self.lm_head(normed)
