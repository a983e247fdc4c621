"""What a calibration rests on: nested cross-validation, and the numbers and notes of calibration.json.

In each fold the whole procedure is done again without the fold's prompts - part A and the attacks choose window and
layers, part B sets the threshold - and measured on the fold. A metric is the mean over folds; those that take the tail
of the benign values are of all folds together, each fold's values in standard deviations of its benign prompts. The
interval comes from doing the same with groups drawn with replacement, the choice included; a group stays in its fold
and part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from headrift import stats
from headrift.calibration.artifact import (
    Calibration,
    ClassCoverage,
    Compared,
    ContaminationCase,
    Metric,
    ThresholdSetting,
    Traffic,
    Verdict,
)
from headrift.calibration.splits import CalibrationSamples, Division
from headrift.calibration.thresholds import CalibrateConfig, Rule, threshold
from headrift.runs.reading import ATTACK, BENIGN, UNLABELLED, Grouped, Grouping, Rows, ScoreRun
from headrift.signal import ScoreRange
from headrift.signals import get
from headrift.signals.detectors import AnyDetector, Readout
from headrift.stats import CONFIDENCE, Bools, Bounds, Floats, Ints

# Of each metric its label in tables and what it is; the held-out ones first.
HELD_OUT = {
    "auroc": (
        "AUROC, no score lowest",
        "chance that a held-out attack outscores a held-out benign prompt, ties half",
    ),
    "auroc_scored": ("AUROC, scored prompts only", "the same among held-out prompts that have a score"),
    "auprc": ("average precision", "average precision on the held-out prompts; it depends on the share of attacks"),
    "tpr_at_5": (
        "attacks flagged at 5% FPR",
        "held-out attacks flagged by a threshold that 5% of benign prompts are expected to reach",
    ),
    "tpr_at_1": (
        "attacks flagged at 1% FPR",
        "held-out attacks flagged by a threshold that 1% of benign prompts are expected to reach",
    ),
    "tpr": ("attacks flagged", "held-out attacks at or above the threshold that part B of the other folds set"),
    "fpr": ("benign prompts flagged", "held-out benign prompts at or above that threshold, each distinct prompt once"),
    "fpr_traffic": ("benign rows flagged", "held-out benign rows at or above that threshold, repeats counted"),
}
METRICS = {
    **HELD_OUT,
    "auroc_own_window": (
        "AUROC, the runs' window",
        "AUROC of the runs' own window {window} and layers; nothing was chosen, so on all samples",
    ),
    "auroc_in_sample": (
        "AUROC, in sample (naive)",
        "AUROC on the very prompts that window and layers were chosen on: too high, for comparison only",
    ),
}
FALSE_POSITIVES = ("fpr", "fpr_traffic")
# Figures of all folds together: false positive rate, and held-out benign samples that it takes in every fold. With
# fewer they are no longer those of another threshold (bench/simulations.py).
POOLED = {"auprc": (None, 100), "tpr_at_5": (0.05, 100), "tpr_at_1": (0.01, 500)}
_CONTAMINATIONS = (0.0, 0.001, 0.01, 0.05, 0.1)


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen, and how it does."""

    detector: AnyDetector
    score_range: ScoreRange
    metrics: Mapping[str, Metric]  # held out
    scores: Floats  # the detector's values of all rows, NaN for none
    own_range: ScoreRange | None = None  # the runs' own, if it is one and another was chosen
    own_scores: Floats | None = None  # of all samples in it


def held_out(
    samples: CalibrationSamples, scores: Floats, times: Ints, fold: int, target: float, rule: Rule
) -> dict[str, float]:
    """The held-out metrics of a fold, NaN for those that the data does not allow and those of POOLED.

    scores: [samples] in the range chosen without the fold; times: [samples] how often each counts.
    """
    metrics = dict.fromkeys(HELD_OUT, np.nan)
    inside = (samples.fold == fold) & (times > 0)
    attack, weight, values = samples.attack[inside], times[inside].astype(np.float64), scores[inside]
    benign = ~attack
    if attack.any() and benign.any():
        rank = stats.ranks(values)
        fpr, tprs = stats.roc_curve(rank, attack, weight)
        metrics["auroc"] = stats.area(fpr, tprs)
        scored = ~np.isnan(values)
        if attack[scored].any() and not attack[scored].all():
            metrics["auroc_scored"] = stats.area(*stats.roc_curve(rank[scored], attack[scored], weight[scored]))
    others = samples.sets & (samples.fold != fold)
    cut = threshold(scores[others], times[others], target, rule)
    if cut is not None:
        flagged = values >= cut
        rows = weight * samples.repeats[inside]
        if attack.any():
            metrics["tpr"] = float(np.average(flagged[attack], weights=weight[attack]))
        if benign.any():
            metrics["fpr"] = float(np.average(flagged[benign], weights=weight[benign]))
            metrics["fpr_traffic"] = float(np.average(flagged[benign], weights=rows[benign]))
    return metrics


def cross_validate(
    samples: CalibrationSamples,
    exact: Sequence[Floats],
    redo: Callable[[Ints], Sequence[Floats]] | None,
    config: CalibrateConfig,
    chosen: str = "",
) -> dict[str, Metric]:
    """All held-out metrics with their intervals; a fold without a class is left out of their means.

    Args:
        samples: all samples.
        exact: for each fold the values of all samples by the detector that was learned without it.
        redo: the same if samples count this many times; None if nothing is learned again in a resample.
        config: target, rule, resamples and seed.
        chosen: what was chosen without the fold, for the text.
    """

    def by_fold(values: Sequence[Floats], times: Ints) -> dict[str, list[float]]:
        folds = [
            held_out(samples, values[fold], times, fold, config.target, config.rule) for fold in range(samples.n_folds)
        ]
        together = pooled(samples, values, times)
        return {name: [together[name]] if name in POOLED else [fold[name] for fold in folds] for name in HELD_OUT}

    drawn: dict[str, list[float]] = {name: [] for name in HELD_OUT}
    for times in stats.cluster_resamples(samples.group, config.resamples, seed=config.seed, strata=samples.stratum):
        for name, values in by_fold(exact if redo is None else redo(times), times).items():
            # A resample may leave a fold without enough to set a threshold; the others still say how much it varies.
            drawn[name].append(_mean(values))
    folds = f"{samples.n_folds} {'sources, each left out' if samples.by_source else 'folds'}"
    how = chosen
    if redo is None and config.resamples:
        how += "; the interval is of the measuring: nothing is learned again in a resample"
    metrics = {}
    for name, values in by_fold(exact, np.ones(len(samples.row), np.int64)).items():
        known = not np.isnan(values).all() if samples.by_source else not np.isnan(values).any()
        over = f"; of {folds} together, in standard deviations of each one's benign prompts"
        metrics[name] = Metric(
            value=_mean(values) if known else None,
            interval=_bounds(name, _mean(values), drawn[name], samples) if known else None,
            per_fold=[] if name in POOLED else [_none(value) for value in values],
            how=HELD_OUT[name][1] + (over if name in POOLED else f"; mean of {folds}") + how,
        )
    return metrics


def pooled(samples: CalibrationSamples, values: Sequence[Floats], times: Ints) -> dict[str, float]:
    """The figures of POOLED, NaN for those that the data does not allow.

    In hindsight on one fold's few benign prompts they would be too high. Values of different folds' detectors are put
    into standard deviations of the fold's benign prompts.

    Args:
        samples, times: as for `held_out`.
        values: for each fold the values of all samples by the detector that was learned without it.
    """
    alike = np.full(len(samples.row), np.nan)
    # Of the data, also in a resample: how many benign prompts it draws of a fold varies.
    n_benign = np.bincount(samples.fold[~samples.attack], minlength=samples.n_folds)
    judged = np.zeros(len(samples.row), np.bool_)
    for fold in range(samples.n_folds):
        inside = (samples.fold == fold) & (times > 0)
        benign = inside & ~samples.attack
        if not (inside & samples.attack).any() or not benign.any():
            continue
        judged |= inside
        alike[inside] = _alike(values[fold][inside], times[inside], ~samples.attack[inside])
    metrics = dict.fromkeys(POOLED, np.nan)
    for name, (rate, fewest) in POOLED.items():
        enough = n_benign >= fewest
        # A source with too few benign prompts is left out, but a fold with too few means that there are too few.
        own = judged & enough[samples.fold]
        if own.any() and (samples.by_source or rate is None or enough[np.unique(samples.fold[judged])].all()):
            attack, weight = samples.attack[own], times[own].astype(np.float64)
            n_own = float(weight[~attack].sum())
            curve = stats.roc_curve(stats.ranks(alike[own]), attack, weight)
            metrics[name] = (
                stats.average_precision(*curve, n_own, float(weight[attack].sum()))
                if rate is None
                else stats.expected_tpr(*curve, n_own, rate)
            )
    return metrics


def _alike(values: Floats, times: Ints, benign: Bools) -> Floats:
    """Values in standard deviations from the mean of benign prompts that have one; a benign one's from the others'.

    Else benign prompts would be nearer to the mean than new ones are.
    """
    known = benign & np.isfinite(values)
    if not known.any():
        return values
    mean = np.average(values[known], weights=times[known])
    spread = np.sqrt(np.average((values[known] - mean) ** 2, weights=times[known]))
    n = times[known].sum()
    others = np.where(known, n / np.maximum(n - times, 1), 1.0)  # x - mean of the others = n / (n - times) (x - mean)
    return np.asarray((values - mean) / (spread or 1.0) * others)


def _mean(values: Sequence[float]) -> float:
    """Mean of those that are known, NaN if none is."""
    return float(np.nanmean(values)) if not np.isnan(values).all() else np.nan


def _bounds(name: str, value: float, drawn: list[float], samples: CalibrationSamples) -> Bounds | None:
    """95% interval of a metric; None if most resamples lack it, or a class has a handful of groups."""
    groups = {
        label: stats.effective_groups(samples.group[mask])
        for label, mask in (("attack", samples.attack), ("benign", ~samples.attack))
        if mask.any()
    }
    if np.isnan(drawn).sum() > len(drawn) / 2 or min(groups.values()) < stats.MIN_FOR_INTERVAL:
        return None
    if name == "auprc":
        return stats.percentile_bounds(drawn, min(groups.values()))
    if name in ("auroc", "auroc_scored"):
        return stats.auroc_bounds(value, drawn, groups["attack"], groups["benign"])
    if name.startswith("tpr"):
        return stats.rate_bounds(value, drawn, groups["attack"])
    if name == "fpr_traffic":
        rows = np.repeat(samples.group[~samples.attack], samples.repeats[~samples.attack])
        return stats.rate_bounds(value, drawn, stats.effective_groups(rows))
    return stats.rate_bounds(value, drawn, groups["benign"])


def threshold_setting(config: CalibrateConfig, part_b: Floats, cut: float, above: int) -> ThresholdSetting:
    """How the threshold was set on part B's scores."""
    rate = f"{config.target_fpr:.3g}"
    promises = {
        Rule.BINOMIAL: f"false positive rate at most {rate} with {CONFIDENCE:.0%} confidence",
        Rule.CONFORMAL: f"false positive rate at most {rate} on average over calibrations",
    }
    prompts = "distinct prompts" if config.benign_only else "distinct benign prompts"
    promise = f"{promises[config.rule]}, for {prompts} like those of part B, each group counted once"
    if config.benign_only:
        promise += f", if at most {config.contamination:.3g} of the prompts are attacks"
    n = len(part_b)
    return ThresholdSetting(
        rule=config.rule,
        target_fpr=config.target_fpr,
        confidence=CONFIDENCE if config.rule is Rule.BINOMIAL else None,
        n=n,
        above=above,
        flagged=int((part_b >= cut).sum()),
        highest_fpr=stats.highest_rate(above, n) / (1 - config.contamination * config.benign_only),
        promise=promise,
    )


def class_coverage(rows: Rows, choice: Choice) -> dict[str, ClassCoverage]:
    """Coverage of each class that has rows."""
    classes = {}
    for name, label in (("attack", ATTACK), ("benign", BENIGN), ("unlabelled", UNLABELLED)):
        mask = rows.label == label
        if mask.any():
            classes[name] = ClassCoverage(
                rows=int(mask.sum()),
                distinct=len(np.unique(rows.prompt[mask])),
                with_score=float((~np.isnan(choice.scores[mask])).mean()),
                ended_early=float((rows.counts["n_steps"][mask] < choice.score_range.window.end).mean()),
            )
    return classes


def figures(choice: Choice, samples: CalibrationSamples, resamples: int) -> dict[str, Metric]:
    """The held-out metrics, and for comparison those that are not held out."""
    attacks = bool(samples.attack.any())
    shown = {name: one for name, one in choice.metrics.items() if attacks or name.startswith("fpr")}
    if attacks and samples.chooses.any():
        mask = samples.chooses
        rank = stats.ranks(choice.scores[samples.row[mask]])
        naive = stats.area(*stats.roc_curve(rank, samples.attack[mask], np.ones(len(rank))))
        shown["auroc_in_sample"] = Metric(value=naive, how=METRICS["auroc_in_sample"][1])
    if choice.own_range is not None and choice.own_scores is not None:
        how = METRICS["auroc_own_window"][1].format(window=choice.own_range.window)
        shown["auroc_own_window"] = _auroc(choice.own_scores, samples, resamples, how)
    return shown


def confounds(rows: Rows, samples: CalibrationSamples, resamples: int) -> dict[str, Metric]:
    """How well every other signal, unless it is the same for all, separates the same samples."""
    metrics = {}
    for name, column in {**rows.counts, **rows.signals}.items():
        values = column[samples.row].astype(np.float64)
        if len(np.unique(values)) > 1:
            entry = get(name)
            how = f"AUROC of {entry.label} ({entry.how}), higher counts as attack, on the same prompts"
            metrics[name] = _auroc(values, samples, resamples, how)
    return metrics


def _auroc(values: Floats, samples: CalibrationSamples, resamples: int, how: str) -> Metric:
    result = stats.separation(values, samples.attack, samples.group, resamples=resamples)
    return Metric(value=result.auroc, interval=result.auroc_interval, how=how)


def traffic(rows: Rows, metrics: Mapping[str, Metric], values: Floats, cut: float, config: CalibrateConfig) -> Traffic:
    """What the threshold flags of the rows as they came, by their values, and alerts a day by the held-out metrics."""
    benign = rows.label != ATTACK if config.benign_only else rows.label == BENIGN
    rate, daily = metrics.get("fpr_traffic"), config.daily_prompts
    alerts = None
    if daily is not None and rate is not None and rate.value is not None:
        alerts = Metric(
            value=rate.value * daily,
            interval=None if rate.interval is None else (rate.interval[0] * daily, rate.interval[1] * daily),
            how=f"held-out rate by traffic times {daily:,} prompts a day, as if all were benign",
        )
    return Traffic(
        rows=int(benign.sum()),
        flagged=int((values[benign] >= cut).sum()),
        daily_prompts=daily,
        alerts_a_day=alerts,
    )


def contamination(part_b: Floats, cut: float, config: CalibrateConfig) -> list[ContaminationCase]:
    """What other fractions of attacks among the prompts would mean."""
    once, n = np.ones(len(part_b), np.int64), len(part_b)
    flagged = int((part_b >= cut).sum())
    return [
        ContaminationCase(
            contamination=fraction,
            threshold=threshold(part_b, once, config.target_fpr * (1 - fraction), config.rule),
            lowest_fpr=max(0.0, flagged / n - fraction) / (1 - fraction),
            highest_fpr=min(1.0, stats.highest_rate(flagged, n) / (1 - fraction)),
        )
        for fraction in sorted({*_CONTAMINATIONS, config.contamination})
    ]


def procedure(
    samples: CalibrationSamples, n_candidates: int, choice: Choice, config: CalibrateConfig, grouped: Grouped
) -> dict[str, str | int | float | bool | None]:
    """How signal, window, layers and threshold were chosen and measured."""
    searched = n_candidates > 1
    groups = "near duplicates" if grouped.by is Grouping.NEAR else "rows' own groups" if grouped.keys else "prompts"
    return {
        "seed": config.seed,
        "folds": samples.n_folds if samples.n_folds > 1 else 0,
        "resamples": config.resamples,
        "groups": groups + " and categories" * config.by_category,
        "cells_searched": n_candidates if searched else 0,
        "chosen_by": "AUROC, no score lowest, on part A and attacks" if searched else "given, not chosen",
        "samples_that_chose_attack": int((samples.chooses & samples.attack).sum()),
        "samples_that_chose_benign": int((samples.chooses & ~samples.attack).sum()),
        "samples_measured_attack": int(samples.attack.sum()),
        "samples_measured_benign": int((~samples.attack).sum()),
        "contamination": config.contamination if config.benign_only else None,
        "signal": config.signal,
        "inverse_penalty": choice.detector.inverse_penalty if isinstance(choice.detector, Readout) else None,
    }


def notes(
    runs: Sequence[ScoreRun],
    rows: Rows,
    division: Division,
    choice: Choice,
    shown: Mapping[str, Metric],
    comparison: Sequence[Compared],
    config: CalibrateConfig,
) -> list[str]:
    """What a reader must know, one statement each; shown: the metrics of `figures`."""
    samples, alone = division.samples, config.benign_only
    attack, benign = rows.label == ATTACK, rows.label == BENIGN
    unlabelled = int((rows.label == UNLABELLED).sum())
    both = len(np.intersect1d(rows.prompt[attack], rows.prompt[benign]))
    drawn = (int(samples.attack.sum()), int((~samples.attack).sum())) != (division.n_attack, division.n_benign)
    steps = {run.steps for run in runs}
    statements = (
        (len(steps) > 1, f"the runs recorded different numbers of steps; only the first {min(steps)} are used"),
        (unlabelled and not alone, f"{unlabelled:,} rows have no label and were left out"),
        (alone and attack.any(), f"{int(attack.sum()):,} rows are labelled attack and were left out"),
        (both and not alone, f"{both:,} prompts are labelled attack in one row and benign in another"),
        (rows.grouped.note, rows.grouped.note or ""),
        (
            division.left_to_groups,
            f"{division.left_to_groups:,} prompts of part B are in a group with others there, of which one, drawn at "
            "random, sets the threshold",
        ),
        (samples.n_folds == 1, "too few groups to hold any out: there are no held-out figures"),
        (
            samples.n_folds > 1 and not division.cross_validated,
            "part B is too small in some folds to set a threshold there: no held-out rates at a threshold",
        ),
        (
            samples.n_folds not in (1, config.folds),
            f"{samples.n_folds} folds instead of {config.folds}: there are no more groups in a class",
        ),
        (
            drawn,
            "figures are of 20,000 distinct prompts of a class, drawn at random; the threshold is of all part B",
        ),
        (alone, "without attacks it is not known how many of them are flagged, nor whether another window flags more"),
    )
    return [text for condition, text in statements if condition] + _just_as_good(choice, shown, comparison)


def _just_as_good(choice: Choice, shown: Mapping[str, Metric], comparison: Sequence[Compared]) -> list[str]:
    """What is not shown to separate worse than what was chosen."""
    auroc, own = shown.get("auroc"), shown.get("auroc_own_window")
    statements = []
    if auroc is not None and own is not None and None not in (auroc.value, own.value) and choice.own_range is not None:
        statements.append(
            f"the runs' own window, with nothing chosen, has AUROC {own.value:.3f}, the search {auroc.value:.3f} held "
            f"out: --window {choice.own_range.window} would leave all benign prompts to part B"
        )
    differences = [one for one in comparison if one.difference is not None and one.difference.interval is not None]
    alike = [one.label for one in differences if stats.side(one.difference.interval, 0) != 1]  # type: ignore[union-attr]
    if alike:
        statements.append(
            f"not shown to separate better than {', '.join(alike)}: of {len(differences)} paired differences these are "
            "not above 0 (95% each)"
        )
    return statements


def verdict(calibration: Calibration) -> Verdict:
    """Whether a calibration can be used, and what says so."""
    figures, left_out = calibration.figures, calibration.left_out
    headline = left_out or figures
    auroc, tpr = headline.get("auroc"), headline.get("tpr")
    label = calibration.label
    if calibration.benign_only or auroc is None or auroc.value is None:
        line = f"not known whether it is usable: {label}, no attacks to hold out; the promise is of prompts like these"
        return Verdict(usable="unknown", lines=[line])
    if (left_out or figures)["auroc"].interval is None:
        line = f"not known whether it is usable: {label}, held-out AUROC {auroc.value:.3f} without an interval"
        return Verdict(usable="unknown", lines=[f"{line} (too few prompts, or --resamples 0)"])
    chance = {name: _side_of_chance(figure.get("auroc")) for name, figure in (("own", figures), ("others", left_out))}
    numbers = f"held-out AUROC {_shown(auroc, '.3f')}"
    if tpr is not None and tpr.value is not None:
        numbers += f", attacks found {_shown(tpr, '.1%')} at {calibration.setting.target_fpr:.3g} false positives"
    none_found = tpr is not None and tpr.value == 0
    lines = []
    if left_out and chance["others"] != 1 and chance["own"] == 1:
        usable: Literal["yes", "sources", "no"] = "sources"
        lines.append(f"usable on these sources only, it does not travel: {label}, with a source left out {numbers}")
        lines.append(f"on prompts of the same sources: held-out AUROC {_shown(figures['auroc'], '.3f')}")
    elif chance["others" if left_out else "own"] != 1:
        usable = "no"
        lines.append(f"not usable, not distinguishable from chance: {label}, {numbers}")
    elif none_found:
        usable = "no"
        lines.append(f"not usable, finds no held-out attack: {label}, {numbers}")
    else:
        usable = "yes"
        travels = f", each of {len(calibration.sources)} sources left out" if left_out else ""
        lines.append(f"usable: {label}, {numbers}{travels}")
    return Verdict(usable=usable, lines=[*lines, *_against_words(calibration)])


def _against_words(calibration: Calibration) -> list[str]:
    words = next((one for one in calibration.comparison if one.name == "words"), None)
    if words is None:
        return []
    if words.difference is None or words.difference.value is None:
        return [f"whether it beats words is not known: {words.absent or 'there are too few prompts'}"]
    side = stats.side(words.difference.interval, 0)
    texts = {1: "beats words", -1: "words alone are better", None: "not shown to beat words"}
    return [f"{texts[side]}: AUROC difference {_shown(words.difference, '+.3f')}"]


def _side_of_chance(metric: Metric | None) -> int | None:
    """1 if a metric's interval is above 0.5; without an interval nothing is known."""
    return None if metric is None else stats.side(metric.interval, 0.5)


def _shown(metric: Metric, digits: str) -> str:
    interval = "no interval" if metric.interval is None else " to ".join(format(end, digits) for end in metric.interval)
    return f"{metric.value:{digits}} ({interval})"


def _none(value: float) -> float | None:
    """None for NaN, as JSON has it."""
    return None if np.isnan(value) else value
