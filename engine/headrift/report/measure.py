"""The numbers behind the report's figures: by step, by window, by layer, against other signals, by run; and which
rows stand out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrift.corpus.summary import SCORE
from headrift.report.gather import Floats, Ints, ReportData, divide
from headrift.stats import Separation, area, ranks, roc_curve, separation

LENGTH = "prompt length"
MOST_EXAMPLES = 5
_MOST_GRID_STEPS = 60  # with more steps, windows start and end at this many, evenly spaced
_FEWEST_FOR_CORRELATION = 10
_EXAMPLE_COLUMNS = ("id", "source", "row", "category", "flags", "instability")
_TEXT_COLUMNS = ("prompt", "text")


@dataclass(frozen=True, slots=True)
class AurocProfile:
    """AUROC at each step or layer, among prompts that have a value there."""

    at: Ints  # steps or layers [n]
    auroc: Floats
    low: Floats  # 95% interval of each by itself, NaN with too few prompts
    high: Floats
    reach: Mapping[str, Floats]  # by class, the fraction of prompts that have a value


@dataclass(frozen=True, slots=True)
class WindowGrid:
    """AUROC of windows, a missing score counted as lowest."""

    starts: Ints  # steps that windows start and end at [n]
    auroc: Floats  # of the window from starts[i] to starts[j], NaN if i > j [n, n]

    @property
    def best(self) -> tuple[int, int, float]:
        """First step, last step and AUROC of the window with the highest AUROC."""
        i, j = np.unravel_index(np.nanargmax(self.auroc), self.auroc.shape)
        return int(self.starts[i]), int(self.starts[j]), float(self.auroc[i, j])


class Relation(NamedTuple):
    """The score against another number of the same prompts, by class."""

    values: Mapping[str, Floats]
    scores: Mapping[str, Floats]
    spearman: Mapping[str, float | None]  # None with too few prompts, or if one of the two is constant


class RunSeparation(NamedTuple):
    """One run by itself; None if it has only one class."""

    name: str
    n: Mapping[str, int]  # rows by class
    score: Separation | None
    length: Separation | None


class Example(NamedTuple):
    """An input row to look at."""

    columns: Mapping[str, Any]
    run: str
    score: float
    percentile: float  # percent of the reference class's scores that are at most this one
    instability: Floats  # [steps, layers]


class Extremes(NamedTuple):
    """The rows that stand out."""

    highest_class: str
    highest: Sequence[Example]  # the highest scores first
    quietest: Sequence[Example]  # attacks, the lowest scores first
    reference: str  # the class that percentiles are relative to
    without_score: int  # attacks


def by_step(data: ReportData, resamples: int) -> AurocProfile:
    """AUROC of the mean over the scored layers at each recorded step from 1."""
    return _profile(data, data.samples.by_step, np.arange(1, data.steps + 1), resamples)


def by_layer(data: ReportData, resamples: int) -> AurocProfile:
    """AUROC of each layer's mean over the window."""
    return _profile(data, data.samples.by_layer, np.arange(data.samples.by_layer.shape[1]), resamples)


def by_window(data: ReportData) -> WindowGrid:
    """AUROC of all windows within the recorded steps."""
    samples = data.samples
    at = np.unique(np.linspace(1, data.steps, min(data.steps, _MOST_GRID_STEPS)).round().astype(np.int64))
    labelled = samples.in_class("attack") | samples.in_class("benign")
    attack = samples.in_class("attack")[labelled]
    step_sums, step_counts = samples.step_sums[labelled], samples.step_counts[labelled]
    sums, counts = step_sums.cumsum(axis=1), step_counts.cumsum(axis=1)
    auroc, weights = np.full((len(at), len(at)), np.nan), np.ones(len(attack))
    for i, start in enumerate(at):
        for j, end in enumerate(at[i:], i):
            scores = divide(
                sums[:, end] - sums[:, start] + step_sums[:, start],
                counts[:, end] - counts[:, start] + step_counts[:, start],
            )
            auroc[i, j] = area(*roc_curve(ranks(scores), attack, weights))
    return WindowGrid(at, auroc)


def by_run(data: ReportData) -> list[RunSeparation]:
    """Each run by itself."""
    runs = []
    for name, summary in zip(data.names, data.run_summaries, strict=True):
        measures = summary.comparisons()[0].measures if summary.comparisons() else {}
        n = {label: int(numbers["n"] or 0) for label, numbers in summary.by_class().items()}
        runs.append(RunSeparation(name, n, measures.get(SCORE), measures.get(LENGTH)))
    return runs


def relation(data: ReportData, values: NDArray[np.floating] | NDArray[np.integer]) -> Relation:
    """The sampled rows' scores against another number, given for all rows, NaN if a row has none."""
    from scipy.stats import spearmanr

    rows, scores = data.samples.row, data.score[data.samples.row]
    others = values[rows].astype(np.float64)
    valid = ~np.isnan(scores) & ~np.isnan(others)
    masks = {label: valid & data.samples.in_class(label) for label in data.classes}
    spearman: dict[str, float | None] = {}
    for label, mask in masks.items():
        varies = min(len(np.unique(numbers[mask])) for numbers in (others, scores)) > 1
        enough = varies and mask.sum() >= _FEWEST_FOR_CORRELATION
        spearman[label] = float(spearmanr(others[mask], scores[mask]).statistic) if enough else None
    return Relation(
        {label: others[mask] for label, mask in masks.items()},
        {label: scores[mask] for label, mask in masks.items()},
        spearman,
    )


def _profile(data: ReportData, values: Floats, at: Ints, resamples: int) -> AurocProfile:
    samples = data.samples
    labelled = samples.in_class("attack") | samples.in_class("benign")
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


def extremes(data: ReportData, *, with_texts: bool) -> Extremes | None:
    """The benign (or else unlabelled) prompts with the highest scores, and the attacks with the lowest."""
    scores = data.score[data.samples.row]
    valid = ~np.isnan(scores)
    places = {label: np.flatnonzero(data.samples.in_class(label) & valid) for label in data.classes}
    nothing = np.array([], np.int64)
    reference = next((label for label in ("benign", "unlabelled", "attack") if len(places.get(label, ()))), None)
    if reference is None:
        return None
    highest_class = "benign" if "benign" in data.classes else "unlabelled"
    chosen = {
        "highest": _smallest(-scores, places.get(highest_class, nothing)),
        "quietest": _smallest(scores, places.get("attack", nothing)),
    }
    columns = [*_EXAMPLE_COLUMNS, *(_TEXT_COLUMNS if with_texts else ())]
    rows = _read(data, data.samples.row[np.concatenate(list(chosen.values()))].tolist(), columns)
    sorted_scores = np.sort(scores[places[reference]])
    examples = {
        name: [_example(data, number, rows[number], sorted_scores) for number in data.samples.row[at].tolist()]
        for name, at in chosen.items()
    }
    without_score = int((data.samples.in_class("attack") & ~valid).sum())
    return Extremes(highest_class, examples["highest"], examples["quietest"], reference, without_score)


def _smallest(keys: Floats, places: Ints) -> Ints:
    """The places with the smallest keys."""
    return places[np.argsort(keys[places], kind="stable")[:MOST_EXAMPLES]]


def _read(data: ReportData, numbers: Sequence[int], columns: Sequence[str]) -> dict[int, dict[str, Any]]:
    """Read columns of rows, by row number."""
    rows: dict[int, dict[str, Any]] = {}
    first = 0
    last = max(numbers, default=-1)
    for run in data.runs:
        for batch in run.batches(columns):
            if first > last:
                return rows
            for number in numbers:
                if first <= number < first + len(batch):
                    rows[number] = batch.slice(number - first, 1).to_pylist()[0]
            first += len(batch)
    return rows


def _example(data: ReportData, number: int, columns: Mapping[str, Any], sorted_scores: Floats) -> Example:
    score = float(data.score[number])
    return Example(
        columns=columns,
        run=data.names[data.run_index[number]],
        score=score,
        percentile=float(np.searchsorted(sorted_scores, score, side="right") / len(sorted_scores) * 100),
        instability=np.array(columns["instability"], np.float64).reshape(-1, data.runs[0].model.layers),
    )
