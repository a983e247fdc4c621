"""What the report's figures show, as numbers: by step, by window, by layer, beside other signals, by run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrift.corpus.summary import SCORE
from headrift.report.gather import Floats, Gathered, Ints, means
from headrift.stats import Separation, area, ranks, roc_curve, separation

_MOST_GRID_STEPS = 60  # of more steps, the grid's windows begin and end at this many, evenly spread
LENGTH = "prompt length"


@dataclass(frozen=True, slots=True)
class Along:
    """AUROC at each of the places `at` (steps, or layers), among prompts that have a value there, with its 95% interval
    for that place alone (NaN where too few are left); reach: by class, the fraction of prompts that have one."""

    at: Ints
    auroc: Floats
    low: Floats
    high: Floats
    reach: Mapping[str, Floats]


@dataclass(frozen=True, slots=True)
class Grid:
    """AUROC, no score lowest, of windows from step starts[i] to ends[j]: [i, j], NaN where i is after j."""

    starts: Ints
    auroc: Floats

    @property
    def best(self) -> tuple[int, int, float]:
        """The highest AUROC and its window's first and last step."""
        i, j = np.unravel_index(np.nanargmax(self.auroc), self.auroc.shape)
        return int(self.starts[i]), int(self.starts[j]), float(self.auroc[i, j])


@dataclass(frozen=True, slots=True)
class Relation:
    """The score against another number of the same prompts, by class: values, scores, and Spearman's rank correlation
    (None for fewer than 10, or where one does not vary)."""

    values: Mapping[str, Floats]
    scores: Mapping[str, Floats]
    spearman: Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class OfRun:
    """A run by itself: rows of each class, and how well score and prompt length separate there (None: one class)."""

    name: str
    n: Mapping[str, int]
    score: Separation | None
    length: Separation | None


def by_step(of: Gathered, resamples: int) -> Along:
    """AUROC of the mean over the scored layers at each recorded step from 1."""
    return _along(of, of.samples.by_step, np.arange(1, of.steps + 1), resamples)


def by_layer(of: Gathered, resamples: int) -> Along:
    """AUROC of each layer's mean over the window."""
    return _along(of, of.samples.by_layer, np.arange(of.samples.by_layer.shape[1]), resamples)


def grid(of: Gathered) -> Grid:
    """AUROC over all windows within the recorded steps."""
    samples = of.samples
    at = np.unique(np.linspace(1, of.steps, min(of.steps, _MOST_GRID_STEPS)).round().astype(np.int64))
    both = samples.mine("attack") | samples.mine("benign")
    attack = samples.mine("attack")[both]
    sums, counts = samples.step_sums[both].cumsum(axis=1), samples.step_counts[both].cumsum(axis=1)
    found, ones = np.full((len(at), len(at)), np.nan), np.ones(len(attack))
    for i, start in enumerate(at):
        for j, end in enumerate(at[i:], i):
            scores = means(
                sums[:, end] - sums[:, start] + samples.step_sums[both, start],
                counts[:, end] - counts[:, start] + samples.step_counts[both, start],
            )
            found[i, j] = area(*roc_curve(ranks(scores), attack, ones))
    return Grid(at, found)


def relation(of: Gathered, values: NDArray[np.floating] | NDArray[np.integer]) -> Relation:
    """The scores of the sampled rows against values, of all rows, NaN for none."""
    from scipy.stats import spearmanr

    rows, scores = of.samples.row, of.score[of.samples.row]
    others = values[rows].astype(np.float64)
    there = ~np.isnan(scores) & ~np.isnan(others)
    shown = {label: there & of.samples.mine(label) for label in of.classes}
    spearman: dict[str, float | None] = {}
    for label, mine in shown.items():
        varies = mine.sum() >= 10 and min(len(np.unique(x[mine])) for x in (others, scores)) > 1
        spearman[label] = float(spearmanr(others[mine], scores[mine]).statistic) if varies else None
    return Relation(
        {label: others[mine] for label, mine in shown.items()},
        {label: scores[mine] for label, mine in shown.items()},
        spearman,
    )


def by_run(of: Gathered) -> list[OfRun]:
    """Each run by itself."""
    found = []
    for name, summary in zip(of.names, of.of_run, strict=True):
        measures = summary.comparisons()[0].measures if summary.comparisons() else {}
        n = {label: int(numbers["n"] or 0) for label, numbers in summary.by_class().items()}
        found.append(OfRun(name, n, measures.get(SCORE), measures.get(LENGTH)))
    return found


def _along(of: Gathered, values: Floats, at: Ints, resamples: int) -> Along:
    samples = of.samples
    both = samples.mine("attack") | samples.mine("benign")
    found = np.full((3, len(at)), np.nan)
    for i, place in enumerate(at):
        there = both & ~np.isnan(values[:, place])
        attack = samples.mine("attack")[there]
        if attack.all() or not attack.any():
            continue
        groups = np.unique(of.rows.group[samples.row[there]], return_inverse=True)[1]
        measured = separation(values[there, place], attack, groups, resamples=resamples)
        found[:, i] = measured.auroc, *(measured.auroc_interval or (np.nan, np.nan))
    reach = {label: (~np.isnan(values[samples.mine(label)][:, at])).mean(axis=0) for label in of.classes}
    return Along(at, found[0], found[1], found[2], reach)
