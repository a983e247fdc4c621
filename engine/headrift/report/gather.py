"""Read finished runs for the report, in batches.

Counts are over all rows. What needs a row's instability is over at most 20,000 distinct prompts per class, the same
sample as in the closing table (corpus.summary); of each of these only its means by step and by layer are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from headrift import signal
from headrift.corpus.summary import COLUMNS, Summary
from headrift.report.html import ReportError
from headrift.runs.reading import Rows, ScoreRun, check_alike, exact_scores, open_run, read_instability, read_rows
from headrift.signal import ScoreRange

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Say: TypeAlias = Callable[[str], None]

CLASSES = ("attack", "benign", "unlabelled")


@dataclass(frozen=True)
class Samples:
    """The sampled rows, in ascending order."""

    row: Ints  # row numbers over all runs [n]
    label: NDArray[np.str_]  # their class [n]
    step_sums: Floats  # over the scored layers that have a value [n, steps + 1]
    step_counts: Ints  # how many have one
    by_layer: Floats  # mean over the window's steps [n, layers]
    means: Mapping[str, Floats]  # by class, mean over its rows [steps + 1, layers], NaN if no row has the cell

    def in_class(self, label: str) -> NDArray[np.bool_]:
        """Mask of the samples of a class."""
        return self.label == label

    @cached_property
    def by_step(self) -> Floats:
        """Mean over the scored layers at each step [n, steps + 1], NaN if there is none."""
        return divide(self.step_sums, self.step_counts)


@dataclass(frozen=True, slots=True)
class ReportData:
    """What the report reads of its runs."""

    runs: Sequence[ScoreRun]
    names: Sequence[str]  # of the runs' folders, with as many parents as tell them apart
    run_json: Sequence[Mapping[str, Any]]
    score_range: ScoreRange  # the window and layers that are scored
    rows: Rows
    score: Floats  # of each row in `score_range`, NaN if it has none
    run_index: Ints  # of each row
    summary: Summary
    run_summaries: Sequence[Summary]
    samples: Samples

    @property
    def steps(self) -> int:
        """The last step that all runs recorded."""
        return min(run.steps for run in self.runs)

    @property
    def window(self) -> tuple[int, int]:
        """The first and last step of the window."""
        return self.score_range.window.start, self.score_range.window.end

    @property
    def layers(self) -> tuple[int, int]:
        """The scored layers [start, end)."""
        return self.score_range.layers(self.runs[0].model.layers)

    @property
    def classes(self) -> list[str]:
        """The classes that have rows."""
        return [name for name in CLASSES if name in self.summary.by_class()]

    @property
    def has_both_classes(self) -> bool:
        """Whether there are both attacks and benign prompts."""
        return {"attack", "benign"} <= set(self.classes)


def open_runs(folders: Sequence[Path]) -> list[ScoreRun]:
    """Open runs of one model. CalibrationError if a folder is not a run, or the runs cannot be compared."""
    runs = [open_run(folder) for folder in folders]
    check_alike(runs)
    return runs


def common_range(runs: Sequence[ScoreRun]) -> ScoreRange:
    """Return the window and layers that all runs were scored over. ReportError if they differ."""
    other = next((run for run in runs if run.score_range != runs[0].score_range), None)
    if other is not None:
        raise ReportError(
            f"{runs[0].name} and {other.name} were scored over different windows or layers: make a report of each, or "
            "give a --calibration, whose window is then used for all"
        )
    return runs[0].score_range


def gather(runs: Sequence[ScoreRun], score_range: ScoreRange, say: Say) -> ReportData:
    """Read the runs, with scores over `score_range`. CalibrationError if their files cannot be read."""
    say("reading the rows")
    rows = read_rows(runs)
    new_scores = None
    if any(run.score_range != score_range for run in runs):
        say(f"scoring {len(rows):,} rows in steps {score_range.window}")
        (new_scores,) = exact_scores(runs, rows, [(score_range, np.arange(len(rows)))])
    summary, run_summaries = Summary(score_range.window.end), []
    scores: list[Floats] = []
    run_index: list[Ints] = []
    first = 0
    for index, run in enumerate(runs):
        run_summary = Summary(score_range.window.end)
        for batch in run.batches(COLUMNS):
            if new_scores is not None:
                batch = _with_scores(batch, new_scores[first : first + len(batch)], score_range)
            first += len(batch)
            scores.append(batch.column("score").to_numpy(zero_copy_only=False).astype(np.float64))
            run_index.append(np.full(len(batch), index, np.int64))
            summary.add(batch)
            run_summary.add(batch)
        summary.add_rejects(run.folder)
        run_summary.add_rejects(run.folder)
        run_summaries.append(run_summary)
    say("reading the instability")
    return ReportData(
        runs=runs,
        names=_distinct_names(runs),
        run_json=[run.about for run in runs],
        score_range=score_range,
        rows=rows,
        score=np.concatenate(scores),
        run_index=np.concatenate(run_index),
        summary=summary,
        run_summaries=run_summaries,
        samples=_read_samples(runs, score_range, summary.samples()),
    )


def divide(sums: Floats, counts: Ints) -> Floats:
    """Return sums / counts, NaN where the count is 0."""
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)


def _with_scores(batch: pa.RecordBatch, score: Floats, score_range: ScoreRange) -> pa.RecordBatch:
    """Replace a batch's scores and reasons by those of another window."""
    missing = np.isnan(score)
    ended = batch.column("n_steps").to_numpy(zero_copy_only=False) < score_range.window.start
    reason = np.where(ended, signal.ANSWER_ENDED, signal.LOST_SPAN)
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
        by_layer[part] = divide(values[:, window].sum(axis=1), valid[:, window].sum(axis=1))
        for name in rows_of_class:
            in_class = label[part] == name
            sums[name] += values[in_class].sum(axis=0)
            counts[name] += valid[in_class].sum(axis=0)
    means = {name: divide(sums[name], counts[name]) for name in rows_of_class}
    return Samples(row, label, step_sums, step_counts, by_layer, means)


def _distinct_names(runs: Sequence[ScoreRun]) -> list[str]:
    parts = [run.folder.resolve().parts for run in runs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names
