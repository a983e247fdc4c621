"""How well a number tells attacks from benign prompts: AUROC, true positives at a false positive rate, the ROC curve.

Intervals are 95% percentile intervals from resampling whole groups (prompts alike) with replacement. The same input
gives the same interval.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]
Interval: TypeAlias = tuple[float, float]

TARGET_FPR = 0.05
HARD = "hard"  # categories of benign prompts that are made to be mistaken for attacks begin so
RESAMPLES = 1000
# Below this many distinct prompts in a class a bootstrap interval says little, and looks as if it said much.
MIN_FOR_INTERVAL = 10
_GRID = np.linspace(0, 1, 101)  # of false positive rates; TARGET_FPR is on it
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Separation:
    """Higher = attack. auroc; tpr: the most attacks (as a fraction) found with at most 5% of the benign flagged.

    Intervals: 95%, None where a class has too few prompts. fpr, tprs: the curve's corners from (0, 0) to (1, 1). band:
    at false positive rates `grid` the 95% interval of the true positive rate, [2, len(grid)], or None.
    """

    auroc: float
    auroc_interval: Interval | None
    tpr: float
    tpr_interval: Interval | None
    fpr: Floats
    tprs: Floats
    grid: Floats
    band: Floats | None

    def numbers(self) -> dict[str, float | Interval | None]:
        """The figures for run.json."""
        named = ("auroc", "auroc_interval", "tpr", "tpr_interval")
        return {name: getattr(self, name) for name in named} | {"at_fpr": TARGET_FPR}


def separation(
    values: Floats, attack: Bools, groups: NDArray[np.int64], *, seed: int = 0, resamples: int | None = None
) -> Separation:
    """What values say of attack; both classes must occur. NaN ranks below every number and is never flagged.

    groups: for each row the number of its group, 0 and up. resamples: RESAMPLES where not given; 0 for no intervals.
    """
    resamples = RESAMPLES if resamples is None else resamples
    rank = ranks(values)
    ones = np.ones(len(values))
    fpr, tprs = curve(rank, attack, ones)
    enough = min(int(attack.sum()), int((~attack).sum())) >= MIN_FOR_INTERVAL
    auroc_interval = tpr_interval = band = None
    if enough and resamples:
        aurocs, on_grid = _resampled(rank, attack, groups, seed, resamples)
        auroc_interval = _interval(aurocs)
        band = np.percentile(on_grid, [2.5, 97.5], axis=0)
        tpr_interval = _interval(on_grid[:, np.flatnonzero(np.isclose(_GRID, TARGET_FPR))[0]])
    return Separation(
        auroc=area(fpr, tprs),
        auroc_interval=auroc_interval,
        tpr=float(tpr_at(fpr, tprs, np.array([TARGET_FPR]))[0]),
        tpr_interval=tpr_interval,
        fpr=fpr,
        tprs=tprs,
        grid=_GRID,
        band=band,
    )


def _resampled(
    rank: NDArray[np.int64], attack: Bools, groups: NDArray[np.int64], seed: int, resamples: int
) -> tuple[Floats, Floats]:
    """AUROCs [n] and true positive rates on the grid [n, grid]; resamples without both classes are left out."""
    random = np.random.default_rng(seed)
    n_groups = int(groups.max()) + 1
    aurocs, on_grid = [], []
    for _ in range(resamples):
        weight = np.bincount(random.integers(0, n_groups, n_groups), minlength=n_groups)[groups].astype(np.float64)
        if weight[attack].any() and weight[~attack].any():
            fpr, tprs = curve(rank, attack, weight)
            aurocs.append(area(fpr, tprs))
            on_grid.append(tpr_at(fpr, tprs, _GRID))
    return np.array(aurocs), np.array(on_grid)


def ranks(values: Floats) -> NDArray[np.int64]:
    """The place of each value among the distinct ones, from 0; NaN below every number."""
    return np.unique(np.where(np.isnan(values), -np.inf, values), return_inverse=True)[1]


def curve(rank: NDArray[np.int64], attack: Bools, weight: Floats) -> tuple[Floats, Floats]:
    """False and true positive rates where ever lower ranks are flagged: none, the highest, ..., all.

    weight: how often each row counts; both classes need some.
    """
    n_ranks = int(rank.max()) + 1

    def flagged(of: Bools) -> Floats:
        below = np.cumsum(np.bincount(rank[of], weight[of], n_ranks)[::-1])
        return np.concatenate([[0.0], below / below[-1]])

    return flagged(~attack), flagged(attack)


def area(fpr: Floats, tprs: Floats) -> float:
    """AUROC: the area under a curve, ties half."""
    return float(np.trapezoid(tprs, fpr))


def average_precision(fpr: Floats, tprs: Floats, n_benign: float, n_attack: float) -> float:
    """The mean, over attacks found, of the fraction of attacks among what a threshold that finds them flags."""
    found = tprs[1:] * n_attack
    return float(np.sum(np.diff(tprs) * found / (found + fpr[1:] * n_benign)))


def tpr_at(fpr: Floats, tprs: Floats, wanted: Floats) -> Floats:
    """The highest true positive rate that a threshold reaches without passing each wanted false positive rate."""
    return tprs[np.searchsorted(fpr, wanted + _ROUNDING, side="right") - 1]


def _interval(values: Floats) -> Interval:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
