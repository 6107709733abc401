"""Intervals and the paired bootstrap, against known values and simulations."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.accuracy.stats import compare, share


def flags(right, count):
    return np.arange(count) < right


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    # Wilson's intervals as in Newcombe (1998), table I, to four places.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
     (1, 29, 0.0061, 0.1718)],
)  # fmt: skip
def test_published_intervals(right, count, low, high):
    found = share(flags(right, count))
    assert found.value == right / count
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)


def test_the_ends_of_an_interval_hold_the_value_to_the_bit():
    for count in range(1, 60):
        assert share(flags(0, count))[:2] == (0, 0)
        value, _, high = share(flags(count, count))
        assert value == high == 1


def test_an_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    for truth in (0.5, 0.9):
        found = [share(rng.random(160) < truth) for _ in range(800)]
        covered = np.mean([low <= truth <= high for _, low, high in found])
        # 0.95 within 3 standard errors of 800 draws, and what the count's steps add
        assert 0.925 < covered < 0.98


def test_the_same_answers_are_no_difference():
    rng = np.random.default_rng(2)
    right, kinds = rng.random(400) < 0.8, np.arange(400) % 8
    found = compare(right, right, kinds)
    assert found.p == 1
    assert found.difference == (0, 0, 0)
    assert found.ratio == (1, 1, 1)


def test_a_clear_difference_has_a_small_p_and_its_sign():
    rng = np.random.default_rng(3)
    kinds = np.arange(400) % 8
    worse, better = rng.random(400) < 0.6, rng.random(400) < 0.9
    up, down = compare(better, worse, kinds), compare(worse, better, kinds)
    assert up.p < 0.001
    assert down.p < 0.001
    assert up.difference.low > 0 > down.difference.high
    assert up.difference.value == pytest.approx(better.mean() - worse.mean())
    assert up.ratio.value == pytest.approx(better.mean() / worse.mean())


def test_by_hand_where_the_bootstrap_is_binomial():
    """3 of 10 questions are won and none lost: a resample is even if it draws none of the 3."""
    other = np.zeros(10, bool)
    found = compare(flags(3, 10), other, np.zeros(10, np.int64), resamples=200_000)
    assert found.p == pytest.approx(2 * 0.7**10, rel=0.05)
    assert found.ratio is None


def test_pairs_count():
    """The same two accuracies: a gap is sure only where the same questions are right."""
    kinds = np.zeros(200, np.int64)
    nested = compare(flags(160, 200), flags(150, 200), kinds)
    crossed = compare(flags(160, 200), flags(150, 200)[::-1], kinds)
    assert nested.difference.value == crossed.difference.value
    assert nested.p < 0.01 < 0.1 < crossed.p


def test_types_are_resampled_apart():
    """One type always right, one always wrong: drawn within types, nothing varies."""
    kinds = np.arange(100) % 2
    found = compare(kinds == 0, np.zeros(100, bool), kinds)
    assert found.difference == (0.5, 0.5, 0.5)


def test_p_is_uniform_where_there_is_no_difference():
    rng = np.random.default_rng(4)
    kinds = np.arange(160) % 8
    ps, covered = [], []
    for _ in range(400):
        a, b = rng.random(160) < 0.8, rng.random(160) < 0.8
        found = compare(a, b, kinds, resamples=1000)
        ps.append(found.p)
        covered.append(found.difference.low <= 0 <= found.difference.high)
    assert 0.02 < np.mean(np.array(ps) < 0.05) < 0.09
    assert 0.91 < np.mean(covered) < 0.98


def test_refusals():
    with pytest.raises(ValueError, match="at least one answer"):
        share(np.zeros(0, bool))
    with pytest.raises(ValueError, match="one length above 0, got 3, 2 and 3"):
        compare(flags(1, 3), flags(1, 2), np.zeros(3, np.int64))
