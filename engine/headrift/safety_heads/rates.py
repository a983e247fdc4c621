"""Rates of few yes-or-no answers, and their differences between two arms that were asked the same: with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrift.stats import MIN_FOR_INTERVAL, RESAMPLES

Bools = NDArray[np.bool_]
Interval = tuple[float, float]
_Z = 1.959963984540054  # of 95%


@dataclass(frozen=True, slots=True)
class Rate:
    """true of n: value, and Wilson's 95% interval (1927), which holds near 0 and 1 and for few."""

    n: int
    true: int
    value: float
    interval: Interval

    def numbers(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.true}/{self.n} {self.value:.2f} [{low:.2f}, {high:.2f}]"


@dataclass(frozen=True, slots=True)
class Paired:
    """The rate of one arm minus that of another, asked the same n. began, ended: true in the first alone, in the second
    alone. interval: 95%, Bonett and Price's (2012), which adds one to either count. p_value: McNemar's exact one."""

    n: int
    began: int
    ended: int
    difference: float
    interval: Interval
    p_value: float

    def numbers(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def rate(true: Sequence[bool] | Bools) -> Rate:
    """Of at least one yes or no."""
    from scipy.stats import binomtest

    n, k = len(true), int(np.sum(true))
    found = binomtest(k, n).proportion_ci(method="wilson")
    return Rate(n, k, k / n, (float(found.low), float(found.high)))


def paired(first: Sequence[bool] | Bools, second: Sequence[bool] | Bools) -> Paired:
    """first - second, of the same n in the same order."""
    from scipy.stats import binomtest

    one, other = np.asarray(first, bool), np.asarray(second, bool)
    n, began, ended = len(one), int((one & ~other).sum()), int((~one & other).sum())
    # With p = (count + 1) / (n + 2) for either count: p1 - p2 +- z sqrt((p1 + p2 - (p1 - p2)^2) / (n + 2)).
    up, down = (began + 1) / (n + 2), (ended + 1) / (n + 2)
    half = _Z * sqrt((up + down - (up - down) ** 2) / (n + 2))
    interval = max(-1.0, up - down - half), min(1.0, up - down + half)
    p_value = float(binomtest(began, began + ended).pvalue) if began + ended else 1.0
    return Paired(n, began, ended, (began - ended) / n, interval, p_value)


def mean_interval(values: NDArray[np.float64], weights: NDArray[np.float64] | None = None) -> Interval | None:
    """The 95% percentile interval of a mean over resamples of its values [n]; None for fewer than ten of them, and
    where they are all the same, of which a bootstrap can say nothing."""
    if len(values) < MIN_FOR_INTERVAL or np.ptp(values) == 0:
        return None
    drawn = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    of = np.ones(len(values)) if weights is None else weights
    means = (values * of)[drawn].sum(axis=1) / of[drawn].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
