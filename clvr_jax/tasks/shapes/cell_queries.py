"""Attention of nine queries, one for each cell of the canvas: the start of the prediction heads of the shapes world."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Shaped

from clvr_jax.models.common.attention import attention
from clvr_jax.worlds.shapes.scene import CELLS


class CellQueries(nnx.Module):
    """Reads a sequence once for each cell; a head derives from it and maps what was read to its predictions.

    Args:
      features: width of the sequence.
      rngs: random streams for the initial weights.
    """

    heads, head_dim = 4, 32

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        queries = jax.random.normal(rngs.params(), (len(CELLS), self.heads, self.head_dim))
        self.queries = nnx.Param(3 * queries)  # so that a query can look at a single token from the start
        self.norm = nnx.RMSNorm(features, rngs=rngs)
        self.key = nnx.Linear(features, self.width, use_bias=False, rngs=rngs)
        self.value = nnx.Linear(features, self.width, use_bias=False, rngs=rngs)

    @property
    def width(self) -> int:
        """Number of values that are read for a cell."""
        return self.heads * self.head_dim

    def read(
        self,
        tokens_btd: Float[Array, "b t d"],
        mask_bt: Shaped[Array, "b t"] | None = None,
        positions_tk: Float[Array, "t k"] | float = 0.0,
    ) -> Float[Array, "b 9 k"]:
        """Returns what the queries read, (b, 9, width).

        Args:
          tokens_btd: (b, t, features).
          mask_bt: nonzero at tokens that may be read; None for all.
          positions_tk: (t, width), added to the keys.
        """
        tokens = self.norm(tokens_btd)
        batch, length = tokens.shape[:2]
        key, value = (
            part.reshape(batch, length, self.heads, -1)
            for part in (self.key(tokens) + positions_tk, self.value(tokens))
        )
        queries = jnp.broadcast_to(self.queries[...], (batch, *self.queries.shape))
        mask = None if mask_bt is None else mask_bt[:, None, None, :].astype(bool)
        return attention(queries, key, value, mask=mask).reshape(batch, len(CELLS), -1)
