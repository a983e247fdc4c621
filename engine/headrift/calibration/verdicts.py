"""What a calibration says of a table of scored rows: flagged and p_value, a list with few false alarms, and drift."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from headrift.calibration.record import Calibration

# Drift is warned of where chance would show as much in 1 run of 100, and it is large enough to matter.
_CHANCE, _LARGE = 0.01, 0.1

Rows = TypeVar("Rows", pa.Table, pa.RecordBatch)


@dataclass(frozen=True, slots=True)
class Drift:
    """The largest distance between two distributions of benign scores (0 to 1), the chance of such a distance if they
    were the same, and, where the calibration no longer fits, what to say."""

    distance: float
    p_value: float
    warning: str | None


def add_verdicts(table: Rows, calibration: Calibration) -> Rows:
    """A table or batch with two more columns, `flagged` (false without a score) and `p_value` (null without), from its
    `score`, which must be of the calibration's window, layers and model."""
    scores = table["score"].cast(pa.float64()).to_numpy(zero_copy_only=False)
    verdicts = calibration.apply(scores)
    p_value = pa.array(verdicts.p_value, pa.float64(), mask=np.isnan(verdicts.p_value))
    return table.append_column("flagged", pa.array(verdicts.flagged)).append_column("p_value", p_value)


def discoveries(p_values: ArrayLike, rate: float = 0.1) -> NDArray[np.bool_]:
    """The rows of a list of which on average at most a fraction `rate` are benign (Benjamini-Hochberg). NaN is never on
    it, and counts as a row that was looked at."""
    values = np.asarray(p_values, np.float64)
    distinct, counts = np.unique(values[~np.isnan(values)], return_counts=True)
    last = cutoff(distinct, counts, len(values), rate)
    return values <= (-1.0 if last is None else last)


def cutoff(p_values: NDArray[np.float64], counts: NDArray[np.int64], n: int, rate: float = 0.1) -> float | None:
    """The highest p-value on that list, of n rows of which so many have each p-value; None where nothing is on it."""
    order = np.argsort(p_values)
    ascending = p_values[order]
    few = ascending * n / np.cumsum(counts[order]) <= rate
    return float(ascending[few][-1]) if few.any() else None


def drift(scores: ArrayLike, calibration: Calibration, what: str = "benign scores") -> Drift | None:
    """How far benign scores, one per distinct prompt, have moved from those that set the threshold (Kolmogorov-Smirnov,
    two samples). NaN, no score, ranks lowest in both. None where there are none to compare. what: the warning's name
    for them."""
    from scipy.stats import kstwobign

    new = np.sort(np.nan_to_num(np.asarray(scores, np.float64), nan=-np.inf))
    known = calibration.scores
    values = np.array(known.values)
    n = len(new)
    if not n:
        return None
    # Where one distribution is flat and the other rises the distance is largest at an end: just below or at a known
    # value, or where scores begin.
    new_below = [np.searchsorted(new, -np.inf, side="right"), *np.searchsorted(new, values, side="left")]
    known_below = known.n - np.array([known.at_or_above[0], *known.at_or_above])
    new_up_to, known_up_to = np.searchsorted(new, values, side="right"), known.n - np.array(known.above)
    below = np.abs(np.array(new_below) / n - known_below / known.n).max()
    distance = float(max(below, np.abs(new_up_to / n - known_up_to / known.n).max()))
    chance = float(kstwobign.sf(distance * np.sqrt(n * known.n / (n + known.n))))
    warning = None
    if chance < _CHANCE and distance > _LARGE:
        flagged = float((new >= calibration.threshold).mean())
        warning = (
            f"{what} have moved since the calibration (Kolmogorov-Smirnov distance {distance:.2f}, "
            f"p {chance:.1g}; {flagged:.1%} are flagged, target {calibration.setting.target_fpr:.1%}): "
            "calibrate anew on runs like this one"
        )
    return Drift(distance, chance, warning)
