"""The keys of noise are those of `jax.random`, whatever the seed."""

import jax
import numpy as np
import pytest

from clvr_jax.pipelines.flux2.noise import batch_keys, row_keys

SEEDS = [0, 1, 7, 2**31 - 1, 2**31, 2**32 - 1, -1]


def bits(keys):
    return np.asarray(jax.random.key_data(keys))


@pytest.mark.parametrize("seed", SEEDS)
def test_rows_of_a_batch_have_the_keys_of_its_seed(seed):
    expected = [bits(jax.random.fold_in(jax.random.key(seed), row)) for row in range(3)]
    np.testing.assert_array_equal(bits(batch_keys(seed, 3)), expected)


def test_independent_rows_have_the_keys_of_their_seeds():
    for seeds in (SEEDS, SEEDS[:4]):
        expected = [bits(jax.random.fold_in(jax.random.key(seed), 0)) for seed in seeds]
        np.testing.assert_array_equal(bits(row_keys(seeds)), expected)
