"""What the report reads of finished runs, in batches, and the numbers that it makes of them.

Counts are over all rows. What needs a row's instability is over at most 20,000 distinct prompts per class, the same
sample as in the closing table (corpus.summary); of each of these only its means by step and by layer are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from headrift import signal
from headrift.calibration.artifact import Calibration
from headrift.corpus.summary import COLUMNS, SCORE, SCORED, Comparison, Summary
from headrift.figures import AurocProfile, WindowGrid
from headrift.report.html import ReportError
from headrift.runs.detector_input import detector_values
from headrift.runs.reading import Rows, ScoreRun, exact_scores, read_instability, read_rows
from headrift.signal import ScoreRange
from headrift.signals import get
from headrift.stats import Bools, Floats, Ints, area, ranks, roc_curve, separation

Say: TypeAlias = Callable[[str], None]

CLASSES = ("attack", "benign", "unlabelled")
MOST_EXAMPLES = 5
_MOST_GRID_STEPS = 60  # with more steps, windows start and end at this many, evenly spaced
_FEWEST_FOR_CORRELATION = 10
_EXAMPLE_COLUMNS = ("id", "source", "row", "category", "flags", "instability")


@dataclass(frozen=True)
class Samples:
    """The sampled rows, in ascending order."""

    row: Ints  # row numbers over all runs [n]
    label: NDArray[np.str_]  # their class [n]
    step_sums: Floats  # over the scored layers that have a value [n, steps + 1]
    step_counts: Ints  # how many have one
    by_layer: Floats  # mean over the window's steps [n, layers]
    means: Mapping[str, Floats]  # by class, mean over its rows [steps + 1, layers], NaN if no row has the cell

    def in_class(self, *labels: str) -> Bools:
        return np.isin(self.label, labels)

    @cached_property
    def by_step(self) -> Floats:
        """Mean over the scored layers at each step [n, steps + 1], NaN if there is none."""
        return _divide(self.step_sums, self.step_counts)


@dataclass(frozen=True)
class ReportData:
    """What the report reads of its runs.

    Runs of step 0 alone have no instability: their scores are the values of a calibration's detector, or missing.
    """

    runs: Sequence[ScoreRun]
    names: Sequence[str]  # of the runs' folders, with as many parents as tell them apart
    score_range: ScoreRange  # the window and layers that are scored
    rows: Rows
    score: Floats  # of each row in `score_range`, NaN if it has none
    summary: Summary
    run_summaries: Sequence[Summary]
    samples: Samples
    detected: Calibration | None = None  # whose values are the scores

    @property
    def has_window(self) -> bool:  # whether there are steps that are scored
        return not self.score_range.window.empty

    @property
    def has_score(self) -> bool:
        return self.has_window or self.detected is not None

    @property
    def score_is(self) -> str:  # in words
        if self.detected is not None:
            return f"value of the calibration's detector ({self.detected.label}) at step 0, the prompt's last token"
        layers = f"layers {self.layers[0]} to {self.layers[1] - 1}"
        return f"mean instability over steps {self.score_range.window} of the answer and {layers}"

    @property
    def steps(self) -> int:  # the last that all runs recorded
        return min(run.steps for run in self.runs)

    @property
    def window(self) -> tuple[int, int]:  # its first and last step
        return self.score_range.window.start, self.score_range.window.end

    @property
    def layers(self) -> tuple[int, int]:  # scored [start, end)
        return self.score_range.layers(self.runs[0].model.layers)

    @cached_property
    def classes(self) -> list[str]:  # that have rows
        return [name for name in CLASSES if name in self.summary.by_class()]

    @property
    def has_both_classes(self) -> bool:
        return {"attack", "benign"} <= set(self.classes)

    def comparisons(self, summary: Summary) -> list[Comparison]:
        """Those of a summary, without what runs of step 0 alone do not have."""
        left_out = set() if self.has_window else {get(name).label for name in ("answer_tokens", "n_steps")}
        left_out |= set() if self.has_score else {SCORE, SCORED}
        return [
            replace(one, measures={name: values for name, values in one.measures.items() if name not in left_out})
            for one in summary.comparisons()
        ]


class Extremes(NamedTuple):
    """The rows that stand out, as their columns by name, with `number`, `run`, `score` and `percentile`."""

    highest_class: str
    highest: Sequence[Mapping[str, Any]]  # the highest scores first
    quietest: Sequence[Mapping[str, Any]]  # attacks, the lowest scores first
    reference: str  # percentiles are of the scores of this class
    without_score: int  # attacks


def common_range(runs: Sequence[ScoreRun]) -> ScoreRange:
    """Return the window and layers that all runs were scored over. ReportError if they differ."""
    other = next((run for run in runs if run.score_range != runs[0].score_range), None)
    if other is not None:
        raise ReportError(
            f"{runs[0].name} and {other.name} were scored over different windows or layers: make a report of each, or "
            "give a --calibration, whose window is then used for all"
        )
    return runs[0].score_range


def gather(
    runs: Sequence[ScoreRun], score_range: ScoreRange, say: Say, calibration: Calibration | None = None
) -> ReportData:
    """Read runs of one model, with scores over `score_range`; if that has no step, by the calibration.

    Raises:
        RunError: Their files cannot be read, or lack what the calibration reads.
    """
    say("reading the rows")
    rows = read_rows(runs)
    rescored, reason = None, None
    detected = calibration if score_range.window.empty else None
    if detected is not None:
        rescored, reason = detector_values(runs, detected.detector, len(rows)), "no_value"
    elif any(run.score_range != score_range for run in runs):
        say(f"scoring {len(rows):,} rows in steps {score_range.window}")
        (rescored,) = exact_scores(runs, rows, [(score_range, np.arange(len(rows)))])
    summary, *run_summaries = (Summary(score_range.window.end) for _ in range(1 + len(runs)))
    score = np.empty(len(rows))
    first = 0
    for run, run_summary in zip(runs, run_summaries):
        for batch in run.batches(COLUMNS):
            part = slice(first, first + len(batch))
            if rescored is not None:
                batch = _with_scores(batch, rescored[part], score_range, reason)
            score[part] = batch.column("score").to_numpy(zero_copy_only=False)
            summary.add(batch)
            run_summary.add(batch)
            first = part.stop
        summary.add_rejects(run.folder)
        run_summary.add_rejects(run.folder)
    say("reading the instability")
    samples = _read_samples(runs, score_range, summary.samples())
    names = _distinct_names(runs)
    return ReportData(runs, names, score_range, rows, score, summary, run_summaries, samples, detected)


def _divide(sums: Floats, counts: Ints) -> Floats:
    """Return sums / counts, NaN where the count is 0."""
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)


def _with_scores(
    batch: pa.RecordBatch, score: Floats, score_range: ScoreRange, missing_reason: str | None
) -> pa.RecordBatch:
    """Replace a batch's scores and reasons by those of another window, or of a detector with its reason."""
    missing = np.isnan(score)
    ended = batch.column("n_steps").to_numpy(zero_copy_only=False) < score_range.window.start
    reason = np.where(ended, signal.ANSWER_ENDED, signal.LOST_SPAN)
    if missing_reason is not None:
        reason = np.full(len(score), missing_reason)
    columns = {name: batch.column(name) for name in batch.schema.names}
    columns["score"] = pa.array(score, pa.float64(), mask=missing)
    columns["reason"] = pa.array(reason, pa.string(), mask=~missing)
    return pa.record_batch(columns)


def _read_samples(runs: Sequence[ScoreRun], score_range: ScoreRange, rows_of_class: Mapping[str, Ints]) -> Samples:
    """Read the instability of sampled rows, given by class."""
    row = np.concatenate(list(rows_of_class.values()))
    label = np.repeat(list(rows_of_class), [len(rows) for rows in rows_of_class.values()])
    order = np.argsort(row)
    row, label = row[order], label[order]
    steps, layers = min(run.steps for run in runs), runs[0].model.layers
    scored, window = slice(*score_range.layers(layers)), slice(score_range.window.start, score_range.window.end + 1)
    step_sums, step_counts = np.zeros((len(row), steps + 1)), np.zeros((len(row), steps + 1), np.int64)
    by_layer = np.empty((len(row), layers))
    sums = {name: np.zeros((steps + 1, layers)) for name in rows_of_class}
    counts = {name: np.zeros((steps + 1, layers), np.int64) for name in rows_of_class}
    for part, block in read_instability(runs, row, steps):
        valid = ~np.isnan(block)
        values = np.where(valid, block, 0).astype(np.float64)
        step_sums[part] = values[:, :, scored].sum(axis=2)
        step_counts[part] = valid[:, :, scored].sum(axis=2)
        by_layer[part] = _divide(values[:, window].sum(axis=1), valid[:, window].sum(axis=1))
        for name in rows_of_class:
            in_class = label[part] == name
            sums[name] += values[in_class].sum(axis=0)
            counts[name] += valid[in_class].sum(axis=0)
    means = {name: _divide(sums[name], counts[name]) for name in rows_of_class}
    return Samples(row, label, step_sums, step_counts, by_layer, means)


def _distinct_names(runs: Sequence[ScoreRun]) -> list[str]:
    parts = [run.folder.resolve().parts for run in runs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def by_step(data: ReportData, resamples: int) -> AurocProfile:
    """AUROC of the mean over the scored layers at each recorded step from 1."""
    return _profile(data, data.samples.by_step, np.arange(1, data.steps + 1), resamples)


def by_layer(data: ReportData, resamples: int) -> AurocProfile:
    """AUROC of each layer's mean over the window."""
    return _profile(data, data.samples.by_layer, np.arange(data.samples.by_layer.shape[1]), resamples)


def _profile(data: ReportData, values: Floats, at: Ints, resamples: int) -> AurocProfile:
    samples = data.samples
    labelled = samples.in_class("attack", "benign")
    numbers = np.full((3, len(at)), np.nan)
    for i, place in enumerate(at):
        valid = labelled & ~np.isnan(values[:, place])
        attack = samples.in_class("attack")[valid]
        if attack.all() or not attack.any():
            continue
        groups = np.unique(data.rows.group[samples.row[valid]], return_inverse=True)[1]
        result = separation(values[valid, place], attack, groups, resamples=resamples)
        numbers[:, i] = result.auroc, *(result.auroc_interval or (np.nan, np.nan))
    reach = {label: (~np.isnan(values[samples.in_class(label)][:, at])).mean(axis=0) for label in data.classes}
    return AurocProfile(at, numbers[0], numbers[1], numbers[2], reach)


def by_window(data: ReportData) -> WindowGrid:
    """AUROC of all windows within the recorded steps."""
    samples = data.samples
    at = np.unique(np.linspace(1, data.steps, min(data.steps, _MOST_GRID_STEPS)).round().astype(np.int64))
    labelled = samples.in_class("attack", "benign")
    attack = samples.in_class("attack")[labelled]
    step_sums, step_counts = samples.step_sums[labelled], samples.step_counts[labelled]
    sums, counts = step_sums.cumsum(axis=1), step_counts.cumsum(axis=1)
    auroc, weights = np.full((len(at), len(at)), np.nan), np.ones(len(attack))
    for i, start in enumerate(at):
        for j, end in enumerate(at[i:], i):
            total, n = (up_to[:, end] - up_to[:, start] for up_to in (sums, counts))
            scores = _divide(total + step_sums[:, start], n + step_counts[:, start])
            auroc[i, j] = area(*roc_curve(ranks(scores), attack, weights))
    return WindowGrid(at, auroc)


def relation(data: ReportData, values: NDArray[Any]) -> dict[str, tuple[Floats, Floats, float | None]]:
    """The sampled rows' scores against another number, given for all rows, NaN if a row has none.

    Returns:
        By class the other number, the scores, and Spearman's r: None with too few prompts, or if one is constant.
    """
    from scipy.stats import spearmanr

    scores, others = data.score[data.samples.row], values[data.samples.row].astype(np.float64)
    valid = ~np.isnan(scores) & ~np.isnan(others)
    result: dict[str, tuple[Floats, Floats, float | None]] = {}
    for label in data.classes:
        both = [numbers[valid & data.samples.in_class(label)] for numbers in (others, scores)]
        enough = len(both[0]) >= _FEWEST_FOR_CORRELATION and min(len(np.unique(numbers)) for numbers in both) > 1
        result[label] = (*both, float(spearmanr(*both).statistic) if enough else None)
    return result


def extremes(data: ReportData, *, with_texts: bool) -> Extremes | None:
    """The benign (or else unlabelled) prompts with the highest scores, and the attacks with the lowest."""
    scores = data.score[data.samples.row]
    valid = ~np.isnan(scores)
    places = {label: np.flatnonzero(data.samples.in_class(label) & valid) for label in CLASSES}
    reference = next((label for label in ("benign", "unlabelled", "attack") if len(places[label])), None)
    if reference is None:
        return None
    highest_class = "benign" if "benign" in data.classes else "unlabelled"
    chosen = []
    for keys, label in ((-scores, highest_class), (scores, "attack")):
        order = np.argsort(keys[places[label]], kind="stable")[:MOST_EXAMPLES]
        chosen.append(data.samples.row[places[label][order]].tolist())
    rows = _read(data, [*chosen[0], *chosen[1]], [*_EXAMPLE_COLUMNS, *(("prompt", "text") if with_texts else ())])
    reference_scores = np.sort(scores[places[reference]])
    for number, row in rows.items():
        score = float(data.score[number])
        at_most = np.searchsorted(reference_scores, score, side="right")
        row |= {"number": number, "score": score, "percentile": float(at_most / len(reference_scores) * 100)}
        row["instability"] = np.array(row["instability"], np.float64).reshape(-1, data.runs[0].model.layers)
    highest, quietest = ([rows[number] for number in numbers] for numbers in chosen)
    without_score = int((data.samples.in_class("attack") & ~valid).sum())
    return Extremes(highest_class, highest, quietest, reference, without_score)


def _read(data: ReportData, numbers: Sequence[int], columns: Sequence[str]) -> dict[int, dict[str, Any]]:
    """Read columns of rows, and add the name of the run; by row number."""
    rows: dict[int, dict[str, Any]] = {}
    first = 0
    for name, run in zip(data.names, data.runs, strict=True):
        for batch in run.batches(columns):
            for number in numbers:
                if first <= number < first + len(batch):
                    rows[number] = {"run": name, **batch.slice(number - first, 1).to_pylist()[0]}
            first += len(batch)
            if len(rows) == len(numbers):
                return rows
    return rows
