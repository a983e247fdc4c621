"""Step by step: from when on does each signal separate, and does instability do so before distraction does?

A signal separates at a step if |AUROC - 0.5| is more than c standard errors, c being what the largest such deviation
over all steps exceeds in 5% of random permutations of the groups' labels (max-t). So a signal that says nothing seems
to separate, at any of the steps and on either side, in 5% of data sets, however many steps there are.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from headrift.calibration.compare.aurocs import NOT_SHOWN
from headrift.calibration.compare.measurements import ComparisonBootstrap, Measurements
from headrift.calibration.splits import ComparisonSamples
from headrift.signals import get, signals
from headrift.stats import (
    MIN_FOR_INTERVAL,
    Bounds,
    Floats,
    Ints,
    auroc_bounds,
    effective_groups,
    fewest_groups,
    percentile_bounds,
    side,
)

_LEVEL = 95
_PERMUTATIONS = 1000
_NO_STEP = -1
_DISTRACTION = ("focus", "focus_important", "system_share")


class Steps(BaseModel, extra="forbid", frozen=True):
    """A signal's AUROC at each step, among the answers that reach it."""

    name: str
    label: str
    how: str
    absent: str | None = None
    steps: list[int] = []
    auroc: list[float | None] = []
    low: list[float | None] = []  # 95% interval of each step alone; empty without resamples
    high: list[float | None] = []
    joint_low: list[float | None] = []  # 95% interval of all steps at once
    joint_high: list[float | None] = []
    n_attack: list[int] = []
    n_benign: list[int] = []
    first: int | None = None  # whose joint interval leaves out 0.5
    first_interval: Bounds | None = None  # over resamples
    found_in: float | None = None  # fraction of the resamples that have such a step
    largest: int | None = None  # the step that separates best


class Before(BaseModel, extra="forbid", frozen=True):
    """Whether instability separates before another signal does."""

    other: str
    label: str
    difference: int | None = None  # its first step minus the other's, below 0 if it is earlier
    interval: Bounds | None = None  # of resamples in which both separate, as what follows
    earlier: float | None = None  # fraction
    same: float | None = None
    later: float | None = None
    resamples: int = 0
    verdict: str


def onset(
    measured: Measurements, samples: ComparisonSamples, bootstrap: ComparisonBootstrap, seed: int
) -> tuple[list[Steps], list[Before]]:
    """Each signal's steps, and whether instability separates before each measure of distraction."""
    random = np.random.default_rng(seed)
    # Labels of whole groups: prompts of a group are alike, and would make single ones' labels differ too little.
    units, unit = np.unique(samples.group * 2 + samples.attack, return_inverse=True)
    permuted = np.stack([random.permutation(units % 2)[unit] for _ in range(_PERMUTATIONS)]).astype(np.float32)
    results, firsts = [], {}
    for entry in signals(compared=True, by_step=True):
        steps, first = _steps(entry.name, measured, samples, bootstrap, permuted)
        results.append(steps)
        if first is not None:
            firsts[entry.name] = first
    by_name = {steps.name: steps for steps in results}
    n = fewest_groups(samples.group, samples.attack, ~samples.attack)
    return results, [_before(other, firsts, by_name, n) for other in _DISTRACTION]


def _steps(
    name: str,
    measured: Measurements,
    samples: ComparisonSamples,
    bootstrap: ComparisonBootstrap,
    permuted: NDArray[np.float32],
) -> tuple[Steps, Ints | None]:
    """A signal's steps, and its first step in each draw, -1 if it has none; None if it is not known.

    permuted: labels [permutations, samples], 1 for attack.
    """
    entry, attack = get(name), samples.attack
    if name in measured.steps_absent:
        return Steps(name=name, label=entry.label, how="", absent=measured.steps_absent[name]), None
    series = measured.steps[name]
    valid = ~np.isnan(series)
    n_attack, n_benign = valid[attack].sum(axis=0), valid[~attack].sum(axis=0)
    # If too few answers go on, nothing is said.
    groups = np.array(
        [
            [effective_groups(samples.group[valid[:, step] & mask]) for mask in (attack, ~attack)]
            for step in range(valid.shape[1])
        ]
    )
    at = np.flatnonzero(groups.min(axis=1) >= MIN_FOR_INTERVAL)
    if not len(at):
        few = f"it takes {MIN_FOR_INTERVAL} groups of attacks and as many of benign prompts at a step"
        return Steps(name=name, label=entry.label, how="", absent=few), None
    draws = np.stack([bootstrap.auroc(series[:, step], attack, valid[:, step]) for step in at], axis=1)
    by_chance = np.stack(
        [_permuted_aurocs(series[valid[:, step], step], permuted[:, valid[:, step]]) for step in at], axis=1
    )
    value, resampled = draws[0], draws[1:]
    error = np.maximum(by_chance.std(axis=0), 1e-9)
    width = np.percentile((np.abs(by_chance - 0.5) / error).max(axis=1), _LEVEL) * error
    deviation = np.concatenate([value[None], resampled + _shrink(value, error) - value]) - 0.5
    separates = np.abs(deviation) > width
    first = np.where(separates.any(axis=1), at[separates.argmax(axis=1)], _NO_STEP)
    known = first[1:][first[1:] != _NO_STEP]
    bounds = [auroc_bounds(one[0], one[1:], *groups[step]) for one, step in zip(draws.T, at)]
    low, high = zip(*(one for one in bounds if one is not None)) if len(resampled) else ((), ())
    steps = Steps(
        name=name,
        label=entry.label,
        how=f"{entry.how}; at the step, among the answers that reach it",
        steps=at.tolist(),
        auroc=value.tolist(),
        low=list(low),
        high=list(high),
        joint_low=np.maximum(value - width, 0).tolist(),
        joint_high=np.minimum(value + width, 1).tolist(),
        n_attack=n_attack[at].tolist(),
        n_benign=n_benign[at].tolist(),
        first=int(first[0]) if first[0] != _NO_STEP else None,
        first_interval=percentile_bounds(known, float(groups[at].min())) if first[0] != _NO_STEP else None,
        found_in=len(known) / len(resampled) if len(resampled) else None,
        largest=int(at[np.abs(value - 0.5).argmax()]),
    )
    return steps, first


def _permuted_aurocs(values: Floats, permuted: NDArray[np.float32]) -> Floats:
    """The AUROC under each permutation of the labels [permutations, values]; 0.5 if a class is missing."""
    from scipy.stats import rankdata

    n = permuted.sum(axis=1, dtype=np.float64)
    pairs = n * (len(values) - n)
    # Ranks from their middle, so that float32 sums are exact enough.
    ranks = rankdata(values) - (len(values) + 1) / 2
    above = permuted @ ranks.astype(np.float32)
    return 0.5 + np.divide(above, pairs, out=np.zeros(len(n)), where=pairs > 0)


def _shrink(value: Floats, error: Floats) -> Floats:
    """AUROCs drawn towards 0.5 by their noise (James and Stein's rule, positive part).

    Resamples add their own noise: around the AUROCs as they are, noise would count twice, and steps at which nothing
    is would seem to separate.
    """
    deviation = value - 0.5
    ratio = np.divide(error**2, deviation**2, out=np.ones(len(value)), where=deviation != 0)
    return 0.5 + deviation * np.maximum(1 - ratio, 0)


def _before(other: str, firsts: dict[str, Ints], steps: dict[str, Steps], n: float) -> Before:
    """Instability's first step against another signal's, in the same draws of n groups."""
    label = get(other).label
    for name in ("instability", other):
        if name not in firsts:
            return Before(other=other, label=label, verdict=f"not known: {steps[name].absent}")
    own, others = firsts["instability"], firsts[other]
    if own[0] == _NO_STEP or others[0] == _NO_STEP:
        words = [
            f"{name} separates " + ("at no step" if step == _NO_STEP else f"first at step {step}")
            for name, step in (("instability", own[0]), (label, others[0]))
        ]
        return Before(other=other, label=label, verdict=" and ".join(words))
    both = (own[1:] != _NO_STEP) & (others[1:] != _NO_STEP)
    difference = (own - others)[1:][both]
    interval = percentile_bounds(difference, n)
    verdicts = {-1: "earlier", 1: "later", None: NOT_SHOWN}
    return Before(
        other=other,
        label=label,
        difference=int(own[0] - others[0]),
        interval=interval,
        earlier=float((difference < 0).mean()) if len(difference) else None,
        same=float((difference == 0).mean()) if len(difference) else None,
        later=float((difference > 0).mean()) if len(difference) else None,
        resamples=int(both.sum()),
        verdict="not known: in no resample do both separate" if interval is None else verdicts[side(interval, 0)],
    )
