"""Attempts are sampled in rounds, in order, each once, and at rising temperatures."""

import pytest

from clvr_jax.reasoning.retries import retry_rounds, temperature_of


@pytest.mark.parametrize(
    ("attempts", "rounds"),
    [(0, []), (1, [[0]]), (3, [[0], [1], [2]]), (8, [[0], [1], [2, 3], [4, 5, 6, 7]]), (6, [[0], [1], [2, 3], [4, 5]])],
)
def test_each_round_has_as_many_attempts_as_all_before(attempts, rounds):
    assert [list(each) for each in retry_rounds(attempts)] == rounds


def test_temperatures_rise_from_that_of_a_retry_to_the_highest():
    assert [temperature_of(attempt, 1.5) for attempt in (0, 1, 2, 3, 9, 10, 16)] == [0.0, 0.7, 0.8, 0.9, 1.5, 1.5, 1.5]
    assert [temperature_of(attempt) for attempt in (0, 1, 4, 5)] == [0.0, 0.7, 1.0, 1.0]
