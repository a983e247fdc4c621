"""Scores against benign prompts of the same length, so that one threshold may serve several sets, and whether it helps.

Of each set (a run and system prompt) two quantiles of the benign scores, the median and the 90%, are fitted as lines
over the logarithm of the prompt's length. A normalised score is how far a score is above the median, in units of the
distance from median to 90%: 0 is usual for a prompt of that length and set, 1 is above nine benign prompts in ten.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel

from headrift.calibration.compare.aurocs import NOT_SHOWN, TOO_FEW, length_thirds
from headrift.calibration.compare.measurements import ComparisonBootstrap, Estimate
from headrift.calibration.splits import ComparisonSamples, take_samples
from headrift.runs.reading import ScoreRun, read_rows
from headrift.stats import TARGET_FPR, Bools, Floats, side

FEWEST = 40  # benign prompts of a set outside each fold: four above the 90% quantile
_MOST = 2_000  # benign prompts that a fit takes
_LOWEST_SPREAD = 0.25  # of the usual one: lines that nearly cross must not blow scores up
_HOW = (
    "(score - median) / (90% quantile - median) of benign scores at the prompt's length, of the same run and system "
    "prompt, by quantile regression (lines over log length) on the other folds"
)


class SetRates(BaseModel, extra="forbid", frozen=True):
    """False positive rates of one set (a run and system prompt) at a threshold that the other sets set."""

    name: str
    n_benign: int
    n_attack: int
    raw: float
    normalised: float


class LengthRates(BaseModel, extra="forbid", frozen=True):
    """False positive rates of benign prompts of a length, at the one threshold of all held-out prompts."""

    label: str
    n_benign: int
    raw: float
    normalised: float


class Normalisation(BaseModel, extra="forbid", frozen=True):
    """What normalising changes, on held-out prompts; `spread` is how far false positive rates are from the target."""

    absent: str | None = None
    how: str = ""
    auroc_raw: Estimate | None = None
    auroc_normalised: Estimate | None = None
    auroc_change: Estimate | None = None
    target_fpr: float = TARGET_FPR
    lengths: list[LengthRates] = []
    sets: list[SetRates] = []
    spread_raw: Estimate | None = None
    spread_normalised: Estimate | None = None
    spread_change: Estimate | None = None
    verdict: str = ""


def normalised(scores: Floats, samples: ComparisonSamples) -> Floats:
    """The samples' scores [samples] against benign prompts of the same set and length, of other folds.

    NaN without a score, and if a set has fewer than 40 benign prompts to go by.
    """
    result = np.full(len(samples), np.nan)
    tokens = samples.counts["prompt_tokens"]
    length = np.log(np.maximum(tokens, 1).astype(np.float64))
    known = ~np.isnan(scores) & (tokens > 0)
    for number in range(len(samples.sets)):
        in_set = known & (samples.set == number)
        for fold in range(samples.n_folds):
            inside = in_set & (samples.fold == fold)
            others = np.flatnonzero(in_set & (samples.fold != fold) & ~samples.attack)
            if inside.any() and len(others) >= FEWEST and samples.n_folds > 1:
                if len(others) > _MOST:
                    others = others[np.random.default_rng(fold).choice(len(others), _MOST, replace=False)]
                result[inside] = _against(length[others], scores[others], length[inside], scores[inside])
    return result


def _against(known_length: Floats, known: Floats, length: Floats, scores: Floats) -> Floats:
    """Scores against the known benign ones; beyond the known lengths the nearest counts."""
    from sklearn.linear_model import QuantileRegressor

    low, high = known_length.min(), known_length.max()
    x, targets = known_length[:, None] - low, np.clip(length, low, high)[:, None] - low
    median, upper = (QuantileRegressor(quantile=q, alpha=0, solver="highs").fit(x, known) for q in (0.5, 0.9))
    usual = max(float(np.median(upper.predict(x) - median.predict(x))), 1e-12)
    spread = np.maximum(upper.predict(targets) - median.predict(targets), _LOWEST_SPREAD * usual)
    return np.asarray((scores - median.predict(targets)) / spread)


def normalisation(scores: Floats, samples: ComparisonSamples, bootstrap: ComparisonBootstrap) -> Normalisation:
    """What normalising does to all scored prompts of the sets that have enough benign ones."""
    values = normalised(scores, samples)
    valid = ~np.isnan(values)
    benign = valid & ~samples.attack
    if not benign.any() or not (valid & samples.attack).any():
        few = f"it takes {FEWEST} benign prompts with a score and a known length outside each fold"
        return Normalisation(absent=few, verdict=f"not known: {few}")
    third, labels = length_thirds(samples)
    numbers = [number for number in range(len(samples.sets)) if (benign & (samples.set == number)).any()]
    in_thirds = [(labels[number], benign & (third == number)) for number in range(3)]
    in_sets = [(number, benign & (samples.set == number)) for number in numbers]

    def rates(measured: Bools, reference: Bools) -> tuple[Floats, Floats]:
        """Rates of the measured, raw and normalised, above the threshold that 5% of the reference are above."""
        raw, after = (
            bootstrap.rate_above(column, measured, bootstrap.threshold(column, reference, TARGET_FPR))
            for column in (scores, values)
        )
        return raw, after

    by_length = [(label, mask, *rates(mask, benign)) for label, mask in in_thirds if mask.any()]
    by_set = [(number, mask, *rates(mask, benign & ~mask)) for number, mask in in_sets] if len(in_sets) > 1 else []
    grouped = [one[2:] for one in by_set or by_length]
    spreads = [
        np.nanmean([np.abs(group_rates[which] - TARGET_FPR) for group_rates in grouped], axis=0) for which in (0, 1)
    ]
    aurocs = [bootstrap.auroc(column, samples.attack, valid) for column in (scores, values)]
    auroc_change = bootstrap.estimate(aurocs[1] - aurocs[0], valid)
    spread_change = bootstrap.estimate(spreads[1] - spreads[0], benign)
    return Normalisation(
        how=_HOW,
        auroc_raw=bootstrap.estimate(aurocs[0], valid),
        auroc_normalised=bootstrap.estimate(aurocs[1], valid),
        auroc_change=auroc_change,
        lengths=[
            LengthRates(label=label, n_benign=int(mask.sum()), raw=raw[0], normalised=after[0])
            for label, mask, raw, after in by_length
        ],
        sets=[
            SetRates(
                name=samples.sets[number],
                n_benign=int(mask.sum()),
                n_attack=int((valid & samples.attack & (samples.set == number)).sum()),
                raw=raw[0],
                normalised=after[0],
            )
            for number, mask, raw, after in by_set
        ],
        spread_raw=bootstrap.estimate(spreads[0], benign),
        spread_normalised=bootstrap.estimate(spreads[1], benign),
        spread_change=spread_change,
        verdict=_verdict(spread_change, auroc_change, "sets" if by_set else "lengths"),
    )


def across(runs: Sequence[ScoreRun], *, resamples: int, seed: int) -> Normalisation:
    """The same for runs of any models, each with the scores of its own window: may one threshold serve them all?

    The same prompt in two runs is two samples of one group. CalibrationError if a class is missing.
    """
    samples = take_samples(runs, read_rows(runs), seed, by_run=True)
    columns = [batch.column("score").cast("float64") for run in runs for batch in run.batches(["score"])]
    scores = np.concatenate([column.to_numpy(zero_copy_only=False) for column in columns])
    return normalisation(scores[samples.row], samples, ComparisonBootstrap(samples, resamples, seed))


def _verdict(spread: Estimate, auroc: Estimate, over: str) -> str:
    if spread.interval is None or auroc.interval is None:
        return TOO_FEW
    evener = {-1: "nearer to the target", 1: "farther from the target", None: f"{NOT_SHOWN} to be evener"}
    change = {1: "rises", -1: "falls: length told attacks apart", None: "does not change measurably"}
    rates = f"false positive rates across {over}: {evener[side(spread.interval, 0)]}"
    return f"{rates}; the AUROC {change[side(auroc.interval, 0)]}"
