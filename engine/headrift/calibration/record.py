"""A calibration as calibration.json keeps it: what to score, the threshold, and every figure with how it was got."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from headrift.calibration.settings import CalibrationError, Rule
from headrift.calibration.thresholds import Reference
from headrift.runs.folder import atomic_path
from headrift.runs.reading import ModelIdentity
from headrift.signal import Window


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Figure(_Part):
    """A number (None: the data do not allow it), its 95% interval, each fold's own, and how it was got."""

    value: float | None
    interval: tuple[float, float] | None = None
    per_fold: list[float | None] = []
    how: str


class OfClass(_Part):
    """Of a class, over all rows: how many, distinct ones, and fractions of the rows that have a score in the window and
    whose answer ended before the window did."""

    rows: int
    distinct: int
    with_score: float
    ended_early: float


class Setting(_Part):
    """How the threshold was set. n: distinct benign prompts in part B; above: how many the rule lets be at or
    above it; flagged: how many are; highest_fpr: the rate that is not exceeded with 95% confidence (binomial rule)."""

    rule: Rule
    target_fpr: float
    confidence: float | None
    n: int
    above: int
    flagged: int
    highest_fpr: float
    promise: str


class Traffic(_Part):
    """Rows as they came, repeats included, all of the calibration's own: benign (or unlabelled) ones and how many of
    them are flagged. alerts_a_day: from the held-out rate, if all of a day's prompts were benign."""

    rows: int
    flagged: int
    daily_prompts: int | None
    alerts_a_day: Figure | None


class Contaminated(_Part):
    """If this fraction of the prompts were attacks: the threshold that would keep the target, and between which rates
    of benign prompts the one that was set flags (all attacks are flagged; none is)."""

    contamination: float
    threshold: float | None
    lowest_fpr: float
    highest_fpr: float


class Data(_Part):
    """The runs, and a hash of their rows' labels, groups, lengths and scores."""

    runs: list[str]
    fingerprint: str
    unlabelled: int


class Scores(_Part):
    """Part B's scores (see thresholds.Reference)."""

    n: int
    values: list[float]
    at_or_above: list[int]
    above: list[int]


@dataclass(frozen=True, slots=True)
class Verdicts:
    """Of each score: whether it is flagged, and the chance of one at least as high from a benign prompt (NaN without a
    score, which is never flagged)."""

    flagged: NDArray[np.bool_]
    p_value: NDArray[np.float64]


class Calibration(_Part):
    """A threshold for a model's scores, and the evidence for it. A score is flagged when it is at or above it.

    window, drop_shallow, drop_deep: what must be scored; layers: [s, e). procedure: how window and threshold were
    found. figures: held out; confounds: how well other numbers separate the same prompts, no threshold involved.
    """

    format: Literal[1] = 1
    headrift: str
    created: str
    benign_only: bool
    model: ModelIdentity
    window: str
    drop_shallow: float
    drop_deep: float
    layers: tuple[int, int]
    threshold: float
    setting: Setting
    scores: Scores
    classes: dict[str, OfClass]
    figures: dict[str, Figure]
    confounds: dict[str, Figure]
    traffic: Traffic
    contamination: list[Contaminated]
    procedure: dict[str, str | int | float | bool | None]
    data: Data
    notes: list[str]

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a file that `headrift calibrate` wrote. CalibrationError where it is none."""
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise CalibrationError(f"{path} cannot be read: {error.strerror}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            said = f"{where}: {first['msg']}" if where else first["msg"]
            raise CalibrationError(f"{path} is no calibration ({said}): write it with `headrift calibrate`") from None

    @property
    def sha256(self) -> str:
        """A hash of all that it says."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write it; at no moment is the file there in part. OSError where that fails."""
        with atomic_path(Path(path)) as temporary:
            temporary.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    def apply(self, scores: ArrayLike | Sequence[float | None]) -> Verdicts:
        """Verdicts on scores, one-dimensional, None or NaN for none. They must be of this window, these layers and this
        model."""
        values = np.array(scores, np.float64)
        known = self.scores
        of_benign = Reference(
            known.n, np.array(known.values), np.array(known.at_or_above, np.int64), np.array(known.above, np.int64)
        )
        return Verdicts(values >= self.threshold, of_benign.p_values(values))

    def check(self, model: ModelIdentity, window: Window, drop_shallow: float, drop_deep: float) -> None:
        """CalibrationError, saying what differs, where scores of such a model, window and layers are not what this
        calibration is for."""
        differ = self.model.differences(model)
        theirs = {"window": str(window), "drop_shallow": drop_shallow, "drop_deep": drop_deep}
        for name, value in theirs.items():
            if getattr(self, name) != value:
                differ.append(f"--{name.replace('_', '-')} ({getattr(self, name)} here, {value} there)")
        if differ:
            raise CalibrationError(
                f"the calibration is for something else: {', '.join(differ)} differ; calibrate on runs of this model "
                "and template"
            )
