import pytest

from clvr_jax.errors import UsageError
from clvr_jax.serving.limits import Limits
from clvr_jax.serving.queues import FairQueues


def test_a_batch_has_one_key_and_waits_for_the_window():
    queues = FairQueues(max_batch=3, window=0.01)
    assert (queues.next_batch(0.0), queues.seconds_until_ready(0.0)) == (None, None)
    for number in range(2):
        queues.add("a", number, 0.0)
    queues.add("b", 9, 0.005)
    assert queues.next_batch(0.004) is None
    assert queues.seconds_until_ready(0.004) == pytest.approx(0.006)
    assert queues.next_batch(0.012) == ("a", [0, 1])
    for number in range(4):  # a full batch does not wait
        queues.add("a", number, 0.013)
    assert queues.next_batch(0.013) == ("a", [0, 1, 2])
    assert len(queues) == 2
    assert queues.remove(lambda item: item == 3) == [3]
    assert queues.next_batch(1.0) == ("b", [9])


def shares_of(seconds, rounds=400):
    """Device seconds of each key while all of them always have work."""
    queues, used, now = FairQueues(max_batch=1, window=0.0), dict.fromkeys(seconds, 0.0), 0.0
    for key in seconds:
        for number in range(rounds):
            queues.add(key, number, 0.0)
    for _ in range(rounds):
        key, _ = queues.next_batch(now)
        now += seconds[key]
        used[key] += seconds[key]
        queues.charge(key, seconds[key])
    return used


def test_keys_get_equal_device_time_whatever_their_batches_cost():
    used = shares_of({"cheap": 0.01, "middle": 0.1, "dear": 1.0})
    assert max(used.values()) - min(used.values()) <= 1.5  # within one and a half of the most expensive batches


def test_no_key_starves_beside_one_that_never_ends():
    queues = FairQueues(max_batch=1, window=0.0)
    queues.charge("dear", 5.0)
    queues.charge("cheap", 0.01)
    queues.add("dear", "x", 0.0)
    served = []
    for number in range(200):
        queues.add("cheap", number, 0.0)
        key, _ = queues.next_batch(float(number))
        queues.charge(key, {"dear": 5.0, "cheap": 0.01}[key])
        served.append(key)
    assert "dear" in served


@pytest.mark.parametrize(
    "fields", [{"max_batch": 17}, {"window_seconds": 0.03}, {"image_rows": 3}, {"max_queue": 0}, {"keep_days": -1}]
)
def test_limits_are_checked(fields):
    with pytest.raises(UsageError, match="limits: "):
        Limits(**fields)
