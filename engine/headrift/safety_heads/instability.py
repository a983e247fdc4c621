"""Do the heads that refusals hang on drive the instability score?

A run of `headrift score --save shares` holds every head's share of attention on the system prompt. From it the score is
worked out anew without chosen heads and with them alone, and beside that with as many heads of the same layers drawn at
random, again and again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrift.calibration import reading
from headrift.calibration.runs import ATTACK, UNLABELLED, Run, open_run, read_rows
from headrift.runs.folder import JobError
from headrift.safety_heads.leading import Leading, leading_heads
from headrift.safety_heads.ships import Head
from headrift.stats import Bounds, separation

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
DRAWS = 200


@dataclass(frozen=True, slots=True)
class Figure:
    """A number, and its interval: 95% over resampled prompts, or the range of 95% of the draws of heads."""

    value: float
    interval: Bounds | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """A score of some heads. rank_correlation: with the score of all heads, Spearman's; auroc: of attacks against
    benign prompts, None where a class is missing. of_draws: means over draws of heads, and their range."""

    heads: str
    rank_correlation: Figure
    auroc: Figure | None
    of_draws: bool


@dataclass(frozen=True, slots=True)
class Instability:
    """What chosen heads are to the scores of a run.

    prompts: how many were scored; layers: [first, end) that the score is the mean of; heads: the chosen ones in them,
    of `top` that were asked for. variance: the fraction of the variance over heads that is theirs, mean over the
    prompts; variance_of_draws: that of as many heads of the same layers; p_value: how often those have as much or more.
    """

    run: str
    prompts: int
    layers: tuple[int, int]
    top: int
    heads: list[Head]
    variance: float
    variance_of_draws: Figure
    p_value: float
    lines: list[Line]

    def numbers(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Scores:
    """Of V sets of heads and n prompts: scores without the sets and of them alone, and their part of the variance
    [V, n]; full: [n], the score of all heads."""

    full: Floats
    without: Floats
    alone: Floats
    variance: Floats


def instability(run: Path, scores: Path, top: int, draws: int = DRAWS, seed: int = 0) -> Instability:
    """What the first `top` heads of a run of `ships` or `sahara` are to the scores of a run of `headrift score`.

    Without heads: the population standard deviation over the others, in layers that keep two or more. Of heads alone:
    the root mean square of their differences from the mean of all heads of their layer, in layers that have any. Both
    are averaged over window and layers as the score is (`signal.score`).

    JobError, CalibrationError where a folder will not do: another model, no saved shares, no chosen head in the layers
    that are scored.
    """
    leading, scored = leading_heads(run, top), open_run(scores)
    first, end = scored.score_range.layers(scored.model.layers)
    heads = _usable(leading, scored, run, top, first, end)
    rows = read_rows([scored])
    sets = _sets(heads, (end - first, scored.model.heads or 1), first, draws, np.random.default_rng(seed))
    wanted, found = _scores(scored, sets, rows.counts["n_steps"])
    label = rows.label[wanted]
    labelled = label != UNLABELLED
    attack = label[labelled] == ATTACK
    groups = np.unique(rows.group[wanted][labelled], return_inverse=True)[1]
    two_classes = bool(attack.any()) and not attack.all()

    def line(name: str, values: Floats, of_draws: bool = False) -> Line:
        correlations = [_spearman(found.full, one) for one in np.atleast_2d(values)]
        auroc = None
        if two_classes and of_draws:
            drawn = [separation(one[labelled], attack, groups, resamples=0).auroc for one in values]
            auroc = _over_draws(drawn)
        elif two_classes:
            apart = separation(values[labelled], attack, groups)
            auroc = Figure(apart.auroc, apart.auroc_interval)
        return Line(name, _over_draws(correlations) if of_draws else Figure(correlations[0]), auroc, of_draws)

    n = len(heads)
    variance = found.variance.mean(axis=1)
    return Instability(
        run=str(scores),
        prompts=len(wanted),
        layers=(first, end),
        top=top,
        heads=heads,
        variance=float(variance[0]),
        variance_of_draws=_over_draws(variance[1:]),
        p_value=float((1 + (variance[1:] >= variance[0]).sum()) / (1 + draws)),
        lines=[
            line("all heads", found.full),
            line(f"without the first {n}", found.without[0]),
            line(f"without {n} at random", found.without[1:], True),
            line(f"the first {n} alone", found.alone[0]),
            line(f"{n} at random alone", found.alone[1:], True),
        ],
    )


def table(found: Instability) -> str:
    """In 100 columns, but for a long name of the run and many heads."""
    named = ", ".join(f"{layer}:{head}" for layer, head in found.heads)
    lines = [
        f"{found.run}: {found.prompts} prompts",
        f"of the first {found.top} heads {len(found.heads)} lie in the scored layers {found.layers[0]} to "
        f"{found.layers[1] - 1}: {named}",
        f"part of the variance over heads: {found.variance:.3f}; of as many at random: "
        f"{_shown(found.variance_of_draws)}, p = {found.p_value:.2g}",
        f"{'score of':<24}{'rank correlation':<26}AUROC",
    ]
    for line in found.lines:
        auroc = "" if line.auroc is None else _shown(line.auroc)
        lines.append(f"{line.heads:<24}{_shown(line.rank_correlation):<26}{auroc}".rstrip())
    return "\n".join(lines)


def _usable(leading: Leading, scored: Run, run: Path, top: int, first: int, end: int) -> list[Head]:
    """The heads that have a say in the score. JobError where there is none, or it is another model's score."""
    if leading.model != scored.model.fingerprint:
        raise JobError(
            f"{run} and {scored.name} were made with two different models: score the prompts with the one whose heads "
            "these are"
        )
    heads = [head for head in leading.heads if first <= head[0] < end]
    if not heads:
        raise JobError(
            f"none of the first {top} heads of {run} lies in the layers {first} to {end - 1} that {scored.name} "
            "scores: take more of them (--top), or score more layers (--drop-shallow, --drop-deep)"
        )
    in_layer = [sum(layer == of for layer, _ in heads) for of in range(first, end)]
    if min(in_layer) > (scored.model.heads or 1) - 2:
        raise JobError(
            f"the first {top} heads of {run} are nearly all there are: leave some to compare with, with a smaller --top"
        )
    return heads


def _sets(heads: Sequence[Head], shape: tuple[int, int], first: int, draws: int, random: np.random.Generator) -> Bools:
    """The chosen heads, and then draws of as many of each layer: [1 + draws, layers, heads] of the scored layers."""
    chosen = np.zeros(shape, np.bool_)
    chosen[tuple(np.transpose([(layer - first, head) for layer, head in heads]))] = True
    return np.stack([chosen, *(random.permuted(chosen, axis=1) for _ in range(draws))])


def _scores(scored: Run, sets: Bools, n_steps: NDArray[np.int32]) -> tuple[NDArray[np.int64], _Scores]:
    """The numbers of the rows that have a score, and their scores."""
    wanted, found = [], []
    every = np.arange(len(n_steps))
    for number, row in reading.rows([scored], every, ["shares"]):
        if row.shares is None:
            raise JobError(f"{scored.name} has no shares of single heads: score the prompts with --save shares")
        of = _of_row(row.shares, ~np.isnan(row.instability), int(n_steps[number]), scored, sets)
        if of is not None:
            wanted.append(number)
            found.append(of)
    if not found:
        raise JobError(f"{scored.name} has no row with a score")
    full, without, alone, variance = zip(*found)
    return np.array(wanted), _Scores(
        np.array(full), np.stack(without, axis=1), np.stack(alone, axis=1), np.stack(variance, axis=1)
    )


def _of_row(
    shares: NDArray[np.float32], counted: Bools, n_steps: int, scored: Run, sets: Bools
) -> tuple[float, Floats, Floats, Floats] | None:
    """A row's score; and without each set, of it alone, and its part of the variance [V]. None without a score."""
    window, layers = scored.score_range.window, slice(*scored.score_range.layers(shares.shape[1]))
    steps = slice(window.start, min(window.end, n_steps) + 1)
    counts = counted[steps, layers]
    if not counts.any():
        return None
    values = shares[steps, layers].astype(np.float64)
    away = np.where(counts[..., None], values - values.mean(axis=2, keepdims=True), 0.0)
    squared = (away**2).sum(axis=2)
    # Of the chosen heads [V, steps, layers], and from that of the others: all differences of a layer sum to nothing.
    chosen = sets.astype(np.float64)
    n, of_chosen = sets.sum(axis=2)[:, None], np.einsum("slh,vlh->vsl", away**2, chosen)
    left = shares.shape[2] - n
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_left = -np.einsum("slh,vlh->vsl", away, chosen) / left
        without = np.sqrt(np.maximum((squared - of_chosen) / left - mean_left**2, 0))
        alone = np.sqrt(of_chosen / n)
    return (
        float(np.sqrt(squared / shares.shape[2])[counts].mean()),
        _mean(without, counts & (left >= 2)),
        _mean(alone, counts & (n >= 1)),
        of_chosen.sum(axis=(1, 2)) / max(squared.sum(), np.finfo(np.float64).tiny),
    )


def _mean(values: Floats, counted: Bools) -> Floats:
    """Over the counted steps and layers of [V, steps, layers]; NaN where there is none."""
    n = counted.sum(axis=(1, 2))
    total = np.where(counted, values, 0.0).sum(axis=(1, 2))
    return np.divide(total, n, out=np.full(len(n), np.nan), where=n > 0)


def _spearman(one: Floats, other: Floats) -> float:
    from scipy.stats import spearmanr

    there = np.isfinite(other)
    if there.sum() < 2 or np.ptp(one[there]) == 0 or np.ptp(other[there]) == 0:
        return float("nan")
    return float(spearmanr(one[there], other[there]).statistic)


def _over_draws(values: Sequence[float] | Floats) -> Figure:
    low, high = np.percentile(values, [2.5, 97.5])
    return Figure(float(np.mean(values)), (float(low), float(high)))


def _shown(figure: Figure) -> str:
    interval = "" if figure.interval is None else f" [{figure.interval[0]:.3f}, {figure.interval[1]:.3f}]"
    return f"{figure.value:.3f}{interval}"
