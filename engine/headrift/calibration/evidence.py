"""What a calibration rests on, in the words and numbers of calibration.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from headrift import stats
from headrift.calibration import validation
from headrift.calibration.record import Contaminated, Figure, OfClass, Scores, Setting, Traffic
from headrift.calibration.runs import ATTACK, BENIGN, UNLABELLED, Rows, Run
from headrift.calibration.settings import Rule, Settings
from headrift.calibration.thresholds import Reference, threshold
from headrift.calibration.units import Division
from headrift.signal import ScoreRange
from headrift.stats import CONFIDENCE, highest_rate

Floats: TypeAlias = NDArray[np.float64]

_CONTAMINATIONS = (0.0, 0.001, 0.01, 0.05, 0.1)
CONFOUNDS = {
    "prompt_tokens": "prompt length",
    "answer_tokens": "answer length",
    "n_steps": "number of steps",
    "system_share": "system share",
    "head_agreement": "head agreement",
    "focus": "focus score",
    "entropy": "entropy",
}
_EXACTLY = {
    "answer_tokens": "as far as it was made",
    "n_steps": "how early the answer ended",
    "system_share": "the heads' mean, over the run's own window",
    "head_agreement": "mean correlation of the heads, over the run's own window",
    "focus": "Attention Tracker's, at step 0, over all heads",
    "entropy": "of the next token, over the run's own window",
}


@dataclass(frozen=True, slots=True)
class Chosen:
    """What was chosen: the cell, and for each fold the one chosen without it; the held-out figures; the scores of all
    rows in the cell, NaN for none; and, where the runs have a window of their own and another was chosen, that one with
    all samples' scores in it."""

    cell: ScoreRange
    of_fold: list[ScoreRange]
    estimates: dict[str, validation.Estimate]
    scores: Floats
    own: tuple[ScoreRange, Floats] | None


def setting(settings: Settings, of_b: Floats, cut: float, above: int) -> Setting:
    """How the threshold was set, and what it promises."""
    flagged = int((of_b >= cut).sum())
    rate = f"{settings.target_fpr:.3g}"
    promises = {
        Rule.BINOMIAL: f"false positive rate at most {rate} with {CONFIDENCE:.0%} confidence",
        Rule.CONFORMAL: f"false positive rate at most {rate} on average over calibrations",
    }
    promise = f"{promises[settings.rule]}, for distinct benign prompts like those of part B"
    if settings.benign_only:
        promise += f", if at most {settings.contamination:.3g} of the prompts are attacks"
    return Setting(
        rule=settings.rule,
        target_fpr=settings.target_fpr,
        confidence=CONFIDENCE if settings.rule is Rule.BINOMIAL else None,
        n=len(of_b),
        above=above,
        flagged=flagged,
        highest_fpr=highest_rate(above, len(of_b)) / (1 - settings.contamination * settings.benign_only),
        promise=promise,
    )


def kept_scores(of_b: Floats) -> Scores:
    """The scores that p-values and drift are told by."""
    kept = Reference.of(of_b)
    return Scores(
        n=kept.n, values=kept.values.tolist(), at_or_above=kept.at_or_above.tolist(), above=kept.above.tolist()
    )


def classes(rows: Rows, chosen: Chosen) -> dict[str, OfClass]:
    """Coverage of each class that has rows."""
    found = {}
    for name, label in (("attack", ATTACK), ("benign", BENIGN), ("unlabelled", UNLABELLED)):
        mine = rows.label == label
        if mine.any():
            found[name] = OfClass(
                rows=int(mine.sum()),
                distinct=len(np.unique(rows.prompt[mine])),
                with_score=float((~np.isnan(chosen.scores[mine])).mean()),
                ended_early=float((rows.counts["n_steps"][mine] < chosen.cell.window.end).mean()),
            )
    return found


def figures(chosen: Chosen, division: Division, resamples: int) -> dict[str, Figure]:
    """The held-out figures, and for comparison the one that is not."""
    units, shown = division.units, {}
    attacks = bool(units.attack.any())
    for name, how in validation.FIGURES.items():
        found = chosen.estimates.get(name)
        if found is None or (not attacks and not name.startswith("fpr")):
            continue
        shown[name] = Figure(
            value=_number(found.value),
            interval=found.interval,
            per_fold=[_number(value) for value in found.per_fold],
            how=f"{how}; mean of {units.n_folds} folds, window and layers chosen without the fold"
            if units.chooses.any()
            else f"{how}; mean of {units.n_folds} folds",
        )
    if units.chooses.any():
        mine = units.chooses
        rank = stats.ranks(chosen.scores[units.row[mine]])
        naive = stats.area(*stats.roc_curve(rank, units.attack[mine], np.ones(len(rank))))
        how = "AUROC on the very prompts that window and layers were chosen on: too high, for comparison only"
        shown["auroc_in_sample"] = Figure(value=naive, how=how)
    if chosen.own is not None:
        cell, scores = chosen.own
        unsearched = stats.separation(scores, units.attack, units.group, resamples=resamples)
        how = f"AUROC of the runs' own window {cell.window} and layers; nothing was chosen, so on all samples"
        shown["auroc_own_window"] = Figure(value=unsearched.auroc, interval=unsearched.auroc_interval, how=how)
    return shown


def confounds(rows: Rows, division: Division, resamples: int) -> dict[str, Figure]:
    """How well other numbers, unless they are the same for all, separate the same samples."""
    units, found = division.units, {}
    for name, values in {**rows.counts, **rows.signals}.items():
        of_units = values[units.row].astype(np.float64)
        if len(np.unique(of_units)) < 2:
            continue
        measured = stats.separation(of_units, units.attack, units.group, resamples=resamples)
        what = CONFOUNDS[name] + (f" ({_EXACTLY[name]})" if name in _EXACTLY else "")
        how = f"AUROC of {what}, higher counted as attack (below 0.5: lower is), on the same prompts"
        found[name] = Figure(value=measured.auroc, interval=measured.auroc_interval, how=how)
    return found


def traffic(rows: Rows, chosen: Chosen, cut: float, settings: Settings) -> Traffic:
    """Alerts by rows as they came."""
    benign = rows.label != ATTACK if settings.benign_only else rows.label == BENIGN
    alerts, held_out, daily = None, chosen.estimates.get("fpr_traffic"), settings.daily_prompts
    if daily is not None and held_out is not None and not np.isnan(held_out.value):
        alerts = Figure(
            value=held_out.value * daily,
            interval=None
            if held_out.interval is None
            else (held_out.interval[0] * daily, held_out.interval[1] * daily),
            how=f"held-out rate by traffic times {daily:,} prompts a day, as if all were benign",
        )
    return Traffic(
        rows=int(benign.sum()),
        flagged=int((chosen.scores[benign] >= cut).sum()),
        daily_prompts=daily,
        alerts_a_day=alerts,
    )


def contamination(of_b: Floats, cut: float, settings: Settings) -> list[Contaminated]:
    """What other fractions of attacks among the prompts would do."""
    once, n = np.ones(len(of_b), np.int64), len(of_b)
    flagged = int((of_b >= cut).sum())
    found = []
    for fraction in sorted({*_CONTAMINATIONS, settings.contamination}):
        rate = settings.target_fpr * (1 - fraction)
        found.append(
            Contaminated(
                contamination=fraction,
                threshold=threshold(of_b, once, rate, settings.rule),
                lowest_fpr=max(0.0, flagged / n - fraction) / (1 - fraction),
                highest_fpr=min(1.0, highest_rate(flagged, n) / (1 - fraction)),
            )
        )
    return found


def procedure(
    division: Division, cells: list[ScoreRange], settings: Settings
) -> dict[str, str | int | float | bool | None]:
    """How it was done."""
    units = division.units
    return {
        "seed": settings.seed,
        "folds": units.n_folds if units.n_folds > 1 else 0,
        "resamples": settings.resamples,
        "groups": "prompts and categories" if settings.by_category else "prompts",
        "cells_searched": len(cells) if len(cells) > 1 else 0,
        "chosen_by": "AUROC, no score lowest, on part A and attacks" if len(cells) > 1 else "given, not chosen",
        "samples_that_chose_attack": int((units.chooses & units.attack).sum()),
        "samples_that_chose_benign": int((units.chooses & ~units.attack).sum()),
        "samples_measured_attack": int(units.attack.sum()),
        "samples_measured_benign": int((~units.attack).sum()),
        "contamination": settings.contamination if settings.benign_only else None,
    }


def notes(
    runs: Sequence[Run],
    rows: Rows,
    division: Division,
    chosen: Chosen,
    shown: Mapping[str, Figure],
    alone: Mapping[str, Figure],
    settings: Settings,
) -> list[str]:
    """What a reader must know, a sentence each. shown: the figures; alone: what other numbers separate."""
    units, found = division.units, []
    if len({run.steps for run in runs}) > 1:
        found.append(f"the runs recorded different numbers of steps; only the first {min(r.steps for r in runs)} count")
    unlabelled = int((rows.label == UNLABELLED).sum())
    if unlabelled and not settings.benign_only:
        found.append(f"{unlabelled:,} rows have no label and were left out")
    if settings.benign_only and (rows.label == ATTACK).any():
        found.append(f"{int((rows.label == ATTACK).sum()):,} rows are labelled attack and were left out")
    both = np.intersect1d(rows.prompt[rows.label == ATTACK], rows.prompt[rows.label == BENIGN])
    if len(both) and not settings.benign_only:
        found.append(f"{len(both):,} prompts are labelled attack in one row and benign in another")
    again = len(division.sets) - len(np.unique(rows.group[division.sets]))
    if again:
        found.append(
            f"{again:,} prompts of part B come under another system prompt too: the promise takes such samples for "
            "independent, which they are not quite"
        )
    if units.n_folds == 1:
        found.append("too few groups to hold any out: there are no held-out figures")
    elif not division.cross_validated:
        found.append("part B is too small in some folds to set a threshold there: no held-out rates at a threshold")
    if units.n_folds not in (1, settings.folds):
        found.append(f"{units.n_folds} folds instead of {settings.folds}: there are no more groups in a class")
    most = (division.n_attack, division.n_benign)
    if (int(units.attack.sum()), int((~units.attack).sum())) != most:
        found.append("figures are of a draw of 20,000 distinct prompts of a class; the threshold is from all of part B")
    if settings.benign_only:
        found.append("without attacks nothing says how many of them are found, nor whether another window finds more")
    found += _beside(chosen, shown, alone)
    return found


def _beside(chosen: Chosen, shown: Mapping[str, Figure], alone: Mapping[str, Figure]) -> list[str]:
    """What does as well as what was chosen."""
    found, auroc, own = [], shown.get("auroc"), shown.get("auroc_own_window")
    if auroc is None or auroc.value is None:
        return []
    if own is not None and own.value is not None and own.value >= auroc.value and chosen.own is not None:
        found.append(
            f"the runs' own window does no worse (AUROC {own.value:.3f}) than a search on data like these "
            f"({auroc.value:.3f} held out): --window {chosen.own[0].window} also leaves all benign prompts to part B"
        )
    for name, figure in alone.items():
        if figure.value is not None and auroc.interval and max(figure.value, 1 - figure.value) >= auroc.interval[0]:
            found.append(f"{CONFOUNDS[name]} alone separates about as well (AUROC {figure.value:.3f})")
    return found


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value
