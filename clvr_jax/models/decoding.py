"""Decoding: prompts in, tokens out, one compiled program for the whole batch.

Knows no model: it needs the two methods of `Decoder`, as `Qwen3VL` has them.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from clvr_jax.errors import ClvrError
from clvr_jax.models.layers import read_only_weights
from clvr_jax.models.sampling import UNCHANGED, Sampling, filtered, occurrences, penalize

CACHE_BUCKET = 64
"""Caches are as long as the next multiple of this, so that slightly longer prompts or replies keep their layout."""

Step = Callable[[Any, jax.Array], tuple[jax.Array, Any]]
Choose = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(logits_bv, number of the token, tokens_bn so far) -> token_b int32."""


class Decoder(Protocol):
    """A model that can be decoded from."""

    def prefill(self, input_ids_bt: jax.Array, *, cache_length: int, **prompts: Any) -> tuple[jax.Array, Any]:
        """Reads the prompts; returns logits (b, vocab) of the next token and a cache with `cache_length` slots."""
        ...

    def decode_step(self, cache: Any, token_b: jax.Array) -> tuple[jax.Array, Any]:
        """Reads one more token of every row; returns logits (b, vocab) of the one after it, and the cache."""
        ...


class Generation(NamedTuple):
    """What was decoded.

    tokens_bn: (b, max_new_tokens) int32, the pad token after a row's end. length_b: how many of them are the row's,
    its stop token included. stopped_b: whether a stop token ended the row; if not, max_new_tokens did. logprobs: of the
    tokens, None unless they were asked for.
    """

    tokens_bn: jax.Array
    length_b: jax.Array
    stopped_b: jax.Array
    logprobs: "Logprobs | None" = None


class Logprobs(NamedTuple):
    """Natural logarithms of token probabilities at temperature 1, whatever temperature tokens were drawn at.

    chosen_bn: (b, n) of the tokens themselves. top_bnk: (b, n, k) of the likeliest tokens, top_tokens_bnk, in falling
    order.
    """

    chosen_bn: jax.Array
    top_bnk: jax.Array
    top_tokens_bnk: jax.Array


def generate(
    model: Any,
    prompts: Mapping[str, Any],
    *,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...] = (),
    pad_token: int = 0,
    temperature: float = 0.0,
    key: jax.Array | None = None,
    top_logprobs: int = 0,
    sampling: Sampling = UNCHANGED,
) -> Generation:
    """Continues a batch of prompts until each has stopped.

    Compiled once for each shape of the prompts, each max_new_tokens and each `sampling`; temperature and key may change
    freely.

    Args:
      model: an NNX module that is a `Decoder`.
      prompts: arguments of `model.prefill`; arrays are traced, all else (image grids) is static and must be hashable.
        `input_ids_bt` must be among them.
      max_new_tokens: most tokens of a row.
      stop_tokens: a row ends with the first of these.
      pad_token: fills rows that have ended.
      temperature: 0 takes the likeliest token, otherwise tokens are drawn from softmax(logits / temperature).
      key: random key, needed to sample: one for all rows, of which row i has its own stream, or (b,) keys, one for each
        row. A row's tokens depend on its own stream only, whatever other rows there are.
      top_logprobs: how many of the likeliest tokens of every position are returned with their probabilities; 0 returns
        no probabilities.
      sampling: repetition penalty, top-k and top-p. The penalty counts the tokens of a row's own prompt, without
        padding, and of its reply.
    Returns: Generation.
    Raises: ClvrError for a temperature or count that makes no sense, or a missing key.
    """
    if max_new_tokens < 1:
        raise ClvrError(f"decoding: max_new_tokens {max_new_tokens} must be at least 1")
    if temperature < 0:
        raise ClvrError(f"decoding: temperature {temperature} must not be negative")
    if temperature > 0 and key is None:
        raise ClvrError(f"decoding: temperature {temperature} draws tokens and needs a key")
    traced = {name: value for name, value in prompts.items() if isinstance(value, jax.Array | np.ndarray)}
    static = tuple(sorted((name, value) for name, value in prompts.items() if name not in traced and value is not None))
    graphdef, state = nnx.split(model)
    return _generate(
        state,
        traced,
        (jnp.float32(temperature), key) if temperature > 0 else None,
        graphdef=graphdef,
        static=static,
        max_new_tokens=max_new_tokens,
        stop_tokens=tuple(stop_tokens),
        pad_token=pad_token,
        top_logprobs=top_logprobs,
        sampling=sampling,
    )


@functools.partial(
    jax.jit,
    static_argnames=("graphdef", "static", "max_new_tokens", "stop_tokens", "pad_token", "top_logprobs", "sampling"),
)
def _generate(
    state: Any,
    traced: dict[str, jax.Array],
    draw: tuple[jax.Array, jax.Array] | None,
    *,
    graphdef: Any,
    static: tuple[tuple[str, Any], ...],
    max_new_tokens: int,
    stop_tokens: tuple[int, ...],
    pad_token: int,
    top_logprobs: int,
    sampling: Sampling,
) -> Generation:
    model: Decoder = nnx.merge(graphdef, state)
    needed = traced["input_ids_bt"].shape[1] + max_new_tokens
    cache_length = -(-needed // CACHE_BUCKET) * CACHE_BUCKET
    with read_only_weights():
        logits_bv, cache = model.prefill(**traced, **dict(static), cache_length=cache_length)
    choose = _greedy if draw is None else _sampler(*draw, logits_bv.shape[0], sampling)
    if sampling.repetition_penalty != 1:
        ids_bt = traced["input_ids_bt"]
        is_real_bt = traced.get("attention_mask_bt", jnp.ones(ids_bt.shape, bool)).astype(bool)
        prompt_bv = occurrences(ids_bt, is_real_bt, logits_bv.shape[-1])
        choose = _penalized(choose, prompt_bv, sampling.repetition_penalty)

    def step(cache: Any, token_b: jax.Array) -> tuple[jax.Array, Any]:
        with read_only_weights():
            return model.decode_step(cache, token_b)

    return decode(
        step,
        logits_bv,
        cache,
        choose,
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
        pad_token=pad_token,
        top_logprobs=top_logprobs,
    )


def decode(
    step: Step,
    logits_bv: jax.Array,
    cache: Any,
    choose: Choose,
    *,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...],
    pad_token: int,
    top_logprobs: int = 0,
) -> Generation:
    """The loop itself, to be traced: chooses a token, reads it, until all rows have stopped or the room is used up.

    Args:
      step: (cache, token_b) -> (logits_bv of the token after it, cache).
      logits_bv: of the first new token.
      cache: pytree, handed from step to step; max_new_tokens - 1 tokens must fit.
      choose: the token of each row from its logits.
      max_new_tokens, stop_tokens, pad_token, top_logprobs: as in `generate`.
    Returns: Generation.
    """
    b = logits_bv.shape[0]
    stops = jnp.asarray(stop_tokens, jnp.int32)

    def emit(number: jax.Array, logits_bv: jax.Array, so_far: Generation) -> tuple[jax.Array, Generation]:
        token_b = jnp.where(so_far.stopped_b, pad_token, choose(logits_bv, number, so_far.tokens_bn))
        tokens_bn = jax.lax.dynamic_update_slice_in_dim(so_far.tokens_bn, token_b[:, None], number, axis=1)
        length_b = so_far.length_b + ~so_far.stopped_b
        logprobs = so_far.logprobs and _with_logprobs(so_far.logprobs, logits_bv, token_b, number)
        return token_b, Generation(tokens_bn, length_b, so_far.stopped_b | jnp.isin(token_b, stops), logprobs)

    def unfinished(carry: tuple[jax.Array, jax.Array, Any, Generation]) -> jax.Array:
        number, _, _, so_far = carry
        return (number < max_new_tokens) & ~so_far.stopped_b.all()

    def body(carry: tuple[jax.Array, jax.Array, Any, Generation]) -> tuple[jax.Array, jax.Array, Any, Generation]:
        number, token_b, cache, so_far = carry
        logits_bv, cache = step(cache, token_b)
        token_b, so_far = emit(number, logits_bv, so_far)
        return number + 1, token_b, cache, so_far

    logprobs = None
    if top_logprobs:
        top = (b, max_new_tokens, top_logprobs)
        logprobs = Logprobs(jnp.zeros((b, max_new_tokens)), jnp.zeros(top), jnp.zeros(top, jnp.int32))
    tokens_bn = jnp.full((b, max_new_tokens), pad_token, jnp.int32)
    empty = Generation(tokens_bn, jnp.zeros(b, jnp.int32), jnp.zeros(b, bool), logprobs)
    token_b, first = emit(jnp.int32(0), logits_bv, empty)
    return jax.lax.while_loop(unfinished, body, (jnp.int32(1), token_b, cache, first))[-1]


def _with_logprobs(logprobs: Logprobs, logits_bv: jax.Array, token_b: jax.Array, number: jax.Array) -> Logprobs:
    """The probabilities so far and those of token `number`."""
    logprobs_bv = jax.nn.log_softmax(logits_bv.astype(jnp.float32))
    top_bk, top_tokens_bk = jax.lax.top_k(logprobs_bv, logprobs.top_bnk.shape[-1])
    new = Logprobs(jnp.take_along_axis(logprobs_bv, token_b[:, None], axis=1)[:, 0], top_bk, top_tokens_bk)
    return Logprobs(
        *(
            jax.lax.dynamic_update_slice_in_dim(old, value[:, None].astype(old.dtype), number, axis=1)
            for old, value in zip(logprobs, new, strict=True)
        )
    )


def _greedy(logits_bv: jax.Array, number: jax.Array, tokens_bn: jax.Array) -> jax.Array:
    return jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)


def _sampler(temperature: jax.Array, key: jax.Array, batch: int, sampling: Sampling) -> Choose:
    row_keys = key if key.ndim else jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(batch))

    def draw(row_key: jax.Array, logits_v: jax.Array, number: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(row_key, number), filtered(logits_v / temperature, sampling))

    def choose(logits_bv: jax.Array, number: jax.Array, tokens_bn: jax.Array) -> jax.Array:
        return jax.vmap(draw, in_axes=(0, 0, None))(row_keys, logits_bv, number).astype(jnp.int32)

    return choose


def _penalized(choose: Choose, prompt_bv: jax.Array, penalty: float) -> Choose:
    """Chooses from logits after the repetition penalty. prompt_bv: the tokens that occur in the prompts."""

    def choose_other(logits_bv: jax.Array, number: jax.Array, tokens_bn: jax.Array) -> jax.Array:
        is_written_bn = jnp.broadcast_to(jnp.arange(tokens_bn.shape[1]) < number, tokens_bn.shape)
        occurred_bv = prompt_bv | occurrences(tokens_bn, is_written_bn, logits_bv.shape[-1])
        return choose(penalize(logits_bv.astype(jnp.float32), occurred_bv, penalty), number, tokens_bn)

    return choose_other
