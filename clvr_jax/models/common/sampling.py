"""Processing of logits before a token is sampled: repetition penalty, temperature, top-k and top-p, in this order.

The order and the arithmetic are those of transformers' logits processors.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from clvr_jax.errors import ClvrError


@dataclass(frozen=True)
class Sampling:
    """Configuration of token sampling; the defaults sample from the distribution of the model.

    top_k: sample from this many most likely tokens only; 0 is all. top_p: sample from the smallest set of most likely
    tokens whose probabilities sum to at least this; 1 is all. Both have no effect at temperature 0.
    repetition_penalty: divides positive logits, and multiplies negative logits, of tokens that have occurred in the
    prompt or the reply; 1 is no penalty. It also applies at temperature 0.
    """

    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.top_k < 0 or not 0 < self.top_p <= 1 or not self.repetition_penalty > 0:
            raise ClvrError(f"{self}: top_k must be at least 0, top_p in (0, 1], and repetition_penalty above 0")


UNCHANGED = Sampling()
"""Samples from all tokens with the probabilities of the model."""


def penalize(logits_bv: Float[Array, "b v"], occurred_bv: Bool[Array, "b v"], penalty: float) -> Float[Array, "b v"]:
    """Returns logits after the repetition penalty. occurred_bv: bool, whether a token has occurred."""
    penalized_bv = jnp.where(logits_bv < 0, logits_bv * penalty, logits_bv / penalty)
    return jnp.where(occurred_bv, penalized_bv, logits_bv)


def keep_top_k(logits_v: Float[Array, " v"], k: int) -> Float[Array, " v"]:
    """Returns logits with -inf for all but the k most likely tokens; tokens as likely as the k-th are kept."""
    kth = jax.lax.top_k(logits_v, min(k, logits_v.shape[-1]))[0][-1]
    return jnp.where(logits_v < kth, -jnp.inf, logits_v)


def keep_top_p(logits_v: Float[Array, " v"], p: float) -> Float[Array, " v"]:
    """Returns logits with -inf for the least likely tokens, whose probabilities sum to at most 1 - p.

    The most likely token is always kept, and so is every token that is as likely as a kept one.
    """
    ascending_v = jnp.sort(logits_v)
    is_dropped_v = jnp.cumsum(jax.nn.softmax(ascending_v)) <= 1 - p
    first_kept = jnp.minimum(is_dropped_v.sum(), len(ascending_v) - 1)
    return jnp.where(logits_v < ascending_v[first_kept], -jnp.inf, logits_v)


def filter_logits(logits_v: Float[Array, " v"], sampling: Sampling) -> Float[Array, " v"]:
    """Returns the logits of one row after top-k and top-p; they are already divided by the temperature."""
    if sampling.top_k:
        logits_v = keep_top_k(logits_v, sampling.top_k)
    return keep_top_p(logits_v, sampling.top_p) if sampling.top_p < 1 else logits_v


def occurrences(tokens_bt: Int[Array, "b t"], valid_mask_bt: Bool[Array, "b t"], vocab_size: int) -> Bool[Array, "b v"]:
    """Returns which tokens occur in each row at positions of the mask, (b, vocab_size) bool."""
    rows_b1 = jnp.arange(tokens_bt.shape[0])[:, None]
    counted_bt = jnp.where(valid_mask_bt, tokens_bt, vocab_size)
    return jnp.zeros((tokens_bt.shape[0], vocab_size), bool).at[rows_b1, counted_bt].set(True, mode="drop")
