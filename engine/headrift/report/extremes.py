"""The rows worth a look: benign prompts that score highest, attacks that score lowest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headrift.report.gather import Floats, Gathered, Ints

MOST = 5
_NAMES = ("id", "source", "row", "label", "category", "n_steps", "flags", "instability")
_TEXTS = ("prompt", "text")


@dataclass(frozen=True, slots=True)
class Example:
    """A row: where it is from, its score, how many percent of the reference's scores are at most that, its instability
    [steps, layers], and its prompt and answer (None where not kept, or not wanted)."""

    id: str
    run: str
    source: str
    row: int
    category: str | None
    flags: Sequence[str]
    score: float
    percentile: float
    instability: Floats
    prompt: str | None
    answer: str | None


@dataclass(frozen=True, slots=True)
class Extremes:
    """suspicious: highest first, of class `highest`; quiet: attacks, lowest first. reference: the class that
    percentiles are of; without_score: attacks that have none."""

    highest: str
    reference: str
    suspicious: Sequence[Example]
    quiet: Sequence[Example]
    without_score: int


def extremes(of: Gathered, *, texts: bool) -> Extremes | None:
    """The most suspicious benign (or, without any, unlabelled) prompts and the quietest attacks; None without rows that
    have a score. texts: whether prompts and answers are wanted."""
    scores = of.score[of.samples.row]
    there = ~np.isnan(scores)
    scored = {label: np.flatnonzero(of.samples.mine(label) & there) for label in of.classes}
    reference = next((label for label in ("benign", "unlabelled", "attack") if len(scored.get(label, ()))), None)
    if reference is None:
        return None
    highest = "unlabelled" if "benign" not in of.classes else "benign"
    places = {
        "suspicious": _first(-scores, scored.get(highest, np.array([], int))),
        "quiet": _first(scores, scored.get("attack", np.array([], int))),
    }
    known = np.sort(scores[scored[reference]])
    wanted = [int(of.samples.row[at]) for chosen in places.values() for at in chosen]
    rows = _read(of, wanted, texts)
    found = {
        name: [_example(of, int(of.samples.row[at]), rows, known) for at in chosen] for name, chosen in places.items()
    }
    missing = int((of.samples.mine("attack") & ~there).sum())
    return Extremes(highest, reference, found["suspicious"], found["quiet"], missing)


def _first(keys: Floats, places: Ints) -> Ints:
    """The places with the smallest keys."""
    return places[np.argsort(keys[places], kind="stable")[:MOST]]


def _read(of: Gathered, wanted: Sequence[int], texts: bool) -> Mapping[int, Mapping[str, Any]]:
    """The columns of the wanted rows, by their numbers."""
    found, first = {}, 0
    for run in of.runs:
        for batch in run.batches([*_NAMES, *(_TEXTS if texts else ())]):
            for number in wanted:
                if first <= number < first + len(batch):
                    found[number] = batch.slice(number - first, 1).to_pylist()[0]
            first += len(batch)
    return found


def _example(of: Gathered, number: int, rows: Mapping[int, Mapping[str, Any]], known: Floats) -> Example:
    row = rows[number]
    score = float(of.score[number])
    layers = of.runs[0].model.layers
    return Example(
        id=row["id"],
        run=of.names[of.run_of[number]],
        source=row["source"],
        row=row["row"],
        category=row["category"],
        flags=list(row["flags"] or ()),
        score=score,
        percentile=float(np.searchsorted(known, score, side="right") / len(known) * 100),
        instability=np.array(row["instability"], np.float64).reshape(-1, layers),
        prompt=row.get("prompt"),
        answer=row.get("text"),
    )
