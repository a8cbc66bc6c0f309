import numpy as np
import pytest
from scipy import stats

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.statistics import (
    clustered_interval,
    holm,
    paired_bootstrap,
    sign_test,
    weighted_mean,
    wilson_interval,
)


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (1, 1), (0, 20), (20, 20), (3, 10), (480, 553), (81, 263)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_wilson_agrees_with_scipy(successes, trials, confidence):
    ours = wilson_interval(successes, trials, confidence)
    expected = stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    assert ours.estimate == successes / trials
    assert (ours.low, ours.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= ours.low <= ours.estimate <= ours.high <= 1


def test_wilson_agrees_with_newcombe():
    # Newcombe 1998, table I: 81/263 and 15/148.
    for (successes, trials), bounds in {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605)}.items():
        interval = wilson_interval(successes, trials)
        assert (interval.low, interval.high) == pytest.approx(bounds, abs=5e-5)


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (3, 2), (-1, 5)])
def test_impossible_counts_are_refused(successes, trials):
    with pytest.raises(ClvrError, match="successes"):
        wilson_interval(successes, trials)
    with pytest.raises(ClvrError, match="confidence"):
        wilson_interval(1, 2, confidence=95)


def test_mean_of_one_group_is_its_wilson_interval():
    assert weighted_mean([wilson_interval(7, 9)]) == wilson_interval(7, 9)


def test_mean_is_unweighted():
    assert weighted_mean([wilson_interval(1, 1), wilson_interval(0, 100)]).estimate == 0.5
    with pytest.raises(ClvrError, match="0 parts"):
        weighted_mean([])


def test_weights_are_shares():
    parts = [wilson_interval(9, 10), wilson_interval(2, 10)]
    assert weighted_mean(parts, [3, 1]).estimate == pytest.approx((3 * 0.9 + 0.2) / 4)
    assert weighted_mean(parts, [1, 0]) == parts[0]
    assert weighted_mean(parts, [6, 2]) == weighted_mean(parts, [3, 1])


def test_interval_of_mean_covers_the_truth():
    rng = np.random.default_rng(0)
    truths, trials = np.array([0.97, 0.9, 0.55, 0.8, 0.35, 0.6]), np.array([80, 99, 80, 94, 100, 100])
    hits = 0
    for _ in range(2000):
        interval = weighted_mean(list(map(wilson_interval, rng.binomial(trials, truths).tolist(), trials.tolist())))
        hits += interval.low <= truths.mean() <= interval.high
    assert 0.94 <= hits / 2000 <= 0.97


@pytest.mark.parametrize(
    ("first_wins", "second_wins"), [(0, 0), (1, 0), (5, 1), (10, 10), (3, 17), (600, 700), (900, 1100)]
)
def test_sign_test_agrees_with_exact_binomial(first_wins, second_wins):
    first = [1] * first_wins + [0] * second_wins + [1, 0] * 3
    second = [0] * first_wins + [1] * second_wins + [1, 0] * 3
    result = sign_test(first, second)
    decided = first_wins + second_wins
    expected = stats.binomtest(first_wins, decided).pvalue if decided else 1.0
    assert (result.first_wins, result.second_wins) == (first_wins, second_wins)
    assert result.p_value == pytest.approx(expected, rel=1e-9)


def test_bootstrap_agrees_with_scipy():
    rng = np.random.default_rng(1)
    first = rng.integers(0, 2, 300).astype(float)
    second = np.where(rng.random(300) < 0.3, 1.0, first)
    ours = paired_bootstrap(first.tolist(), second.tolist(), seed=2)
    theirs = stats.bootstrap(
        (second - first,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(3)
    ).confidence_interval
    assert ours.estimate == pytest.approx((second - first).mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.005)


def test_bootstrap_over_groups_weighs_groups_alike_and_keeps_their_sizes():
    first, second = [0.0] * 101, [1.0] + [0.0] * 100
    interval = paired_bootstrap(first, second, groups=["small"] + ["large"] * 100)
    assert (interval.estimate, interval.low, interval.high) == (0.5, 0.5, 0.5)


def test_bootstrap_repeats_with_its_seed():
    first, second = [0.0, 1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0, 1.0]
    assert paired_bootstrap(first, second, seed=4) == paired_bootstrap(first, second, seed=4)
    same = paired_bootstrap(first, first)
    assert (same.estimate, same.low, same.high) == (0.0, 0.0, 0.0)


def test_unpaired_scores_are_refused():
    for function in (sign_test, paired_bootstrap):
        with pytest.raises(ClvrError, match="paired"):
            function([1.0], [1.0, 0.0])
    with pytest.raises(ClvrError, match="groups"):
        paired_bootstrap([1.0], [0.0], groups=["a", "b"])


def test_one_picture_per_prompt_has_wilsons_interval():
    assert clustered_interval([[1.0]] * 7 + [[0.0]] * 2) == wilson_interval(7, 9)
    with pytest.raises(ClvrError, match="at least one score for each prompt"):
        clustered_interval([[1.0], []])


def test_pictures_of_a_prompt_that_always_agree_count_once():
    together = clustered_interval([[1.0] * 4] * 30 + [[0.0] * 4] * 10)
    assert (together.low, together.high) == pytest.approx(
        tuple(wilson_interval(30, 40).__dict__.values())[1:], abs=0.01
    )
    apart = clustered_interval([[1.0, 1.0, 1.0, 0.0]] * 40)  # less than chance would vary: not better than independent
    assert (apart.low, apart.high) == pytest.approx((wilson_interval(30, 40).low, wilson_interval(30, 40).high))


def test_interval_over_prompts_covers_the_truth():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(500):
        chances = rng.beta(2, 1, 60)  # of the prompts; their mean is 2/3
        interval = clustered_interval(rng.binomial(1, np.repeat(chances[:, None], 4, 1)).astype(float).tolist())
        hits += interval.low <= 2 / 3 <= interval.high
    assert 0.92 <= hits / 500 <= 0.98


def test_other_scores_have_a_bootstrap_interval():
    scores = np.random.default_rng(0).uniform(0, 10, 80)
    interval = clustered_interval([[score] for score in scores], seed=1)
    half = 1.96 * scores.std(ddof=1) / np.sqrt(80)
    assert (interval.low, interval.high) == pytest.approx((scores.mean() - half, scores.mean() + half), abs=0.15)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
