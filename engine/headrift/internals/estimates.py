"""Figures over prompts with their intervals: what other prompts of the same kind might have given.

Prompts are drawn with replacement, each with all its rows (system prompts, layers), so rows of one prompt do not count
as if they were so many prompts. 95% percentile intervals; for a handful of prompts Student's t instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrift.stats import MIN_FOR_INTERVAL, RESAMPLES, ClusterBootstrap

Floats = NDArray[np.float64]
_TAILS = (2.5, 97.5)


@dataclass(frozen=True, slots=True)
class Figure:
    """A number, its 95% interval (None: too few prompts for one), and the prompts and rows that it rests on."""

    value: float
    interval: tuple[float, float] | None
    prompts: int
    rows: int

    @property
    def shown(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


@dataclass(frozen=True, slots=True)
class Figures:
    """Numbers of one shape with their intervals, NaN where there are too few prompts."""

    value: Floats
    low: Floats
    high: Floats
    prompts: int
    rows: int

    def at(self, *index: int) -> Figure:
        low, high = float(self.low[index]), float(self.high[index])
        interval = None if np.isnan(low) or np.isnan(high) else (low, high)
        return Figure(float(self.value[index]), interval, self.prompts, self.rows)


class Prompts:
    """Draws of n prompts, the same for all figures, so that differences are paired."""

    def __init__(self, n: int, seed: int = 0, resamples: int = RESAMPLES) -> None:
        self.n = n
        self._times = ClusterBootstrap(np.arange(n), resamples, seed=seed).times

    def mean(self, values: Any, rows: int | None = None) -> Figures:
        """Means over the prompts [n, ...], NaN left out; of several rows a prompt, take their mean first and say how
        many `rows` there are."""
        values = np.asarray(values, np.float64)
        flat = values.reshape(self.n, -1)
        there = np.isfinite(flat)
        times = self._times.astype(np.float64)
        counts = times @ there
        drawn = np.divide(
            times @ np.where(there, flat, 0.0), counts, out=np.full(counts.shape, np.nan), where=counts > 0
        )
        n = int(there.any(1).sum())
        return self._figures(drawn.reshape(-1, *values.shape[1:]), n if rows is None else rows, n)

    def of(self, statistic: Callable[[NDArray[np.int64]], Any], rows: int, most: int | None = None) -> Figures:
        """What a function makes of prompts' numbers, as they are drawn. most: so many draws at most, for slow ones."""
        draws = self._times if most is None else self._times[: most + 1]
        drawn = np.stack([np.asarray(statistic(np.repeat(np.arange(self.n), times)), np.float64) for times in draws])
        return self._figures(drawn, rows, self.n)

    def _figures(self, drawn: Floats, rows: int, prompts: int) -> Figures:
        value, low, high = drawn[0], *(np.full(drawn.shape[1:], np.nan) for _ in _TAILS)
        if prompts >= MIN_FOR_INTERVAL:
            with np.errstate(invalid="ignore"):
                low, high = np.nanpercentile(drawn[1:], _TAILS, axis=0) if np.isfinite(drawn).any() else (low, high)
        return Figures(value, np.asarray(low), np.asarray(high), prompts, rows)


def student(values: Any, rows: int | None = None) -> tuple[Figure, float]:
    """The mean of one number a prompt with Student's t interval, and the two-sided p-value against 0; NaN for that,
    and no interval, for fewer than three prompts or where all are the same."""
    from scipy import stats

    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    n = len(values)
    value = float(values.mean()) if n else float("nan")
    rows = n if rows is None else rows
    if n < 3 or np.ptp(values) == 0:
        return Figure(value, None, n, rows), float("nan")
    half = float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n))
    return Figure(value, (value - half, value + half), n, rows), float(stats.ttest_1samp(values, 0.0).pvalue)


def spearman(x: Floats, y: Floats) -> Floats:
    """Spearman's rank correlation of columns [n, ...] with each other; NaN where one is constant."""
    from scipy.stats import rankdata

    return pearson(rankdata(x, axis=0), rankdata(y, axis=0))


def pearson(x: Floats, y: Floats) -> Floats:
    """Pearson's correlation of columns [n, ...] with each other; NaN where one is constant."""
    x, y = x - x.mean(0), y - y.mean(0)
    norms = np.sqrt((x * x).sum(0) * (y * y).sum(0))
    return np.divide((x * y).sum(0), norms, out=np.full(norms.shape, np.nan), where=norms > 0)
