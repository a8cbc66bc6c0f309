"""Autoregressive decoding of a batch of prompts in one compiled program, for models that are a `Decoder`."""

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, PyTree

from clvr_jax.errors import ClvrError
from clvr_jax.models.common.layers import read_only_weights
from clvr_jax.models.common.sampling import UNCHANGED, Sampling, filter_logits, occurrences, penalize
from clvr_jax.programs import StoredFunction
from clvr_jax.trees import Params

CACHE_BUCKET = 64
"""Cache lengths are multiples of this, so that slightly longer prompts or replies need no new cache shape."""

DecodeStep = Callable[[PyTree, jax.Array], tuple[jax.Array, PyTree]]
ChooseToken = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(logits_bv, index of the token in the reply, tokens_bn so far) -> token_b int32."""


class Decoder(Protocol):
    """A model that decodes autoregressively."""

    def prefill(
        self, input_ids_bt: Int[Array, "b t"], *, cache_length: int, **prompts: Any
    ) -> tuple[Float[Array, "b v"], PyTree]:
        """Processes the prompts; returns logits (b, vocab) of the next token and a cache with `cache_length` slots."""
        ...

    def decode_step(self, cache: PyTree, token_b: Int[Array, " b"]) -> tuple[Float[Array, "b v"], PyTree]:
        """Processes one more token of every row; returns logits (b, vocab) of the next token, and the cache."""
        ...


class Prefix(NamedTuple):
    """Beginnings of prompts that a model has processed before, padded to p tokens; rows may have 0 tokens.

    key (rotated), value: (layers, b, p, kv_heads, head_dim). valid_mask_bp: whether an entry has a token; padding is
    after the tokens. input_ids_bp: token ids.
    """

    key: Float[Array, "l b p k h"]
    value: Float[Array, "l b p k h"]
    valid_mask_bp: Bool[Array, "b p"] | Bool[np.ndarray, "b p"]
    input_ids_bp: Int[Array, "b p"] | Int[np.ndarray, "b p"]


class SplitModel(NamedTuple):
    """A module as `nnx.split` returns it. A caller that decodes often splits its model once, which takes some ms."""

    graphdef: nnx.GraphDef[Any]
    state: Params


class Generation(NamedTuple):
    """The decoded tokens of a batch.

    tokens_bn: (b, max_new_tokens) int32, the pad token after the end of a row. length_b: number of tokens of each row,
    with its stop token. stopped_b: whether a stop token ended the row; otherwise max_new_tokens did. logprobs: of the
    tokens; None unless requested. cache: of the model after the last step, with every token of a row but its last one;
    None unless requested.
    """

    tokens_bn: Int[Array, "b n"]
    length_b: Int[Array, " b"]
    stopped_b: Bool[Array, " b"]
    logprobs: "Logprobs | None" = None
    cache: PyTree = None


class Logprobs(NamedTuple):
    """Natural logarithms of token probabilities at temperature 1, whatever the sampling temperature.

    chosen_bn: (b, n), of the decoded tokens. top_bnk: (b, n, k), of the k most likely tokens in descending order, whose
    ids are top_tokens_bnk.
    """

    chosen_bn: Float[Array, "b n"]
    top_bnk: Float[Array, "b n k"]
    top_tokens_bnk: Int[Array, "b n k"]


def generate(
    model: nnx.Module | SplitModel,
    prompts: Mapping[str, PyTree | Hashable],
    *,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...] = (),
    pad_token: int = 0,
    temperature: float = 0.0,
    key: PRNGKeyArray | Key[Array, " b"] | None = None,
    top_logprobs: int = 0,
    sampling: Sampling = UNCHANGED,
    return_cache: bool = False,
) -> Generation:
    """Decodes the replies to a batch of prompts until all rows have stopped.

    It is compiled once for each shape of the prompts, each max_new_tokens and each `sampling`; temperature and key may
    change without another compilation.

    Args:
      model: an NNX module that is a `Decoder`, or its parts.
      prompts: arguments of `model.prefill`, with `input_ids_bt`; with a `prefix`, those of the tokens after it. Arrays
        and trees of arrays are traced; all else (static image grids) must be hashable.
      max_new_tokens: maximum number of tokens of a row.
      stop_tokens: the first of these ends a row.
      pad_token: fills rows that have ended.
      temperature: 0 chooses the most likely token; otherwise tokens are sampled from softmax(logits / temperature).
      key: random key for sampling, of which row i folds in i; or (b,) keys, one for each row. The tokens of a row do
        not depend on the other rows.
      top_logprobs: number of most likely tokens of each position to return with their log-probabilities; 0 returns no
        log-probabilities.
      sampling: repetition penalty, top-k and top-p. The penalty counts the tokens of a row's prompt, without padding,
        and of its reply.
      return_cache: whether the result has the cache.
    Returns: Generation.
    Raises: ClvrError for a max_new_tokens below 1, a negative temperature, or sampling without a key.
    """
    if max_new_tokens < 1:
        raise ClvrError(f"decoding: max_new_tokens {max_new_tokens} must be at least 1")
    if temperature < 0:
        raise ClvrError(f"decoding: temperature {temperature} must not be negative")
    if temperature > 0 and key is None:
        raise ClvrError(f"decoding: temperature {temperature} samples tokens; pass a key")
    traced = {name: value for name, value in prompts.items() if _is_traced(value)}
    static = tuple(sorted((name, value) for name, value in prompts.items() if name not in traced and value is not None))
    graphdef, state = model if isinstance(model, SplitModel) else SplitModel(*nnx.split(model))
    found: Generation = _generate(
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
        return_cache=return_cache,
    )
    return found


def _is_traced(prompt: object) -> bool:
    leaves = jax.tree.leaves(prompt)
    return bool(leaves) and all(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves)


@functools.partial(
    StoredFunction,
    static_argnames=(
        *("graphdef", "static", "max_new_tokens", "stop_tokens", "pad_token", "top_logprobs", "sampling"),
        "return_cache",
    ),
)
def _generate(
    state: Params,
    traced: dict[str, PyTree],
    temperature_and_key: tuple[jax.Array, jax.Array] | None,
    *,
    graphdef: nnx.GraphDef[Any],
    static: tuple[tuple[str, Any], ...],
    max_new_tokens: int,
    stop_tokens: tuple[int, ...],
    pad_token: int,
    top_logprobs: int,
    sampling: Sampling,
    return_cache: bool,
) -> Generation:
    model: Decoder = nnx.merge(graphdef, state)
    ids_bt: jax.Array = traced["input_ids_bt"]
    valid_mask_bt = traced.get("attention_mask_bt", jnp.ones(ids_bt.shape, bool)).astype(bool)
    if isinstance(prefix := traced.get("prefix"), Prefix):
        ids_bt = jnp.concatenate([prefix.input_ids_bp, ids_bt], axis=1)
        valid_mask_bt = jnp.concatenate([prefix.valid_mask_bp, valid_mask_bt], axis=1)
    needed = ids_bt.shape[1] + max_new_tokens
    cache_length = -(-needed // CACHE_BUCKET) * CACHE_BUCKET
    with read_only_weights():
        logits_bv, cache = model.prefill(**traced, **dict(static), cache_length=cache_length)
    choose = _greedy if temperature_and_key is None else _sampler(*temperature_and_key, logits_bv.shape[0], sampling)
    if sampling.repetition_penalty != 1:
        prompt_bv = occurrences(ids_bt, valid_mask_bt, logits_bv.shape[-1])
        choose = _penalized(choose, prompt_bv, sampling.repetition_penalty)

    def step(cache: PyTree, token_b: jax.Array) -> tuple[jax.Array, PyTree]:
        with read_only_weights():
            return model.decode_step(cache, token_b)

    found = decode(
        step,
        logits_bv,
        cache,
        choose,
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
        pad_token=pad_token,
        top_logprobs=top_logprobs,
    )
    return found if return_cache else found._replace(cache=None)


def decode(
    step: DecodeStep,
    logits_bv: Float[Array, "b v"],
    cache: PyTree,
    choose: ChooseToken,
    *,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...],
    pad_token: int,
    top_logprobs: int = 0,
) -> Generation:
    """Runs the decoding loop inside a traced function: chooses a token and processes it, until all rows have stopped.

    Args:
      step: (cache, token_b) -> (logits_bv of the token after it, cache).
      logits_bv: logits of the first new token.
      cache: pytree that each step updates, with free slots for max_new_tokens - 1 tokens.
      choose: chooses the token of each row from its logits.
      max_new_tokens, stop_tokens, pad_token, top_logprobs: as in `generate`.
    Returns: Generation, with the cache.
    """
    b = logits_bv.shape[0]
    stops = jnp.asarray(stop_tokens, jnp.int32)

    def emit(index: jax.Array, logits_bv: jax.Array, so_far: Generation) -> tuple[jax.Array, Generation]:
        token_b = jnp.where(so_far.stopped_b, pad_token, choose(logits_bv, index, so_far.tokens_bn))
        tokens_bn = jax.lax.dynamic_update_slice_in_dim(so_far.tokens_bn, token_b[:, None], index, axis=1)
        length_b = so_far.length_b + ~so_far.stopped_b
        logprobs = so_far.logprobs and _with_logprobs(so_far.logprobs, logits_bv, token_b, index)
        return token_b, Generation(tokens_bn, length_b, so_far.stopped_b | jnp.isin(token_b, stops), logprobs)

    def unfinished(carry: tuple[jax.Array, jax.Array, PyTree, Generation]) -> jax.Array:
        index, _, _, so_far = carry
        return (index < max_new_tokens) & ~so_far.stopped_b.all()

    def body(carry: tuple[jax.Array, jax.Array, PyTree, Generation]) -> tuple[jax.Array, jax.Array, PyTree, Generation]:
        index, token_b, cache, so_far = carry
        logits_bv, cache = step(cache, token_b)
        token_b, so_far = emit(index, logits_bv, so_far)
        return index + 1, token_b, cache, so_far

    logprobs = None
    if top_logprobs:
        top = (b, max_new_tokens, top_logprobs)
        logprobs = Logprobs(jnp.zeros((b, max_new_tokens)), jnp.zeros(top), jnp.zeros(top, jnp.int32))
    tokens_bn = jnp.full((b, max_new_tokens), pad_token, jnp.int32)
    empty = Generation(tokens_bn, jnp.zeros(b, jnp.int32), jnp.zeros(b, bool), logprobs)
    token_b, first = emit(jnp.int32(0), logits_bv, empty)
    _, _, cache, found = jax.lax.while_loop(unfinished, body, (jnp.int32(1), token_b, cache, first))
    return found._replace(cache=cache)


def _with_logprobs(logprobs: Logprobs, logits_bv: jax.Array, token_b: jax.Array, index: jax.Array) -> Logprobs:
    """Returns `logprobs` with the log-probabilities of token `index`."""
    logprobs_bv = jax.nn.log_softmax(logits_bv.astype(jnp.float32))
    top_bk, top_tokens_bk = jax.lax.top_k(logprobs_bv, logprobs.top_bnk.shape[-1])
    new = Logprobs(jnp.take_along_axis(logprobs_bv, token_b[:, None], axis=1)[:, 0], top_bk, top_tokens_bk)
    return Logprobs(
        *(
            jax.lax.dynamic_update_slice_in_dim(old, value[:, None].astype(old.dtype), index, axis=1)
            for old, value in zip(logprobs, new, strict=True)
        )
    )


def _greedy(logits_bv: jax.Array, index: jax.Array, tokens_bn: jax.Array) -> jax.Array:
    return jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)


def _sampler(temperature: jax.Array, key: jax.Array, batch: int, sampling: Sampling) -> ChooseToken:
    row_keys = key if key.ndim else jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(batch))

    def sample(row_key: jax.Array, logits_v: jax.Array, index: jax.Array) -> jax.Array:
        return jax.random.categorical(
            jax.random.fold_in(row_key, index), filter_logits(logits_v / temperature, sampling)
        )

    def choose(logits_bv: jax.Array, index: jax.Array, tokens_bn: jax.Array) -> jax.Array:
        return jax.vmap(sample, in_axes=(0, 0, None))(row_keys, logits_bv, index).astype(jnp.int32)

    return choose


def _penalized(choose: ChooseToken, prompt_bv: jax.Array, penalty: float) -> ChooseToken:
    """Returns `choose` after the repetition penalty. prompt_bv: whether a token occurs in the prompt."""

    def choose_penalized(logits_bv: jax.Array, index: jax.Array, tokens_bn: jax.Array) -> jax.Array:
        is_decoded_bn = jnp.broadcast_to(jnp.arange(tokens_bn.shape[1]) < index, tokens_bn.shape)
        occurred_bv = prompt_bv | occurrences(tokens_bn, is_decoded_bn, logits_bv.shape[-1])
        return choose(penalize(logits_bv.astype(jnp.float32), occurred_bv, penalty), index, tokens_bn)

    return choose_penalized
