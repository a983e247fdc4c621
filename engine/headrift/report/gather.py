"""Finished runs as the report reads them, in batches.

Counts are of all rows. What needs a row's instability is of at most 20,000 distinct prompts a class, those that the
closing table compares (corpus.summary): of each its mean by step and by layer is kept, and of each class the mean of
every cell.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from headrift import signal
from headrift.calibration.runs import Rows, Run, blocks, check_alike, exact_scores, open_run, read_rows
from headrift.corpus.summary import COLUMNS, Summary
from headrift.signal import ScoreRange

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Say: TypeAlias = Callable[[str], None]

CLASSES = ("attack", "benign", "unlabelled")
_SCORE, _REASON = "score", "reason"


class ReportError(ValueError):
    """No report can be made of these runs. The message says why and what to do."""


@dataclass(frozen=True)
class Samples:
    """What is kept of the sampled rows, in the order of their numbers.

    row: numbers over all runs; of: the class of each. by_step: [n, steps + 1], sums over the scored layers and how many
    there were; by_layer: [n, layers], the mean over the window's steps. Means: by class [steps + 1, layers], NaN where
    no row has the cell.
    """

    row: Ints
    of: NDArray[np.str_]
    step_sums: Floats
    step_counts: Ints
    by_layer: Floats
    means: Mapping[str, Floats]

    def mine(self, label: str) -> NDArray[np.bool_]:
        """Which samples are of a class."""
        return self.of == label

    @cached_property
    def by_step(self) -> Floats:
        """The mean over the scored layers at each step, NaN where there is none."""
        return means(self.step_sums, self.step_counts)


@dataclass(frozen=True, slots=True)
class Gathered:
    """runs with their folders' names, what run.json says of each, the cell that is scored, the rows and their scores
    in it (NaN for none), the run of each row, summaries over all runs and of each, and the samples."""

    runs: Sequence[Run]
    names: Sequence[str]
    about: Sequence[Mapping[str, Any]]
    cell: ScoreRange
    rows: Rows
    score: Floats
    run_of: Ints
    summary: Summary
    of_run: Sequence[Summary]
    samples: Samples

    @property
    def steps(self) -> int:
        """The last step that all runs recorded."""
        return min(run.steps for run in self.runs)

    @property
    def layers(self) -> tuple[int, int]:
        """The scored layers [s, e)."""
        return self.cell.layers(self.runs[0].model.layers)

    @property
    def classes(self) -> list[str]:
        """Those that have rows."""
        return [name for name in CLASSES if name in self.summary.by_class()]

    @property
    def both(self) -> bool:
        """Whether there are attacks and benign prompts to compare."""
        return {"attack", "benign"} <= set(self.classes)


def open_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders. CalibrationError where one is none, or they are not of one model."""
    runs = [open_run(folder) for folder in folders]
    check_alike(runs)
    return runs


def cell_of(runs: Sequence[Run]) -> ScoreRange:
    """The window and layers that the runs were scored over. ReportError where they differ."""
    cells = list(dict.fromkeys(run.score_range for run in runs))
    if len(cells) > 1:
        raise ReportError(
            f"{runs[0].name} was scored over another window or other layers than "
            f"{next(run.name for run in runs if run.score_range != cells[0])}: make a report of each, or give the "
            "--calibration whose window is to be used for all"
        )
    return cells[0]


def gather(runs: Sequence[Run], cell: ScoreRange, say: Say) -> Gathered:
    """Read the runs. CalibrationError where their files cannot be read."""
    steps = min(run.steps for run in runs)
    say("reading the rows")
    rows = read_rows(runs)
    score = None
    if any(run.score_range != cell for run in runs):
        say(f"scoring {len(rows):,} rows in steps {cell.window}")
        (score,) = exact_scores(runs, rows, [(cell, np.arange(len(rows)))])
    summary, of_run = Summary(cell.window.end), []
    kept: list[Floats] = []
    run_of: list[Ints] = []
    for number, run in enumerate(runs):
        own = Summary(cell.window.end)
        for batch in run.batches(COLUMNS):
            if score is not None:
                start = sum(len(of) for of in kept)
                batch = _with_scores(batch, score[start : start + len(batch)], cell)
            kept.append(batch.column(_SCORE).to_numpy(zero_copy_only=False).astype(np.float64))
            run_of.append(np.full(len(batch), number, np.int64))
            summary.add(batch)
            own.add(batch)
        for of in (summary, own):
            of.add_rejects(Path(run.name))
        of_run.append(own)
    say("reading the instability")
    return Gathered(
        runs=runs,
        names=_names(runs),
        about=[_about(Path(run.name)) for run in runs],
        cell=cell,
        rows=rows,
        score=np.concatenate(kept),
        run_of=np.concatenate(run_of),
        summary=summary,
        of_run=of_run,
        samples=_read_samples(runs, cell, steps, summary.samples()),
    )


def means(sums: Floats, counts: Ints) -> Floats:
    """Sums over counts, NaN where nothing was counted."""
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)


def _with_scores(batch: pa.RecordBatch, score: Floats, cell: ScoreRange) -> pa.RecordBatch:
    """The batch with the scores of a window that is not its run's own."""
    none = np.isnan(score)
    ended = batch.column("n_steps").to_numpy(zero_copy_only=False) < cell.window.start
    reason = np.where(ended, signal.ANSWER_ENDED, signal.LOST_SPAN)
    columns = {name: batch.column(name) for name in batch.schema.names}
    columns[_SCORE] = pa.array(score, pa.float64(), mask=none)
    columns[_REASON] = pa.array(reason, pa.string(), mask=~none)
    return pa.record_batch(columns)


def _read_samples(runs: Sequence[Run], cell: ScoreRange, steps: int, wanted: Mapping[str, Ints]) -> Samples:
    row = np.concatenate(list(wanted.values()))
    of = np.repeat(list(wanted), [len(rows) for rows in wanted.values()])
    order = np.argsort(row)
    row, of = row[order], of[order]
    layers, scored = runs[0].model.layers, slice(*cell.layers(runs[0].model.layers))
    in_window = slice(cell.window.start, cell.window.end + 1)
    step_sums, step_counts = np.zeros((len(row), steps + 1)), np.zeros((len(row), steps + 1), np.int64)
    by_layer = np.empty((len(row), layers))
    sums = {label: np.zeros((steps + 1, layers)) for label in wanted}
    counts = {label: np.zeros((steps + 1, layers), np.int64) for label in wanted}
    for which, block in blocks(runs, row, steps):
        there = ~np.isnan(block)
        values = np.where(there, block, 0).astype(np.float64)
        step_sums[which] = values[:, :, scored].sum(axis=2)
        step_counts[which] = there[:, :, scored].sum(axis=2)
        by_layer[which] = means(values[:, in_window].sum(axis=1), there[:, in_window].sum(axis=1))
        for label in wanted:
            mine = of[which] == label
            sums[label] += values[mine].sum(axis=0)
            counts[label] += there[mine].sum(axis=0)
    by_class = {label: means(sums[label], counts[label]) for label in wanted}
    return Samples(row, of, step_sums, step_counts, by_layer, by_class)


def _about(folder: Path) -> Mapping[str, Any]:
    about: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return about


def _names(runs: Sequence[Run]) -> list[str]:
    """The folders' names, with as many of the folders they are in as tell them apart."""
    parts = [Path(run.name).resolve().parts for run in runs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(of[-depth:]) for of in parts]
        if len(set(names)) == len(names):
            break
    return names
