"""AUROC, true positives and their intervals, against scikit-learn and a slow bootstrap."""

import time

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from headrift import separation as module
from headrift.separation import separation


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
    found = separation(values, attack, groups)
    lowest = np.nan_to_num(values, nan=-1.0)
    assert found.auroc == pytest.approx(roc_auc_score(attack, lowest))
    assert found.tpr == pytest.approx(slow_tpr(attack, lowest))
    assert np.trapezoid(found.tprs, found.fpr) == pytest.approx(found.auroc)
    assert (found.fpr[0], found.tprs[0], found.fpr[-1], found.tprs[-1]) == (0, 0, 1, 1)


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
    found = separation(values, attack, groups)
    assert found.auroc_interval == pytest.approx(tuple(np.percentile(aurocs, [2.5, 97.5])))
    assert found.tpr_interval == pytest.approx(tuple(np.percentile(tprs, [2.5, 97.5])))
    low, high = found.band
    assert (low <= high).all()
    assert found.tpr_interval == pytest.approx((low[5], high[5]))


def test_no_interval_from_a_handful():
    attack = np.arange(60) < 9
    found = separation(np.arange(60.0), attack, np.arange(60))
    assert (found.auroc_interval, found.tpr_interval, found.band) == (None, None, None)
    assert set(found.numbers()) == {"auroc", "auroc_interval", "tpr", "tpr_interval", "at_fpr"}


def test_the_same_rows_give_the_same_interval_soon():
    random = np.random.default_rng(0)
    values, attack, groups = random.random(5000), random.random(5000) < 0.3, np.arange(5000)
    begun = time.perf_counter()
    assert separation(values, attack, groups).auroc_interval == separation(values, attack, groups).auroc_interval
    assert time.perf_counter() - begun < 8
