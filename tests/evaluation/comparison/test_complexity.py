import math

import numpy as np
import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.comparison.complexity import (
    Task,
    Tier,
    Weights,
    area,
    assign_tiers,
    failure_law,
    pass_curve,
    power_law,
    probe,
    task_from_metadata,
)
from clvr_jax.worlds.shapes.prompts import evaluation_prompts

GENEVAL = {
    "tag": "position",
    "include": [
        {"class": "dog", "count": 1},
        {"class": "cup", "count": 2, "color": "red", "position": ["left of", 0]},
    ],
    "exclude": [{"class": "cup", "count": 3}],
    "prompt": "a photo of two red cups left of a dog",
}


def test_a_task_by_hand():
    task = task_from_metadata(GENEVAL)
    assert task == Task(objects=3, edges=3, words=10, extra=1.0)
    expected = 3 * math.log(4) + 3 + math.log(11) + 1
    assert task.complexity() == pytest.approx(expected)
    weights = Weights(objects=2, edges=3, words=4, text=0.5)
    assert task.complexity(weights) == pytest.approx(2 * 3 * math.log(4) + 9 + 4 * 0.5 * math.log(11) + 1)
    with pytest.raises(ClvrError, match="no include list"):
        task_from_metadata({"prompt": "a dog"})


def test_complexity_rises_with_the_number_of_things():
    means = {}
    for entry in evaluation_prompts("complex"):
        means.setdefault(entry["tier"], []).append(task_from_metadata(entry).complexity())
    ordered = [np.mean(means[tier]) for tier in sorted(means)]
    assert ordered == sorted(ordered)
    assert max(task_from_metadata(entry).complexity() for entry in evaluation_prompts("eval")) < ordered[-1]


def test_tiers_have_equally_many_prompts_and_equal_complexity_shares_one():
    values = np.random.default_rng(0).permutation(40).astype(float)
    places = assign_tiers(values)
    assert [places.count(tier) for tier in range(10)] == [4] * 10
    assert all((places[i] <= places[j]) for i in range(40) for j in range(40) if values[i] < values[j])
    assert assign_tiers([1.0, 1.0, 1.0, 5.0]) == [0, 0, 0, 7]


def test_the_curve_and_its_area():
    complexities = list(range(20))
    never_fails = pass_curve(complexities, [[1.0]] * 20)
    assert (len(never_fails), area(never_fails)) == (10, pytest.approx(100))
    assert area(pass_curve(complexities, [[0.0]] * 20)) == 0
    half = pass_curve(complexities, [[float(value < 10)] for value in complexities])
    assert [tier.passed for tier in half] == [1.0] * 5 + [0.0] * 5
    assert area(half) == pytest.approx(50)
    assert [tier.prompts for tier in half] == [2] * 10
    assert half[0].low < 1
    assert area(pass_curve([1.0, 1.0], [[1.0], [0.0]])) == 50
    with pytest.raises(ClvrError, match="1 complexities but 2 prompts"):
        pass_curve([1.0], [[1.0], [0.0]])


def test_a_power_law_is_found_again():
    x = np.array([1.0, 2.0, 4.0, 9.0])
    law = power_law(x, 3 * x**-0.7)
    assert (law.factor, law.exponent, law.r_squared) == pytest.approx((3, -0.7, 1))
    assert power_law([1.0, 2.0], [1.0, 2.0]) is None
    assert power_law([1.0, 2.0, 3.0], [1.0, 0.0, 2.0]) is None
    assert power_law([2.0, 2.0, 2.0], [1.0, 3.0, 2.0]) is None


def test_half_fails_where_the_odds_are_even():
    # Odds of failure (C / 8)^3, seen on many prompts.
    tiers = [Tier(c, 10_000, 1 / (1 + (c / 8) ** 3), 0, 1) for c in (4.0, 6.0, 8.0, 12.0)]
    law = failure_law(tiers)
    assert law.exponent == pytest.approx(3, abs=1e-3)
    rng = np.random.default_rng(0)
    complexities = rng.uniform(3, 16, 4000)
    scores = [[float(rng.random() < 1 / (1 + (c / 8) ** 3))] for c in complexities]
    found = probe(complexities.tolist(), scores)
    assert found["half_fails_at"] == pytest.approx(8, rel=0.05)
    assert 0 < found["area"] < 100
    assert probe([1.0, 2.0], [[1.0], [1.0]])["half_fails_at"] is None
