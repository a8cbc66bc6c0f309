"""Attempts are sampled in rounds, in order, each once."""

import pytest

from clvr_jax.reasoning.retries import retry_rounds


@pytest.mark.parametrize(
    ("attempts", "rounds"),
    [(0, []), (1, [[0]]), (3, [[0], [1], [2]]), (8, [[0], [1], [2, 3], [4, 5, 6, 7]]), (6, [[0], [1], [2, 3], [4, 5]])],
)
def test_each_round_has_as_many_attempts_as_all_before(attempts, rounds):
    assert [list(each) for each in retry_rounds(attempts)] == rounds
