"""Thresholds from benign scores, and what they promise.

A score is flagged when it is at or above the threshold. With n benign scores, no score lowest, the threshold is the
smallest number above the largest of them but k, so that at most k benign samples are flagged, and that one is not. Two
rules for k, both exact whatever the scores' distribution, if the samples are independent draws of what comes later:

- binomial: the largest k with P(Binomial(n, target) <= k) <= 5%. If the true false positive rate were above the target,
  so few would be flagged in at most 5% of calibrations: it is at most the target with 95% confidence.
- conformal: k = floor(target * (n + 1)) - 1. The next benign score is flagged with probability at most the target, on
  average over calibrations. The same as p-value <= target.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from headrift.runs.reading import Grouping
from headrift.signal import Window
from headrift.stats import CONFIDENCE, Floats, Ints


class CalibrationError(ValueError):
    """The runs cannot be calibrated on, or the calibration not be used. The message says why and what to do."""


class Rule(StrEnum):
    """How a threshold is set; see the module's docstring."""

    BINOMIAL = "binomial"
    CONFORMAL = "conformal"


@dataclass(frozen=True, slots=True)
class CalibrateConfig:
    """Options of a calibration. CalibrationError if a value is out of range."""

    target_fpr: float = 0.05  # fraction of distinct benign prompts that may be flagged
    rule: Rule = Rule.BINOMIAL
    benign_only: bool = False  # use no attacks, and the rows without a label as benign ones
    contamination: float = 0.01  # with benign_only: fraction of attacks among the prompts to allow for
    daily_prompts: int | None = None  # prompts a day, to estimate alerts a day
    window: Window | None = None  # use this window and the runs' own layers instead of searching
    signal: str = "auto"  # to detect by; auto chooses
    prefill_only: bool = False  # use step 0 alone, also if the runs recorded more
    by_category: bool = False  # keep categories whole in cross-validation
    grouping: Grouping = Grouping.AUTO  # or its value: "auto", "own", "near"
    folds: int = 5
    resamples: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "grouping", Grouping(self.grouping))
        if not 0 < self.target_fpr < 1:
            raise CalibrationError(f"--target-fpr {self.target_fpr} is not a rate between 0 and 1, as 0.05 is")
        if not 0 <= self.contamination < 1:
            raise CalibrationError(f"--contamination {self.contamination} must be at least 0 and below 1, as 0.01 is")
        if self.folds < 2:
            raise CalibrationError(f"--folds {self.folds}: cross-validation needs at least 2")
        if self.resamples < 0:
            raise CalibrationError(f"--resamples {self.resamples} must be at least 0 (0: no intervals)")

    @property
    def target(self) -> float:
        """Rate of all prompts that may be flagged; with benign_only, if all flagged ones were benign."""
        return self.target_fpr * (1 - self.contamination) if self.benign_only else self.target_fpr


def needed(target: float, rule: Rule) -> int:
    """The fewest benign samples from which a threshold can be set: 59 for 5% and 299 for 1% (binomial)."""
    if rule is Rule.CONFORMAL:
        return math.ceil(1 / target - 1e-9) - 1
    return math.ceil(math.log(1 - CONFIDENCE) / math.log1p(-target))


def allowed(n: int, target: float, rule: Rule) -> int | None:
    """How many of n benign samples may be flagged; None if n is too few."""
    if n < needed(target, rule):
        return None
    if rule is Rule.CONFORMAL:
        return math.floor(target * (n + 1) + 1e-9) - 1
    from scipy.stats import binom

    k = int(binom.ppf(1 - CONFIDENCE, n, target))  # the smallest with a probability of at least 5%
    return k if binom.cdf(k, n, target) <= 1 - CONFIDENCE else k - 1


def threshold(scores: Floats, times: Ints, target: float, rule: Rule) -> float | None:
    """The threshold from benign scores; None if they are too few or none has a score.

    Each of scores [n], NaN for none, counts times [n]. If so few have a score that all might be flagged, all but the
    lowest are.
    """
    k = allowed(int(times.sum()), target, rule)
    counted = times > 0
    values = np.where(np.isnan(scores), -np.inf, scores)[counted]
    if k is None or not np.isfinite(values).any():
        return None
    down = np.argsort(-values, kind="stable")
    place = np.searchsorted(np.cumsum(times[counted][down]), k, side="right")
    not_flagged = max(values[down[place]], values[np.isfinite(values)].min())
    return float(np.nextafter(not_flagged, np.inf))
