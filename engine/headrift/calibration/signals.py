"""Every signal of every sample, over a window and step by step, from what runs saved.

What a run saved per step (shares, mass, entropy_steps) is taken over the window that is asked for; where it saved none,
its own columns serve, over its own window, and `how` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from headrift.calibration import heads
from headrift.calibration.comparison import Heads
from headrift.calibration.reading import OWN, Measured, Saved, focus_at_0, measure, rows, saved
from headrift.calibration.runs import Run
from headrift.calibration.samples import Samples
from headrift.fail_terms import FailTerms
from headrift.signal import ScoreRange

Floats: TypeAlias = NDArray[np.float64]

# Name: label, unit.
SIGNALS = {
    "instability": ("instability", "std over heads, 0 to 0.5"),
    "instability_without_bos": ("instability, BOS left out", "std over heads, 0 to 0.5"),
    "system_share": ("system share", "fraction of the attention on the prompt"),
    "system_share_without_bos": ("system share, BOS left out", "fraction of the attention on the prompt but BOS"),
    "focus": ("focus, all heads", "fraction of the attention on system and user"),
    "focus_important": ("focus, important heads", "standard deviations of benign prompts"),
    "entropy": ("next-token entropy", "nats"),
    "head_agreement": ("head agreement", "mean correlation, -1 to 1"),
    "prompt_tokens": ("prompt length", "tokens"),
    "answer_tokens": ("answer length", "tokens"),
    "n_steps": ("number of steps", "steps"),
}
# What is compared step by step.
STEPPED = ("instability", "instability_without_bos", "system_share", "focus", "focus_important", "entropy")
_COUNTS = ("prompt_tokens", "answer_tokens", "n_steps")

_NO_BOS = "the runs saved no mass with a region `bos`: score with --save mass"
_NO_MASS = "the runs saved no mass, so focus is known at step 0 only: score with --save mass"
_ABSENT = {
    "system_share": "the runs hold no system share",
    "head_agreement": "the runs hold no head agreement",
    "focus": "the runs hold no focus: it needs to be known where the user's turn is",
    "entropy": "the runs recorded no entropy: score with --save entropy (replayed answers have none)",
    "instability_without_bos": _NO_BOS,
    "system_share_without_bos": _NO_BOS,
    "focus_important": "the runs saved no focus of single heads: score with --save focus",
}
_STEPS_ABSENT = {
    "system_share": "the runs saved no shares: score with --save shares",
    "instability_without_bos": _NO_BOS,
    "focus": _NO_MASS,
    "focus_important": _NO_MASS,
    "entropy": "the runs recorded no entropy of each step: score with --save entropy",
}


@dataclass(frozen=True, slots=True)
class Signals:
    """values: [samples], NaN for none; steps: [samples, steps + 1], step 0 first, NaN after an answer's end. how: in
    words; absent, steps_absent: why there is none. succeeded: 1 where a fail term is in the answer, 0 where none is,
    -1 where it is not known."""

    values: dict[str, Floats]
    steps: dict[str, Floats]
    how: dict[str, str]
    absent: dict[str, str]
    steps_absent: dict[str, str]
    important: Heads | None
    succeeded: NDArray[np.int8]


def read(
    runs: Sequence[Run],
    samples: Samples,
    cell: ScoreRange,
    *,
    fail_terms: FailTerms | None = None,
    important_heads: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Signals:
    """The samples' signals over the cell's window and layers. The runs must be of one model."""
    have = saved(runs)
    own = all(run.score_range == cell for run in runs)
    absent = {} if important_heads else {"focus_important": "not asked for"}
    choices: list[heads.Choice] = []
    important = None
    if important_heads and (have.focus_mass or "focus_heads" in have.columns):
        say("choosing important heads")
        focus_heads = _focus_heads(runs, samples, have)
        if heads.enough(focus_heads, samples):
            choices = heads.without_folds(focus_heads, samples)
            important = heads.described(focus_heads, samples, choices)
        else:
            few = f"at least {heads.FEWEST} attacks and as many benign prompts outside each fold"
            absent["focus_important"] = f"important heads can only be chosen with {few}"
    say(f"reading the signals of {len(samples):,} samples")
    steps = min(run.steps for run in runs)
    found = _Found(len(samples), steps)
    wanted = [*OWN, "mass" if have.mass else "shares", "focus_heads", "entropy_steps"]
    for of, row in rows(runs, samples.row, [name for name in wanted if name in have.columns]):
        chosen = choices[samples.fold[of]].chosen if choices else None
        found.put(of, measure(row, int(samples.counts["n_steps"][of]), cell, chosen), row.own, own)
    for kind in (found.values, found.steps):
        kind["focus_important"] = heads.standardised(kind["focus_important"], samples)
    for name in _COUNTS:
        count = samples.counts[name]
        found.values[name] = np.where(count >= 0, count, np.nan)
    for name in SIGNALS:
        if np.isnan(found.values[name]).all():
            absent.setdefault(name, _ABSENT.get(name, "no prompt has it"))
    steps_absent = {
        name: _STEPS_ABSENT.get(name, "no prompt has it") if name not in absent else absent[name]
        for name in STEPPED
        if np.isnan(found.steps[name]).all()
    }
    return Signals(
        values={name: found.values[name] for name in SIGNALS if name not in absent},
        steps={name: found.steps[name] for name in STEPPED if name not in steps_absent},
        how=_how(have, cell, runs, own, important),
        absent=absent,
        steps_absent=steps_absent,
        important=important,
        succeeded=_succeeded(runs, samples, fail_terms),
    )


class _Found:
    """Signals as they are measured, by sample."""

    def __init__(self, n: int, steps: int) -> None:
        self.values = {name: np.full(n, np.nan) for name in SIGNALS}
        self.steps = {name: np.full((n, steps + 1), np.nan) for name in STEPPED}

    def put(self, of: int, measured: Measured, own: dict[str, float], prefer_own: bool) -> None:
        """A sample's. own: the run's columns, preferred where they are over the same window (shares are rounded)."""
        values = {name: np.nan if value is None else value for name, value in measured.values.items()}
        known = {name: value for name, value in own.items() if not np.isnan(value)}
        for name, value in ({**values, **known} if prefer_own else {**known, **values}).items():
            self.values[name][of] = value
        for name, series in measured.steps.items():
            recorded = series[: self.steps[name].shape[1]]
            self.steps[name][of, : len(recorded)] = recorded


def _focus_heads(runs: Sequence[Run], samples: Samples, have: Saved) -> NDArray[np.float32]:
    """[samples, layers, heads] at step 0, NaN where it is not known."""
    found = np.full((len(samples), runs[0].model.layers, runs[0].model.heads or 1), np.nan, np.float32)
    for of, row in rows(runs, samples.row, ["focus_heads" if "focus_heads" in have.columns else "mass"]):
        focus = focus_at_0(row)
        if focus is not None:
            found[of] = focus
    return found


def _succeeded(runs: Sequence[Run], samples: Samples, fail_terms: FailTerms | None) -> NDArray[np.int8]:
    found = np.full(len(samples), -1, np.int8)
    if fail_terms is None:
        return found
    first = 0
    for run in runs:
        for batch in run.batches(["label", "text"]):
            start, stop = np.searchsorted(samples.row, [first, first + batch.num_rows])
            if "text" in batch.schema.names:
                text = batch.column("text")
                for of in range(start, stop):
                    answer = text[int(samples.row[of]) - first].as_py()
                    if answer is not None:
                        found[of] = fail_terms.found(answer)
            first += batch.num_rows
    return found


def _how(have: Saved, cell: ScoreRange, runs: Sequence[Run], own: bool, important: Heads | None) -> dict[str, str]:
    """How each signal was got."""
    start, end = cell.layers(runs[0].model.layers)
    over = f"steps {cell.window}, layers {start} to {end - 1}"
    theirs = ", ".join(sorted({f"steps {run.score_range.window}" for run in runs}))
    from_own, not_asked = f"the runs' own column, {over}", f"the runs' own column over {theirs}, not what was asked for"

    def measured(there: bool, source: str) -> str:
        return from_own if own else f"from the saved {source}, {over}" if there else not_asked

    share = measured(have.mass or "shares" in have.columns, "mass" if have.mass else "shares")
    focus = "mean over all heads of system / (system + user) of the attention at step 0"
    return {
        "instability": f"the score: {over}",
        "instability_without_bos": f"the same with BOS a region of its own, share = system / (prompt - BOS); {over}",
        "system_share": f"mean over steps, layers and heads; {share}",
        "system_share_without_bos": f"system / (prompt - BOS), mean over steps, layers and heads; {over}",
        "focus": focus,
        "focus_important": ""
        if important is None
        else f"the same over chosen heads, each fold by itself; {important.how}",
        "entropy": f"mean over steps; {measured('entropy_steps' in have.columns, 'entropy of each step')}",
        "head_agreement": f"mean pairwise correlation of the heads over depth, mean over steps; {share}",
        "prompt_tokens": "the whole prompt, system prompt and template included",
        "answer_tokens": f"as far as the answer was made, at most {max(run.steps for run in runs) + 1}",
        "n_steps": f"recorded steps, at most {max(run.steps for run in runs)}: fewer where the answer ended",
    }
