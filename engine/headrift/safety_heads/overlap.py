"""Whether two runs find the same heads: two models of one family, two query sets, two kinds of ablation."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headrift.runs.folder import JobError
from headrift.safety_heads import job
from headrift.safety_heads.leading import found_by
from headrift.safety_heads.ships import Head


@dataclass(frozen=True, slots=True)
class Overlap:
    """What the first `top` heads of two rankings of the same `heads` heads share.

    shared: the heads that both have, in the first one's order. jaccard: shared over all that either has. by_chance: how
    many two random rankings would share on average, and p_value: how often as many or more. rank_correlation: of all
    heads, Spearman's.
    """

    heads: int
    top: int
    shared: list[Head]
    jaccard: float
    by_chance: float
    p_value: float
    rank_correlation: float

    def numbers(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def overlap(first: Path, second: Path, top: int, label: str | None = None) -> Overlap:
    """Compare what two runs of `headrift heads ships` found, or of `sahara` in its first step. label: of `ships`, by
    the queries with this label alone.

    JobError where a run is not finished, or the two did not score the same heads, or there are fewer than `top`.
    """
    from scipy.stats import hypergeom, spearmanr

    one, other = _scores(first, label), _scores(second, label)
    if one.keys() != other.keys():
        raise JobError(
            f"{first} and {second} scored different heads ({len(one)} and {len(other)}): compare models with the same "
            "layers and heads, and runs with the same --heads"
        )
    n = len(one)
    if not 1 <= top < n:
        raise JobError(f"--top {top}: the runs scored {n} heads, so that 1 to {n - 1} can be compared")
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


def _scores(run: Path, label: str | None) -> dict[Head, float]:
    """The score of each head of a finished run: its mean KL, or the angle of the head alone."""
    with found_by(run) as (name, found):
        if name == job.SETTINGS:
            ranked, score = found["heads"] if label is None else found.get("heads_by_label", {}).get(label), "mean"
        else:
            ranked, score = found["steps"][0] if label is None else None, "angle"
        if ranked is None:
            raise JobError(f"{run} has no queries with the label {label}: leave --label out")
        return {(head["layer"], head["head"]): head[score] for head in ranked}
