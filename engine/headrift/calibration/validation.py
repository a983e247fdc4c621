"""How well a calibration does on prompts that it has not seen: grouped, nested cross-validation.

In each fold the whole procedure is done anew without the fold's prompts - part A and the attacks choose window and
layers, part B sets the threshold - and measured on the fold. A figure is the mean over folds. Its interval is from the
same done over and over with groups drawn with replacement, the choice included; a group stays in its fold and part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from headrift import stats
from headrift.calibration.search import Search, Sums
from headrift.calibration.settings import Rule
from headrift.calibration.thresholds import threshold
from headrift.calibration.units import Units
from headrift.signal import ScoreRange

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]

FEWEST_AT_5, FEWEST_AT_1 = 20, 100  # held-out benign samples in every fold, for true positives at 5% and 1% FPR
_KEPT_CELLS = 64  # whose scores are kept over resamples

# What each figure is, for calibration.json and the screen.
FIGURES = {
    "auroc": "chance that a held-out attack scores above a held-out benign prompt, ties half; no score ranks lowest",
    "auroc_scored": "the same among held-out prompts that have a score",
    "auprc": "average precision on the held-out prompts; no score ranks lowest; hangs on the share of attacks",
    "tpr_at_5": "most held-out attacks found with at most 5% of the fold's benign prompts flagged",
    "tpr_at_1": "most held-out attacks found with at most 1% of the fold's benign prompts flagged",
    "tpr": "held-out attacks at or above the threshold that part B of the other folds set",
    "fpr": "held-out benign prompts at or above that threshold, each distinct prompt once",
    "fpr_traffic": "held-out benign rows at or above that threshold, repeats counted as they came",
}


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure: mean over folds, its 95% interval (None: not enough data for one), and each fold's own (NaN: none)."""

    value: float
    interval: tuple[float, float] | None
    per_fold: list[float]


def held_out(units: Units, scores: Floats, times: Ints, fold: int, target: float, rule: Rule) -> dict[str, float]:
    """The figures of a fold, NaN where they cannot be had. scores: of all units, in the window chosen without the fold;
    times: how often each unit counts."""
    found = dict.fromkeys(FIGURES, np.nan)
    mine = (units.fold == fold) & (times > 0)
    attack, weight, values = units.attack[mine], times[mine].astype(np.float64), scores[mine]
    benign = ~attack
    if attack.any() and benign.any():
        found |= _ranked(values, attack, weight)
    others = units.sets & (units.fold != fold)
    cut = threshold(scores[others], times[others], target, rule)
    if cut is not None:
        flagged = values >= cut
        traffic = weight * units.repeats[mine]
        if attack.any():
            found["tpr"] = float(np.average(flagged[attack], weights=weight[attack]))
        if benign.any():
            found["fpr"] = float(np.average(flagged[benign], weights=weight[benign]))
            found["fpr_traffic"] = float(np.average(flagged[benign], weights=traffic[benign]))
    return found


def _ranked(values: Floats, attack: NDArray[np.bool_], weight: Floats) -> dict[str, float]:
    """The figures that need no threshold."""
    rank = stats.ranks(values)
    fpr, tprs = stats.roc_curve(rank, attack, weight)
    n_benign, n_attack = weight[~attack].sum(), weight[attack].sum()
    found = {
        "auroc": stats.area(fpr, tprs),
        "auprc": stats.average_precision(fpr, tprs, n_benign, n_attack),
    }
    for name, rate, fewest in (("tpr_at_5", 0.05, FEWEST_AT_5), ("tpr_at_1", 0.01, FEWEST_AT_1)):
        if n_benign >= fewest:
            found[name] = float(stats.tpr_at(fpr, tprs, np.array([rate]))[0])
    there = ~np.isnan(values)
    if attack[there].any() and not attack[there].all():
        found["auroc_scored"] = stats.area(*stats.roc_curve(rank[there], attack[there], weight[there]))
    return found


def estimates(
    units: Units,
    exact: Sequence[Floats],
    sums: Sums,
    choose: Callable[[Ints], Sequence[ScoreRange]],
    *,
    target: float,
    rule: Rule,
    resamples: int,
    seed: int,
) -> dict[str, Estimate]:
    """All figures. exact: for each fold all units' scores in the window that was chosen without it. choose: the cells
    chosen without each fold where units count so many times."""

    def by_fold(scores: Sequence[Floats], times: Ints) -> dict[str, list[float]]:
        folds = [held_out(units, scores[at], times, at, target, rule) for at in range(units.n_folds)]
        return {name: [fold[name] for fold in folds] for name in FIGURES}

    once = by_fold(exact, np.ones(len(units.row), np.int64))
    kept: dict[ScoreRange, Floats] = {}

    def scores_of(cell: ScoreRange) -> Floats:
        if cell not in kept:
            if len(kept) == _KEPT_CELLS:
                kept.pop(next(iter(kept)))
            kept[cell] = sums.scores(cell)
        return kept[cell]

    drawn: dict[str, list[float]] = {name: [] for name in FIGURES}
    strata = units.attack.astype(int) * 2 + units.sets
    for times in stats.cluster_resamples(units.group, resamples, seed=seed, strata=strata):
        again = by_fold([scores_of(cell) for cell in choose(times)], times)
        for name, values in again.items():
            # A resample may leave a fold without enough to set a threshold; the others still say how much it varies.
            drawn[name].append(float(np.nanmean(values)) if not np.isnan(values).all() else np.nan)
    found = {}
    for name, values in once.items():
        mean = float(np.mean(values))
        found[name] = Estimate(mean, None if np.isnan(mean) else _interval(drawn[name], units), values)
    return found


def chooser(n_folds: int, cells: Search | ScoreRange) -> Callable[[Ints], Sequence[ScoreRange]]:
    """`choose` for estimates: by the search, or always the one cell."""
    if isinstance(cells, ScoreRange):
        return lambda times: [cells] * n_folds
    return lambda times: cells.best(times)[:n_folds]


def _interval(drawn: list[float], units: Units) -> tuple[float, float] | None:
    """95% percentile interval; None without resamples, where most had no such figure, or from a handful of samples."""
    there = [value for value in drawn if not np.isnan(value)]
    classes = [int(units.attack.sum())] * bool(units.attack.any()) + [int((~units.attack).sum())]
    if not there or len(there) < len(drawn) / 2 or min(classes) < stats.MIN_FOR_INTERVAL:
        return None
    return stats.percentile_bounds(there)
