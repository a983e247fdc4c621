"""Step by step: from when on does each signal separate, and does instability do so before distraction does?

A signal separates at a step where |AUROC - 0.5| is more than c standard errors, c being what the largest such deviation
over all steps exceeds in 5% of random permutations of the labels (max-t). So a signal that says nothing seems to
separate, at any of the steps and on either side, in 5% of data sets, however many steps there are.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from headrift.calibration.comparison import Before, Steps
from headrift.calibration.resampling import Draws
from headrift.calibration.samples import Samples
from headrift.calibration.signals import SIGNALS, STEPPED, Signals
from headrift.stats import MIN_FOR_INTERVAL, percentile_bands, percentile_bounds

Floats: TypeAlias = NDArray[np.float64]

_LEVEL = 95
_PERMUTATIONS = 1000
_NO_STEP = -1
_DISTRACTION = ("focus", "focus_important", "system_share")
_HOW = {
    "instability": "mean over the scored layers",
    "instability_without_bos": "the same with BOS left out",
    "system_share": "mean over the scored layers and all heads",
    "focus": "mean over all layers and heads of system / (system + user)",
    "focus_important": "the same over the important heads, chosen at step 0 without the fold",
    "entropy": "of the token that the step chooses",
}


def onset(signals: Signals, samples: Samples, draws: Draws, seed: int) -> tuple[list[Steps], list[Before]]:
    """Each signal's steps, and whether instability separates before each measure of distraction."""
    random = np.random.default_rng(seed)
    permuted = np.stack([random.permutation(samples.attack) for _ in range(_PERMUTATIONS)]).astype(np.float32)
    shown, firsts = [], {}
    for name in STEPPED:
        steps, first = _steps(name, signals, samples, draws, permuted)
        shown.append(steps)
        if first is not None:
            firsts[name] = first
    return shown, [_before(other, firsts, {of.name: of for of in shown}) for other in _DISTRACTION]


def _steps(
    name: str, signals: Signals, samples: Samples, draws: Draws, permuted: NDArray[np.float32]
) -> tuple[Steps, NDArray[np.int64] | None]:
    """A signal's steps, and its first step in each draw, -1 where it has none; None where it cannot be told. permuted:
    labels [permutations, samples], 1 for attack."""
    label = SIGNALS[name][0]
    if name in signals.steps_absent:
        return Steps(name=name, label=label, how="", absent=signals.steps_absent[name]), None
    series = signals.steps[name]
    there = ~np.isnan(series)
    counts = [(there & (samples.attack == of)[:, None]).sum(axis=0) for of in (True, False)]
    # Where too few answers go on, nothing is said.
    at = np.flatnonzero(np.minimum(*counts) >= MIN_FOR_INTERVAL)
    if not len(at):
        few = f"it takes {MIN_FOR_INTERVAL} attacks and as many benign prompts at a step"
        return Steps(name=name, label=label, how="", absent=few), None
    drawn = np.stack([draws.aurocs(series[:, step], there[:, step]) for step in at], axis=1)
    by_chance = np.stack(
        [_permuted_aurocs(series[there[:, step], step], permuted[:, there[:, step]]) for step in at], 1
    )
    value, again = drawn[0], drawn[1:]
    error = np.maximum(by_chance.std(axis=0), 1e-9)
    width = np.percentile((np.abs(by_chance - 0.5) / error).max(axis=1), _LEVEL) * error
    deviation = np.concatenate([value[None], again + _shrunk(value, error) - value]) - 0.5
    separates = np.abs(deviation) > width
    first = np.where(separates.any(axis=1), at[separates.argmax(axis=1)], _NO_STEP)
    found = first[1:][first[1:] != _NO_STEP]
    low, high = percentile_bands(again) if len(again) else (np.array([]), np.array([]))
    steps = Steps(
        name=name,
        label=label,
        how=f"{_HOW[name]}; among the answers that reach the step",
        steps=at.tolist(),
        auroc=value.tolist(),
        low=low.tolist(),
        high=high.tolist(),
        joint_low=np.maximum(value - width, 0).tolist(),
        joint_high=np.minimum(value + width, 1).tolist(),
        n_attack=counts[0][at].tolist(),
        n_benign=counts[1][at].tolist(),
        first=int(first[0]) if first[0] != _NO_STEP else None,
        first_interval=percentile_bounds(found) if first[0] != _NO_STEP and len(found) else None,
        found_in=len(found) / len(again) if len(again) else None,
        largest=int(at[np.abs(value - 0.5).argmax()]),
    )
    return steps, first


def _permuted_aurocs(values: Floats, permuted: NDArray[np.float32]) -> Floats:
    """The AUROC under each permutation of the labels [permutations, values]; 0.5 where a class is missing."""
    from scipy.stats import rankdata

    n = permuted.sum(axis=1, dtype=np.float64)
    pairs = n * (len(values) - n)
    # Ranks from their middle, so that float32 sums are exact enough.
    ranks = rankdata(values) - (len(values) + 1) / 2
    over = permuted @ ranks.astype(np.float32)
    return 0.5 + np.divide(over, pairs, out=np.zeros(len(n)), where=pairs > 0)


def _shrunk(value: Floats, error: Floats) -> Floats:
    """AUROCs drawn towards 0.5 by their noise (James and Stein's rule, positive part). Resamples add their own noise:
    around the AUROCs as they are, noise would count twice, and steps at which nothing is would seem to separate."""
    deviation = value - 0.5
    ratio = np.divide(error**2, deviation**2, out=np.ones(len(value)), where=deviation != 0)
    return 0.5 + deviation * np.maximum(1 - ratio, 0)


def _before(other: str, firsts: dict[str, NDArray[np.int64]], shown: dict[str, Steps]) -> Before:
    """Instability's first step against another's, in the same draws."""
    label = SIGNALS[other][0]
    for name in ("instability", other):
        if name not in firsts:
            return Before(other=other, label=label, verdict=f"not known: {shown[name].absent}")
    mine, its = firsts["instability"], firsts[other]
    if mine[0] == _NO_STEP or its[0] == _NO_STEP:
        of = [("instability", int(mine[0])), (label, int(its[0]))]
        said = [f"{name} separates " + ("at no step" if at == _NO_STEP else f"first at step {at}") for name, at in of]
        return Before(other=other, label=label, verdict=" and ".join(said))
    both = (mine[1:] != _NO_STEP) & (its[1:] != _NO_STEP)
    difference = (mine - its)[1:][both]
    interval = percentile_bounds(difference) if len(difference) else None
    if interval is None:
        verdict = "not known: in no resample do both separate"
    elif interval[1] < 0:
        verdict = f"instability separates before {label} does"
    elif interval[0] > 0:
        verdict = f"instability separates after {label} does"
    else:
        verdict = f"not shown that instability separates before {label}: the interval of the difference holds 0"
    return Before(
        other=other,
        label=label,
        difference=int(mine[0] - its[0]),
        interval=interval,
        earlier=float((difference < 0).mean()) if len(difference) else None,
        same=float((difference == 0).mean()) if len(difference) else None,
        later=float((difference > 0).mean()) if len(difference) else None,
        resamples=int(both.sum()),
        verdict=verdict,
    )
