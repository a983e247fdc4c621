"""Do the heads that refusals depend on drive the instability score?

A run of `headrift score --save shares` contains every head's share of attention on the system prompt. The score is
computed again without chosen heads and with them alone, and the same for as many heads of the same layers drawn at
random, many times.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrift.calibration.compare.measurements import read_prompts
from headrift.runs.folder import JobError
from headrift.runs.reading import ATTACK, UNLABELLED, ScoreRun, open_run, read_rows
from headrift.safety_heads.overlap import LeadingHeads, leading_heads
from headrift.safety_heads.ships import Head
from headrift.stats import Bools, Floats, Interval, Ints, percentile_bounds, separation

DRAWS = 200


class HeadSetScore(NamedTuple):
    """The score of a set of heads against that of all heads."""

    heads: str
    rank_correlation: Interval  # Spearman's
    auroc: Interval | None  # attacks against benign prompts, None if a class is missing
    of_draws: bool  # means over draws of heads, with the range of 95% of the draws instead of an interval over prompts

    def to_json(self) -> dict[str, Any]:
        auroc = None if self.auroc is None else _to_json(self.auroc)
        return {**self._asdict(), "rank_correlation": _to_json(self.rank_correlation), "auroc": auroc}


class Instability(NamedTuple):
    """What chosen heads contribute to the scores of a run."""

    run: str
    prompts: int  # with a score
    layers: tuple[int, int]  # [first, end) that the score is the mean of
    top: int
    heads: list[Head]  # those of the first `top` that are in these layers
    variance: float  # their fraction of the variance over heads, mean over the prompts
    variance_of_draws: Interval  # that of as many heads of the same layers
    p_value: float  # how often those have as much or more
    lines: list[HeadSetScore]

    def to_json(self) -> dict[str, Any]:
        """The values as `headrift heads instability --out` writes them."""
        variance, lines = _to_json(self.variance_of_draws), [line.to_json() for line in self.lines]
        return {**self._asdict(), "variance_of_draws": variance, "lines": lines}


def instability(run: Path, scores: Path, top: int, draws: int = DRAWS, seed: int = 0) -> Instability:
    """Compare the first `top` heads of a run of `ships` or `sahara` with the scores of a run of `headrift score`.

    Without heads, the score is the population standard deviation over the others, in layers that keep two or more. Of
    heads alone, it is the root mean square of their differences from the mean of all heads of their layer, in layers
    that have any. Both are averaged over window and layers as the score is (`signal.score`).

    Raises:
        ValueError: a folder cannot be used: another model, no saved shares, no chosen head in the scored layers.
    """
    leading, scored = leading_heads(run, top), open_run(scores)
    first, end = scored.score_range.layers(scored.model.layers)
    heads = _scored_heads(leading, scored, run, top, first, end)
    rows = read_rows([scored])
    random = np.random.default_rng(seed)
    chosen = np.zeros((end - first, scored.model.heads or 1), np.bool_)
    chosen[tuple(np.transpose([(layer - first, head) for layer, head in heads]))] = True
    # The chosen heads, then draws of as many per layer: [1 + draws, layers, heads] of the scored layers.
    sets = np.stack([chosen, *(random.permuted(chosen, axis=1) for _ in range(draws))])
    selected, full, without, alone, variance = _score_sets(scored, sets, rows.counts["n_steps"])
    label = rows.label[selected]
    labelled = label != UNLABELLED
    attack = label[labelled] == ATTACK
    groups = np.unique(rows.group[selected][labelled], return_inverse=True)[1]
    has_both_classes = bool(attack.any()) and not attack.all()

    def compare(name: str, values: Floats, of_draws: bool = False) -> HeadSetScore:
        correlations = [_spearman(full, one) for one in np.atleast_2d(values)]
        auroc = None
        if has_both_classes and of_draws:
            auroc = _over_draws([separation(one[labelled], attack, groups, resamples=0).auroc for one in values])
        elif has_both_classes:
            result = separation(values[labelled], attack, groups)
            auroc = Interval(result.auroc, *(result.auroc_interval or ()))
        correlation = _over_draws(correlations) if of_draws else Interval(correlations[0])
        return HeadSetScore(name, correlation, auroc, of_draws)

    n = len(heads)
    variance = variance.mean(axis=1)
    return Instability(
        run=str(scores),
        prompts=len(selected),
        layers=(first, end),
        top=top,
        heads=heads,
        variance=float(variance[0]),
        variance_of_draws=_over_draws(variance[1:]),
        p_value=float((1 + (variance[1:] >= variance[0]).sum()) / (1 + draws)),
        lines=[
            compare("all heads", full),
            compare(f"without the first {n}", without[0]),
            compare(f"without {n} at random", without[1:], True),
            compare(f"the first {n} alone", alone[0]),
            compare(f"{n} at random alone", alone[1:], True),
        ],
    )


def table(result: Instability) -> str:
    """The scores, and whether the heads have more of the variance than random ones, as text of about 100 columns."""
    named = ", ".join(f"{layer}:{head}" for layer, head in result.heads)
    first, end = result.layers
    verdict = "more than random heads" if result.p_value < 0.05 else "not shown to be more"
    lines = [
        f"{result.run}: {result.prompts} prompts",
        f"{len(result.heads)} of the first {result.top} heads are in the scored layers {first} to {end - 1}: {named}",
        f"{'variance over heads':<24}{'as many at random':<26}verdict",
        f"{result.variance:<24.3f}{_cell(result.variance_of_draws):<26}{verdict}, p = {result.p_value:.2g}",
        f"{'score of':<24}{'rank correlation':<26}AUROC",
    ]
    for line in result.lines:
        auroc = "" if line.auroc is None else _cell(line.auroc)
        lines.append(f"{line.heads:<24}{_cell(line.rank_correlation):<26}{auroc}".rstrip())
    return "\n".join(lines)


def _scored_heads(leading: LeadingHeads, scored: ScoreRun, run: Path, top: int, first: int, end: int) -> list[Head]:
    """The heads in the scored layers. JobError if there is none, or the scores are of another model."""
    if leading.model != scored.model.fingerprint:
        raise JobError(f"{run} and {scored.name} are of different models: score the prompts with the model of {run}")
    heads = [head for head in leading.heads if first <= head[0] < end]
    if not heads:
        raise JobError(
            f"none of the first {top} heads of {run} is in the layers {first} to {end - 1} that {scored.name} scores: "
            "raise --top, or score more layers (--drop-shallow, --drop-deep)"
        )
    per_layer = [sum(head[0] == layer for head in heads) for layer in range(first, end)]
    if min(per_layer) > (scored.model.heads or 1) - 2:
        raise JobError(f"--top {top}: nearly all heads of {run}; lower it, so that some are left to compare with")
    return heads


def _score_sets(
    scored: ScoreRun, sets: Bools, n_steps: NDArray[np.int32]
) -> tuple[Ints, Floats, Floats, Floats, Floats]:
    """The numbers of the n rows with a score; their scores [n]; and as of `_score_row`, for V sets, [V, n] each."""
    selected, scores = [], []
    for number, row, _ in read_prompts([scored], np.arange(len(n_steps)), scored.score_range, ["shares"]):
        if row.share is None:
            raise JobError(f"{scored.name} has no shares of single heads: score the prompts with --save shares")
        row_scores = _score_row(row.share, ~np.isnan(row.instability), int(n_steps[number]), scored, sets)
        if row_scores is not None:
            selected.append(number)
            scores.append(row_scores)
    if not scores:
        raise JobError(f"{scored.name} has no row with a score")
    full, *by_set = zip(*scores)
    without, alone, variance = (np.stack(values, axis=1) for values in by_set)
    return np.array(selected), np.array(full), without, alone, variance


def _score_row(
    shares: NDArray[np.float32], counted: Bools, n_steps: int, scored: ScoreRun, sets: Bools
) -> tuple[float, Floats, Floats, Floats] | None:
    """A row's score; and [V] without each set, of it alone, and its fraction of the variance. None without a score.

    shares: [steps, layers, heads]. counted: [steps, layers] of the score. sets: [V, layers, heads] of scored layers.
    """
    window, layers = scored.score_range.window, slice(*scored.score_range.layers(shares.shape[1]))
    steps = slice(window.start, min(window.end, n_steps) + 1)
    counts = counted[steps, layers]
    if not counts.any():
        return None
    values = shares[steps, layers].astype(np.float64)
    deviation = np.where(counts[..., None], values - values.mean(axis=2, keepdims=True), 0.0)
    squares = (deviation**2).sum(axis=2)
    # [V, steps, layers] of the chosen heads; of the others by difference, as a layer's deviations sum to zero.
    chosen = sets.astype(np.float64)
    n, chosen_squares = sets.sum(axis=2)[:, None], np.einsum("slh,vlh->vsl", deviation**2, chosen)
    left = shares.shape[2] - n
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_left = -np.einsum("slh,vlh->vsl", deviation, chosen) / left
        without = np.sqrt(np.maximum((squares - chosen_squares) / left - mean_left**2, 0))
        alone = np.sqrt(chosen_squares / n)
    return (
        float(np.sqrt(squares / shares.shape[2])[counts].mean()),
        _mean(without, counts & (left >= 2)),
        _mean(alone, counts & (n >= 1)),
        chosen_squares.sum(axis=(1, 2)) / max(squares.sum(), np.finfo(np.float64).tiny),
    )


def _mean(values: Floats, counted: Bools) -> Floats:
    """Mean of [V, steps, layers] over the counted steps and layers; NaN if there are none."""
    n = counted.sum(axis=(1, 2))
    total = np.where(counted, values, 0.0).sum(axis=(1, 2))
    return np.divide(total, n, out=np.full(len(n), np.nan), where=n > 0)


def _spearman(one: Floats, other: Floats) -> float:
    from scipy.stats import spearmanr

    valid = np.isfinite(other)
    if valid.sum() < 2 or np.ptp(one[valid]) == 0 or np.ptp(other[valid]) == 0:
        return float("nan")
    return float(spearmanr(one[valid], other[valid]).statistic)


def _over_draws(values: Sequence[float] | Floats) -> Interval:
    return Interval(float(np.mean(values)), *(percentile_bounds(values, np.inf) or ()))


def _cell(interval: Interval) -> str:
    bounds = "" if interval.bounds is None else f" [{interval.low:.3f}, {interval.high:.3f}]"
    return f"{interval.value:.3f}{bounds}"


def _to_json(interval: Interval) -> dict[str, Any]:
    return {"value": interval.value, "interval": interval.bounds}
