"""Does instability add anything to other signals? Logistic regressions without and with it, on held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from headrift.calibration.comparison import Increment
from headrift.calibration.resampling import Draws
from headrift.calibration.samples import Samples
from headrift.calibration.signals import SIGNALS, Signals

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]
Interval: TypeAlias = tuple[float, float]

# What is asked: the signals of the regression, and the one that is added.
ASKED: tuple[tuple[tuple[str, ...], str], ...] = (
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
_IN_LOG = ("prompt_tokens", "n_steps")
_FEWEST = 20  # samples of a class with all the signals
_FEW = 5_000  # up to so many samples folds are drawn several times, so that no one division decides
_DIVISIONS = 5
_INVERSE_PENALTY = 100.0  # next to none: a penalty would shrink a signal, and less so a signal and its copy
_TINY = 1e-12


def increments(
    signals: Signals, samples: Samples, draws: Draws, seed: int, asked: Sequence[tuple[tuple[str, ...], str]] = ASKED
) -> list[Increment]:
    """Everything that is asked, on prompts that have all signals of a question. Samples of the same group are in one
    fold. The regressions are not fitted anew in resamples: intervals are those of the measuring, not of the fitting."""
    from threadpoolctl import threadpool_limits

    n = _DIVISIONS if len(samples) <= _FEW else 1
    divisions = [samples.fold, *(samples.other_folds(seed + at) for at in range(1, n))]
    with threadpool_limits(1, "blas"):  # more threads take longer to meet than such small fits take
        return [_increment(base, added, signals, samples, draws, divisions) for base, added in asked]


def _increment(
    base: tuple[str, ...], added: str, signals: Signals, samples: Samples, draws: Draws, divisions: list[Ints]
) -> Increment:
    names = [*base, added]
    label = f"{_named(base)} + {SIGNALS[added][0]}"
    missing = [name for name in names if name not in signals.values]
    if missing:
        why = signals.absent.get(missing[0], "it is not known")
        return Increment(base=list(base), added=added, label=label, absent=f"no {SIGNALS[missing[0]][0]}: {why}")
    columns = np.stack([_feature(name, signals.values[name]) for name in names], axis=1)
    there: Bools = np.asarray(~np.isnan(columns).any(axis=1))
    fewest = min(int((there & (samples.attack == label)).sum()) for label in (True, False))
    if fewest < _FEWEST or samples.n_folds < 2:
        few = f"it needs {_FEWEST} attacks and as many benign prompts that have all of these, and there are {fewest}"
        return Increment(base=list(base), added=added, label=label, absent=few)
    sets = _indicators(samples)
    without, having = (
        [_held_out(np.concatenate([sets, part], axis=1), there, fold, samples.attack) for fold in divisions]
        for part in (columns[:, : len(base)], columns)
    )
    losses = [_mean_loss(of, samples.attack, draws, there) for of in (without, having)]
    aurocs = [_mean_auroc(of, divisions, samples, draws, there) for of in (without, having)]
    change, auroc_change = (draws.estimate(of[1] - of[0], there) for of in (losses, aurocs))
    with_auroc = draws.estimate(aurocs[1], there)
    return Increment(
        base=list(base),
        added=added,
        label=label,
        log_loss=draws.estimate(losses[0], there),
        log_loss_with=draws.estimate(losses[1], there),
        log_loss_change=change,
        auroc=draws.estimate(aurocs[0], there),
        auroc_with=with_auroc,
        auroc_change=auroc_change,
        verdict=_verdict(base, added, change.interval, with_auroc.interval, auroc_change.interval),
    )


def _verdict(
    base: tuple[str, ...],
    added: str,
    loss: Interval | None,
    auroc_with: Interval | None,
    auroc_change: Interval | None,
) -> str:
    """By the changes' intervals. An AUROC also rises where the base, which knows nothing, was below 0.5 by chance: it
    has to be above 0.5 after."""
    what, to = SIGNALS[added][0], _named(base)
    if loss is None or auroc_with is None or auroc_change is None:
        return f"too few prompts to say whether {what} adds to {to}"
    if loss[1] < 0:
        return f"{what} adds to {to}: the held-out log-loss falls"
    if loss[0] > 0:
        return f"{what} adds nothing to {to}: held-out predictions get worse with it"
    if auroc_change[0] > 0 and auroc_with[0] > 0.5:
        return f"{what} ranks held-out prompts better than {to} without it, but it is not shown that the log-loss falls"
    return f"not shown that {what} adds anything to {to}"


def _named(base: tuple[str, ...]) -> str:
    return " + ".join(SIGNALS[name][0] for name in base) or "nothing but the share of attacks"


def _feature(name: str, values: Floats) -> Floats:
    return np.log1p(values) if name in _IN_LOG else values


def _indicators(samples: Samples) -> Floats:
    """A column for each set but the first, so that no regression has to tell the sets apart by a signal. One of zeros
    where there is one set."""
    return np.stack([(samples.set == at).astype(np.float64) for at in range(1, max(2, len(samples.sets)))], axis=1)


def _held_out(columns: Floats, there: Bools, fold: Ints, attack: Bools) -> Floats:
    """Each sample's chance of being an attack, by a regression fitted on the other folds; NaN where signals are
    missing."""
    from sklearn.linear_model import LogisticRegression

    chance = np.full(len(columns), np.nan)
    for at in np.unique(fold):
        mine, others = there & (fold == at), there & (fold != at)
        if mine.any():
            mean, spread = columns[others].mean(axis=0), np.maximum(columns[others].std(axis=0), _TINY)
            fitted = LogisticRegression(C=_INVERSE_PENALTY).fit((columns[others] - mean) / spread, attack[others])
            chance[mine] = fitted.predict_proba((columns[mine] - mean) / spread)[:, 1]
    return chance


def _mean_loss(chances: list[Floats], attack: Bools, draws: Draws, there: Bools) -> Floats:
    """In each draw the mean log-loss over samples and divisions."""
    of_truth = [np.where(attack, chance, 1 - chance) for chance in chances]
    return draws.mean(np.mean([-np.log(np.maximum(chance, _TINY)) for chance in of_truth], axis=0), there)


def _mean_auroc(chances: list[Floats], divisions: list[Ints], samples: Samples, draws: Draws, there: Bools) -> Floats:
    """In each draw the AUROC of pairs of the same fold (and so regression) and set, mean over divisions."""
    n_sets = len(samples.sets) + 1
    return np.mean(
        [draws.aurocs(of, there, fold * n_sets + samples.set + 1) for of, fold in zip(chances, divisions)], axis=0
    )
