"""AUROCs and other figures of the same samples over the same resamples, so that differences are paired.

Groups of exact repeats and near repeats are drawn whole, with replacement, as many of a class as there are. The first
draw is the data itself: a figure's value. The others give its 95% percentile interval.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from headrift.calibration.comparison import Estimate
from headrift.separation import MIN_FOR_INTERVAL

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]

_ROUNDING = 1e-9
_AT_ONCE = 4_000_000  # numbers: with float64, 32 MB


class Draws:
    """How often each of n samples counts in each draw, the data itself first: times [resamples + 1, n]."""

    def __init__(self, attack: Bools, group: Ints, resamples: int, seed: int) -> None:
        self.attack = attack
        random = np.random.default_rng(seed)
        _, first, of = np.unique(group, return_index=True, return_inverse=True)
        members = [np.flatnonzero(attack[first] == label) for label in (True, False)]
        self.times = np.ones((resamples + 1, len(attack)), np.uint16)
        for row in self.times[1:]:
            drawn = np.zeros(len(first), np.uint16)
            for mine in members:
                drawn[mine] = (
                    np.bincount(random.integers(0, len(mine), len(mine)), minlength=len(mine)) if len(mine) else 0
                )
            row[:] = drawn[of]

    def auroc(self, values: Floats, mask: Bools, strata: Ints | None = None, positive: Bools | None = None) -> Floats:
        """In each draw the chance that an attack of the mask is above a benign prompt of it, ties half; NaN where a
        class is missing. strata: only pairs of the same stratum. positive: others to tell apart than attacks."""
        positive = self.attack if positive is None else positive
        won, pairs = np.zeros(len(self.times)), np.zeros(len(self.times))
        for of in [mask] if strata is None else [mask & (strata == at) for at in np.unique(strata[mask])]:
            if positive[of].any() and not positive[of].all():
                some_won, some_pairs = self._won(values[of], positive[of], np.flatnonzero(of))
                won += some_won
                pairs += some_pairs
        return np.divide(won, pairs, out=np.full(len(won), np.nan), where=pairs > 0)

    def _won(self, values: Floats, positive: Bools, at: Ints) -> tuple[Floats, Floats]:
        """Pairs in which the positive one is above, ties half, and all pairs, in each draw."""
        order = np.argsort(values, kind="stable")
        ordered, positive, at = values[order], positive[order], at[order]
        starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
        won, pairs = np.empty(len(self.times)), np.empty(len(self.times))
        size = max(1, _AT_ONCE // len(at))
        for first in range(0, len(self.times), size):
            part = slice(first, first + size)
            times = self.times[part][:, at].astype(np.float64)
            of_positive = np.add.reduceat(np.where(positive, times, 0.0), starts, axis=1)
            of_negative = np.add.reduceat(np.where(positive, 0.0, times), starts, axis=1)
            up_to = np.cumsum(of_negative, axis=1)
            won[part] = (of_positive * (up_to - of_negative / 2)).sum(axis=1)
            pairs[part] = of_positive.sum(axis=1) * up_to[:, -1]
        return won, pairs

    def mean(self, values: Floats, mask: Bools) -> Floats:
        """In each draw the mean over the mask; NaN where none of it was drawn."""
        times = self.times[:, mask]
        n = times.sum(axis=1, dtype=np.float64)
        return np.divide(times @ values[mask], n, out=np.full(len(n), np.nan), where=n > 0)

    def rate_above(self, values: Floats, mask: Bools, thresholds: Floats) -> Floats:
        """In each draw the fraction of the mask that is above the draw's threshold; NaN where none of it was drawn."""
        times = self.times[:, mask]
        above = np.where(values[mask] > thresholds[:, None], times, 0).sum(axis=1, dtype=np.float64)
        n = times.sum(axis=1, dtype=np.float64)
        return np.divide(above, n, out=np.full(len(n), np.nan), where=n > 0)

    def threshold(self, values: Floats, mask: Bools, rate: float) -> Floats:
        """In each draw the lowest value of the mask's that at most this fraction of it is above."""
        order = np.flatnonzero(mask)[np.argsort(values[mask], kind="stable")]
        up_to = np.cumsum(self.times[:, order], axis=1, dtype=np.float64)
        place = (up_to < (1 - rate) * up_to[:, -1:] - _ROUNDING).sum(axis=1)
        return values[order][np.minimum(place, len(order) - 1)]

    def estimate(self, drawn: Floats, mask: Bools, positive: Bools | None = None) -> Estimate:
        """A figure of the mask's samples, of both classes or of one, from its value in each draw."""
        positive = self.attack if positive is None else positive
        n_attack, n_benign = int((mask & positive).sum()), int((mask & ~positive).sum())
        value, interval, reason = None, None, None
        if np.isnan(drawn[0]):
            reason = "one of the classes has no such prompt"
        else:
            value = float(drawn[0])
            there = drawn[1:][~np.isnan(drawn[1:])]
            if len(there) and min(n for n in (n_attack, n_benign) if n) >= MIN_FOR_INTERVAL:
                low, high = np.percentile(there, [2.5, 97.5])
                interval = float(low), float(high)
        return Estimate(value=value, interval=interval, n_attack=n_attack, n_benign=n_benign, reason=reason)
