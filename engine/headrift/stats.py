"""Intervals, the bootstrap over groups of prompts, AUROC and true positive rates: the statistics of every report.

All intervals have 95% confidence. Bootstrap intervals come from resampling whole groups (prompts that are alike) with
replacement; the same input and seed give the same interval. Percentile intervals of few groups are too narrow, so they
are expanded: Hesterberg, "What Teachers Should Know About the Bootstrap" (2015). The number of groups that counts is
that of the class that has fewer, not the number of rows.
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
# With fewer groups in a class a bootstrap interval says little, and looks as if it said much (bench/simulations.py).
MIN_FOR_INTERVAL = 10

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
    def from_draws(cls, draws: Floats, n: float) -> Interval:
        """Estimate and interval of a statistic that a `ClusterBootstrap` computed.

        Args:
            draws: [resamples + 1], the statistic of the data itself first; NaN for resamples that have none.
            n: groups, as for `percentile_bounds`.
        """
        bounds = None if np.isnan(draws[0]) else percentile_bounds(draws[1:], n)
        return cls(float(draws[0]), *(bounds or (None, None)))

    @classmethod
    def from_aurocs(cls, draws: Floats, n_positive: float, n_negative: float) -> Interval:
        """The same of an AUROC, by `auroc_bounds`."""
        value = float(draws[0])
        bounds = None if np.isnan(value) else auroc_bounds(value, draws[1:], n_positive, n_negative)
        return cls(value, *(bounds or (None, None)))

    @property
    def bounds(self) -> Bounds | None:
        """(low, high), as JSON files keep it, or None."""
        return None if self.low is None or self.high is None else (self.low, self.high)


def side(bounds: Bounds | None, number: float) -> Literal[1, -1] | None:
    """1 if the whole interval is above a number, -1 if it is below, None if it includes it or is not known."""
    if bounds is None:
        return None
    return 1 if bounds[0] > number else -1 if bounds[1] < number else None


def effective_groups(group: Ints) -> float:
    """How many groups of one size would say as much as these samples' groups [n]: Kish's (sum of sizes)^2 / sum of
    squared sizes, the number of groups if all have the same size."""
    sizes = np.unique(group, return_counts=True)[1].astype(np.float64)
    return float(sizes.sum() ** 2 / (sizes**2).sum()) if len(sizes) else 0.0


def fewest_groups(group: Ints, *classes: Bools) -> float:
    """The least `effective_groups` of masks [n] of samples, leaving out empty ones; 0 if all are."""
    return min((effective_groups(group[mask]) for mask in classes if mask.any()), default=0.0)


def tail(n: float, comparisons: int = 1) -> float:
    """Fraction of resamples to leave out at each end for an interval of n groups.

    It is Phi(-sqrt(n / (n - 1)) t), t being Student's quantile for n - 1 degrees of freedom: 0.025 for very many groups
    and 0.0086 for 10.

    Args:
        n: groups of the class that has fewer.
        comparisons: the interval holds for as many at once (Bonferroni).
    """
    from scipy.stats import norm, t

    alpha = (1 - CONFIDENCE) / 2 / comparisons
    return alpha if np.isinf(n) else float(norm.cdf(np.sqrt(n / (n - 1)) * t.ppf(alpha, n - 1)))


def percentile_bounds(draws: ArrayLike, n: float, comparisons: int = 1) -> Bounds | None:
    """Expanded percentile interval of a statistic's resamples.

    The tail has to hold a resample: with 200 resamples and 10 groups the ends are the two most extreme resamples, with
    fewer resamples the interval is too narrow.

    Args:
        draws: [resamples]; NaN is left out.
        n: groups of the class that has fewer (see `fewest_groups`); infinite for draws that are no resamples.
        comparisons: as for `tail`.

    Returns:
        None if no number is there, or fewer than MIN_FOR_INTERVAL groups.
    """
    values = np.asarray(draws, np.float64)
    values = values[~np.isnan(values)]
    if not len(values) or n < MIN_FOR_INTERVAL:
        return None
    share = tail(n, comparisons)
    low, high = np.quantile(values, (share, 1 - share))
    return float(low), float(high)


def percentile_bands(draws: Floats, n: float) -> tuple[Floats, Floats]:
    """`percentile_bounds` of each column of [resamples, ...] as two arrays [...]; NaN if a column has none."""
    empty = np.isnan(draws).all(axis=0)
    if n < MIN_FOR_INTERVAL:
        empty = np.ones_like(empty)
    if empty.all():
        return np.full(empty.shape, np.nan), np.full(empty.shape, np.nan)
    share = tail(n)
    quantile = np.nanquantile if np.isnan(draws).any() else np.quantile
    low, high = quantile(np.where(empty, 0.0, draws), (share, 1 - share), axis=0)
    return np.where(empty, np.nan, low), np.where(empty, np.nan, high)


def rate_bounds(value: float, draws: ArrayLike, n: float) -> Bounds | None:
    """Interval of a rate: `percentile_bounds` of its resamples, and no narrower than Wilson's for n groups.

    If none or all of few prompts are flagged, so they are in every resample, whose interval then has no width.
    """
    return _wider(percentile_bounds(draws, n), wilson_interval(value * n, n) if n else None)


def auroc_bounds(value: float, draws: ArrayLike, n_positive: float, n_negative: float) -> Bounds | None:
    """Interval of an AUROC: `percentile_bounds` of its resamples, and no narrower than `auroc_interval`.

    Near 0 and 1 resamples of few groups are too narrow, and of no width if the data separates.
    """
    n = min(n_positive, n_negative)
    return _wider(percentile_bounds(draws, n), auroc_interval(value, n_positive, n_negative) if n else None)


def _wider(one: Bounds | None, other: Bounds | None) -> Bounds | None:
    return None if one is None or other is None else (min(one[0], other[0]), max(one[1], other[1]))


def exact_interval(k: float, n: float) -> Bounds:
    """Two-sided Clopper-Pearson interval of a rate of which k of n were seen; n may be `effective_groups`."""
    from scipy.stats import beta

    alpha = (1 - CONFIDENCE) / 2
    low = 0.0 if k <= 0 else float(beta.ppf(alpha, k, n - k + 1))
    return low, 1.0 if k >= n else float(beta.ppf(1 - alpha, k + 1, n - k))


def rate_interval(hits: Bools, group: Ints) -> Bounds:
    """Two-sided Clopper-Pearson interval of a rate [n] with the groups [n] as trials.

    It is exact if each sample is a group of its own. Otherwise it is too wide where samples of a group differ; what
    they add cannot be told from few groups, of which one or two may hold all hits.
    """
    n = effective_groups(group)
    return exact_interval(round(float(np.mean(hits)) * n, 9), n)


def wilson_interval(k: float, n: float) -> Bounds:
    """Two-sided Wilson interval (1927) of a rate of which k of n were seen; good near 0 and 1 and for small n.

    n may be a number of `effective_groups`.
    """
    rate = k / n
    middle = (rate + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * np.sqrt(rate * (1 - rate) / n + Z**2 / (4 * n * n)) / (1 + Z**2 / n)
    return (0.0 if k <= 0 else float(middle - half)), (1.0 if k >= n else float(middle + half))


def auroc_interval(auroc: float, n_positive: float, n_negative: float) -> Bounds:
    """Two-sided score interval of an AUROC (Newcombe 2006, method 5): for AUROCs, what Wilson's is for rates.

    Its ends are the AUROCs whose standard error, Hanley and McNeil's with (n_positive + n_negative) / 2 for both
    classes, would just allow what was seen.
    """
    from scipy.optimize import brentq

    half = (n_positive + n_negative) / 2 - 1

    def excess(other: float) -> float:
        spread = 1 + half * ((1 - other) / (2 - other) + other / (1 + other))
        return (auroc - other) ** 2 - Z**2 * other * (1 - other) * spread / (n_positive * n_negative)

    first, last = 1e-9, 1 - 1e-9
    value = min(max(auroc, first), last)
    low = 0.0 if excess(first) <= 0 else float(brentq(excess, first, value))
    high = 1.0 if excess(last) <= 0 else float(brentq(excess, value, last))
    return low, high


def mean_interval(values: ArrayLike, comparisons: int = 1) -> Interval:
    """Mean of one figure per source (set, model) with Student's t interval; without one for fewer than three sources.

    It says how the figure would be on other such sources, which no resampling of prompts does. comparisons: as for
    `tail`.
    """
    from scipy.stats import t

    numbers = np.asarray(values, np.float64)
    numbers = numbers[~np.isnan(numbers)]
    n = len(numbers)
    if n < 3:
        return Interval(float(numbers.mean()) if n else np.nan)
    mean, quantile = float(numbers.mean()), float(t.ppf(1 - (1 - CONFIDENCE) / 2 / comparisons, n - 1))
    half = quantile * float(numbers.std(ddof=1)) / np.sqrt(n)
    return Interval(mean, float(mean - half), float(mean + half))


def change_interval(differences: Floats, group: Ints, z: float = Z) -> Bounds:
    """Interval of the mean difference of two rates of the same samples, by Bonett and Price (2012).

    It is the usual interval of a mean over groups, with two more groups added: one of difference 1, one of -1.

    Args:
        differences: [n] from -1 to 1.
        group: [n] the group of each sample.
        z: quantile of the normal distribution; by default for 95%.
    """
    number = np.unique(group, return_inverse=True)[1]
    by_group = np.bincount(number, differences) / np.bincount(number)
    widened = np.append(by_group, (1.0, -1.0))
    half = z * widened.std() / np.sqrt(len(widened))
    return max(-1.0, float(widened.mean() - half)), min(1.0, float(widened.mean() + half))


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
    it, or the difference of two of them, to `Interval.from_draws`, with the number of groups.

    Args:
        group, resamples, seed, strata: as for `cluster_resamples`.

    Attributes:
        group: [n] as given.
        times: uint16 [resamples + 1, n], how often each sample counts; ones in the first row.
    """

    def __init__(
        self, group: Ints, resamples: int = RESAMPLES, *, seed: int = 0, strata: NDArray | None = None
    ) -> None:
        self.group = group
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
        auroc: with its interval; without one if a class has too few groups.
        tpr: the most attacks, as a fraction, that a threshold flags with at most 5% of the benign prompts flagged.
        fpr, tprs: the corners of the ROC curve, from (0, 0) to (1, 1).
        grid, band: at false positive rates [g] the 95% interval of the true positive rate [2, g], or None.
        n: groups of the class that has fewer.
        draws: AUROC of each resample, NaN without a class; empty if there is no interval. Those of two numbers of the
            same samples are of the same resamples.
    """

    auroc: float
    auroc_interval: Bounds | None
    tpr: float
    tpr_interval: Bounds | None
    fpr: Floats
    tprs: Floats
    grid: Floats
    band: Floats | None
    n: float
    draws: Floats

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
    tpr = float(tpr_at(fpr, tprs, np.array([TARGET_FPR]))[0])
    auroc_interval = tpr_interval = band = None
    n, draws = fewest_groups(groups, attack, ~attack), np.full(resamples, np.nan)
    if resamples and n >= MIN_FOR_INTERVAL:
        on_grid = np.full((resamples, len(_FPR_GRID)), np.nan)
        for number, times in enumerate(cluster_resamples(groups, resamples, seed=seed)):
            weight = times.astype(np.float64)
            if weight[attack].any() and weight[~attack].any():
                curve = roc_curve(rank, attack, weight)
                draws[number], on_grid[number] = area(*curve), tpr_at(*curve, _FPR_GRID)
        auroc_interval = auroc_bounds(
            area(fpr, tprs), draws, *(effective_groups(groups[mask]) for mask in (attack, ~attack))
        )
        band = np.stack(percentile_bands(on_grid, n))
        at_target = on_grid[:, np.flatnonzero(np.isclose(_FPR_GRID, TARGET_FPR))[0]]
        tpr_interval = rate_bounds(tpr, at_target, n)
    return Separation(
        auroc=area(fpr, tprs),
        auroc_interval=auroc_interval,
        tpr=tpr,
        tpr_interval=tpr_interval,
        fpr=fpr,
        tprs=tprs,
        grid=_FPR_GRID,
        band=band,
        n=n,
        draws=draws if auroc_interval is not None else np.empty(0),
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


def expected_tpr(fpr: Floats, tprs: Floats, n_benign: float, rate: float) -> float:
    """True positive rate at a threshold that a fraction `rate` of other benign prompts is above on average.

    Above the k-th highest of n benign values are k / (n + 1) of others, not (k - 1) / n: the best threshold with at
    most 5% of 26 in hindsight flags 7.4% of others. Between two k it is interpolated.
    """
    k = rate * (n_benign + 1)
    low, high = np.floor(k), np.floor(k) + 1
    ends = tpr_at(fpr, tprs, (np.array([low, high]) - 1) / n_benign) * (np.array([low, high]) >= 1)
    return float(ends @ np.array([high - k, k - low]))
