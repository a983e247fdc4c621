"""Intervals, the bootstrap, AUROC and true positives, against scikit-learn and slow computations of the same."""

import time

import numpy as np
import pytest
from scipy.stats import binomtest, ttest_1samp
from sklearn.metrics import roc_auc_score, roc_curve

from headrift import stats as module
from headrift.stats import (
    ClusterBootstrap,
    Interval,
    auroc_bounds,
    auroc_interval,
    cluster_resamples,
    effective_groups,
    expected_tpr,
    fewest_groups,
    mean_interval,
    percentile_bands,
    percentile_bounds,
    rate_bounds,
    separation,
    side,
    tail,
    wilson_interval,
)


def random_rows(seed: int, n: int = 60):
    """Values with ties and some missing, labels, and groups of one to a few rows."""
    random = np.random.default_rng(seed)
    values = random.integers(0, 12, n).astype(float)
    values[random.random(n) < 0.15] = np.nan
    attack = random.random(n) < 0.4
    return values, attack, np.unique(random.integers(0, n // 2, n), return_inverse=True)[1]


def slow_tpr(attack, values, weight=None) -> float:
    fpr, tpr, _ = roc_curve(attack, values, sample_weight=weight, drop_intermediate=False)
    return float(tpr[fpr <= 0.05 + 1e-9].max())


@pytest.mark.parametrize("seed", range(5))
def test_values_are_scikit_learns_with_missing_ones_lowest(seed):
    values, attack, groups = random_rows(seed)
    result = separation(values, attack, groups)
    lowest = np.nan_to_num(values, nan=-1.0)
    assert result.auroc == pytest.approx(roc_auc_score(attack, lowest))
    assert result.tpr == pytest.approx(slow_tpr(attack, lowest))
    assert np.trapezoid(result.tprs, result.fpr) == pytest.approx(result.auroc)
    assert (result.fpr[0], result.tprs[0], result.fpr[-1], result.tprs[-1]) == (0, 0, 1, 1)


def test_higher_means_attack_and_missing_is_never_flagged():
    attack, groups = np.array([True, False]), np.array([0, 1])
    assert separation(np.array([np.nan, 0.0]), attack, groups).auroc == 0.0
    assert separation(np.array([0.0, np.nan]), attack, groups).tpr == 1.0
    all_missing = separation(np.array([np.nan, np.nan]), attack, groups)
    assert (all_missing.auroc, all_missing.tpr) == (0.5, 0.0)


def test_intervals_are_those_of_resampled_groups(monkeypatch):
    monkeypatch.setattr(module, "RESAMPLES", 50)
    values, attack, groups = random_rows(3)
    lowest = np.nan_to_num(values, nan=-1.0)
    n_groups = groups.max() + 1
    draws, aurocs, tprs = np.random.default_rng(0), [], []
    for _ in range(50):
        rows = np.concatenate([np.flatnonzero(groups == g) for g in draws.integers(0, n_groups, n_groups)])
        if len(set(attack[rows])) == 2:
            aurocs.append(roc_auc_score(attack[rows], lowest[rows]))
            tprs.append(slow_tpr(attack[rows], lowest[rows]))
    result = separation(values, attack, groups)
    n = [effective_groups(groups[mask]) for mask in (attack, ~attack)]
    assert result.n == min(n) == fewest_groups(groups, attack, ~attack)
    np.testing.assert_allclose(result.draws[~np.isnan(result.draws)], aurocs)
    assert result.auroc_interval == pytest.approx(auroc_bounds(result.auroc, aurocs, *n))
    assert result.tpr_interval == pytest.approx(rate_bounds(result.tpr, tprs, min(n)))
    low, high = result.band
    assert (low <= high).all()
    assert (low[5], high[5]) == pytest.approx(percentile_bounds(tprs, min(n)))


def test_no_interval_from_a_handful():
    attack = np.arange(60) < 9
    result = separation(np.arange(60.0), attack, np.arange(60))
    assert (result.auroc_interval, result.tpr_interval, result.band) == (None, None, None)
    assert set(result.numbers()) == {"auroc", "auroc_interval", "tpr", "tpr_interval", "at_fpr"}


def test_groups_count_and_not_rows():
    attack, prompt = np.arange(100) < 50, np.arange(100) // 10
    assert separation(np.arange(100.0), attack, np.arange(100)).auroc_interval is not None
    assert separation(np.arange(100.0), attack, prompt).auroc_interval is None  # 5 prompts a class, 10 rows each
    assert effective_groups(prompt) == 10
    assert effective_groups(np.repeat([0, 1, 2], [98, 1, 1])) == pytest.approx(100**2 / (98**2 + 2))
    assert fewest_groups(prompt, attack, np.zeros(100, bool)) == 5


def test_what_separates_in_a_sample_is_not_certain_to():
    attack = np.arange(40) < 20
    result = separation(attack.astype(float), attack, np.arange(40))
    assert result.auroc_interval == pytest.approx(auroc_interval(1.0, 20, 20))
    assert 0.85 < result.auroc_interval[0] < 0.95
    assert result.tpr_interval == pytest.approx(wilson_interval(20, 20))
    assert auroc_bounds(0.0, np.zeros(9), 20, 20) == pytest.approx(tuple(1 - np.array(result.auroc_interval[::-1])))


def test_score_intervals_are_those_of_scipy_and_of_their_definition():
    for k in range(9):
        expected = binomtest(k, 8).proportion_ci(0.95, method="wilson")
        assert wilson_interval(k, 8) == pytest.approx(tuple(expected))
    auroc, m, n = 0.8, 12, 40
    for end in auroc_interval(auroc, m, n):
        spread = 1 + ((m + n) / 2 - 1) * ((1 - end) / (2 - end) + end / (1 + end))
        assert abs(auroc - end) == pytest.approx(module.Z * np.sqrt(end * (1 - end) * spread / (m * n)))


def test_intervals_of_few_groups_are_expanded():
    assert tail(10) == pytest.approx(0.00855, abs=1e-5)
    assert tail(1000) == pytest.approx(0.025, abs=1e-3)
    assert tail(np.inf) == pytest.approx(0.025)
    assert tail(np.inf, 10) == pytest.approx(0.0025)
    draws = np.random.default_rng(0).random(1000)
    assert percentile_bounds(draws, 9) is None
    assert percentile_bounds(draws, 12) == pytest.approx(tuple(np.quantile(draws, [tail(12), 1 - tail(12)])))


def test_a_mean_over_sources_has_students_interval():
    values = np.random.default_rng(0).random(7)
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean_interval(values).bounds == pytest.approx(tuple(expected))
    assert mean_interval([0.5, 0.7, np.nan]) == Interval(0.6)


def test_expected_true_positives_are_those_of_a_threshold_that_others_reach_as_often():
    """Benign prompts are uniform, so that a threshold's rate is known: above the k-th of n are k / (n + 1)."""
    attack = np.arange(40) >= 19
    values = np.concatenate([np.arange(19.0), np.arange(21) + 0.5])
    fpr, tprs = module.roc_curve(module.ranks(values), attack, np.ones(40))
    assert expected_tpr(fpr, tprs, 19, 0.05) == pytest.approx((values[attack] > 18).mean())
    assert expected_tpr(fpr, tprs, 19, 0.1) == pytest.approx((values[attack] > 17).mean())
    halfway = np.mean([(values[attack] > one).mean() for one in (17, 18)])
    assert expected_tpr(fpr, tprs, 19, 0.075) == pytest.approx(halfway)
    assert expected_tpr(fpr, tprs, 19, 0.025) == pytest.approx((values[attack] > 18).mean() / 2)


def test_the_same_rows_give_the_same_interval_soon():
    random = np.random.default_rng(0)
    values, attack, groups = random.random(5000), random.random(5000) < 0.3, np.arange(5000)
    begun = time.perf_counter()
    assert separation(values, attack, groups).auroc_interval == separation(values, attack, groups).auroc_interval
    assert time.perf_counter() - begun < 8


def test_groups_are_resampled_whole_and_as_many_of_a_stratum():
    random = np.random.default_rng(0)
    group = random.integers(0, 20, 60)
    strata = group % 3
    for times in cluster_resamples(group, 20, strata=strata):
        n_groups = [
            sum(times[np.flatnonzero(group == one)[0]] for one in np.unique(group[strata == at])) for at in range(3)
        ]
        assert n_groups == [len(np.unique(group[strata == at])) for at in range(3)]
        assert all(len(set(times[group == one])) == 1 for one in np.unique(group))


@pytest.fixture
def drawn():
    """Samples with ties, and how often each counts in every draw of a bootstrap."""
    random = np.random.default_rng(1)
    values, positive = random.integers(0, 9, 40).astype(float), np.arange(40) < 15
    return values, positive, ClusterBootstrap(np.arange(40) // 2, 30, strata=~positive)


def repeated(bootstrap, values):
    return [np.repeat(values, times) for times in bootstrap.times]


def test_means_and_rates_are_those_of_the_repeated_samples(drawn):
    values, positive, bootstrap = drawn
    samples, mask = repeated(bootstrap, values), positive
    of_mask = [part[np.repeat(mask, times)] for part, times in zip(samples, bootstrap.times)]
    np.testing.assert_allclose(bootstrap.mean(values, mask), [part.mean() for part in of_mask])
    cut = bootstrap.threshold(values, ~mask, 0.2)
    above = [(part[np.repeat(~mask, t)] > at).mean() for part, t, at in zip(samples, bootstrap.times, cut)]
    assert max(above) <= 0.2
    np.testing.assert_allclose(bootstrap.rate_above(values, ~mask, cut), above)
    columns = np.stack([values, np.where(mask, values, np.nan)], axis=1)
    expected = np.stack([bootstrap.mean(values, np.ones(40, bool)), bootstrap.mean(values, mask)], axis=1)
    np.testing.assert_allclose(bootstrap.column_means(columns), expected)


def test_aurocs_are_scikit_learns_of_the_repeated_samples(drawn):
    values, positive, bootstrap = drawn
    everything = np.ones(40, bool)
    expected = [
        roc_auc_score(np.repeat(positive, times), part)
        for part, times in zip(repeated(bootstrap, values), bootstrap.times)
    ]
    np.testing.assert_allclose(bootstrap.auroc(values, positive, everything), expected)
    higher = np.where(np.arange(40) % 2, values + 100, values)  # a shift that pairs within a stratum do not see
    halves = [bootstrap.auroc(values, positive, np.arange(40) % 2 == at)[0] for at in (0, 1)]
    pairs = [8 * 12, 7 * 13]
    within = bootstrap.auroc(higher, positive, everything, np.arange(40) % 2)[0]
    assert within == pytest.approx(np.average(halves, weights=pairs))
    assert np.isnan(bootstrap.auroc(values, positive, positive)).all()


def test_an_interval_is_of_the_draws_and_left_out_for_a_handful(drawn):
    values, positive, bootstrap = drawn
    draws = bootstrap.mean(values, positive)
    result = Interval.from_draws(draws, 15)
    assert result.value == draws[0] == pytest.approx(values[positive].mean())
    assert result.bounds == pytest.approx(percentile_bounds(draws[1:], 15))
    assert side(result.bounds, -1) == 1
    assert side(result.bounds, 100) == -1
    assert side(result.bounds, result.value) is None
    assert Interval.from_draws(draws, 9).bounds is None
    assert Interval.from_draws(draws[:1], 15).bounds is None
    draws[1:4] = np.nan
    assert Interval.from_draws(draws, np.inf).bounds == pytest.approx(tuple(np.nanpercentile(draws[1:], [2.5, 97.5])))


def test_bands_are_the_bounds_of_each_column():
    columns = np.random.default_rng(0).random((50, 3))
    columns[:5, 1], columns[:, 2] = np.nan, np.nan
    low, high = percentile_bands(columns, 20)
    for at in (0, 1):
        assert (low[at], high[at]) == pytest.approx(percentile_bounds(columns[:, at], 20))
    assert np.isnan([low[2], high[2]]).all()
    assert percentile_bounds(columns[:, 2], 20) is None
    assert np.isnan(percentile_bands(columns, 9)).all()
