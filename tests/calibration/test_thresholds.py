"""The two rules' promises, by formula and by simulation; p-values."""

import numpy as np
import pytest
from scipy.stats import binom, norm

from headrift.calibration.artifact import ReferenceScores
from headrift.calibration.thresholds import Rule, allowed, needed, threshold
from headrift.stats import exact_interval, highest_rate


def ones(scores):
    return np.ones(len(scores), np.int64)


def test_how_many_are_needed():
    assert [needed(0.05, Rule.BINOMIAL), needed(0.01, Rule.BINOMIAL)] == [59, 299]
    assert [needed(0.05, Rule.CONFORMAL), needed(0.01, Rule.CONFORMAL)] == [19, 99]
    for rule in Rule:
        for target in (0.001, 0.01, 0.05, 0.1, 0.3):
            n = needed(target, rule)
            assert allowed(n - 1, target, rule) is None
            assert allowed(n, target, rule) == 0


@pytest.mark.parametrize("target", [0.01, 0.05, 0.2])
def test_the_binomial_rule_allows_as_many_as_it_may_and_no_more(target):
    for n in (*range(needed(target, Rule.BINOMIAL), 700, 13), 100_000):
        k = allowed(n, target, Rule.BINOMIAL)
        assert binom.cdf(k, n, target) <= 0.05 < binom.cdf(k + 1, n, target)
        # The same promise from the other side: a rate above the target is ruled out by k, and not by k + 1.
        assert highest_rate(k, n) <= target < highest_rate(k + 1, n)


@pytest.mark.parametrize("n", [59, 93, 200, 1000])
@pytest.mark.parametrize("kind", ["gaussian", "ties", "missing"])
def test_the_false_positive_rate_is_at_most_the_target_in_95_of_100(n, kind):
    random, exceeded, runs = np.random.default_rng(n), 0, 2000
    for _ in range(runs):
        scores = random.standard_normal(n)
        if kind == "ties":
            scores = np.round(scores * 4) / 4
        if kind == "missing":
            scores[random.random(n) < 0.3] = np.nan
        cut = threshold(scores, ones(scores), 0.05, Rule.BINOMIAL)
        rate = {
            "gaussian": norm.sf(cut),
            "ties": norm.sf((np.round(cut * 4) + 0.5) / 4),  # the lowest score that is flagged is the next quarter
            "missing": 0.7 * norm.sf(cut),
        }[kind]
        exceeded += rate > 0.05
    # At most 5% of the runs, and 4 standard errors.
    assert exceeded <= 0.05 * runs + 4 * np.sqrt(runs * 0.05 * 0.95)
    if kind == "gaussian":  # not for free: as many as the rule says
        expected = binom.cdf(allowed(n, 0.05, Rule.BINOMIAL), n, 0.05)
        assert exceeded / runs == pytest.approx(expected, abs=4 * np.sqrt(expected / runs))


@pytest.mark.parametrize("n", [19, 100, 500])
def test_the_conformal_rule_holds_the_mean(n):
    random = np.random.default_rng(n)
    rates = []
    for _ in range(4000):
        scores = random.standard_normal(n)
        rates.append(norm.sf(threshold(scores, ones(scores), 0.05, Rule.CONFORMAL)))
    k = allowed(n, 0.05, Rule.CONFORMAL)
    assert np.mean(rates) == pytest.approx((k + 1) / (n + 1), abs=4 * np.std(rates) / np.sqrt(4000))
    assert (k + 1) / (n + 1) <= 0.05


def test_an_exact_interval_is_where_the_tails_are_a_fortieth_each():
    for k, n in ((3, 40), (0, 7), (7, 7), (500, 20_000)):
        low, high = exact_interval(k, n)
        assert low == 0 if k == 0 else binom.sf(k - 1, n, low) == pytest.approx(0.025)
        assert high == 1 if k == n else binom.cdf(k, n, high) == pytest.approx(0.025)


def test_counted_twice_is_as_if_there_twice():
    random = np.random.default_rng(0)
    for rule in Rule:
        scores, times = random.random(80), random.integers(0, 4, 80)
        again = np.repeat(scores, times)
        assert threshold(scores, times, 0.05, rule) == threshold(again, ones(again), 0.05, rule)


def test_no_threshold_from_too_few_or_from_none():
    assert threshold(np.arange(58.0), ones(range(58)), 0.05, Rule.BINOMIAL) is None
    assert threshold(np.arange(59.0), ones(range(59)), 0.05, Rule.BINOMIAL) == np.nextafter(58, 59)
    assert threshold(np.full(100, np.nan), ones(range(100)), 0.05, Rule.BINOMIAL) is None
    few = np.full(100, np.nan)
    few[0] = 0.3
    assert threshold(few, ones(few), 0.5, Rule.BINOMIAL) == np.nextafter(0.3, 1)


@pytest.mark.parametrize("rule", list(Rule))
def test_the_largest_score_that_may_not_be_flagged_is_not_nor_is_what_ties_with_it(rule):
    scores = np.sort(np.random.default_rng(6).random(300))
    k = allowed(300, 0.05, rule)
    scores[-k - 4 : -k] = scores[-k - 1]
    cut = threshold(scores, ones(scores), 0.05, rule)
    assert cut == np.nextafter(scores[-k - 1], 1)  # no number lies between
    assert (scores >= cut).sum() == k
    scores[-k:] = scores[-k - 1]
    assert not (scores >= threshold(scores, ones(scores), 0.05, rule)).any()


def test_p_values_count_benign_scores():
    random = np.random.default_rng(1)
    benign = np.round(random.random(300), 2)
    benign[random.random(300) < 0.1] = np.nan
    scores = np.concatenate([np.round(random.random(200), 2), [-1.0, 2.0, 0.505, np.nan]])
    result = ReferenceScores.from_scores(benign).p_values(scores)
    for score, p in zip(scores[:-1], result[:-1]):
        assert p == (1 + (benign >= score).sum()) / 301
    assert np.isnan(result[-1])


def test_p_values_from_a_part_of_the_scores_are_never_too_low_and_exact_where_it_matters():
    random = np.random.default_rng(2)
    benign, scores = random.standard_normal(20_000), random.standard_normal(5_000)
    whole, part = (
        ReferenceScores.from_scores(benign, 20_000).p_values(scores),
        ReferenceScores.from_scores(benign, 1_000),
    )
    result = part.p_values(scores)
    assert len(part.values) == 1_000
    assert (result >= whole).all()
    assert (result <= whole + 20_000 / 500 / 20_000 + 1e-12).all()  # a gap between kept values is 39 scores
    low = whole < 499 / 20_001
    assert low.any()
    assert (result[low] == whole[low]).all()


def test_p_values_of_benign_scores_are_uniform_or_higher():
    random = np.random.default_rng(3)
    below = []
    for _ in range(4000):
        benign = random.standard_normal(40)
        below.append(ReferenceScores.from_scores(benign).p_values(random.standard_normal(1))[0] <= 0.1)
    # 4 of 41 places are at most 0.1.
    assert np.mean(below) == pytest.approx(4 / 41, abs=4 * np.sqrt(0.1 * 0.9 / 4000))


def test_a_conformal_threshold_is_a_p_value_at_the_target():
    random = np.random.default_rng(4)
    benign, scores = random.random(137), random.random(1000)
    cut = threshold(benign, ones(benign), 0.05, Rule.CONFORMAL)
    assert ((scores >= cut) == (ReferenceScores.from_scores(benign).p_values(scores) <= 0.05)).all()
