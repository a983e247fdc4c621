"""Important heads, as Attention Tracker chooses them (Hung et al. 2024, arXiv 2411.00348): those whose focus on the
system prompt an attack moves by more than it varies from prompt to prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from headrift.calibration.comparison import Heads
from headrift.calibration.samples import Samples

Floats: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]

FEWEST = 10  # samples of a class in every training fold
_LARGEST_N = 4
_BEST = 0.1  # the fraction of heads that is taken where no head passes


@dataclass(frozen=True, slots=True)
class Choice:
    """n: of the rule, None where no head passed it and the best tenth was taken; chosen: bool [layers, heads]."""

    n: int | None
    chosen: Bools


def choose(focus_heads: NDArray[np.floating], attack: Bools) -> Choice:
    """The heads with mean_clean - mean_attack - n * (std_clean + std_attack) > 0, for the largest n from 4 to 1 that
    any head passes; where none does, the tenth of the heads (at least one) in which it is highest for n = 1.

    focus_heads: [samples, layers, heads], signal.focus_heads at step 0, no NaN; both classes must occur.
    """
    clean, attacked = (focus_heads[of].astype(np.float64) for of in (~attack, attack))
    shift = clean.mean(axis=0) - attacked.mean(axis=0)
    spread = clean.std(axis=0) + attacked.std(axis=0)
    for n in range(_LARGEST_N, 0, -1):
        passed = shift - n * spread > 0
        if passed.any():
            return Choice(n, passed)
    margin = shift - spread
    best = np.argsort(-margin, axis=None, kind="stable")[: max(1, int(margin.size * _BEST))]
    chosen = np.zeros(margin.size, np.bool_)
    chosen[best] = True
    return Choice(None, chosen.reshape(margin.shape))


def without_folds(focus_heads: NDArray[np.floating], samples: Samples) -> list[Choice]:
    """For each fold the heads chosen on the other folds. Samples whose focus is not known (NaN) choose nothing."""
    known = ~np.isnan(focus_heads).any(axis=(1, 2))
    found = []
    for fold in range(samples.n_folds):
        others = known & (samples.fold != fold)
        found.append(choose(focus_heads[others], samples.attack[others]))
    return found


def enough(focus_heads: NDArray[np.floating], samples: Samples) -> bool:
    """Whether all folds leave enough samples of both classes to choose heads by."""
    known = ~np.isnan(focus_heads).any(axis=(1, 2))
    return samples.n_folds > 1 and all(
        (known & (samples.fold != fold) & (samples.attack == label)).sum() >= FEWEST
        for fold in range(samples.n_folds)
        for label in (True, False)
    )


def described(focus_heads: NDArray[np.floating], samples: Samples, of_folds: list[Choice]) -> Heads:
    """What was chosen, for a reader."""
    known = ~np.isnan(focus_heads).any(axis=(1, 2))
    on_all = choose(focus_heads[known], samples.attack[known])
    rules = sorted({"the best tenth, as none passed" if of.n is None else f"n = {of.n}" for of in of_folds})
    return Heads(
        n=on_all.n,
        heads=[(int(layer), int(head)) for layer, head in np.argwhere(on_all.chosen)],
        per_fold=[int(of.chosen.sum()) for of in of_folds],
        in_all_folds=int(np.all([of.chosen for of in of_folds], axis=0).sum()),
        how="heads with mean_clean - mean_attack - n * (std_clean + std_attack) > 0 of their focus at step 0, for the "
        f"largest n from 4 to 1 that any head passes, chosen without the fold that is measured: {', '.join(rules)}",
    )


def standardised(values: Floats, samples: Samples) -> Floats:
    """Each fold's values [samples] or [samples, steps] in standard deviations from the mean of the other folds' benign
    prompts: heads chosen anew in each fold have another level in each."""
    found = np.full(values.shape, np.nan)
    for fold in range(samples.n_folds):
        mine = samples.fold == fold
        known = values[~mine & ~samples.attack]
        there = ~np.isnan(known)
        n = np.maximum(there.sum(axis=0), 1)
        mean = np.where(there, known, 0.0).sum(axis=0) / n
        spread = np.sqrt(np.where(there, (known - mean) ** 2, 0.0).sum(axis=0) / n)
        found[mine] = (values[mine] - mean) / np.maximum(spread, 1e-12)
    return found
