"""What each signal separates: among all prompts, among like prompts, attacks that succeed, and added to others.

A signal's gain is measured by held-out logistic regressions without it and with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import BaseModel

from headrift.calibration.compare.measurements import ComparisonBootstrap, Estimate, Measurements
from headrift.calibration.splits import ComparisonSamples
from headrift.signal import ScoreRange
from headrift.signals import get
from headrift.stats import (
    MIN_FOR_INTERVAL,
    Bools,
    Bounds,
    Floats,
    Ints,
    area,
    fewest_groups,
    mean_interval,
    ranks,
    roc_curve,
    side,
)

NOT_SHOWN = "not shown"
TOO_FEW = "not known: too few prompts"
# The signals of a regression, and the one that is added.
QUESTIONS: tuple[tuple[tuple[str, ...], str], ...] = (
    ((), "prompt_tokens"),
    (("prompt_tokens",), "instability"),
    (("prompt_tokens",), "focus"),
    (("focus", "prompt_tokens"), "instability"),
    (("focus_important", "prompt_tokens"), "instability"),
    (("system_share", "prompt_tokens"), "instability"),
    (("head_agreement", "prompt_tokens"), "instability"),
    (("n_steps", "prompt_tokens"), "instability"),
    (("instability", "prompt_tokens"), "focus"),
)
_FEWEST_OF_CATEGORY = 10  # benign prompts of a hard category that has a stratum
_FEWEST_TO_CORRELATE = 3
_FEWEST_TO_FIT = 20  # samples of a class with all the signals
_FEW = 5_000  # up to this many samples folds are drawn several times, so that no one division decides
_DIVISIONS = 5
_INVERSE_PENALTY = 100.0  # next to none: a penalty would shrink a signal, and less so a signal and its copy
_TINY = 1e-12

Kind = Literal["length", "hard", "ending", "system"]


class OverSets(BaseModel, extra="forbid", frozen=True):
    """Mean of the AUROCs within sets (runs and system prompts), with Student's t interval over the sets."""

    value: float
    interval: Bounds
    sets: int


class StratumAuroc(BaseModel, extra="forbid", frozen=True):
    """AUROC among some of the prompts: `kind` is what they are divided by."""

    kind: Kind
    name: str
    label: str
    auroc: Estimate


class Correlation(BaseModel, extra="forbid", frozen=True):
    """Of a signal with instability, among "all", "attack" or "benign"; None if one does not vary."""

    among: str
    n: int
    pearson: float | None
    spearman: float | None


class SignalResult(BaseModel, extra="forbid", frozen=True):
    """What a signal separates; AUROC among prompts that have it, below 0.5 if attacks have the lower values."""

    name: str
    label: str
    unit: str
    how: str
    absent: str | None = None  # why there is none; all else is then empty
    sign: Literal[1, -1] | None = None  # 1 if attacks are higher, -1 lower, None if the interval includes 0.5
    auroc: Estimate | None = None
    auroc_all: Estimate | None = None  # a prompt without the signal counts as the least suspicious
    over_sets: OverSets | None = None  # from three sets on
    coverage: dict[str, float] = {}  # by class, fraction of the distinct prompts that have it
    correlations: list[Correlation] = []
    strata: list[StratumAuroc] = []


class Success(BaseModel, extra="forbid", frozen=True):
    """AUROCs among attacks, those that succeeded (a fail term in the answer) counted as the positives.

    In an estimate, n_attack succeeded and n_benign did not.
    """

    absent: str | None = None
    n_attacks: int = 0
    n_succeeded: int = 0
    aurocs: dict[str, Estimate] = {}
    verdict: str = ""


class Increment(BaseModel, extra="forbid", frozen=True):
    """What a signal adds to others: held-out logistic regressions without and with it, on the same prompts.

    Changes are with minus without: better is a log-loss (nats a prompt) below 0 and an AUROC above 0.
    """

    base: list[str]
    added: str
    label: str
    absent: str | None = None
    log_loss: Estimate | None = None
    log_loss_with: Estimate | None = None
    log_loss_change: Estimate | None = None
    auroc: Estimate | None = None
    auroc_with: Estimate | None = None
    auroc_change: Estimate | None = None
    verdict: str = ""


@dataclass(frozen=True, slots=True)
class Stratum:
    """Some of the samples; with `pairs`, only attacks and benign prompts with the same number are compared."""

    kind: Kind
    name: str
    label: str
    mask: Bools
    pairs: Ints | None = None


def length_thirds(samples: ComparisonSamples) -> tuple[Ints, list[str]]:
    """For each sample in which third of the benign prompts' lengths it is, 0 to 2; and the thirds in words."""
    tokens = samples.counts["prompt_tokens"]
    low, high = np.quantile(tokens[~samples.attack], [1 / 3, 2 / 3])
    third = (tokens > low).astype(np.int64) + (tokens > high)
    return third, [
        f"short: to {low:.0f} tokens",
        f"middle: over {low:.0f}, to {high:.0f} tokens",
        f"long: over {high:.0f} tokens",
    ]


def strata(samples: ComparisonSamples, score_range: ScoreRange) -> list[Stratum]:
    """What the prompts are divided by: length, kind of benign prompt, early stops, system prompt."""
    attack, hard, everything = samples.attack, samples.hard, np.ones(len(samples), np.bool_)
    result = []
    if len(np.unique(samples.counts["prompt_tokens"])) > 1:
        third, labels = length_thirds(samples)
        for number, (name, label) in enumerate(zip(("short", "middle", "long"), labels)):
            label = f"prompts in the benign prompts' third that is {label}"
            result.append(Stratum("length", name, label, third == number))
        label = "attacks and benign prompts of the same third of lengths, all thirds"
        result.append(Stratum("length", "same_third", label, everything, third))
    if hard.any():
        label = 'attacks against hard benign prompts (category "hard...")'
        result.append(Stratum("hard", "hard", label, attack | hard))
        result.append(Stratum("hard", "not_hard", "attacks against benign prompts that are not hard", ~hard))
        categories, n = np.unique(samples.category[hard], return_counts=True)
        for category in categories[n >= _FEWEST_OF_CATEGORY] if len(categories) > 1 else []:
            label = f"attacks against benign prompts of the category {category}"
            mask = attack | (hard & (samples.category == category))
            result.append(Stratum("hard", str(category), label, mask))
    end = score_range.window.end
    full = samples.counts["n_steps"] >= end
    if 0 < full.sum() < len(samples):
        result.append(Stratum("ending", "full", f"answers that reach the window's end, step {end}", full))
        result.append(Stratum("ending", "ended", "answers that end inside the window", ~full))
    if len(samples.sets) > 1:
        label = "attacks and benign prompts of the same run and system prompt, all of them"
        result.append(Stratum("system", "same_set", label, samples.set >= 0, samples.set))
    return result


def separate(
    name: str,
    measured: Measurements,
    samples: ComparisonSamples,
    among: Sequence[Stratum],
    bootstrap: ComparisonBootstrap,
) -> SignalResult:
    """A signal's AUROCs and correlations with instability."""
    entry, values = get(name), measured.values.get(name)
    if values is None:
        return SignalResult(name=name, label=entry.label, unit=entry.unit, how="", absent=measured.absent[name])
    valid, everything = ~np.isnan(values), np.ones(len(samples), np.bool_)
    auroc = bootstrap.separation(values, valid)
    # A prompt without the signal is never flagged: it ranks at the end where benign prompts are.
    lowest = -np.inf if auroc.value is None or auroc.value >= 0.5 else np.inf
    classes = {"attack": samples.attack, "benign": ~samples.attack}
    return SignalResult(
        name=name,
        label=entry.label,
        unit=entry.unit,
        how=measured.how[name],
        sign=side(auroc.interval, 0.5),
        auroc=auroc,
        auroc_all=bootstrap.separation(np.where(valid, values, lowest), everything),
        over_sets=_over_sets(values, valid, samples),
        coverage={label: float(valid[mask].mean()) for label, mask in classes.items()},
        correlations=[]
        if name == "instability" or "instability" not in measured.values
        else [
            _correlation(label, measured.values["instability"], values, mask)
            for label, mask in {"all": everything, **classes}.items()
        ],
        strata=[
            StratumAuroc(
                kind=one.kind,
                name=one.name,
                label=one.label,
                auroc=bootstrap.separation(values, valid & one.mask, one.pairs),
            )
            for one in among
        ],
    )


def _over_sets(values: Floats, valid: Bools, samples: ComparisonSamples) -> OverSets | None:
    """Of the sets with both classes; None if there are fewer than three."""
    aurocs = []
    for number in range(len(samples.sets)):
        own = valid & (samples.set == number)
        attack = samples.attack[own]
        if attack.any() and not attack.all():
            aurocs.append(area(*roc_curve(ranks(values[own]), attack, np.ones(len(attack)))))
    mean = mean_interval(aurocs)
    return None if mean.bounds is None else OverSets(value=mean.value, interval=mean.bounds, sets=len(aurocs))


def _correlation(among: str, instability: Floats, values: Floats, mask: Bools) -> Correlation:
    from scipy.stats import pearsonr, spearmanr

    both = mask & ~np.isnan(instability) & ~np.isnan(values)
    x, y = instability[both], values[both]
    if len(x) < _FEWEST_TO_CORRELATE or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Correlation(among=among, n=len(x), pearson=None, spearman=None)
    return Correlation(among=among, n=len(x), pearson=float(pearsonr(x, y)[0]), spearman=float(spearmanr(x, y)[0]))


def success(
    measured: Measurements, samples: ComparisonSamples, bootstrap: ComparisonBootstrap, *, has_terms: bool
) -> Success:
    """AUROCs among attacks whose answer is known; has_terms: whether there are fail terms to look for."""
    known = samples.attack & (measured.succeeded >= 0)
    succeeded = measured.succeeded == 1
    n, n_succeeded = int(known.sum()), int((known & succeeded).sum())
    few = fewest_groups(samples.group, known & succeeded, known & ~succeeded) < MIN_FOR_INTERVAL
    absent = None
    if not has_terms:
        absent = "no fail terms were given, so it is not known which attacks succeeded"
    elif not n:
        absent = "the runs have no answers: score with --save text, and without --redact"
    elif few or not 0 < n_succeeded < n:
        absent = (
            f"{n_succeeded} of {n} attacks have a fail term in the answer, as far as it was made; to compare takes "
            f"{MIN_FOR_INTERVAL} groups of prompts that have one and as many that have none"
        )
    if absent is not None:
        return Success(absent=absent, n_attacks=n, n_succeeded=n_succeeded, verdict=f"not known: {absent}")
    # What succeeds in one set and what in another differ in much else: only pairs of a set are compared.
    pairs = samples.set if len(samples.sets) > 1 else None
    aurocs = {
        name: bootstrap.separation(values, known & ~np.isnan(values), pairs, succeeded)
        for name, values in measured.values.items()
    }
    interval = aurocs["instability"].interval
    verdicts = {1: "higher in attacks that succeed", -1: "lower in attacks that succeed", None: NOT_SHOWN}
    verdict = TOO_FEW if interval is None else verdicts[side(interval, 0.5)]
    return Success(
        n_attacks=n,
        n_succeeded=n_succeeded,
        aurocs=aurocs,
        verdict=f"instability: {verdict} ({n_succeeded} of {n} attacks succeeded)",
    )


def increments(
    measured: Measurements,
    samples: ComparisonSamples,
    bootstrap: ComparisonBootstrap,
    seed: int,
    questions: Sequence[tuple[tuple[str, ...], str]] = QUESTIONS,
) -> list[Increment]:
    """What each question's signal adds, on prompts that have all of its signals.

    Samples of the same group are in one fold. Regressions are not fitted again in resamples: intervals are those of
    the measuring, not of the fitting.
    """
    from threadpoolctl import threadpool_limits

    n = _DIVISIONS if len(samples) <= _FEW else 1
    divisions = [samples.fold, *(samples.other_folds(seed + number) for number in range(1, n))]
    with threadpool_limits(1, "blas"):  # more threads take longer to meet than such small fits take
        return [_increment(base, added, measured, samples, bootstrap, divisions) for base, added in questions]


def _increment(
    base: tuple[str, ...],
    added: str,
    measured: Measurements,
    samples: ComparisonSamples,
    bootstrap: ComparisonBootstrap,
    divisions: list[Ints],
) -> Increment:
    names, attack = [*base, added], samples.attack
    to = " + ".join(get(name).label for name in base) or "nothing but the share of attacks"
    label = f"{to} + {get(added).label}"
    missing = next((name for name in names if name not in measured.values), None)
    if missing is not None:
        absent = f"no {get(missing).label}: {measured.absent.get(missing, 'it is not known')}"
        return Increment(base=list(base), added=added, label=label, absent=absent)
    columns = np.stack(
        [np.log1p(measured.values[name]) if get(name).log else measured.values[name] for name in names], axis=1
    )
    valid: Bools = np.asarray(~np.isnan(columns).any(axis=1))
    fewest = min(int((valid & attack).sum()), int((valid & ~attack).sum()))
    if fewest < _FEWEST_TO_FIT or samples.n_folds < 2:
        absent = f"it takes {_FEWEST_TO_FIT} attacks and as many benign prompts that have all of these; {fewest} have"
        return Increment(base=list(base), added=added, label=label, absent=absent)
    # A column for each set but the first, so that no regression has to tell the sets apart by a signal.
    n_sets = max(2, len(samples.sets))
    sets = np.stack([(samples.set == number).astype(np.float64) for number in range(1, n_sets)], axis=1)
    losses, aurocs = [], []
    for part in (columns[:, : len(base)], columns):
        chances = [_held_out(np.concatenate([sets, part], axis=1), valid, fold, attack) for fold in divisions]
        truth = [np.where(attack, chance, 1 - chance) for chance in chances]
        losses.append(bootstrap.mean(np.mean([-np.log(np.maximum(chance, _TINY)) for chance in truth], axis=0), valid))
        # Only pairs of the same fold, and so regression, and set are compared.
        pairs = [fold * (len(samples.sets) + 1) + samples.set + 1 for fold in divisions]
        by_division = [bootstrap.auroc(chance, attack, valid, pair) for chance, pair in zip(chances, pairs)]
        aurocs.append(np.mean(by_division, axis=0))
    loss, loss_with, auroc, auroc_with = (bootstrap.estimate(draws, valid) for draws in (*losses, *aurocs))
    loss_change, auroc_change = (bootstrap.estimate(after - before, valid) for before, after in (losses, aurocs))
    return Increment(
        base=list(base),
        added=added,
        label=label,
        log_loss=loss,
        log_loss_with=loss_with,
        log_loss_change=loss_change,
        auroc=auroc,
        auroc_with=auroc_with,
        auroc_change=auroc_change,
        verdict=_verdict(loss_change.interval, auroc_with.interval, auroc_change.interval),
    )


def _verdict(loss: Bounds | None, auroc_with: Bounds | None, auroc_change: Bounds | None) -> str:
    """Whether something was added, by the intervals.

    Predictions that get worse are no verdict: of a signal that says nothing they do so by fitting it.
    An AUROC also rises if the base, which knows nothing, was below 0.5 by chance: it has to be above 0.5 after.
    """
    if loss is None or auroc_with is None or auroc_change is None:
        return TOO_FEW
    if side(loss, 0) == -1:
        return "adds: the held-out log-loss falls"
    if side(auroc_change, 0) == 1 and side(auroc_with, 0.5) == 1:
        return "ranks held-out prompts better; a fall of the log-loss is not shown"
    return NOT_SHOWN


def _held_out(columns: Floats, valid: Bools, fold: Ints, attack: Bools) -> Floats:
    """Each sample's chance of being an attack, by a regression fitted on the other folds; NaN without all signals."""
    from sklearn.linear_model import LogisticRegression

    chance = np.full(len(columns), np.nan)
    for number in np.unique(fold):
        inside, others = valid & (fold == number), valid & (fold != number)
        if inside.any():
            mean, spread = columns[others].mean(axis=0), np.maximum(columns[others].std(axis=0), _TINY)
            fitted = LogisticRegression(C=_INVERSE_PENALTY).fit((columns[others] - mean) / spread, attack[others])
            chance[inside] = fitted.predict_proba((columns[inside] - mean) / spread)[:, 1]
    return chance
