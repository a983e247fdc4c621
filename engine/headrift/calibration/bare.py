"""A threshold on instability without a calibration: it judges as one does, and promises nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from headrift.calibration.artifact import Calibration, Verdicts
from headrift.calibration.thresholds import CalibrationError
from headrift.results import ScoreResult
from headrift.signal import ScoreRange
from headrift.signals import get
from headrift.signals.detectors import Directed

HIGHEST = 0.5  # instability of shares from 0 to 1
NO_PROMISE = (
    "nothing is promised: the threshold was not set on benign prompts of yours, so its false positive rate is not "
    "known; `headrift calibrate` sets one with a known rate"
)


@dataclass(frozen=True, slots=True)
class BareThreshold:
    """A threshold on instability over a window, and what of `Calibration` judging takes.

    There are no benign scores to compare with, so there are no p-values.

    Raises:
        CalibrationError: The threshold is not a number that instability can reach, or the window has no step.
    """

    threshold: float
    score_range: ScoreRange

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= HIGHEST:
            raise CalibrationError(
                f"--threshold {self.threshold} is not a number from 0 to {HIGHEST}, the highest instability there is"
            )
        if self.score_range.window.empty:
            raise CalibrationError("--window none has no step to judge by: name some, as in --window 2:3")

    @property
    def detector(self) -> Directed:
        return Directed(signal="instability", direction=1)

    @property
    def label(self) -> str:
        """What the detector is, in words."""
        return f"{get('instability').label}, attacks higher"

    def value(self, result: ScoreResult) -> float | None:
        """The score of a result; None if it has none."""
        return result.score

    def apply(self, values: ArrayLike | Sequence[float | None]) -> Verdicts:
        """Verdicts on scores [n], None or NaN for none, without p-values."""
        values = np.array(values, np.float64)
        return Verdicts(values >= self.threshold, np.full(values.shape, np.nan))


Judge: TypeAlias = Calibration | BareThreshold  # what judges the rows of a run
