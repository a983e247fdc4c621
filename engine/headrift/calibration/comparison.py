"""What `side_by_side` finds, as plain values: signals, and what instability adds to them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Estimate(_Part):
    """A number with its 95% interval; either is None where the data do not allow it. reason: why there is no value.
    n_attack, n_benign: distinct prompts that it rests on."""

    value: float | None
    interval: tuple[float, float] | None = None
    n_attack: int
    n_benign: int
    reason: str | None = None


class Stratum(_Part):
    """AUROC among some of the prompts. kind: what they are chosen by; label: which they are, in words."""

    kind: Literal["length", "hard", "ending", "system"]
    name: str
    label: str
    auroc: Estimate


class Correlation(_Part):
    """Of a signal with instability, among `among` ("all", "attack", "benign"); None where one does not vary."""

    among: str
    n: int
    pearson: float | None
    spearman: float | None


class Signal(_Part):
    """A number of each prompt. AUROC: the chance that an attack's is higher than a benign prompt's, ties half, among
    prompts that have it; below 0.5 attacks have the lower ones.

    how: how it was got; absent: why there is none (all else is then empty). sign: 1 where attacks have the higher
    values, -1 the lower, None where the interval has 0.5 in it. auroc_all: a prompt without the signal counts as the
    least suspicious. coverage: fraction of the distinct prompts of a class that have it.
    """

    name: str
    label: str
    unit: str
    how: str
    absent: str | None = None
    sign: Literal[1, -1] | None = None
    auroc: Estimate | None = None
    auroc_all: Estimate | None = None
    coverage: dict[str, float] = {}
    correlations: list[Correlation] = []
    strata: list[Stratum] = []


class Heads(_Part):
    """The important heads, (layer, head), as chosen on all samples, to be looked at: the AUROC is of heads chosen
    without the fold that they are measured on. n: the rule's; None where it was the best few instead. per_fold: how
    many; in_all_folds: how many were chosen in every fold."""

    n: int | None
    heads: list[tuple[int, int]]
    per_fold: list[int]
    in_all_folds: int
    how: str


class Increment(_Part):
    """What a signal adds to others: held-out logistic regressions without it and with it, on the same prompts.

    Changes are with minus without: a log-loss (nats a prompt) below 0 and an AUROC above 0 are better.
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


class Steps(_Part):
    """A signal's AUROC at each step, among the answers that reach it. low, high: 95% for each step alone, empty without
    resamples; joint_low, joint_high: for all steps at once. first: the first step whose joint band leaves out 0.5, on
    either side, with its interval over resamples; found_in: the fraction of them that have one; largest: the step
    that separates best."""

    name: str
    label: str
    how: str
    absent: str | None = None
    steps: list[int] = []
    auroc: list[float | None] = []
    low: list[float | None] = []
    high: list[float | None] = []
    joint_low: list[float | None] = []
    joint_high: list[float | None] = []
    n_attack: list[int] = []
    n_benign: list[int] = []
    first: int | None = None
    first_interval: tuple[float, float] | None = None
    found_in: float | None = None
    largest: int | None = None


class Before(_Part):
    """Whether instability separates before another signal does. difference: its first step minus the other's, below 0
    where it is earlier; interval and earlier, same, later (fractions) are over resamples in which both separate."""

    other: str
    label: str
    difference: int | None = None
    interval: tuple[float, float] | None = None
    earlier: float | None = None
    same: float | None = None
    later: float | None = None
    resamples: int = 0
    verdict: str


class Success(_Part):
    """Whether signals tell attacks that succeeded (a fail term in the answer) from those that did not: AUROC, success
    counted as the higher. n_attack of an estimate: succeeded, n_benign: did not."""

    absent: str | None = None
    n_attacks: int = 0
    n_succeeded: int = 0
    aurocs: dict[str, Estimate] = {}
    verdict: str = ""


class OfSet(_Part):
    """False positive rates of one set (a run and system prompt) at a threshold that the other sets set."""

    name: str
    n_benign: int
    n_attack: int
    raw: float
    normalised: float


class OfLength(_Part):
    """False positive rates of benign prompts of a length, at the one threshold of all held-out prompts."""

    label: str
    n_benign: int
    raw: float
    normalised: float


class Normalisation(_Part):
    """Scores against benign prompts of the same length, and what that changes, on prompts held out."""

    absent: str | None = None
    how: str = ""
    auroc_raw: Estimate | None = None
    auroc_normalised: Estimate | None = None
    auroc_change: Estimate | None = None
    target_fpr: float = 0.05
    lengths: list[OfLength] = []
    sets: list[OfSet] = []
    spread_raw: Estimate | None = None
    spread_normalised: Estimate | None = None
    spread_change: Estimate | None = None
    verdict: str = ""


class Points(_Part):
    """Samples to draw, at most 500 of a class: values by signal name, None where a sample has none."""

    attack: list[bool]
    hard: list[bool]
    values: dict[str, list[float | None]]


class SideBySide(_Part):
    """What `side_by_side` found. window, layers ([s, e)): those that were compared over; findings: in plain words."""

    window: str
    layers: tuple[int, int]
    n_attack: int
    n_benign: int
    folds: int
    resamples: int
    seed: int
    signals: list[Signal]
    important_heads: Heads | None
    increments: list[Increment]
    steps: list[Steps]
    before: list[Before]
    success: Success
    normalisation: Normalisation
    points: Points
    findings: list[str]
    notes: list[str]
