"""Scores against benign prompts of the same length, so that one threshold may serve several sets, and whether it helps.

Of each set (a run and system prompt) two quantiles of the benign scores, the median and the 90%, are fitted as lines
over the logarithm of the prompt's length. A normalised score is how far a score is above the median, in units of the
distance from median to 90%: 0 is usual for a prompt of that length and set, 1 is above nine benign prompts in ten.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from headrift.calibration import samples as sampling
from headrift.calibration.comparison import Normalisation, OfLength, OfSet
from headrift.calibration.resampling import Draws
from headrift.calibration.runs import Run, read_rows
from headrift.calibration.samples import Samples
from headrift.calibration.strata import length_thirds

Floats: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]

TARGET_FPR = 0.05
FEWEST = 40  # benign prompts of a set outside each fold: four above the 90% quantile
_MOST = 2_000  # benign prompts that a fit takes
_LOWEST_SPREAD = 0.25  # of the usual one: lines that nearly cross must not blow scores up
_HOW = (
    "(score - median) / (90% quantile - median) of benign scores at the prompt's length, of the same run and system "
    "prompt, by quantile regression (lines over log length) on the other folds"
)


def normalised(scores: Floats, samples: Samples) -> Floats:
    """The samples' scores against benign prompts of the same set and length, of other folds; NaN without a score, and
    where a set has fewer than 40 benign prompts to go by."""
    found = np.full(len(samples), np.nan)
    length = np.log(np.maximum(samples.counts["prompt_tokens"], 1).astype(np.float64))
    known = ~np.isnan(scores) & (samples.counts["prompt_tokens"] > 0)
    for number in range(len(samples.sets)):
        for fold in range(samples.n_folds):
            of_set = known & (samples.set == number)
            mine = of_set & (samples.fold == fold)
            others = np.flatnonzero(of_set & (samples.fold != fold) & ~samples.attack)
            if mine.any() and len(others) >= FEWEST and samples.n_folds > 1:
                found[mine] = _against(length[others], scores[others], length[mine], scores[mine], fold)
    return found


def _against(known_length: Floats, known: Floats, length: Floats, scores: Floats, seed: int) -> Floats:
    """Scores against the known benign ones. Beyond the known lengths the nearest counts."""
    from sklearn.linear_model import QuantileRegressor

    if len(known) > _MOST:
        drawn = np.random.default_rng(seed).choice(len(known), _MOST, replace=False)
        known_length, known = known_length[drawn], known[drawn]
    low, high = known_length.min(), known_length.max()
    at, to = known_length[:, None] - low, np.clip(length, low, high)[:, None] - low
    median, upper = (QuantileRegressor(quantile=of, alpha=0, solver="highs").fit(at, known) for of in (0.5, 0.9))
    usual = max(float(np.median(upper.predict(at) - median.predict(at))), 1e-12)
    spread = np.maximum(upper.predict(to) - median.predict(to), _LOWEST_SPREAD * usual)
    return np.asarray((scores - median.predict(to)) / spread)


def normalisation(scores: Floats, samples: Samples, draws: Draws) -> Normalisation:
    """What normalising does, to all scored prompts of the sets that have enough benign ones."""
    values = normalised(scores, samples)
    there = ~np.isnan(values)
    benign = there & ~samples.attack
    if not benign.any() or not (there & samples.attack).any():
        few = f"it takes {FEWEST} benign prompts with a score and a known length outside each fold"
        return Normalisation(absent=few, verdict=f"not known: {few}")
    both = (scores, values)
    third, words = length_thirds(samples)
    by_length = _rates(both, [(benign & (third == at), benign) for at in range(3)], draws)
    in_sets = [number for number in range(len(samples.sets)) if (benign & (samples.set == number)).any()]
    of_sets = [benign & (samples.set == number) for number in in_sets]
    by_set = _rates(both, [(mine, benign & ~mine) for mine in of_sets], draws) if len(of_sets) > 1 else []
    aurocs = [draws.aurocs(of, there) for of in both]
    spreads = [
        np.nanmean([np.abs(rates[which] - TARGET_FPR) for rates in by_set or by_length if rates is not None], axis=0)
        for which in (0, 1)
    ]
    change, spread_change = (after - before for before, after in (aurocs, spreads))
    result = Normalisation(
        how=_HOW,
        auroc_raw=draws.estimate(aurocs[0], there),
        auroc_normalised=draws.estimate(aurocs[1], there),
        auroc_change=draws.estimate(change, there),
        target_fpr=TARGET_FPR,
        lengths=[
            OfLength(label=words[at], n_benign=int((benign & (third == at)).sum()), raw=raw[0], normalised=after[0])
            for at, rates in enumerate(by_length)
            if rates is not None
            for raw, after in [rates]
        ],
        sets=[
            OfSet(
                name=samples.sets[number],
                n_benign=int(mine.sum()),
                n_attack=int((there & samples.attack & (samples.set == number)).sum()),
                raw=raw[0],
                normalised=after[0],
            )
            for number, mine, rates in zip(in_sets, of_sets, by_set)
            if rates is not None
            for raw, after in [rates]
        ],
        spread_raw=draws.estimate(spreads[0], benign),
        spread_normalised=draws.estimate(spreads[1], benign),
        spread_change=draws.estimate(spread_change, benign),
    )
    return result.model_copy(update={"verdict": _verdict(result, "sets" if by_set else "lengths")})


def across(runs: Sequence[Run], *, resamples: int, seed: int) -> Normalisation:
    """The same for runs of any models, each with the scores of its own window: may one threshold serve them all? The
    same prompt in two runs is two samples of one group. CalibrationError where a class is missing."""
    rows = read_rows(runs)
    samples = sampling.take(runs, rows, seed, by_run=True)
    scores = np.concatenate(
        [
            batch.column("score").cast("float64").to_numpy(zero_copy_only=False)
            for run in runs
            for batch in run.batches(["score"])
        ]
    )
    return normalisation(scores[samples.row], samples, Draws(samples.attack, samples.group, resamples, seed))


def _rates(
    both: tuple[Floats, Floats], asked: list[tuple[Bools, Bools]], draws: Draws
) -> list[tuple[Floats, Floats] | None]:
    """For each (measured, reference): the rate of the measured, raw and normalised, above the threshold that 5% of the
    reference are above, in each draw; None where nothing is measured."""
    found: list[tuple[Floats, Floats] | None] = []
    for measured, reference in asked:
        if not measured.any() or not reference.any():
            found.append(None)
            continue
        raw, after = (draws.rate_above(of, measured, draws.threshold(of, reference, TARGET_FPR)) for of in both)
        found.append((raw, after))
    return found


def _verdict(of: Normalisation, over: str) -> str:
    change, auroc = of.spread_change, of.auroc_change
    if change is None or auroc is None or change.interval is None or auroc.interval is None:
        return "too few prompts to say whether normalising helps"
    if change.interval[1] < 0:
        said = f"false positive rates at one threshold are nearer to the target across {over}"
    elif change.interval[0] > 0:
        said = f"false positive rates at one threshold are farther from the target across {over}"
    else:
        said = f"not shown that false positive rates at one threshold are any evener across {over}"
    if auroc.interval[0] > 0:
        return f"{said}; the AUROC rises"
    if auroc.interval[1] < 0:
        return f"{said}; the AUROC falls: length told attacks apart"
    return f"{said}; the AUROC does not change measurably"
