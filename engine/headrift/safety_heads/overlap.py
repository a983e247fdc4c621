"""Overlap of two runs' leading heads: two models of one family, two query sets, two kinds of ablation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from headrift.runs.folder import JobError
from headrift.safety_heads.ranking import head_scores
from headrift.safety_heads.ships import Head


@dataclass(frozen=True, slots=True)
class Overlap:
    """What the first `top` heads of two rankings of the same `heads` heads share.

    shared: heads in both, in the first ranking's order. jaccard: shared over all that either has. by_chance: how many
    two random rankings share on average; p_value: how often they share as many or more. rank_correlation: Spearman's,
    of all heads.
    """

    heads: int
    top: int
    shared: list[Head]
    jaccard: float
    by_chance: float
    p_value: float
    rank_correlation: float


def overlap(first: Path, second: Path, top: int, label: str | None = None) -> Overlap:
    """Compare two finished runs of `headrift heads ships` or `sahara` (by its first step).

    Args:
        top: number of leading heads of each run.
        label: compare rankings over the queries with this label only (ships).

    Raises:
        JobError: a run is not finished, or the two do not have the same heads, or `top` is out of range.
    """
    from scipy.stats import hypergeom, spearmanr

    one, other = head_scores(first, label), head_scores(second, label)
    if one.keys() != other.keys():
        raise JobError(
            f"{first} and {second} have different heads ({len(one)} and {len(other)}): compare models with the same "
            "layers and heads, and runs with the same --heads"
        )
    n = len(one)
    if not 1 <= top < n:
        raise JobError(f"--top {top}: the runs have {n} heads; give 1 to {n - 1}")
    leading = [sorted(scores, key=lambda head: -scores[head])[:top] for scores in (one, other)]
    shared = [head for head in leading[0] if head in leading[1]]
    return Overlap(
        heads=n,
        top=top,
        shared=shared,
        jaccard=len(shared) / len({*leading[0], *leading[1]}),
        by_chance=top * top / n,
        p_value=float(hypergeom.sf(len(shared) - 1, n, top, top)),
        rank_correlation=float(spearmanr(list(one.values()), [other[head] for head in one]).statistic),
    )


def table(result: Overlap) -> str:
    """The overlap as a table of text, with a verdict on whether chance explains it."""
    shared = ", ".join(f"{layer}:{head}" for layer, head in result.shared) or "none"
    verdict = "more than by chance" if result.p_value < 0.05 else "may be chance"
    rows = (
        (f"first {result.top} of {result.heads} heads, shared", f"{len(result.shared)}", shared),
        ("shared by two random rankings", f"{result.by_chance:.1f}", f"p = {result.p_value:.2g}: {verdict}"),
        ("Jaccard", f"{result.jaccard:.2f}", ""),
        ("rank correlation of all heads", f"{result.rank_correlation:.3f}", ""),
    )
    return "\n".join(f"{name:<36}{value:>7}  {note}".rstrip() for name, value, note in rows)
