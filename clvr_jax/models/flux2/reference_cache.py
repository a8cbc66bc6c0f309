"""Keys and values of reference tokens, which are computed once and attended to in every denoising step.

In a model that was trained for it, reference tokens attend to reference tokens only and are modulated as at timestep 0.
Their keys and values then depend neither on the text, nor on the noise, nor on the timestep.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from clvr_jax.models.common.attention import attention
from clvr_jax.sharding import with_logical_constraint


class KeyValue(NamedTuple):
    """Keys, after norm and rotation, and values of tokens in one block; with a leading layer axis in a stack of blocks.

    key, value: (b, tokens, heads, head_dim) in the compute dtype.
    """

    key: Float[Array, "*l b k n h"]
    value: Float[Array, "*l b k n h"]

    def constrained(self) -> "KeyValue":
        """Returns the keys and values of one block, sharded as attention takes them: by rows and heads."""
        return KeyValue(*(with_logical_constraint(x, "batch", None, "heads", None) for x in self))


class ReferenceCache(NamedTuple):
    """Keys and values of reference tokens in all blocks.

    double: of the double-stream blocks, (num_layers, b, tokens, heads, head_dim) each. single: of the single-stream
    blocks, (num_single_layers, ...).
    """

    double: KeyValue
    single: KeyValue

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
        return self if repeats == 1 else jax.tree.map(lambda x: jnp.tile(x, (1, repeats, 1, 1, 1)), self)


def attend(
    query_bqnh: Float[Array, "b q n h"],
    own: KeyValue,
    references: Sequence[KeyValue] = (),
    mask_bt: Bool[Array, "b t"] | None = None,
) -> Float[Array, "b q d"]:
    """Returns the attention of queries to their own sequence and to cached references, heads merged.

    Args:
      query_bqnh: queries, after norm and rotation.
      own: keys and values of the sequence that the queries belong to.
      references: keys and values of cached references, which all queries attend to.
      mask_bt: `key_mask_bk` of `attention` for the keys of `own`.
    """
    key_bknh, value_bknh = own
    if references:
        key_bknh, value_bknh = (jnp.concatenate(parts, axis=1) for parts in zip(own, *references, strict=True))
        if mask_bt is not None:
            cached = key_bknh.shape[1] - mask_bt.shape[1]
            mask_bt = jnp.pad(mask_bt, ((0, 0), (0, cached)), constant_values=True)
    out = attention(query_bqnh, key_bknh, value_bknh, key_mask_bk=mask_bt)
    return out.reshape(*out.shape[:2], -1)
