"""Thresholds from benign scores, and what they promise.

A score is flagged when it is at or above the threshold. With n benign scores, no score lowest, the threshold is the
smallest number above the largest of them but k, so that at most k benign samples are flagged, and that one is not. Two
rules for k, both exact whatever the scores' distribution, if the samples are independent draws of what comes later:

- binomial: the largest k with P(Binomial(n, target) <= k) <= 5%. Were the true false positive rate above the target, so
  few would be flagged in at most 5% of calibrations: it is at most the target with 95% confidence.
- conformal: k = floor(target * (n + 1)) - 1. The next benign score is flagged with probability at most the target, on
  average over calibrations. The same as p-value <= target.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from headrift.calibration.settings import Rule
from headrift.stats import CONFIDENCE

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]


def needed(target: float, rule: Rule) -> int:
    """The fewest benign samples from which a threshold can be set: 59 for 5% and 299 for 1% (binomial)."""
    if rule is Rule.CONFORMAL:
        return math.ceil(1 / target - 1e-9) - 1
    return math.ceil(math.log(1 - CONFIDENCE) / math.log1p(-target))


def allowed(n: int, target: float, rule: Rule) -> int | None:
    """How many of n benign samples may be flagged; None where n are too few."""
    if n < needed(target, rule):
        return None
    if rule is Rule.CONFORMAL:
        return math.floor(target * (n + 1) + 1e-9) - 1
    from scipy.stats import binom

    k = int(binom.ppf(1 - CONFIDENCE, n, target))  # the smallest with a probability of at least 5%
    return k if binom.cdf(k, n, target) <= 1 - CONFIDENCE else k - 1


def threshold(scores: Floats, times: Ints, target: float, rule: Rule) -> float | None:
    """The threshold from benign scores (NaN for none), each counted so many times; None where they are too few, or none
    has a score.

    Where so few have a score that all might be flagged, all but the lowest are.
    """
    k = allowed(int(times.sum()), target, rule)
    there = times > 0
    ordered = np.where(np.isnan(scores), -np.inf, scores)[there]
    if k is None or not np.isfinite(ordered).any():
        return None
    down = np.argsort(-ordered, kind="stable")
    place = np.searchsorted(np.cumsum(times[there][down]), k, side="right")
    not_flagged = max(ordered[down[place]], ordered[np.isfinite(ordered)].min())
    return float(np.nextafter(not_flagged, np.inf))


@dataclass(frozen=True, slots=True)
class Reference:
    """What p-values need of n benign scores: values, ascending, with how many scores are at least that and how many
    are above it."""

    n: int
    values: Floats
    at_or_above: Ints
    above: Ints

    @classmethod
    def of(cls, scores: Floats, most: int = 5_000) -> Reference:
        """Of benign scores, NaN for none: all distinct values or, of more than `most`, the highest half of `most` and
        as many others, evenly spread."""
        there = scores[~np.isnan(scores)]
        values, first, times = np.unique(np.sort(there), return_index=True, return_counts=True)
        at_or_above = len(there) - first
        keep = np.arange(len(values))
        if len(values) > most:
            top = len(values) - most // 2
            keep = np.concatenate([np.linspace(0, top - 1, most - most // 2).round().astype(np.int64), keep[top:]])
        return cls(len(scores), values[keep], at_or_above[keep], (at_or_above - times)[keep])

    def p_values(self, scores: Floats) -> Floats:
        """(1 + benign samples with at least that score) / (1 + n) for each score, NaN for none.

        A value between two that are not neighbours among the samples counts all between as above it: p-values are then
        a little too high, never too low.
        """
        place = np.searchsorted(self.values, scores, side="right") - 1
        known = np.maximum(place, 0)
        as_high = (place < 0) | (self.values[known] == scores)
        at_least = np.where(as_high, self.at_or_above[known], self.above[known])
        return np.where(np.isnan(scores), np.nan, (1 + at_least) / (1 + self.n))
