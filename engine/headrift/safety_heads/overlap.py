"""The leading heads of finished runs of `ships` and `sahara`, and what those of two runs share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrift.runs.folder import JobError
from headrift.safety_heads.ships import Head

SHIPS_FILE, SAHARA_FILE = RESULT_FILES = ("ships.json", "sahara.json")
QUERY_HASHES = "query_hashes"  # in these files' `about`: `jobs.text_hash` of each query


@contextmanager
def open_results(run: Path) -> Iterator[dict[str, Any]]:
    """Read the results of a finished run. JobError if there are none, or lack what the `with` block looks for."""
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


@dataclass(frozen=True, slots=True)
class LeadingHeads:
    """The heads that matter most in a finished run: first of a ranking (ships) or members of a group (sahara)."""

    heads: tuple[Head, ...]
    available: int  # heads that the run has
    kind: str  # how heads were ablated
    epsilon: float
    model: str  # its fingerprint
    chosen_on: frozenset[str] | None  # hashes of the queries that chose them; None for runs of earlier versions


def leading_heads(run: Path, top: int | None = None) -> LeadingHeads:
    """The first `top` heads of a finished run, or all. JobError as from `open_results`, or if the run has fewer."""
    with open_results(run) as results:
        settings = results["settings"]
        heads = tuple((int(head["layer"]), int(head["head"])) for head in results["heads"])
        how = str(settings["kind"]), float(settings["epsilon"]), str(settings["model"])
        hashes = results.get("about", {}).get(QUERY_HASHES)
    if top is not None and top > len(heads):
        raise JobError(f"--top {top}: {run} has {len(heads)} heads; give {len(heads)} at most")
    return LeadingHeads(heads[:top], len(heads), *how, None if hashes is None else frozenset(hashes))


def _head_scores(run: Path, label: str | None) -> dict[Head, float]:
    """The score of each head of a run: its mean KL (ships, of a label's queries) or its angle alone (sahara)."""
    with open_results(run) as results:
        ranked, score = (results["steps"][0], "angle") if "steps" in results else (results["heads"], "mean")
        if label is not None:
            ranked = results.get("heads_by_label", {}).get(label)
        if ranked is None:
            raise JobError(f"{run} has no queries with the label {label}: leave --label out")
        return {(head["layer"], head["head"]): head[score] for head in ranked}


@dataclass(frozen=True, slots=True)
class Overlap:
    """What the first `top` heads of two rankings of the same heads share.

    Attributes:
        heads: number of heads that are ranked.
        shared: heads in both, in the first ranking's order.
        jaccard: shared over all that either has.
        by_chance: how many two random rankings share on average.
        p_value: how often two random rankings share as many or more.
        rank_correlation: Spearman's, of all heads.
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

    one, other = _head_scores(first, label), _head_scores(second, label)
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
