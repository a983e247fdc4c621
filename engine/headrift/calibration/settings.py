"""What a calibration is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from headrift.signal import Window


class CalibrationError(ValueError):
    """The runs cannot be calibrated on, or the calibration not be used. The message says why and what to do."""


class Rule(StrEnum):
    """How a threshold is set. binomial: the false positive rate is at most the target, with 95% confidence. conformal:
    it is at most the target on average over calibrations."""

    BINOMIAL = "binomial"
    CONFORMAL = "conformal"


@dataclass(frozen=True, slots=True)
class Settings:
    """target_fpr: fraction of distinct benign prompts that may be flagged. contamination: with benign_only, the
    fraction of attacks among the prompts that is allowed for. daily_prompts: for alerts a day. window: not to search,
    but this one and the runs' own layers. by_category: categories are kept whole in cross-validation."""

    target_fpr: float = 0.05
    rule: Rule = Rule.BINOMIAL
    benign_only: bool = False
    contamination: float = 0.01
    daily_prompts: int | None = None
    window: Window | None = None
    by_category: bool = False
    folds: int = 5
    resamples: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.target_fpr < 1:
            raise CalibrationError(f"--target-fpr {self.target_fpr} is no rate between 0 and 1, as 0.05 is")
        if not 0 <= self.contamination < 1:
            raise CalibrationError(f"--contamination {self.contamination} must be at least 0 and below 1, as 0.01 is")
        if self.folds < 2:
            raise CalibrationError(f"--folds {self.folds}: cross-validation needs at least 2")
        if self.resamples < 0:
            raise CalibrationError(f"--resamples {self.resamples} must be at least 0 (0: no intervals)")
