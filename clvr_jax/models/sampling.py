"""What happens to logits before a token is drawn: repetition penalty, temperature, top-k and top-p, in this order.

The order and the arithmetic are those of transformers' logits processors.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from clvr_jax.errors import ClvrError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the defaults change nothing.

    top_k: draw from this many likeliest tokens only; 0 is all. top_p: draw from the fewest likeliest tokens whose
    probabilities add up to this share; 1 is all. Neither has a meaning without a temperature. repetition_penalty: of
    the tokens that have occurred, in the prompt or the reply, divide positive logits by this and multiply negative ones
    by it; 1 is none. It acts on greedy decoding too.
    """

    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.top_k < 0 or not 0 < self.top_p <= 1 or not self.repetition_penalty > 0:
            raise ClvrError(f"{self}: top_k must be at least 0, top_p lie in (0, 1], and repetition_penalty be above 0")


UNCHANGED = Sampling()
"""Draws from all tokens with the probabilities that the model gives them."""


def penalize(logits_bv: jax.Array, occurred_bv: jax.Array, penalty: float) -> jax.Array:
    """Returns logits after the repetition penalty. occurred_bv: bool, the tokens that have occurred."""
    penalized_bv = jnp.where(logits_bv < 0, logits_bv * penalty, logits_bv / penalty)
    return jnp.where(occurred_bv, penalized_bv, logits_bv)


def keep_top_k(logits_v: jax.Array, k: int) -> jax.Array:
    """Returns logits with -inf for all but the k likeliest tokens; those as likely as the k-th are kept."""
    kth = jax.lax.top_k(logits_v, min(k, logits_v.shape[-1]))[0][-1]
    return jnp.where(logits_v < kth, -jnp.inf, logits_v)


def keep_top_p(logits_v: jax.Array, p: float) -> jax.Array:
    """Returns logits with -inf for the least likely tokens, whose probabilities add up to at most 1 - p.

    The likeliest token is always kept, and tokens as likely as one that is kept are.
    """
    rising_v = jnp.sort(logits_v)
    is_dropped_v = jnp.cumsum(jax.nn.softmax(rising_v)) <= 1 - p
    first_kept = jnp.minimum(is_dropped_v.sum(), len(rising_v) - 1)
    return jnp.where(logits_v < rising_v[first_kept], -jnp.inf, logits_v)


def filtered(logits_v: jax.Array, sampling: Sampling) -> jax.Array:
    """Returns the logits of one row, already divided by the temperature, after top-k and top-p."""
    if sampling.top_k:
        logits_v = keep_top_k(logits_v, sampling.top_k)
    return keep_top_p(logits_v, sampling.top_p) if sampling.top_p < 1 else logits_v


def occurrences(tokens_bt: jax.Array, is_real_bt: jax.Array, vocab_size: int) -> jax.Array:
    """Returns which tokens occur in each row, (b, vocab_size) bool; places that are not real do not count."""
    rows_b1 = jnp.arange(tokens_bt.shape[0])[:, None]
    counted_bt = jnp.where(is_real_bt, tokens_bt, vocab_size)
    return jnp.zeros((tokens_bt.shape[0], vocab_size), bool).at[rows_b1, counted_bt].set(True, mode="drop")
