"""Estimates over prompts, with 95% intervals, and the columns of measured tables that they are made from.

An interval says what other prompts of the same kind might have given. Prompts are resampled with all their rows, so
rows of one prompt (system prompts, layers) do not count as independent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from headrift.stats import (
    CONFIDENCE,
    MIN_FOR_INTERVAL,
    RESAMPLES,
    Bounds,
    ClusterBootstrap,
    Floats,
    Ints,
    percentile_bands,
    side,
)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95% interval (None with too few prompts), and how many prompts and rows it is made from."""

    value: float
    interval: Bounds | None
    prompts: int
    rows: int

    @property
    def shown(self) -> bool:
        """Whether the interval leaves out 0."""
        return side(self.interval, 0) is not None


@dataclass(frozen=True, slots=True)
class Estimates:
    """Numbers of one shape with their 95% intervals, NaN with too few prompts."""

    value: Floats
    low: Floats
    high: Floats
    prompts: int
    rows: int

    def at(self, *index: int) -> Estimate:
        """One of the numbers."""
        low, high = float(self.low[index]), float(self.high[index])
        interval = None if np.isnan(low) or np.isnan(high) else (low, high)
        return Estimate(float(self.value[index]), interval, self.prompts, self.rows)


class PromptBootstrap:
    """Resamples of n prompts, the same for all estimates, so that differences are paired."""

    def __init__(self, n: int, seed: int = 0, resamples: int = RESAMPLES) -> None:
        self.n = n
        self._bootstrap = ClusterBootstrap(np.arange(n), resamples, seed=seed)

    def mean(self, values: Any, rows: int | None = None) -> Estimates:
        """Mean over the prompts.

        Args:
            values: [n, ...], NaN is left out; with several rows per prompt, their mean.
            rows: How many rows there are, if not one per prompt.
        """
        values = np.asarray(values, np.float64)
        flat = values.reshape(self.n, -1)
        draws = self._bootstrap.column_means(flat)
        prompts = int(np.isfinite(flat).any(1).sum())
        return _estimates(draws.reshape(-1, *values.shape[1:]), prompts, prompts if rows is None else rows)

    def statistic(self, function: Callable[[Ints], Any], rows: int, resamples: int) -> Estimates:
        """Any statistic of the prompts.

        Args:
            function: Computes it from the numbers of the drawn prompts, repeated as often as they were drawn.
            resamples: How many of the resamples to use, for slow functions.
        """
        times = self._bootstrap.times[: resamples + 1]
        draws = [np.asarray(function(np.repeat(np.arange(self.n), row)), np.float64) for row in times]
        return _estimates(np.stack(draws), self.n, rows)


def _estimates(draws: Floats, prompts: int, rows: int) -> Estimates:
    missing = np.full(draws.shape[1:], np.nan)
    low, high = percentile_bands(draws[1:]) if prompts >= MIN_FOR_INTERVAL else (missing, missing)
    return Estimates(draws[0], np.asarray(low), np.asarray(high), prompts, rows)


def student(values: Any, rows: int | None = None) -> tuple[Estimate, float]:
    """Mean of one number per prompt with Student's t interval, for few prompts, and its two-sided p-value against 0.

    With fewer than three prompts, or if all are equal, there is no interval and the p-value is NaN.
    """
    from scipy import stats

    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    n = len(values)
    value = float(values.mean()) if n else float("nan")
    rows = n if rows is None else rows
    if n < 3 or np.ptp(values) == 0:
        return Estimate(value, None, n, rows), float("nan")
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * values.std(ddof=1) / np.sqrt(n))
    return Estimate(value, (value - half, value + half), n, rows), float(stats.ttest_1samp(values, 0.0).pvalue)


def spearman(x: Floats, y: Floats) -> Floats:
    """Spearman's rank correlation of the columns of x and y [n, ...]; NaN if one is constant."""
    from scipy.stats import rankdata

    return pearson(rankdata(x, axis=0), rankdata(y, axis=0))


def pearson(x: Floats, y: Floats) -> Floats:
    """Pearson's correlation of the columns of x and y [n, ...]; NaN if one is constant."""
    x, y = x - x.mean(0), y - y.mean(0)
    norms = np.sqrt((x * x).sum(0) * (y * y).sum(0))
    return np.divide((x * y).sum(0), norms, out=np.full(norms.shape, np.nan), where=norms > 0)


def nan_mean(values: Floats, axis: int = 1) -> Floats:
    """Mean over an axis, leaving out NaN; NaN if nothing is left."""
    valid = np.isfinite(values)
    n = valid.sum(axis)
    return np.divide(np.where(valid, values, 0.0).sum(axis), n, out=np.full(n.shape, np.nan), where=n > 0)


def column(table: pa.Table, name: str) -> NDArray[Any]:
    """A column's values; numbers have NaN for null."""
    return np.array(table[name].to_pylist())


def list_column(table: pa.Table, name: str) -> list[NDArray[Any]]:
    """A column of lists, one array for each row."""
    return [chunk[i].values.to_numpy() for chunk in table[name].chunks for i in range(len(chunk))]


def prompt_means(table: pa.Table, value: str, prompts: Sequence[int], **only: str) -> Floats:
    """Each prompt's mean of a column [prompts], NaN if it has no row. only: use rows that have these values only."""
    selected = np.ones(table.num_rows, bool)
    for name, expected in only.items():
        selected &= column(table, name) == expected
    values, number = column(table, value).astype(float), column(table, "prompt")
    masks = [selected & (number == prompt) for prompt in prompts]
    return np.array([values[mask].mean() if mask.any() else np.nan for mask in masks])
