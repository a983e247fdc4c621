"""Measures of a change, and estimates over prompts with 95% intervals.

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

from headrift.stats import CONFIDENCE, MIN_FOR_INTERVAL, Bounds, ClusterBootstrap, Floats, Ints, percentile_bands

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
    """A number with its 95% interval (None with too few prompts), and how many prompts and rows it is made from."""

    value: float
    interval: Bounds | None
    prompts: int
    rows: int


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

    def __init__(self, n: int, seed: int = 0) -> None:
        self.n = n
        self._bootstrap = ClusterBootstrap(np.arange(n), seed=seed)

    def mean(self, values: Any, rows: int | None = None) -> Estimates:
        """Mean over the prompts of values [n, ...], NaN left out. rows: how many there are, if not one per prompt."""
        values = np.asarray(values, np.float64)
        flat = values.reshape(self.n, -1)
        draws = self._bootstrap.column_means(flat)
        prompts = int(np.isfinite(flat).any(1).sum())
        return _estimates(draws.reshape(-1, *values.shape[1:]), prompts, prompts if rows is None else rows)

    def statistic(self, function: Callable[[Ints], Any], rows: int, resamples: int) -> Estimates:
        """Any statistic, computed from the numbers of the drawn prompts, repeated as often as they were drawn.

        resamples: how many of the resamples to use, for slow functions.
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


def column(table: pa.Table, name: str) -> NDArray[Any]:
    """A column's values; numbers have NaN for null."""
    return np.array(table[name].to_pylist())


def prompt_means(table: pa.Table, value: str, prompts: Sequence[int]) -> Floats:
    """Each prompt's mean of a column [prompts], NaN if it has no row."""
    values, number = column(table, value).astype(float), column(table, "prompt")
    masks = [number == prompt for prompt in prompts]
    return np.array([values[mask].mean() if mask.any() else np.nan for mask in masks])
