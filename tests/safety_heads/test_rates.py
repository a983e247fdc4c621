"""Intervals of rates and of paired differences: against published values, and by how often they hold the truth."""

import numpy as np
import pytest
from scipy.stats import binom

from headrift.safety_heads import refusals
from headrift.safety_heads.refusals import mean_interval, paired_difference, rate


def test_a_rate_with_wilsons_interval():
    result = rate([True] * 81 + [False] * 182)
    # Newcombe (1998), table I: 81 of 263, method 3.
    assert (result.n, result.true) == (263, 81)
    assert result.value == pytest.approx(0.3080, abs=5e-5)
    assert result.interval == pytest.approx((0.2553, 0.3662), abs=5e-5)
    # The same table: 0 of 20.
    assert rate([False] * 20).interval == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_a_paired_difference_by_hand():
    first = [True, True, True, False, False, False, False, False]
    second = [True, False, False, False, False, True, False, False]
    result = paired_difference(first, second)
    assert (result.n, result.began, result.ended) == (8, 2, 1)
    assert result.difference == 1 / 8
    # Two against one: as a coin thrown three times, anything but 0 or 3 of a kind is as usual as can be.
    assert result.p_value == 1.0
    up, down = 3 / 10, 2 / 10
    half = 1.96 * np.sqrt((up + down - (up - down) ** 2) / 10)
    assert result.interval == pytest.approx((up - down - half, up - down + half), abs=1e-4)
    assert paired_difference([True] * 9, [False] * 9).p_value == pytest.approx(2 * 0.5**9)
    same = paired_difference(first, first)
    assert (same.difference, same.p_value) == (0.0, 1.0)
    assert same.interval[0] < 0 < same.interval[1]


def test_the_intervals_hold_the_truth_nineteen_times_in_twenty():
    """Of 40 queries: Wilson's exactly, by the binomial distribution; the paired one by drawing."""
    n = 40
    intervals = [rate([True] * k + [False] * (n - k)).interval for k in range(n + 1)]
    coverage = [
        sum(binom.pmf(k, n, p) for k, (low, high) in enumerate(intervals) if low <= p <= high)
        for p in np.linspace(0.05, 0.95, 91)
    ]
    assert np.mean(coverage) == pytest.approx(0.95, abs=0.01)
    random = np.random.default_rng(0)
    kept = 0
    for _ in range(2000):
        cases = random.choice(4, n, p=[0.5, 0.3, 0.05, 0.15])  # both, first alone, second alone, neither
        low, high = paired_difference(cases <= 1, (cases == 0) | (cases == 2)).interval
        kept += low <= 0.25 <= high
    # 95%, and three standard errors of 2,000 draws are 1.5%.
    assert kept / 2000 == pytest.approx(0.95, abs=0.02)


def test_a_means_interval():
    random = np.random.default_rng(1)
    values = random.normal(2.0, 1.0, 400)
    low, high = mean_interval(values)
    # 1.96 standard errors of the mean on either side, and the bootstrap's own noise.
    assert (low, high) == pytest.approx((values.mean() - 0.098, values.mean() + 0.098), abs=0.015)
    weights = np.repeat([1.0, 3.0], 200)
    low, high = mean_interval(values, weights)
    assert low < np.average(values, weights=weights) < high
    assert mean_interval(values[:9]) is None
    assert mean_interval(np.zeros(40)) is None


@pytest.mark.parametrize(
    ("stopped", "verdict"),
    [(5, "no difference shown"), (6, "fewer refusals")],  # of 20: p is 0.0625, 0.031; both intervals leave out 0
)
def test_a_difference_is_shown_if_interval_and_exact_test_agree(stopped, verdict):
    paired = paired_difference([False] * 20, [True] * stopped + [False] * (20 - stopped))
    assert paired.interval[1] < 0
    assert verdict in refusals._difference("attack", paired.difference, paired.interval, paired.p_value)
