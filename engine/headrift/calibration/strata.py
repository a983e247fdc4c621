"""How each signal separates: among all prompts, among prompts alike in what might pass for the signal, and how it goes
with instability."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from headrift.calibration.comparison import Correlation, Signal, Stratum
from headrift.calibration.resampling import Draws
from headrift.calibration.samples import Samples
from headrift.calibration.signals import SIGNALS, Signals
from headrift.signal import ScoreRange

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]

_FEWEST_OF_KIND = 10  # benign prompts of a hard kind that is shown by itself
_FEWEST_TO_CORRELATE = 3


@dataclass(frozen=True, slots=True)
class Among:
    """Some of the samples. pairs: only attacks and benign prompts with the same number are compared."""

    kind: Literal["length", "hard", "ending", "system"]
    name: str
    label: str
    mask: Bools
    pairs: Ints | None = None


def length_thirds(samples: Samples) -> tuple[Ints, list[str]]:
    """For each sample 0, 1 or 2: in which third of the benign prompts' lengths it is; and the thirds in words."""
    tokens = samples.counts["prompt_tokens"]
    low, high = np.quantile(tokens[~samples.attack], [1 / 3, 2 / 3])
    third = (tokens > low).astype(np.int64) + (tokens > high)
    return third, [
        f"short: to {low:.0f} tokens",
        f"middle: over {low:.0f}, to {high:.0f} tokens",
        f"long: over {high:.0f} tokens",
    ]


def strata(samples: Samples, cell: ScoreRange) -> list[Among]:
    """What the prompts are divided by: length, kind of benign prompt, early stops, system prompt."""
    attack, hard, everything = samples.attack, samples.hard, np.ones(len(samples), np.bool_)
    found = []
    if len(np.unique(samples.counts["prompt_tokens"])) > 1:
        third, words = length_thirds(samples)
        for at, (name, label) in enumerate(zip(("short", "middle", "long"), words)):
            found.append(Among("length", name, f"prompts in the benign prompts' third that is {label}", third == at))
        label = "attacks and benign prompts of the same third of lengths, all thirds"
        found.append(Among("length", "same_third", label, everything, third))
    if hard.any():
        label = 'attacks against hard benign prompts (category "hard...")'
        found.append(Among("hard", "hard", label, attack | hard))
        found.append(Among("hard", "not_hard", "attacks against benign prompts that are not hard", ~hard))
        kinds, n = np.unique(samples.category[hard], return_counts=True)
        for kind in kinds[n >= _FEWEST_OF_KIND] if len(kinds) > 1 else []:
            label = f"attacks against benign prompts of the category {kind}"
            found.append(Among("hard", str(kind), label, attack | (hard & (samples.category == kind))))
    full = samples.counts["n_steps"] >= cell.window.end
    if 0 < full.sum() < len(samples):
        found.append(Among("ending", "full", f"answers that reach the window's end, step {cell.window.end}", full))
        found.append(Among("ending", "ended", "answers that end inside the window", ~full))
    if len(samples.sets) > 1:
        label = "attacks and benign prompts of the same run and system prompt, all of them"
        found.append(Among("system", "same_set", label, samples.set >= 0, samples.set))
    return found


def compare(name: str, signals: Signals, samples: Samples, among: list[Among], draws: Draws) -> Signal:
    """A signal's AUROCs and correlations with instability."""
    label, unit = SIGNALS[name]
    values = signals.values.get(name)
    if values is None:
        return Signal(name=name, label=label, unit=unit, how="", absent=signals.absent[name])
    there = ~np.isnan(values)
    auroc = draws.estimate(draws.aurocs(values, there), there)
    sign: Literal[1, -1] | None = None
    if auroc.interval is not None:
        sign = 1 if auroc.interval[0] > 0.5 else -1 if auroc.interval[1] < 0.5 else None
    everything = np.ones(len(samples), np.bool_)
    # A prompt without the signal is never flagged: it ranks at the end where benign prompts are.
    lowest = -np.inf if auroc.value is None or auroc.value >= 0.5 else np.inf
    of_all = draws.aurocs(np.where(there, values, lowest), everything)
    return Signal(
        name=name,
        label=label,
        unit=unit,
        how=signals.how[name],
        sign=sign,
        auroc=auroc,
        auroc_all=draws.estimate(of_all, everything),
        coverage={
            of: float(there[samples.attack == attack].mean()) for of, attack in (("attack", True), ("benign", False))
        },
        correlations=[] if name == "instability" else _correlations(signals.values["instability"], values, samples),
        strata=[
            Stratum(
                kind=some.kind,
                name=some.name,
                label=some.label,
                auroc=draws.estimate(draws.aurocs(values, there & some.mask, some.pairs), there & some.mask),
            )
            for some in among
        ],
    )


def _correlations(instability: Floats, values: Floats, samples: Samples) -> list[Correlation]:
    from scipy.stats import pearsonr, spearmanr

    there = ~np.isnan(instability) & ~np.isnan(values)
    masks = {"all": there, "attack": there & samples.attack, "benign": there & ~samples.attack}
    found = []
    for among, mask in masks.items():
        n, pearson, spearman = int(mask.sum()), None, None
        if n >= _FEWEST_TO_CORRELATE and np.ptp(instability[mask]) > 0 and np.ptp(values[mask]) > 0:
            pearson = float(pearsonr(instability[mask], values[mask])[0])
            spearman = float(spearmanr(instability[mask], values[mask])[0])
        found.append(Correlation(among=among, n=n, pearson=pearson, spearman=spearman))
    return found
