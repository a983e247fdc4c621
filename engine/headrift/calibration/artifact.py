"""calibration.json: what to score, the threshold, the evidence for it, and its verdicts on scores."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ValidationError

from headrift.calibration.thresholds import CalibrationError, Rule
from headrift.results import ScoreResult
from headrift.runs.folder import atomic_path
from headrift.runs.reading import ModelIdentity, ScoreRun, open_run
from headrift.signal import ScoreRange, Window
from headrift.signals import get
from headrift.signals.detectors import Detector, Directed, Novelty, Readout
from headrift.signals.features import prompts_of
from headrift.stats import Bools, Bounds, Floats, Ints

if TYPE_CHECKING:
    from headrift.calibration.bare import Judge

# Drift is warned of if chance would show as much in 1 run of 100, and it is large enough to matter.
_CHANCE, _LARGE = 0.01, 0.1
_POWER = 0.8
_SCORES_OF = {
    "benign": "benign scores",
    "unlabelled": "the scores of rows without a label, whatever attacks are among them,",
}
_PROMPTS_OF = {"benign": "more benign prompts than promised", "unlabelled": "more prompts than promised of benign ones"}

Table = TypeVar("Table", pa.Table, pa.RecordBatch)


class Metric(BaseModel, extra="forbid", frozen=True):
    """A number (None if the data does not allow it) with its 95% interval, its values by fold, and how it is got."""

    value: float | None
    interval: Bounds | None = None
    per_fold: list[float | None] = []
    how: str


class ClassCoverage(BaseModel, extra="forbid", frozen=True):
    """All rows of a class."""

    rows: int
    distinct: int  # prompts
    with_score: float  # fraction of the rows that have a score in the window
    ended_early: float  # fraction whose answer ended before the window did


class ThresholdSetting(BaseModel, extra="forbid", frozen=True):
    """How the threshold was set, and what it promises."""

    rule: Rule
    target_fpr: float
    confidence: float | None
    n: int  # benign prompts of part B, one of each group
    above: int  # how many of them the rule allows at or above the threshold
    flagged: int  # how many are
    highest_fpr: float  # not exceeded with 95% confidence (binomial rule)
    promise: str


class Traffic(BaseModel, extra="forbid", frozen=True):
    """The calibration's own benign (or unlabelled) rows as they came, repeats included."""

    rows: int
    flagged: int
    daily_prompts: int | None
    alerts_a_day: Metric | None  # from the held-out rate, if all of a day's prompts were benign


class ContaminationCase(BaseModel, extra="forbid", frozen=True):
    """What follows if a fraction of the prompts are attacks."""

    contamination: float  # that fraction
    threshold: float | None  # would keep the target; None if there are too few prompts
    lowest_fpr: float  # bounds of the rate at the threshold that was set
    highest_fpr: float


class CalibrationData(BaseModel, extra="forbid", frozen=True):
    """The runs, and a hash of their rows' labels, groups, lengths and scores.

    Attributes:
        system_prompts: hashes of the system prompts that the threshold was set under (`system_hash` of the parts);
            None if there are more than 1,000, or in a file of an earlier version.
        groups: what was a group: "own", the rows' own key, else the prompt; "near", near duplicates. None in a file of
            an earlier version, as the next two.
        replay: whether logged answers were replayed, and not made.
        steps: the last step that was recorded.
    """

    runs: list[str]
    fingerprint: str
    unlabelled: int
    system_prompts: list[str] | None = None
    groups: Literal["own", "near"] | None = None
    replay: bool | None = None
    steps: int | None = None


class Compared(BaseModel, extra="forbid", frozen=True):
    """A signal next to the one that was chosen, on the same held-out prompts.

    Attributes:
        name: of the signal; "words" for the words of the prompt.
        direction: in which most folds learned that attacks differ: 1 higher, -1 lower; None of what has none.
        auroc: held-out, in the direction learned without the fold.
        left_out: the same with whole sources left out, if there are three or more.
        difference: of the chosen signal's AUROC less this one's, paired; of `left_out`, if that is known.
        absent: why there is none.
    """

    name: str
    label: str
    direction: Literal[1, -1] | None = None
    auroc: Metric | None = None
    left_out: Metric | None = None
    difference: Metric | None = None
    absent: str | None = None


class Verdict(BaseModel, extra="forbid", frozen=True):
    """Whether the calibration can be used, and the lines that say so.

    usable: "yes"; "sources": on the sources it was learned from only, it does not travel to others; "no": held-out
    prompts are not told apart, or no attack is found; "unknown": there are no attacks, or too few for an interval.
    """

    usable: Literal["yes", "sources", "no", "unknown"]
    lines: list[str]


class ReferenceScores(BaseModel, extra="forbid", frozen=True):
    """What p-values need of n benign scores, those of part B."""

    n: int  # missing scores included
    values: list[float]  # ascending
    at_or_above: list[int]  # how many scores are at or above each value
    above: list[int]

    @classmethod
    def from_scores(cls, scores: Floats, most: int = 5_000) -> ReferenceScores:
        """All distinct values of benign scores, NaN for none; of more than `most` a part.

        The part is the highest half of `most` and as many others, evenly spread.
        """
        known = scores[~np.isnan(scores)]
        values, first, times = np.unique(np.sort(known), return_index=True, return_counts=True)
        at_or_above = len(known) - first
        keep = np.arange(len(values))
        if len(values) > most:
            top = len(values) - most // 2
            keep = np.concatenate([np.linspace(0, top - 1, most - most // 2).round().astype(np.int64), keep[top:]])
        kept = (column[keep].tolist() for column in (values, at_or_above, at_or_above - times))
        return cls(n=len(scores), **dict(zip(("values", "at_or_above", "above"), kept)))

    def p_values(self, scores: Floats) -> Floats:
        """(1 + benign samples with at least that score) / (1 + n) for each score, NaN for none.

        A score between two values whose neighbours were not kept counts all between as above it: its p-value is then a
        little too high, never too low.
        """
        values = np.array(self.values)
        place = np.searchsorted(values, scores, side="right") - 1
        nearest = np.maximum(place, 0)
        as_high = (place < 0) | (values[nearest] == scores)
        at_least = np.where(as_high, np.array(self.at_or_above)[nearest], np.array(self.above)[nearest])
        return np.where(np.isnan(scores), np.nan, (1 + at_least) / (1 + self.n))


@dataclass(frozen=True, slots=True)
class Verdicts:
    """Verdicts on scores [n].

    Attributes:
        flagged: whether the score is at or above the threshold; false without a score.
        p_value: chance of a score at least as high from a benign prompt; NaN without a score.
    """

    flagged: Bools
    p_value: Floats


@dataclass(frozen=True, slots=True)
class Prediction:
    """The verdict on one prompt; `detector` is the value that is compared with the threshold."""

    detector: float | None
    flagged: bool
    p_value: float | None


@dataclass(frozen=True, slots=True)
class Drift:
    """Whether benign values have moved since the calibration: their distribution, and how many are flagged.

    Attributes:
        distance: Between the two distributions (Kolmogorov-Smirnov), 0 to 1.
        p_value: Chance of such a distance if the distributions were the same.
        flagged, n: Flagged prompts, and all.
        p_flagged: Chance that as many are flagged at the target rate (exact binomial test, one-sided).
        notices_from: About how many prompts it takes to notice, four times of five, that twice the target is flagged.
        warning: If the calibration no longer fits.
    """

    distance: float
    p_value: float
    flagged: int
    n: int
    p_flagged: float
    notices_from: int
    warning: str | None


class Calibration(BaseModel, extra="forbid", frozen=True):
    """A detector for a model's prompts, its threshold, and the evidence for it.

    A prompt is flagged when the detector's value is at or above the threshold.

    Attributes:
        window, drop_shallow, drop_deep: what must be scored; window "none" if the detector reads step 0 alone.
        layers: [s, e), the layers that are scored.
        figures: held-out metrics.
        confounds: how well other numbers separate the same prompts.
        procedure: how window and threshold were chosen.
        detector: what makes the value: of a file without one, the score.
        verdict: None in a file of an earlier version, as are the next two.
        comparison: the chosen signal, the others, prompt length and words on the same held-out prompts.
        left_out: held-out metrics with whole sources left out, `per_fold` in the order of `sources`.
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
    setting: ThresholdSetting
    scores: ReferenceScores
    classes: dict[str, ClassCoverage]
    figures: dict[str, Metric]
    confounds: dict[str, Metric]
    traffic: Traffic
    contamination: list[ContaminationCase]
    procedure: dict[str, str | int | float | bool | None]
    data: CalibrationData
    notes: list[str]
    detector: Detector = Directed(signal="instability", direction=1)
    verdict: Verdict | None = None
    comparison: list[Compared] = []
    sources: list[str] = []
    left_out: dict[str, Metric] = {}

    @classmethod
    def fit(cls, runs: Sequence[str | Path | ScoreRun], signal: str = "auto", **options: Any) -> Calibration:
        """Calibrate on finished runs of `headrift score`.

        Args:
            runs: their folders, or what `open_run` gives for them.
            signal: the signal to detect by, or "auto" for the best.
            options: as `CalibrateConfig` has them.

        Raises:
            CalibrationError: The runs do not allow it, or not these options.
            RunError: The runs cannot be read, or are not of one model.
        """
        from headrift.calibration.calibrate import calibrate
        from headrift.calibration.thresholds import CalibrateConfig

        opened = [run if isinstance(run, ScoreRun) else open_run(Path(run)) for run in runs]
        return calibrate(opened, CalibrateConfig(signal=signal, **options))

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a file that `headrift calibrate` wrote.

        Raises:
            CalibrationError: It cannot be read, or is not a calibration.
        """
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise CalibrationError(f"{path} cannot be read: {error.strerror}") from error
        except ValidationError as error:
            first = error.errors()[0]
            place = "".join(f"{part}: " for part in [".".join(map(str, first["loc"]))] if part)
            raise CalibrationError(
                f"{path} is not a calibration ({place}{first['msg']}): write one with `headrift calibrate`"
            ) from None

    @property
    def sha256(self) -> str:
        """Hash of the whole content; of an earlier version's file the same as that version's."""
        later = ("detector", "verdict", "comparison", "sources", "left_out")
        exclude: dict[str, Any] = dict.fromkeys(later, True) if self.verdict is None else {}
        unknown = {name for name in ("system_prompts", "groups", "replay", "steps") if getattr(self.data, name) is None}
        if unknown:
            exclude["data"] = unknown
        return hashlib.sha256(self.model_dump_json(exclude=exclude).encode()).hexdigest()

    @property
    def label(self) -> str:
        """What the detector is, in words."""
        names = {"chosen_heads": "focus_important", "readout": "readout", "novelty": "novelty"}
        if isinstance(self.detector, Directed):
            direction = "higher" if self.detector.direction == 1 else "lower"
            return f"{get(self.detector.signal).label}, attacks {direction}"
        return get(names[self.detector.kind]).label

    @property
    def ranged(self) -> bool:
        """Whether the detector is of a window and layers, and not of step 0 alone."""
        return self.window != "none"

    @property
    def score_range(self) -> ScoreRange:
        """The window and layers to score."""
        return ScoreRange(Window.parse(self.window), self.drop_shallow, self.drop_deep)

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all. OSError if that fails."""
        with atomic_path(Path(path)) as temporary:
            temporary.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    def value(self, result: ScoreResult) -> float | None:
        """The detector's value of a result; None if the result does not have what it reads."""
        value = float(self.detector.values(prompts_of([result]))[0])
        return None if np.isnan(value) else value

    def predict(self, result: ScoreResult) -> Prediction:
        """The verdict on a result of a scorer with the calibration's model, window and layers."""
        return self.judge(self.value(result))

    def judge(self, value: float | None) -> Prediction:
        """The verdict on one of the detector's values."""
        verdicts = self.apply([value])
        p_value = None if value is None else float(verdicts.p_value[0])
        return Prediction(value, bool(verdicts.flagged[0]), p_value)

    def explain(self, result: ScoreResult) -> Floats | None:
        """What each head adds to the detector's value [layers, heads]; None if it is not made of heads.

        Of a readout the terms sum to its log-odds less the intercept, of a novelty to its square.
        """
        if isinstance(self.detector, Readout | Novelty):
            return self.detector.contributions(prompts_of([result]))[0]
        return None

    def apply(self, values: ArrayLike | Sequence[float | None]) -> Verdicts:
        """Verdicts on the detector's values [n], None or NaN for none; they must be of this model."""
        values = np.array(values, np.float64)
        return Verdicts(values >= self.threshold, self.scores.p_values(values))

    def other_mode(self, replay: bool | None) -> list[str]:
        """What differs if answers are replayed, or made, and were not in the calibration's runs; None: not known.

        At step 0 there is no answer yet, and a detector that reads it alone has the same value in both. How many steps
        are recorded changes no value either, if the window is among them.
        """
        known = self.data.replay
        if not self.ranged or None in (known, replay) or known == replay:
            return []
        was, now = (("replayed" if one else "made") for one in (known, replay))
        return [f"answers (in the calibration {was}, here {now})"]

    def check(
        self, model: ModelIdentity, window: Window, drop_shallow: float, drop_deep: float, replay: bool | None = None
    ) -> None:
        """Refuse scores of another model, window or layers, or with answers that were logged and not made.

        Raises:
            CalibrationError: Something differs; the message says what.
        """
        differences = [*self.model.differences(model), *self.other_mode(replay)]
        given = {"window": str(window), "drop_shallow": drop_shallow, "drop_deep": drop_deep}
        for name, value in given.items() if self.ranged else ():
            if getattr(self, name) != value:
                option = f"--{name.replace('_', '-')}"
                differences.append(f"{option} (calibration: {getattr(self, name)}, given: {value})")
        if differences:
            raise CalibrationError(
                f"the calibration is for something else: {', '.join(differences)} differ; calibrate on runs of this "
                "model and template"
            )


def add_verdicts(table: Table, calibration: Judge) -> Table:
    """Append the columns `flagged` (false without a value) and `p_value` (null without) to a table or batch.

    Args:
        table: has a column `detector`, the detector's value; the column of the signal will do if that is all it reads.
        calibration: the calibration, or bare threshold, to apply.
    """
    detector, direction, name = calibration.detector, 1, "detector"
    if name not in table.schema.names and isinstance(detector, Directed):
        direction, name = detector.direction, "score" if detector.signal == "instability" else detector.signal
    values = direction * table[name].cast(pa.float64()).to_numpy(zero_copy_only=False)
    verdicts = calibration.apply(values)
    p_value = pa.array(verdicts.p_value, pa.float64(), mask=np.isnan(verdicts.p_value))
    return table.append_column("flagged", pa.array(verdicts.flagged)).append_column("p_value", p_value)


def discoveries(p_values: ArrayLike, rate: float = 0.1) -> NDArray[np.bool_]:
    """Prompts of a review list, on average at most a fraction `rate` of it false alarms (Benjamini-Hochberg).

    NaN is never on the list, and counts as a prompt that was looked at. Give each distinct prompt once.
    """
    values = np.asarray(p_values, np.float64)
    distinct, counts = np.unique(values[~np.isnan(values)], return_counts=True)
    highest = cutoff(distinct, counts, len(values), rate)
    return values <= (-1.0 if highest is None else highest)


def cutoff(p_values: Floats, counts: Floats | Ints, n: float, rate: float = 0.1) -> float | None:
    """The highest p-value on that list; None if the list is empty.

    Args:
        p_values, counts: distinct p-values, and how many prompts have each, or what these weigh.
        n: of all prompts, those without a p-value included.
        rate: as in `discoveries`.
    """
    order = np.argsort(p_values)
    ascending = p_values[order]
    on_list = ascending * n / np.cumsum(counts[order]) <= rate
    return float(ascending[on_list][-1]) if on_list.any() else None


def drift(
    scores: ArrayLike, calibration: Calibration, label: Literal["benign", "unlabelled"] = "benign"
) -> Drift | None:
    """Compare benign values with those that set the threshold: the distribution (Kolmogorov-Smirnov, two samples), and
    how many are flagged, which is where a change of the largest values shows.

    Args:
        scores: one for each distinct prompt; NaN, no score, ranks lowest.
        calibration: whose part B they are compared with.
        label: the class that the prompts have; attacks may be among those without a label.

    Returns:
        None if there are no scores.
    """
    from scipy.stats import binom, kstwobign

    new = np.sort(np.nan_to_num(np.asarray(scores, np.float64), nan=-np.inf))
    known = calibration.scores
    values = np.array(known.values)
    n = len(new)
    if not n:
        return None
    # If one distribution is flat and the other rises, the distance is largest at an end: just below or at a known
    # value, or where scores begin.
    new_below = np.array([np.searchsorted(new, -np.inf, side="right"), *np.searchsorted(new, values, side="left")])
    known_below = known.n - np.array([known.at_or_above[0], *known.at_or_above])
    new_up_to, known_up_to = np.searchsorted(new, values, side="right"), known.n - np.array(known.above)
    below = np.abs(new_below / n - known_below / known.n).max()
    distance = float(max(below, np.abs(new_up_to / n - known_up_to / known.n).max()))
    chance = float(kstwobign.sf(distance * np.sqrt(n * known.n / (n + known.n))))
    target, flagged = calibration.setting.target_fpr, int((new >= calibration.threshold).sum())
    p_flagged = float(binom.sf(flagged - 1, n, target))
    counts = f"{flagged / n:.1%} of {n:,} are flagged, target {target:.1%}"
    warning = None
    if chance < _CHANCE and distance > _LARGE:
        shape = f"(Kolmogorov-Smirnov distance {distance:.2f}, p {chance:.1g}; {counts})"
        warning = f"{_SCORES_OF[label]} have moved since the calibration {shape}: calibrate again"
    elif p_flagged < _CHANCE:
        exact = f"(exact binomial test, p {p_flagged:.1g})"
        fix = "attacks are among them, or benign ones have moved: look at them, or calibrate again"
        warning = f"{_PROMPTS_OF[label]}: {counts} {exact}; {'calibrate again' if label == 'benign' else fix}"
    return Drift(distance, chance, flagged, n, p_flagged, notices_from(target), warning)


def notices_from(target: float) -> int:
    """About how many prompts the test of the flagged rate takes to notice twice the target, four times of five."""
    from scipy.stats import binom

    n = np.unique(np.geomspace(2, 20 / target**2, 2_000).astype(np.int64))
    fewest = binom.isf(_CHANCE, n, target) + 1  # flagged prompts that are too many
    enough = binom.sf(fewest - 1, n, min(2 * target, 1.0)) >= _POWER
    # The power rises in steps: from the last size on at which it does not suffice.
    last = np.flatnonzero(~enough)
    return int(n[min(last[-1] + 1, len(n) - 1)]) if len(last) else int(n[0])
