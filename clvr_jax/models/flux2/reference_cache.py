"""Keys and values of reference tokens, which are computed once and attended to in every denoising step.

In a model that was trained for it, reference tokens attend to reference tokens only and are modulated as at timestep 0.
Their keys and values then depend neither on the text, nor on the noise, nor on the timestep. They are stored in the
compute dtype, or as 8-bit integers in about half the memory of bfloat16.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int8

from clvr_jax.models.common.attention import attention
from clvr_jax.models.common.quantization import quantize
from clvr_jax.sharding import with_logical_constraint


class KeyValue(NamedTuple):
    """Keys, after norm and rotation, and values of tokens in one block; with a leading layer axis in a stack of blocks.

    key, value: (b, tokens, heads, head_dim) in the compute dtype.
    """

    key: Float[Array, "*l b k n h"]
    value: Float[Array, "*l b k n h"]

    def quantized(self) -> "QuantizedKeyValue":
        """Returns the keys and values of one block as 8-bit integers."""
        stored = [quantize(x, axis=-1) for x in self]
        key, value = (with_logical_constraint(x, "batch", None, "heads", None) for x, _ in stored)
        key_scale, value_scale = (
            with_logical_constraint(scale.swapaxes(1, 2), "batch", "heads", None) for _, scale in stored
        )
        return QuantizedKeyValue(key, value, key_scale, value_scale)

    def constrained(self) -> "KeyValue":
        """Returns the keys and values of one block, sharded as attention takes them: by rows and heads."""
        return KeyValue(*(with_logical_constraint(x, "batch", None, "heads", None) for x in self))

    def shared_by(self, rows: int) -> "KeyValue":
        """Returns the keys and values of one block for `rows` rows, each row of them repeated consecutively."""
        repeats = rows // len(self.key)
        return self if repeats == 1 else KeyValue(*(jnp.repeat(x, repeats, axis=0) for x in self)).constrained()


class QuantizedKeyValue(NamedTuple):
    """Keys and values of tokens in one block as 8-bit integers, with one scale for each token and head.

    key, value: int8, with the axes of `KeyValue`. key_scale, value_scale: float32 (b, heads, tokens), the largest
    absolute value among the channels of a head / 127. The tokens are the last axis, because accelerators pad it.
    """

    key: Int8[Array, "*l b k n h"]
    value: Int8[Array, "*l b k n h"]
    key_scale: Float32[Array, "*l b n k"]
    value_scale: Float32[Array, "*l b n k"]

    def dequantized(self, dtype: DTypeLike) -> KeyValue:
        """Returns the keys and values of one block in a dtype."""
        pairs = (self.key, self.key_scale), (self.value, self.value_scale)
        return KeyValue(
            *((x.astype(jnp.float32) * scale.swapaxes(1, 2)[..., None]).astype(dtype) for x, scale in pairs)
        )


CachedKeyValue = KeyValue | QuantizedKeyValue


def expected_arrays(
    stored: CachedKeyValue, shape: tuple[int, int, int, int, int], dtype: DTypeLike
) -> list[tuple[tuple[int, ...], np.dtype]]:
    """Returns shape and dtype of each array of a stack of blocks.

    Args:
      stored: keys and values, quantized or not.
      shape: (layers, rows, tokens, heads, head_dim).
      dtype: of the computation.
    """
    layers, rows, tokens, heads, _ = shape
    if isinstance(stored, KeyValue):
        return [(shape, np.dtype(dtype))] * 2
    return [(shape, np.dtype(np.int8))] * 2 + [((layers, rows, heads, tokens), np.dtype(np.float32))] * 2


class ReferenceCache(NamedTuple):
    """Keys and values of reference tokens in all blocks.

    double: of the double-stream blocks, (num_layers, b, tokens, heads, head_dim) each. single: of the single-stream
    blocks, (num_single_layers, ...).
    """

    double: CachedKeyValue
    single: CachedKeyValue

    @property
    def rows(self) -> int:
        """Number of rows of the batch."""
        return int(self.double.key.shape[1])

    @property
    def tokens(self) -> int:
        """Number of reference tokens of each row."""
        return int(self.double.key.shape[2])

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, over all devices."""
        return sum(int(leaf.nbytes) for leaf in jax.tree.leaves(self))

    def repeated(self, repeats: int) -> "ReferenceCache":
        """Returns the cache for `repeats` copies of the rows, one copy of all rows after the other."""
        return self if repeats == 1 else jax.tree.map(lambda x: jnp.tile(x, (1, repeats, *[1] * (x.ndim - 2))), self)


Attend = Callable[[Float[Array, "b q n h"], KeyValue], Float[Array, "b q d"]]
"""(queries after norm and rotation, keys and values of their own sequence) -> attention, heads merged."""


def attend(
    query_bqnh: Float[Array, "b q n h"],
    own: KeyValue,
    references: Sequence[CachedKeyValue] = (),
    mask_bt: Bool[Array, "b t"] | None = None,
    reference_mask_bk: Bool[Array, "b k"] | None = None,
) -> Float[Array, "b q d"]:
    """Returns the attention of queries to their own sequence and to cached references, heads merged.

    Args:
      query_bqnh: queries, after norm and rotation.
      own: keys and values of the sequence that the queries belong to.
      references: keys and values of cached references, quantized or not. Of r times fewer rows than the queries, each
        row serves r consecutive rows of queries.
      mask_bt: `key_mask_bk` of `attention` for the keys of `own`.
      reference_mask_bk: the same for the keys of all references; None attends to all of them.
    """
    key_bknh, value_bknh = own
    if references:
        in_dtype = [each if isinstance(each, KeyValue) else each.dequantized(own.key.dtype) for each in references]
        shared = [reference.shared_by(len(query_bqnh)) for reference in in_dtype]
        key_bknh, value_bknh = (jnp.concatenate(parts, axis=1) for parts in zip(own, *shared, strict=True))
        if mask_bt is not None or reference_mask_bk is not None:
            rows, tokens = own.key.shape[:2]
            cached = key_bknh.shape[1] - tokens
            mask_bt = jnp.ones((rows, tokens), bool) if mask_bt is None else mask_bt
            visible = jnp.ones((rows, cached), bool) if reference_mask_bk is None else reference_mask_bk
            mask_bt = jnp.concatenate([mask_bt, visible], axis=1)
    out = attention(query_bqnh, key_bknh, value_bknh, key_mask_bk=mask_bt)
    return out.reshape(*out.shape[:2], -1)


def attend_to_earlier(
    query_bqnh: Float[Array, "b q n h"],
    own: KeyValue,
    references: Sequence[CachedKeyValue] = (),
    *,
    lengths: Sequence[int] = (),
) -> Float[Array, "b q d"]:
    """Returns the attention of reference tokens to those of the same reference and of earlier ones, heads merged.

    There is one product for each reference instead of a mask, so that no kernel computes what the mask would discard.

    Args:
      query_bqnh, own, references: see `attend`.
      lengths: number of tokens of each reference in the sequence; () is one reference.
    """
    if len(lengths) < 2:
        return attend(query_bqnh, own, references)
    query_bqnh, own = with_logical_constraint(query_bqnh, "batch", None, "heads", None), own.constrained()
    ends = np.cumsum(lengths).tolist()
    parts = [
        attend(query_bqnh[:, start:end], KeyValue(own.key[:, :end], own.value[:, :end]), references)
        for start, end in zip([0, *ends], ends, strict=False)
    ]
    return jnp.concatenate(parts, axis=1)
