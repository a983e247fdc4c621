"""Intervals, the bootstrap over groups of prompts, AUROC and true positive rates: the statistics of every report.

All intervals have 95% confidence. Bootstrap intervals are percentile intervals from resampling whole groups (prompts
that are alike) with replacement; the same input and seed give the same interval.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]
Bounds: TypeAlias = tuple[float, float]

CONFIDENCE = 0.95
Z = 1.959963984540054  # quantile of the normal distribution for two-sided 95%
RESAMPLES = 1000
TARGET_FPR = 0.05
# With fewer distinct prompts a bootstrap interval says little, and looks as if it said much.
MIN_FOR_INTERVAL = 10

_TAILS = (2.5, 97.5)
_FPR_GRID = np.linspace(0, 1, 101)  # TARGET_FPR is on it
_ROUNDING = 1e-9
_BLOCK = 4_000_000  # numbers held at once: with float64, 32 MB


@dataclass(frozen=True, slots=True)
class Interval:
    """A number with its 95% interval."""

    value: float  # NaN if the data does not allow one
    low: float | None = None  # None, as high, if there is too little data for an interval
    high: float | None = None

    @classmethod
    def from_draws(cls, draws: Floats, n: int | None = None) -> Interval:
        """Estimate and percentile interval of a statistic that a `ClusterBootstrap` computed.

        Args:
            draws: [resamples + 1], the statistic of the data itself first; NaN for resamples that have none.
            n: number of distinct prompts; the interval is left out for fewer than MIN_FOR_INTERVAL.
        """
        enough = n is None or n >= MIN_FOR_INTERVAL
        bounds = percentile_bounds(draws[1:]) if enough and not np.isnan(draws[0]) else None
        return cls(float(draws[0]), *(bounds or (None, None)))

    @property
    def bounds(self) -> Bounds | None:
        """(low, high), as JSON files keep it, or None."""
        return None if self.low is None or self.high is None else (self.low, self.high)


def side(bounds: Bounds | None, number: float) -> Literal[1, -1] | None:
    """1 if the whole interval is above a number, -1 if it is below, None if it includes it or is not known."""
    if bounds is None:
        return None
    return 1 if bounds[0] > number else -1 if bounds[1] < number else None


def percentile_bounds(draws: ArrayLike) -> Bounds | None:
    """95% percentile interval of a statistic's resamples [n]; NaN is left out, None if nothing else is there."""
    values = np.asarray(draws, np.float64)
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    low, high = np.percentile(values, _TAILS)
    return float(low), float(high)


def percentile_bands(draws: Floats) -> tuple[Floats, Floats]:
    """`percentile_bounds` of each column of [n, ...] as two arrays [...]; NaN if a column has no number."""
    if not np.isnan(draws).any():
        low, high = np.percentile(draws, _TAILS, axis=0)
        return low, high
    empty = np.isnan(draws).all(axis=0)
    low, high = np.nanpercentile(np.where(empty, 0.0, draws), _TAILS, axis=0)
    return np.where(empty, np.nan, low), np.where(empty, np.nan, high)


def exact_interval(k: int, n: int) -> Bounds:
    """Two-sided Clopper-Pearson interval of a rate of which k of n were seen."""
    from scipy.stats import binomtest

    low, high = binomtest(k, n).proportion_ci(CONFIDENCE, method="exact")
    return float(low), float(high)


def wilson_interval(k: int, n: int) -> Bounds:
    """Two-sided Wilson interval (1927) of a rate of which k of n were seen; good near 0 and 1 and for small n."""
    from scipy.stats import binomtest

    low, high = binomtest(k, n).proportion_ci(CONFIDENCE, method="wilson")
    return float(low), float(high)


def highest_rate(k: int, n: int) -> float:
    """The highest rate that k of n do not rule out with 95% confidence (one-sided Clopper-Pearson)."""
    from scipy.stats import beta

    return 1.0 if k >= n else float(beta.ppf(CONFIDENCE, k + 1, n - k))


# The bootstrap


def cluster_resamples(group: Ints, resamples: int, *, seed: int = 0, strata: NDArray | None = None) -> Iterator[Ints]:
    """Draw whole groups with replacement, as many as there are.

    Args:
        group: [n] the group of each sample.
        resamples: how many times to draw.
        seed: of the random generator.
        strata: [n] draw as many groups of each stratum as there are; the first sample of a group decides its stratum.

    Yields:
        [n] how often each sample counts.
    """
    random = np.random.default_rng(seed)
    _, first, group_index = np.unique(group, return_index=True, return_inverse=True)
    stratum = np.zeros(len(first), np.int64) if strata is None else strata[first]
    members = [np.flatnonzero(stratum == value) for value in np.unique(stratum)]
    for _ in range(resamples):
        times = np.zeros(len(first), np.int64)
        for own in members:
            times[own] = np.bincount(random.integers(0, len(own), len(own)), minlength=len(own))
        yield times[group_index]


class ClusterBootstrap:
    """Statistics of the same samples over the same resamples, so that differences between them are paired.

    Every method returns an array [resamples + 1]: the statistic of the data itself first, then of each resample. Pass
    it, or the difference of two of them, to `Interval.from_draws`.

    Args:
        group, resamples, seed, strata: as for `cluster_resamples`.

    Attributes:
        times: uint16 [resamples + 1, n], how often each sample counts; ones in the first row.
    """

    def __init__(
        self, group: Ints, resamples: int = RESAMPLES, *, seed: int = 0, strata: NDArray | None = None
    ) -> None:
        self.times = np.ones((resamples + 1, len(group)), np.uint16)
        for row, times in zip(self.times[1:], cluster_resamples(group, resamples, seed=seed, strata=strata)):
            row[:] = times

    def mean(self, values: Floats, mask: Bools) -> Floats:
        """Mean of the masked samples' values [n]; NaN if none was drawn."""
        times = self.times[:, mask]
        return _divide(times @ values[mask], times.sum(axis=1, dtype=np.float64))

    def column_means(self, values: Floats) -> Floats:
        """Mean of each column of values [n, columns], leaving out NaN -> [resamples + 1, columns]."""
        valid = np.isfinite(values)
        times = self.times.astype(np.float64)
        return _divide(times @ np.where(valid, values, 0.0), times @ valid)

    def rate_above(self, values: Floats, mask: Bools, thresholds: Floats) -> Floats:
        """Fraction of the masked samples above each draw's own threshold [resamples + 1]; NaN if none was drawn."""
        times = self.times[:, mask]
        above = np.where(values[mask] > thresholds[:, None], times, 0).sum(axis=1, dtype=np.float64)
        return _divide(above, times.sum(axis=1, dtype=np.float64))

    def threshold(self, values: Floats, mask: Bools, rate: float) -> Floats:
        """The lowest of the masked values that at most a fraction `rate` of them is above."""
        order = np.flatnonzero(mask)[np.argsort(values[mask], kind="stable")]
        up_to = np.cumsum(self.times[:, order], axis=1, dtype=np.float64)
        place = (up_to < (1 - rate) * up_to[:, -1:] - _ROUNDING).sum(axis=1)
        return values[order][np.minimum(place, len(order) - 1)]

    def auroc(self, values: Floats, positive: Bools, mask: Bools, pair_strata: Ints | None = None) -> Floats:
        """Chance that a positive sample has a higher value than a negative one, ties half; NaN if a class is missing.

        Args:
            values, positive, mask: [n]; samples outside the mask are left out.
            pair_strata: [n] compare only pairs within the same stratum.
        """
        won, pairs = np.zeros(len(self.times)), np.zeros(len(self.times))
        strata = (
            [mask] if pair_strata is None else [mask & (pair_strata == value) for value in np.unique(pair_strata[mask])]
        )
        for members in strata:
            if positive[members].any() and not positive[members].all():
                more_won, more_pairs = self._won(values[members], positive[members], np.flatnonzero(members))
                won += more_won
                pairs += more_pairs
        return _divide(won, pairs)

    def _won(self, values: Floats, positive: Bools, index: Ints) -> tuple[Floats, Floats]:
        """Pairs in which the positive sample is above, ties half, and all pairs; of each draw."""
        order = np.argsort(values, kind="stable")
        values, positive, index = values[order], positive[order], index[order]
        starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
        won, pairs = np.empty(len(self.times)), np.empty(len(self.times))
        size = max(1, _BLOCK // len(index))
        for first in range(0, len(self.times), size):
            block = slice(first, first + size)
            times = self.times[block][:, index].astype(np.float64)
            positives = np.add.reduceat(np.where(positive, times, 0.0), starts, axis=1)
            negatives = np.add.reduceat(np.where(positive, 0.0, times), starts, axis=1)
            negatives_up_to = np.cumsum(negatives, axis=1)
            won[block] = (positives * (negatives_up_to - negatives / 2)).sum(axis=1)
            pairs[block] = positives.sum(axis=1) * negatives_up_to[:, -1]
        return won, pairs


def _divide(total: Floats, n: Floats) -> Floats:
    return np.divide(total, n, out=np.full(total.shape, np.nan), where=n > 0)


# ROC curves


@dataclass(frozen=True, slots=True)
class Separation:
    """How well a number tells attacks from benign prompts; higher counts as attack.

    Attributes:
        auroc: with its interval; without one if a class has too few prompts.
        tpr: the most attacks, as a fraction, that a threshold flags with at most 5% of the benign prompts flagged.
        fpr, tprs: the corners of the ROC curve, from (0, 0) to (1, 1).
        grid, band: at false positive rates [g] the 95% interval of the true positive rate [2, g], or None.
    """

    auroc: float
    auroc_interval: Bounds | None
    tpr: float
    tpr_interval: Bounds | None
    fpr: Floats
    tprs: Floats
    grid: Floats
    band: Floats | None

    @property
    def constant(self) -> bool:
        """Whether all samples have the same value, or none has one: then it separates nothing."""
        return len(self.fpr) == 2

    def numbers(self) -> dict[str, float | Bounds | None]:
        """The values and intervals for run.json."""
        named = ("auroc", "auroc_interval", "tpr", "tpr_interval")
        return {name: getattr(self, name) for name in named} | {"at_fpr": TARGET_FPR}


def separation(
    values: Floats, attack: Bools, groups: Ints, *, seed: int = 0, resamples: int | None = None
) -> Separation:
    """ROC curve, AUROC and true positive rate of values [n], with bootstrap intervals; both classes must occur.

    Args:
        values: NaN ranks below every number and is never flagged.
        attack: [n] which samples are attacks.
        groups: [n] the group of each sample.
        resamples: RESAMPLES if None, 0 for no intervals.
    """
    resamples = RESAMPLES if resamples is None else resamples
    rank = ranks(values)
    fpr, tprs = roc_curve(rank, attack, np.ones(len(values)))
    auroc_interval = tpr_interval = band = None
    if resamples and min(int(attack.sum()), int((~attack).sum())) >= MIN_FOR_INTERVAL:
        aurocs, on_grid = [], []
        for times in cluster_resamples(groups, resamples, seed=seed):
            weight = times.astype(np.float64)
            if weight[attack].any() and weight[~attack].any():
                curve = roc_curve(rank, attack, weight)
                aurocs.append(area(*curve))
                on_grid.append(tpr_at(*curve, _FPR_GRID))
        auroc_interval = percentile_bounds(aurocs)
        band = np.stack(percentile_bands(np.array(on_grid)))
        at_target = band[:, np.flatnonzero(np.isclose(_FPR_GRID, TARGET_FPR))[0]]
        tpr_interval = float(at_target[0]), float(at_target[1])
    return Separation(
        auroc=area(fpr, tprs),
        auroc_interval=auroc_interval,
        tpr=float(tpr_at(fpr, tprs, np.array([TARGET_FPR]))[0]),
        tpr_interval=tpr_interval,
        fpr=fpr,
        tprs=tprs,
        grid=_FPR_GRID,
        band=band,
    )


def ranks(values: Floats) -> Ints:
    """Rank of each value among the distinct ones, from 0; NaN below every number."""
    return np.unique(np.where(np.isnan(values), -np.inf, values), return_inverse=True)[1]


def roc_curve(rank: Ints, attack: Bools, weight: Floats) -> tuple[Floats, Floats]:
    """False and true positive rates as ever lower ranks are flagged: none, the highest, ..., all.

    Args:
        rank: [n] of `ranks`.
        attack: [n]; both classes need some weight.
        weight: [n] how often each sample counts.
    """
    n_ranks = int(rank.max()) + 1

    def flagged(members: Bools) -> Floats:
        down_to = np.cumsum(np.bincount(rank[members], weight[members], n_ranks)[::-1])
        return np.concatenate([[0.0], down_to / down_to[-1]])

    return flagged(~attack), flagged(attack)


def area(fpr: Floats, tprs: Floats) -> float:
    """AUROC: the area under a ROC curve, ties half."""
    return float(np.trapezoid(tprs, fpr))


def average_precision(fpr: Floats, tprs: Floats, n_benign: float, n_attack: float) -> float:
    """Mean over the attacks of the precision of the threshold that just flags each of them."""
    flagged_attacks = tprs[1:] * n_attack
    return float(np.sum(np.diff(tprs) * flagged_attacks / (flagged_attacks + fpr[1:] * n_benign)))


def tpr_at(fpr: Floats, tprs: Floats, rates: Floats) -> Floats:
    """The highest true positive rate of a ROC curve at each false positive rate [g] that is not to be exceeded."""
    return tprs[np.searchsorted(fpr, rates + _ROUNDING, side="right") - 1]
