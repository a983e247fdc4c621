"""Rankings of heads: over many queries, and as the folders of finished runs contain them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrift.runs.folder import JobError
from headrift.safety_heads.ships import Head

SHIPS_FILE, SAHARA_FILE = RESULT_FILES = ("ships.json", "sahara.json")
TOP_OF_QUERY = 10


@dataclass(frozen=True, slots=True)
class RankedHead:
    """A head's scores over the queries, in nats: mean, population sd and quartiles.

    first_of: number of queries for which the head is among the first TOP_OF_QUERY.
    """

    rank: int
    layer: int
    head: int
    mean: float
    sd: float
    low: float
    median: float
    high: float
    first_of: int


def rank(scores: NDArray[np.float64]) -> list[RankedHead]:
    """Order heads by their mean score, highest first.

    Args:
        scores: [queries, layers, heads], NaN for heads that were not ablated.
    """
    heads = np.argwhere(np.isfinite(scores[0]))
    by_head = scores[:, heads[:, 0], heads[:, 1]]
    order = np.argsort(-by_head.mean(axis=0), kind="stable")
    first_of = np.zeros(len(heads), int)
    for leading in np.argsort(-by_head, axis=1, kind="stable")[:, :TOP_OF_QUERY]:
        first_of[leading] += 1
    low, median, high = np.quantile(by_head, (0.25, 0.5, 0.75), axis=0)
    return [
        RankedHead(
            rank=place,
            layer=int(heads[i, 0]),
            head=int(heads[i, 1]),
            mean=float(by_head[:, i].mean()),
            sd=float(by_head[:, i].std()),
            low=float(low[i]),
            median=float(median[i]),
            high=float(high[i]),
            first_of=int(first_of[i]),
        )
        for place, i in enumerate(order, 1)
    ]


def agreement(scores: NDArray[np.float64]) -> float | None:
    """Mean Spearman correlation of the heads' scores over all pairs of queries; None with fewer than two queries.

    Queries whose heads all have the same score are left out.
    """
    from scipy.stats import rankdata

    ranks = rankdata(scores[:, np.isfinite(scores[0])], axis=1)
    ranks = ranks[ranks.std(axis=1) > 0]
    if len(ranks) < 2:
        return None
    correlations = np.corrcoef(ranks)
    return float(correlations[np.triu_indices(len(ranks), 1)].mean())


def table(ranked: Sequence[RankedHead], queries: int, top: int) -> str:
    """The first `top` heads as text of at most 80 columns."""
    lines = ["rank  layer  head  mean KL (nats)        sd    median  among the first ten of"]
    lines += [
        f"{h.rank:>4}  {h.layer:>5}  {h.head:>4}  {h.mean:>14.6f}  {h.sd:>8.6f}  {h.median:>8.6f}  "
        f"{h.first_of} of {queries} queries"
        for h in ranked[:top]
    ]
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class LeadingHeads:
    """The heads that matter most in a finished run: first of a ranking (ships) or members of a group (sahara).

    available: number of heads that the run has. kind, epsilon: how heads were ablated. model: its fingerprint.
    """

    heads: tuple[Head, ...]
    available: int
    kind: str
    epsilon: float
    model: str


@contextmanager
def open_results(run: Path) -> Iterator[dict[str, Any]]:
    """Read the results of a finished run of `headrift heads ships` or `sahara`; those of `sahara` have "steps".

    Raises:
        JobError: `run` is not the folder of a finished run, or what the `with` block looks for is not in it.
    """
    path = next((run / name for name in RESULT_FILES if (run / name).is_file()), None)
    if path is None:
        raise JobError(f"{run} has no results of `headrift heads ships` or `sahara` (no {' or '.join(RESULT_FILES)})")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if "heads" not in results:
            raise JobError(f"{run} is not finished: rerun the command with --resume")
        yield results
    except (OSError, LookupError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise JobError(f"{path} cannot be read: {error!r}") from error


def leading_heads(run: Path, top: int | None = None) -> LeadingHeads:
    """The first `top` heads of a finished run, or all of them.

    Raises:
        JobError: see `open_results`; or the run has fewer heads.
    """
    with open_results(run) as results:
        settings = results["settings"]
        heads = tuple((int(head["layer"]), int(head["head"])) for head in results["heads"])
        how = str(settings["kind"]), float(settings["epsilon"]), str(settings["model"])
    if top is not None and top > len(heads):
        raise JobError(f"--top {top}: {run} has {len(heads)} heads; give {len(heads)} at most")
    return LeadingHeads(heads[:top], len(heads), *how)


def head_scores(run: Path, label: str | None = None) -> dict[Head, float]:
    """The score of each head of a finished run: its mean KL (ships) or its angle alone (sahara).

    Args:
        label: only from the queries with this label (ships).

    Raises:
        JobError: see `open_results`; or no query has the label.
    """
    with open_results(run) as results:
        if "steps" in results:
            ranked, score = results["steps"][0] if label is None else None, "angle"
        else:
            ranked, score = results["heads"] if label is None else results.get("heads_by_label", {}).get(label), "mean"
        if ranked is None:
            raise JobError(f"{run} has no queries with the label {label}: leave --label out")
        return {(head["layer"], head["head"]): head[score] for head in ranked}
