"""Heads in the order of their scores over many queries, and how far the queries agree on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# A head is among the first of a query's heads if it is one of so many.
FIRST = 10


@dataclass(frozen=True, slots=True)
class RankedHead:
    """A head's scores over the queries, in nats. first_of: the number of queries of whose first heads it is one."""

    rank: int
    layer: int
    head: int
    mean: float
    sd: float
    low: float
    median: float
    high: float
    first_of: int

    def numbers(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def rank(scores: NDArray[np.float64]) -> list[RankedHead]:
    """The heads of scores [queries, layers, heads], NaN for heads that were not asked for, by their mean, most first.

    sd is the population's; low, median and high are the quartiles.
    """
    asked = np.argwhere(np.isfinite(scores[0]))
    of_head = scores[:, asked[:, 0], asked[:, 1]]
    order = np.argsort(-of_head.mean(axis=0), kind="stable")
    first = np.zeros(len(asked), int)
    for row in np.argsort(-of_head, axis=1, kind="stable")[:, :FIRST]:
        first[row] += 1
    low, median, high = np.quantile(of_head, (0.25, 0.5, 0.75), axis=0)
    return [
        RankedHead(
            rank=place,
            layer=int(asked[i, 0]),
            head=int(asked[i, 1]),
            mean=float(of_head[:, i].mean()),
            sd=float(of_head[:, i].std()),
            low=float(low[i]),
            median=float(median[i]),
            high=float(high[i]),
            first_of=int(first[i]),
        )
        for place, i in enumerate(order, 1)
    ]


def agreement(scores: NDArray[np.float64]) -> float | None:
    """The mean of Spearman's rank correlation of the heads' scores over all pairs of queries; None for one query.

    It is not counted for a query whose heads all score alike.
    """
    from scipy.stats import rankdata

    ranks = rankdata(scores[:, np.isfinite(scores[0])], axis=1)
    ranks = ranks[ranks.std(axis=1) > 0]
    if len(ranks) < 2:
        return None
    correlations = np.corrcoef(ranks)
    return float(correlations[np.triu_indices(len(ranks), 1)].mean())


def table(ranked: Sequence[RankedHead], queries: int, top: int) -> str:
    """The first heads, in 80 columns."""
    lines = ["rank  layer  head  mean KL (nats)        sd    median  among the first ten of"]
    lines += [
        f"{h.rank:>4}  {h.layer:>5}  {h.head:>4}  {h.mean:>14.6f}  {h.sd:>8.6f}  {h.median:>8.6f}  "
        f"{h.first_of} of {queries} queries"
        for h in ranked[:top]
    ]
    return "\n".join(lines)
