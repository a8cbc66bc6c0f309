import itertools
from collections import Counter

import numpy as np
import pytest

from clvr_jax.data.batch_plan import BatchPlan, length_bounds
from clvr_jax.errors import ClvrError, UsageError

BUCKETS = tuple(np.random.default_rng(0).choice(["a", "b", "c", "rare"], 100, p=[0.5, 0.3, 0.19, 0.01]).tolist())


def padding(lengths, bounds):
    padded = [min(bound for bound in bounds if bound >= length) for length in lengths]
    return 1 - sum(lengths) / sum(padded)


@pytest.mark.parametrize(("max_padding", "multiple"), [(0.0, 1), (0.05, 1), (0.15, 1), (0.2, 4), (0.9, 1)])
def test_bounds_are_the_fewest_with_the_least_padding(max_padding, multiple):
    lengths = np.random.default_rng(1).integers(20, 60, 9).tolist()
    bounds = length_bounds(lengths, max_padding, multiple)
    assert all(bound % multiple == 0 for bound in bounds)
    assert padding(lengths, bounds) <= max_padding
    tops = sorted({-(-length // multiple) * multiple for length in lengths})

    def best(count):
        chosen = itertools.combinations(tops[:-1], count - 1)
        return min(padding(lengths, (*others, tops[-1])) for others in chosen)

    assert padding(lengths, bounds) == pytest.approx(best(len(bounds)))
    assert len(bounds) == 1 or best(len(bounds) - 1) > max_padding


def test_bounds_are_finer_if_padding_requires_it():
    assert length_bounds([30, 40], 0.1, 64) == (32, 40)
    assert length_bounds([30, 40], 0.5, 64) == (64,)
    with pytest.raises(UsageError, match="0 lengths"):
        length_bounds([], 0.1)


def test_each_sample_is_used_once_per_epoch_in_batches_of_one_bucket():
    plan, epochs = BatchPlan(BUCKETS, batch_size=8, seed=3), 8  # a multiple of a batch in every bucket
    batches = [plan(step) for step in range(plan.steps(epochs))]
    assert all(len({BUCKETS[sample] for sample in batch}) == 1 and len(batch) == 8 for batch in batches)
    assert Counter(itertools.chain(*batches)) == dict.fromkeys(range(len(BUCKETS)), epochs)
    for epoch in range(epochs):
        began = range(plan.steps(epoch), plan.steps(epoch + 1))
        assert {plan.epoch(step) for step in began} == {epoch}


def test_a_short_run_uses_all_buckets_in_proportion():
    buckets = ("often",) * 90 + ("rare",) * 10
    plan = BatchPlan(buckets, batch_size=16)
    came = Counter(buckets[plan(step)[0]] for step in range(plan.steps(3)))
    assert came == {"often": round(270 / 16), "rare": round(30 / 16)}


def test_the_order_depends_on_seed_and_epoch_only():
    plan = BatchPlan(BUCKETS, 8, seed=3)
    steps = plan.steps(2)
    forward = [plan(step) for step in range(steps)]
    again = BatchPlan(BUCKETS, 8, seed=3)
    assert [again(step) for step in reversed(range(steps))] == forward[::-1]
    other = BatchPlan(BUCKETS, 8, seed=4)
    assert [other(step) for step in range(steps)] != forward
    kinds = [[BUCKETS[plan(step)[0]] for step in range(plan.steps(e), plan.steps(e + 1))] for e in range(2)]
    assert kinds[0] != sorted(kinds[0])
    assert kinds[0] != kinds[1]


def test_late_steps_and_data_smaller_than_a_batch_have_batches():
    plan = BatchPlan(("x", "y"), batch_size=5, seed=0)
    assert {plan(step) for step in range(4)} == {(0,) * 5, (1,) * 5}
    assert len(BatchPlan(BUCKETS, 7)(10**7)) == 7
    with pytest.raises(ClvrError, match="no samples"):
        BatchPlan((), 5)
