"""The noise that images begin from, and its random keys, in one program each."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from clvr_jax.programs import StoredFunction


def batch_keys(seed: int, rows: int) -> jax.Array:
    """Returns the noise keys of the rows of a batch, from the seed of the batch."""
    if 0 <= seed < 2**31:
        return _batch_keys(np.int32(seed), rows)
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.arange(rows))


@partial(StoredFunction, static_argnums=1)
def _batch_keys(seed: np.int32, rows: int) -> jax.Array:
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.arange(rows))


def row_keys(seeds: Sequence[int]) -> jax.Array:
    """Returns the noise key of each of several independent rows, from its seed."""
    if all(0 <= seed < 2**31 for seed in seeds):
        return _row_keys(np.asarray(seeds, np.int32))
    return jnp.stack([jax.random.fold_in(jax.random.key(seed), 0) for seed in seeds])


@StoredFunction
def _row_keys(seeds_b: np.ndarray) -> jax.Array:
    """Returns the keys of seeds; computed one by one they would be six more programs."""
    return jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 0))(seeds_b)


@partial(StoredFunction, static_argnums=2)
def make_noise(keys: jax.Array, rows: np.ndarray, shape: tuple[int, int, int]) -> jax.Array:
    """Returns noise (rows, h w, channels) from the keys of rows; to index outside would be eight more programs."""
    noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys[rows])
    return noise.reshape(len(rows), shape[0] * shape[1], shape[2])
