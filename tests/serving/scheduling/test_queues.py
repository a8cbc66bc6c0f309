import random

import pytest

from clvr_jax.errors import UsageError
from clvr_jax.serving.scheduling.limits import Limits
from clvr_jax.serving.scheduling.queues import MAX_PASSES, GroupQueues


def test_a_batch_has_one_key_and_waits_for_others():
    queues = GroupQueues(max_batch=3)
    assert (queues.next_batch(0.0), queues.seconds_until_ready(0.0)) == (None, None)
    for number in range(2):
        queues.add("a", number, 0.01)
    queues.add("b", 9, 0.015)
    assert queues.next_batch(0.004) is None
    assert queues.seconds_until_ready(0.004) == pytest.approx(0.006)
    assert queues.next_batch(0.012) == ("a", [0, 1])
    for number in range(4):  # a full batch does not wait
        queues.add("a", number, 0.1)
    assert queues.next_batch(0.013) == ("a", [0, 1, 2])
    assert len(queues) == 2
    assert queues.next_batch(0.02) == ("b", [9])
    queues.add("a", 4, 0.02)  # one item that is ready is enough
    assert queues.next_batch(0.03) == ("a", [3, 4])
    queues.add("a", 5, 0.03)
    assert queues.remove(lambda item: item == 5) == [5]
    assert queues.next_batch(1.0) is None


def test_the_largest_group_goes_first_and_the_longer_wait_among_equals():
    queues = GroupQueues(max_batch=4)
    for key, count in (("a", 1), ("b", 3), ("c", 5), ("d", 4)):
        for number in range(count):
            queues.add(key, number, 0.0)
    served = []
    while batch := queues.next_batch(0.0):
        served.append((batch[0], len(batch[1])))
    assert served == [("c", 4), ("d", 4), ("b", 3), ("a", 1), ("c", 1)]


def test_no_key_starves_beside_larger_ones_that_never_end():
    queues = GroupQueues(max_batch=4)
    for key in "xyz":
        queues.add(key, key, 0.0)
    waited, served = 0, []
    while len(queues) and waited < 100:
        for key in "ab":
            for number in range(4):
                queues.add(key, number, 0.0)
        key, _ = queues.next_batch(0.0)
        waited += 1
        if key in "xyz":
            served.append(key)
            if len(served) == 3:
                break
    assert sorted(served) == ["x", "y", "z"]
    assert waited <= MAX_PASSES + 5  # the two large keys reach the limit too, and each has a turn


def batches_of(take, clients=16, seed=0):
    """Mean batch of loops that go through stages of random number, by the function that takes the next batch."""
    rng, queues = random.Random(seed), GroupQueues(max_batch=16)
    sizes = []
    for client in range(clients):
        queues.add(("reply", 0), (client, 0), 0.0)
    for _ in range(2000):
        (stage, _), items = take(queues)
        sizes.append(len(items))
        for client, images in items:
            if stage == "reply":
                queues.add(("generate", images), (client, images), 0.0)
            elif stage == "generate":
                queues.add(("verify", 0), (client, images + 1), 0.0)
            else:
                left = images if images < 8 and rng.random() < 0.6 else 0
                queues.add(("reply", left), (client, left), 0.0)
    return sum(sizes) / len(sizes)


def in_rounds(queues):
    """Takes the keys in turn, as a round robin does."""
    key = next(iter(queues._queues))
    return key, queues._take(key)


def test_groups_of_loops_grow_more_than_in_a_round_robin():
    largest = batches_of(lambda queues: queues.next_batch(0.0))
    assert largest > 1.2 * batches_of(in_rounds)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_batch": 17},
        {"window_seconds": 0.03},
        {"image_rows": 3},
        {"max_queue": 0},
        {"keep_days": -1},
        {"concurrent_calls": 0},
    ],
)
def test_limits_are_checked(fields):
    with pytest.raises(UsageError, match="limits: "):
        Limits(**fields)
