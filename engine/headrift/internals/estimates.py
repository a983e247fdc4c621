"""Measures of a change, and estimates over prompts and system prompts with 95% intervals.

Prompts and system prompts are both samples: effect = prompt + system prompt + rest (crossed random effects). A
statement about one given system prompt or sentence is a mean over prompts (`over_prompts`). A statement about system
prompts is made from one value per system prompt, its mean over prompts (`over_systems`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from headrift.stats import CONFIDENCE, Bools, Bounds, Floats

# With fewer system prompts nothing is said about system prompts in general.
MIN_SYSTEMS = 30
_MIN_UNITS = 3  # prompts, or system prompts, for an interval
_ROUNDING = 1e-12

# Measures


def cosine(a: Any, b: Any) -> Floats:
    """Cosine of the vectors on the last axis; 0 if one of them is 0."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return _divide((a * b).sum(-1), np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), otherwise=0.0)


def relative_l2(a: Any, b: Any) -> Floats:
    """|b - a| / |a| of the vectors on the last axis; NaN if a is 0."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return _divide(np.linalg.norm(b - a, axis=-1), np.linalg.norm(a, axis=-1))


def kl(a: Any, b: Any) -> Floats:
    """KL(a || b) in nats of log probabilities on the last axis."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.maximum((np.exp(a) * (a - b)).sum(-1), 0.0)


def gram(states: Any) -> Floats:
    """Inner products [..., n, n] of n examples [n, ..., p], each of the p columns centred first."""
    x = np.moveaxis(np.asarray(states, np.float64), 0, -2)
    x = x - x.mean(-2, keepdims=True)
    return x @ np.swapaxes(x, -1, -2)


def linear_cka(a: Floats, b: Floats) -> Floats:
    """Linear centred kernel alignment [...] of two states' `gram`s [..., n, n]; 0 to 1, NaN if one never varies.

    CKA(X, Y) = |Y'X|^2 / (|X'X| |Y'Y|), Frobenius norms, columns centred (Kornblith et al., Similarity of Neural
    Network Representations Revisited, 2019, section 3); by n x n matrices, since n is far below p here.
    """
    return _divide((a * b).sum((-2, -1)), np.linalg.norm(a, axis=(-2, -1)) * np.linalg.norm(b, axis=(-2, -1)))


def cka_by_chance(a: Floats, b: Floats, draws: int = 20, seed: int = 0) -> Floats:
    """Mean CKA [...] with the examples of b in random order.

    With far fewer examples than dimensions CKA is far above 0 even for unrelated states; this says how far.
    """
    random = np.random.default_rng(seed)
    orders = (random.permutation(b.shape[-1]) for _ in range(draws))
    return np.mean([linear_cka(a, b[..., order, :][..., order]) for order in orders], axis=0)


def spearman(x: Floats, y: Floats) -> Floats:
    """Spearman's rank correlation of the columns of x and y [n, ...]; NaN if one is constant."""
    from scipy.stats import rankdata

    return pearson(rankdata(x, axis=0), rankdata(y, axis=0))


def pearson(x: Floats, y: Floats) -> Floats:
    """Pearson's correlation of the columns of x and y [n, ...]; NaN if one is constant."""
    x, y = x - x.mean(0), y - y.mean(0)
    return _divide((x * y).sum(0), np.sqrt((x * x).sum(0) * (y * y).sum(0)))


def nan_mean(values: Floats, axis: int = 1) -> Floats:
    """Mean over an axis, leaving out NaN; NaN if nothing is left."""
    valid = np.isfinite(values)
    return _divide(np.where(valid, values, 0.0).sum(axis), valid.sum(axis))


def _divide(a: Any, b: Any, otherwise: float = np.nan) -> Floats:
    return np.divide(a, b, out=np.full(np.shape(b), otherwise), where=b > 0)


# Estimates


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95% interval, and what it is made from.

    Attributes:
        value: NaN if there is none.
        interval: None with fewer than three prompts or system prompts, or if all values are equal.
        p: two-sided, of the value against 0, not corrected; NaN without an interval.
        prompts, rows: how many.
        systems: how many system prompts, if it is about system prompts in general; else None.
    """

    value: float
    interval: Bounds | None
    p: float
    prompts: int
    systems: int | None
    rows: int

    @property
    def not_judged(self) -> str | None:
        """Why there is no verdict on it; None if there is one."""
        if self.systems is not None and self.systems < MIN_SYSTEMS:
            prompts = "system prompt" if self.systems == 1 else "system prompts"
            return f"not judged: {self.systems} {prompts}, {MIN_SYSTEMS} needed"
        return "not judged: too few prompts, or all alike" if self.interval is None else None


@dataclass(frozen=True, slots=True)
class Estimates:
    """Numbers of one shape, as in `Estimate`; NaN for low and high without an interval."""

    value: Floats
    low: Floats
    high: Floats
    p: Floats
    prompts: int
    systems: int | None
    rows: int

    def at(self, *index: int) -> Estimate:
        """One of the numbers."""
        low, high, p = float(self.low[index]), float(self.high[index]), float(self.p[index])
        interval = None if np.isnan(low) or np.isnan(high) else (low, high)
        return Estimate(float(self.value[index]), interval, p, self.prompts, self.systems, self.rows)


# Of one value per unit [units, ...]: a statistic, its variance and the variance's degrees of freedom, each [...].
Statistic: TypeAlias = Callable[[Floats], tuple[Floats, Floats, Floats]]


def mean(values: Floats) -> tuple[Floats, Floats, Floats]:
    """Mean of the units, NaN left out: a `Statistic`."""
    n, value = np.isfinite(values).sum(0), nan_mean(values, 0)
    squares = np.where(np.isfinite(values), (values - value) ** 2, 0.0).sum(0)
    n = np.where(n >= _MIN_UNITS, n, np.nan)
    return value, squares / (n - 1) / n, n - 1


def difference(has: Bools) -> Statistic:
    """Mean of the units with something, `has` [units], less that of the others, with Welch's variance."""

    def statistic(values: Floats) -> tuple[Floats, Floats, Floats]:
        (one, variance, df), (other, other_variance, other_df) = mean(values[has]), mean(values[~has])
        return one - other, *_sum_of_variances((variance, df), (other_variance, other_df))

    return statistic


def slope(x: Floats) -> Statistic:
    """Least squares' slope of the units' values over x [units]."""

    def statistic(values: Floats) -> tuple[Floats, Floats, Floats]:
        y, own = _finite(values, x)
        own, y = own - own.mean(), y - y.mean()
        squares, n = (own * own).sum(), len(y)
        if n < _MIN_UNITS or squares == 0:
            return _NOTHING
        value = (own * y).sum() / squares
        variance = ((y - value * own) ** 2).sum() / (n - 2) / squares
        return value, variance, np.array(n - 2.0)

    return statistic


def correlation(x: Floats, *, ranks: bool) -> Statistic:
    """Pearson's or Spearman's (`ranks`) correlation of the units' values and x [units]."""

    def statistic(values: Floats) -> tuple[Floats, Floats, Floats]:
        y, own = _finite(values, x)
        return with_variance((spearman if ranks else pearson)(own, y), len(y)) if len(y) else _NOTHING

    return statistic


def with_variance(r: Floats, n: int) -> tuple[Floats, Floats, Floats]:
    """Correlations of n units with the variance of their Fisher's z (Bonett and Wright, 2000, which fits ranks too)."""
    variance = (1 + r * r / 2) / (n - 3) if n > _MIN_UNITS else np.full(np.shape(r), np.nan)
    return r, variance, np.full(np.shape(r), n - 2.0)


def _finite(values: Floats, x: Floats) -> tuple[Floats, Floats]:
    keep = np.isfinite(values) & np.isfinite(x)
    return values[keep], x[keep]


_NOTHING = (np.array(np.nan),) * 3


def _sum_of_variances(*parts: tuple[Floats, Floats]) -> tuple[Floats, Floats]:
    """The sum of variances, each with its degrees of freedom, and the sum's (Satterthwaite)."""
    total = sum((variance for variance, _ in parts), np.array(0.0))
    return total, _divide(total**2, sum((variance**2 / df for variance, df in parts), np.array(0.0)))


def over_prompts(values: Any, rows: int | None = None) -> Estimates:
    """Mean over prompts of values [prompts, ...], NaN left out, with Student's interval.

    rows: how many there are, if not one per prompt.
    """
    values = np.asarray(values, np.float64)
    prompts = _count(values, 0)
    return _estimates(*mean(values), _size(values), prompts, None, prompts if rows is None else rows)


def over_systems(
    values: Any,
    statistic: Statistic = mean,
    rows: int | None = None,
    is_correlation: bool = False,
) -> Estimates:
    """A statistic of one value per system prompt, the mean over prompts of values [prompts, systems, ...].

    Args:
        values: NaN is left out.
        statistic: of the system prompts' values.
        rows: how many there are, if not one per prompt and system prompt.
        is_correlation: whether the interval is on Fisher's scale, and over system prompts only.
    """
    values = np.asarray(values, np.float64)
    if rows is None:
        rows = int(np.isfinite(values).reshape(*values.shape[:2], -1).any(2).sum())
    return of_systems(lambda kept: nan_mean(values[kept], 0), values, statistic, rows, is_correlation)


def of_systems(
    by_system: Callable[[Bools], Floats],
    values: Floats,
    statistic: Statistic = mean,
    rows: int = 0,
    is_correlation: bool = False,
) -> Estimates:
    """A statistic of one value per system prompt, with an interval over system prompts and prompts.

    Its variance is that over system prompts plus that over prompts, by the jackknife. What is neither the prompt's nor
    the system prompt's is in both, so that it is rather too large than too small. Student's interval, with
    Satterthwaite's degrees of freedom. Correlations, which the jackknife does not suit near 1, have an interval over
    system prompts only.

    Args:
        by_system: of the prompts to use [prompts], the system prompts' values [systems, ...].
        values: [prompts, systems, ...], NaN if there is none; for counts.
        statistic, rows, is_correlation: as for `over_systems`.
    """
    has_values = np.asarray(np.isfinite(values).reshape(len(values), -1).any(axis=1))
    value, variance, df = statistic(by_system(has_values))
    prompts, systems = int(has_values.sum()), _count(values, 1)
    if prompts < _MIN_UNITS:
        variance = np.full(np.shape(value), np.nan)
    elif not is_correlation:
        without = np.stack([statistic(by_system(_without(has_values, i)))[0] for i in np.flatnonzero(has_values)])
        of_prompts = ((without - without.mean(0)) ** 2).sum(0) * (prompts - 1) / prompts
        variance, df = _sum_of_variances((variance, df), (of_prompts, np.full(np.shape(df), prompts - 1.0)))
    size = 1.0 if is_correlation else _size(values)
    return _estimates(value, variance, df, size, prompts, systems, rows, is_correlation)


def _without(has_values: Bools, i: Any) -> Bools:
    kept = has_values.copy()
    kept[i] = False
    return kept


def _count(values: Floats, axis: int) -> int:
    """How many entries of an axis have a number."""
    return int(np.isfinite(np.moveaxis(values, axis, 0)).reshape(values.shape[axis], -1).any(1).sum())


def _size(values: Floats) -> float:
    return float(np.max(np.abs(values), initial=0.0, where=np.isfinite(values)))


def _estimates(
    value: Floats,
    variance: Floats,
    df: Floats,
    size: float,
    prompts: int,
    systems: int | None,
    rows: int,
    is_correlation: bool = False,
) -> Estimates:
    """size: the largest of the values; a spread that rounding explains is none."""
    from scipy import stats

    error = np.sqrt(np.where(variance > (_ROUNDING * size) ** 2, variance, np.nan))
    middle = np.asarray(value, np.float64)
    if is_correlation:
        inside = np.where(np.abs(middle) < 1 - _ROUNDING, middle, np.nan)
        middle = np.arctanh(inside)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, df) * error
    low, high = (np.tanh(one) if is_correlation else np.asarray(one) for one in (middle - half, middle + half))
    p = 2 * stats.t.sf(np.abs(middle) / error, df)
    return Estimates(np.asarray(value, np.float64), low, high, np.asarray(p), prompts, systems, rows)


def corrected(p: Sequence[float]) -> Floats:
    """p-values that allow for their number (Benjamini and Hochberg: the false discovery rate); NaN is not a test."""
    from scipy.stats import false_discovery_control

    results = np.array(p, np.float64)
    tests = np.isfinite(results)
    if tests.any():
        results[tests] = false_discovery_control(results[tests])
    return results


def column(table: pa.Table, name: str) -> NDArray[Any]:
    """A column's values; numbers have NaN for null."""
    return np.array(table[name].to_pylist())


def cell_means(table: pa.Table, value: str, keep: ArrayLike = True) -> Floats:
    """The mean of a column [prompts, systems] over the rows of each prompt and system prompt, NaN if there is none.

    keep: [rows] of the table, which to use; prompts and system prompts are those of all rows.
    """
    values = column(table, value).astype(float)
    (prompts, i), (systems, j) = (np.unique(column(table, one), return_inverse=True) for one in ("prompt", "system"))
    totals, counts = np.zeros((2, len(prompts), len(systems)))
    used = np.isfinite(values) & np.asarray(keep, bool)
    np.add.at(totals, (i[used], j[used]), values[used])
    np.add.at(counts, (i[used], j[used]), 1)
    return _divide(totals, counts)
