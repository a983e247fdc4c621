"""What a signal is, and the one list of them.

A signal is a number of a prompt that may tell attacks from benign prompts. An entry says all there is to know of it;
the columns of scored parts, the comparisons of `calibrate` and `report`, `explain` and the documentation go through
this list, so that a new signal is one entry (see `builtin`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from headrift import signal
from headrift.signal import ScoreRange
from headrift.signals.detectors import AnyDetector, Reads, Training, learn_direction
from headrift.signals.features import logit_shares

Array: TypeAlias = NDArray[Any]
Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class PromptData:
    """What was recorded of one prompt, and what to measure it over; T = n_steps + 1 steps, step 0 first.

    Attributes:
        score_range: window and layers to measure over.
        n_steps: index of the answer's last recorded step.
        instability: [T, layers], NaN where a layer is not counted.
        share: [T, layers, heads], or None if neither shares nor masses are known.
        mass: [T, layers, heads] by name of the region, of the regions that are known.
        focus_heads: [layers, heads] system / (system + user) at step 0, or None.
        logit_stats: [T] by name: entropy (nats), top1, margin; those that are known.
        important_heads: bool [layers, heads], the heads chosen for this prompt, or None.
    """

    score_range: ScoreRange
    n_steps: int
    instability: Array
    share: Array | None = None
    mass: Mapping[str, Array] = field(default_factory=dict)
    focus_heads: Array | None = None
    logit_stats: Mapping[str, Array] = field(default_factory=dict)
    important_heads: NDArray[np.bool_] | None = None

    @cached_property
    def counted(self) -> NDArray[np.bool_]:
        """Which (step, layer) cells are counted [T, layers]."""
        return ~np.isnan(self.instability)

    @cached_property
    def share_without_bos(self) -> Floats | None:
        """Share with the first token (BOS) a region of its own: system / (prompt - bos), or None."""
        if not {"system", "prompt", "bos"} <= self.mass.keys():
            return None
        return signal.share(self.mass["system"], np.maximum(self.mass["prompt"] - self.mass["bos"], 0))

    @cached_property
    def instability_without_bos(self) -> Floats | None:
        """Instability of `share_without_bos` [T, layers], NaN where a layer is not counted."""
        if self.share_without_bos is None:
            return None
        return np.where(self.counted, signal.instability(self.share_without_bos), np.nan)

    @cached_property
    def focus_by_step(self) -> Floats | None:
        """system / (system + user) of every head [T, layers, heads], or None."""
        if not {"system", "user"} <= self.mass.keys():
            return None
        return signal.focus_heads(self.mass["system"], self.mass["user"])

    @cached_property
    def logit_shares(self) -> NDArray[np.float32] | None:
        """Log-odds of the shares at step 0 and their mean over the window [1 or 2, layers, heads], or None."""
        if self.share is None:
            return None
        return logit_shares(self.share, self.counted, self.score_range.window, self.n_steps)

    def over_cells(self, function: Callable[..., float | None], share: Array | None) -> float | None:
        """A function of `signal`, as `mean_share`, over the scored cells of a share; None without the share."""
        if share is None:
            return None
        window, trims = self.score_range.window, self.score_range.trims
        return function(share, window, n_steps=self.n_steps, counted=self.counted, **trims)

    def score(self, values: Array | None) -> float | None:
        """Mean over the scored cells of values [T, layers] that are counted; None if there are none."""
        if values is None:
            return None
        return self.score_range.score(np.where(self.counted, values, np.nan), self.n_steps).value

    def window_mean(self, series: Array | None) -> float | None:
        """Mean over the window's steps of values [T]; None if there are none."""
        return None if series is None else signal.window_mean(series, self.score_range.window, self.n_steps)

    def layer_mean(self, values: Array | None) -> Floats | None:
        """Mean over the scored layers of values [T, layers] at each step [T]; NaN if no layer is counted."""
        if values is None:
            return None
        layers = slice(*self.score_range.layers(self.instability.shape[1]))
        counted = self.counted[:, layers] & ~np.isnan(values[:, layers])
        n = counted.sum(axis=1)
        total = np.where(counted, values[:, layers], 0).sum(axis=1, dtype=np.float64)
        return np.divide(total, n, out=np.full(len(n), np.nan), where=n > 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """One entry of the registry.

    Attributes:
        name: key in columns, calibrations and report data.
        label, unit: for tables and axes.
        how: how the prompt's number is computed, in a few words.
        value: the prompt's number, None if the data does not have it; no function for a count that every row has.
        steps: the number at each recorded step [T], None if the data does not have it; no function if the signal has
            no value for each step.
        column: whether `score` writes it to the column of this name.
        compared: whether `calibrate` and `report` compare it with the others.
        saves: what `score --save` must keep so that it can be measured over any window.
        direction: 1 if attacks are expected to have the higher values, -1 the lower, 0 if nothing is expected; what
            holds is measured.
        windowed: whether it is measured over the window, and not at step 0 or of the whole prompt.
        length: whether it only says how long prompt or answer is; regressions take `log(1 + value)` if `log`.
        of_chosen_heads: whether heads are chosen for each fold, whose values are then not on one scale.
        learn: how `calibrate` makes a detector of it; by default it takes the column as it is and learns its direction.
        reads: what of a prompt the detector reads.
        absent, steps_absent: why runs lack it and what to do, if the names in `saves` do not say it.
    """

    name: str
    label: str
    unit: str
    how: str
    value: Callable[[PromptData], float | None] | None = None
    steps: Callable[[PromptData], Array | None] | None = None
    column: bool = False
    compared: bool = True
    saves: tuple[str, ...] = ()
    direction: Literal[1, 0, -1] = 0
    windowed: bool = True
    length: bool = False
    log: bool = False
    of_chosen_heads: bool = False
    learn: Callable[[Training], AnyDetector] | None = None
    reads: Reads = "values"
    absent: str = ""
    steps_absent: str = ""

    @property
    def detects(self) -> bool:
        """Whether `calibrate` can make a detector of it."""
        return self.learn is not None or (self.compared and self.column) or self.name == "instability"

    def detector(self, training: Training) -> AnyDetector:
        """Learn a detector. NotEnoughError if the prompts do not allow it."""
        if self.learn is None:
            return learn_direction(self.name, training, self.direction or 1)
        return self.learn(training)

    def why_absent(self, by_step: bool = False) -> str:
        """What to say if no prompt of a run has the signal, or none has it step by step."""
        message = self.steps_absent if by_step else self.absent
        if message or not self.saves:
            return message or f"the runs have no {self.label}"
        return f"the runs saved no {self.saves[0]}: score with --save {self.saves[0]}"


_SIGNALS: dict[str, Signal] = {}


def register(entry: Signal) -> Signal:
    """Add a signal to the end of the registry. ValueError if its name is taken."""
    if entry.name in _SIGNALS:
        raise ValueError(f"there is a signal {entry.name} already: choose another name")
    _SIGNALS[entry.name] = entry
    return entry


@contextmanager
def registered(entry: Signal) -> Iterator[Signal]:
    """Have a signal in the registry for a while, as an experiment or a test does."""
    register(entry)
    try:
        yield entry
    finally:
        del _SIGNALS[entry.name]


def signals(
    *, column: bool | None = None, compared: bool | None = None, length: bool | None = None, by_step: bool | None = None
) -> list[Signal]:
    """The signals in their order; each argument keeps only those that have, or do not have, the property.

    Args:
        column, compared, length: as in `Signal`.
        by_step: whether the signal has a number for each step.
    """
    kept = []
    for entry in _SIGNALS.values():
        properties = (entry.column, entry.compared, entry.length, entry.steps is not None)
        if all(want in (None, has) for want, has in zip((column, compared, length, by_step), properties)):
            kept.append(entry)
    return kept


def get(name: str) -> Signal:
    """The signal of a name. KeyError if there is none."""
    return _SIGNALS[name]


def measure_columns(data: PromptData) -> dict[str, float | None]:
    """Every signal that `score` writes to a column, by name; None if the data does not have it."""
    return {entry.name: entry.value(data) for entry in _SIGNALS.values() if entry.column and entry.value is not None}
