import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.providers.batching import DynamicBatcher


class Squares:
    """Squares, with the batches it was given; negative numbers fail."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __call__(self, numbers):
        self.batches.append(list(numbers))
        if any(number < 0 for number in numbers):
            raise ValueError(f"negative: {min(numbers)}")
        return [number**2 for number in numbers]


def chat_all(gathered, numbers):
    """Every number from a thread of its own; exceptions in the place of results."""

    def ask(number):
        try:
            return gathered(number)
        except ValueError as error:
            return error

    with ThreadPoolExecutor(max(1, len(numbers))) as pool:
        return list(pool.map(ask, numbers))


def test_callers_share_a_batch_and_get_their_own_results():
    squares = Squares()
    with DynamicBatcher(squares, max_batch=64, wait=2) as gathered:
        assert chat_all(gathered, list(range(64))) == [number**2 for number in range(64)]
    assert sorted(squares.batches[0]) == list(range(64))
    assert len(squares.batches) == 1


def test_a_full_batch_does_not_wait():
    with DynamicBatcher(Squares(), max_batch=4, wait=60) as gathered:
        began = time.monotonic()
        chat_all(gathered, [1, 2, 3, 4])
        assert time.monotonic() - began < 30


def test_no_batch_is_larger_than_allowed():
    squares = Squares()
    with DynamicBatcher(squares, max_batch=3, wait=0.2) as gathered:
        assert chat_all(gathered, list(range(10))) == [number**2 for number in range(10)]
    assert max(map(len, squares.batches)) <= 3


def test_one_caller_waits_for_company_only_so_long():
    squares = Squares()
    with DynamicBatcher(squares, max_batch=8, wait=0.05) as gathered:
        began = time.monotonic()
        assert gathered(7) == 49
        assert 0.05 <= time.monotonic() - began < 5
    assert squares.batches == [[7]]


def test_who_comes_while_a_batch_runs_shares_the_next():
    running, go = threading.Event(), threading.Event()
    batches = []

    def slow(numbers):
        batches.append(sorted(numbers))
        running.set()
        go.wait(20)
        return list(numbers)

    with DynamicBatcher(slow, max_batch=8, wait=0) as gathered, ThreadPoolExecutor(4) as pool:
        first = pool.submit(gathered, 0)
        running.wait(20)
        others = [pool.submit(gathered, number) for number in (1, 2, 3)]
        while len(gathered._waiting) < 3:
            time.sleep(0.001)
        go.set()
        assert [each.result() for each in (first, *others)] == [0, 1, 2, 3]
    assert batches == [[0], [1, 2, 3]]


def test_each_caller_gets_its_own_exception():
    with DynamicBatcher(Squares(), max_batch=5, wait=2) as gathered:
        good, bad, fine, worse, last = chat_all(gathered, [3, -1, 4, -2, 5])
    assert (good, fine, last) == (9, 16, 25)
    assert (str(bad), str(worse)) == ("negative: -1", "negative: -2")


def test_a_result_too_few_is_an_error_for_whoever_has_none():
    with (
        DynamicBatcher(lambda numbers: [], max_batch=1) as gathered,
        pytest.raises(ClvrError, match=r"1 requests .* 0 results"),
    ):
        gathered(1)


def test_even_an_exit_reaches_its_caller():
    def leave(numbers):
        raise SystemExit(3)

    with DynamicBatcher(leave, max_batch=1) as gathered:
        with pytest.raises(SystemExit):
            gathered(1)
        with pytest.raises(SystemExit):
            gathered(2)


def test_closing_answers_what_waits_and_takes_no_more():
    started, go = threading.Event(), threading.Event()

    def slow(numbers):
        started.set()
        go.wait(20)
        return list(numbers)

    gathered = DynamicBatcher(slow, max_batch=1, wait=0)
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(gathered, number) for number in range(3)]
        started.wait(20)
        while len(gathered._waiting) < 2:
            time.sleep(0.001)
        closing = pool.submit(gathered.close)
        while not gathered._closed:
            time.sleep(0.001)
        with pytest.raises(ClvrError, match="closed"):
            gathered(9)
        go.set()
        assert [each.result(20) for each in waiting] == [0, 1, 2]
        closing.result(20)
    gathered.close()
    assert not gathered._thread.is_alive()


@pytest.mark.parametrize(("max_batch", "wait"), [(0, 0.1), (4, -1)])
def test_numbers_that_make_no_sense_are_a_usage_error(max_batch, wait):
    with pytest.raises(UsageError):
        DynamicBatcher(Squares(), max_batch, wait)
