"""Finished runs as calibration reads them: what is known of each row, and its instability when it is asked for.

Rows are numbered over all runs, in their order. Per row some 70 bytes are kept; instability is read in batches, and
only of rows that are wanted is anything kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from headrift.calibration.settings import CalibrationError
from headrift.runs.reading import ScoreRun as Run
from headrift.runs.reading import open_run
from headrift.signal import ScoreRange

__all__ = ["Run", "open_run"]

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]

BENIGN, ATTACK, UNLABELLED = 0, 1, 2
HARD = "hard"  # categories of benign prompts that are made to be mistaken for attacks begin so
_CLASSES = {"benign": BENIGN, "attack": ATTACK, None: UNLABELLED}
_TEXTS = ("label", "group", "system_hash", "category")
_COUNTS = ("n_steps", "prompt_tokens", "answer_tokens")
# What else a run measured, over its own window; a column of nulls is no signal.
SIGNALS = ("system_share", "head_agreement", "focus", "entropy")


@dataclass(frozen=True, slots=True)
class Rows:
    """Of each row: label (BENIGN, ATTACK or UNLABELLED), group, prompt (group and system prompt together) and category
    (numbers, alike for alike; -1 for none), counts (-1 where not known) and other signals (NaN where there are none).
    fingerprint: of all of it."""

    label: NDArray[np.int8]
    group: Ints
    prompt: Ints
    category: NDArray[np.int32]
    counts: Mapping[str, NDArray[np.int32]]
    signals: Mapping[str, NDArray[np.float32]]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.label)


def check_alike(runs: Sequence[Run]) -> None:
    """CalibrationError, saying what differs, unless the runs' scores can be compared."""
    first = runs[0]
    for run in runs[1:]:
        differ = first.model.differences(run.model) + ["whether answers were replayed"] * (run.replay != first.replay)
        if differ:
            raise CalibrationError(
                f"{first.name} and {run.name} differ in {', '.join(differ)}: their scores cannot be compared; "
                "take each alone"
            )
    names = [run.name for run in runs]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise CalibrationError(f"{sorted(twice)[0]} is given twice: name each run once")


def read_rows(runs: Sequence[Run]) -> Rows:
    """What is known of every row but its instability."""
    digests = [hashlib.sha256() for _ in range(4)]
    categories: dict[str | None, int] = {None: -1}
    found: dict[str, list[NDArray[Any]]] = {}
    for run in runs:
        for batch in run.batches([*_TEXTS, *_COUNTS, "score", *SIGNALS]):
            label = [_CLASSES[of] for of in batch.column("label").to_pylist()]
            group = batch.column("group").to_pylist()
            columns: dict[str, NDArray[Any]] = {
                "label": np.array(label, np.int8),
                "group": np.array([int(text, 16) for text in group], np.uint64),
                "system": np.array(
                    [int(text or "0", 16) for text in batch.column("system_hash").to_pylist()], np.uint64
                ),
                "category": _numbered(batch.column("category"), categories),
                **{name: np.nan_to_num(_numeric(batch, name), nan=-1).astype(np.int32) for name in _COUNTS},
                **{name: _numeric(batch, name).astype(np.float32) for name in SIGNALS},
            }
            score = _numeric(batch, "score")
            of_rows = (
                "".join(group).encode(),
                columns["label"].tobytes(),
                columns["n_steps"].tobytes(),
                score.tobytes(),
            )
            for digest, content in zip(digests, of_rows):
                digest.update(content)
            for name, column in columns.items():
                found.setdefault(name, []).append(column)
    joined = {name: np.concatenate(found.pop(name)) for name in list(found)}
    if not joined:
        raise CalibrationError("the runs have no rows: there is nothing to calibrate on")
    group, system = (np.unique(joined.pop(name), return_inverse=True)[1] for name in ("group", "system"))
    return Rows(
        joined["label"],
        group,
        np.unique(group * (int(system.max()) + 1) + system, return_inverse=True)[1],
        joined["category"],
        {name: joined[name] for name in _COUNTS},
        {name: joined[name] for name in SIGNALS if not np.isnan(joined[name]).all()},
        hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest(),
    )


def blocks(runs: Sequence[Run], wanted: Ints, steps: int) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """The instability of the wanted rows (numbers, ascending): which of them, and [rows, steps + 1, layers] with NaN
    after an answer's end."""
    layers = runs[0].model.layers
    for first, instability in _instability(runs, layers):
        start, stop = np.searchsorted(wanted, [first, first + len(instability)])
        if start == stop:
            continue
        block = np.full((stop - start, steps + 1, layers), np.nan, np.float32)
        for at, row in zip(block, wanted[start:stop]):
            recorded = instability[row - first][: steps + 1]
            at[: len(recorded)] = recorded
        yield slice(start, stop), block


def exact_scores(runs: Sequence[Run], rows: Rows, asked: Sequence[tuple[ScoreRange, Ints]]) -> list[Floats]:
    """For each cell and rows (numbers, ascending): their scores, by the definition; NaN for none. In one pass."""
    n_steps = rows.counts["n_steps"]
    found = [np.full(len(wanted), np.nan) for _, wanted in asked]
    for first, instability in _instability(runs, runs[0].model.layers):
        for (cell, wanted), scores in zip(asked, found):
            start, stop = np.searchsorted(wanted, [first, first + len(instability)])
            for at in range(start, stop):
                row = int(wanted[at])
                value = cell.score(instability[row - first], int(n_steps[row])).value
                if value is not None:
                    scores[at] = value
    return found


def _instability(runs: Sequence[Run], layers: int) -> Iterator[tuple[int, list[NDArray[np.float32]]]]:
    """The number of each batch's first row, and its rows' instability [recorded steps, layers]."""
    first = 0
    for run in runs:
        for batch in run.batches(["instability"]):
            column = batch.column(0)
            ends = np.cumsum(column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False))
            flat = column.flatten().to_numpy(zero_copy_only=False)
            rows = [flat[start:end].reshape(-1, layers) for start, end in zip([0, *ends[:-1]], ends)]
            yield first, rows
            first += len(rows)


def _numbered(column: pa.Array, numbers: dict[str | None, int]) -> NDArray[np.int32]:
    """A number for each text, the same for the same one in all batches."""
    return np.array([numbers.setdefault(text, len(numbers) - 1) for text in column.to_pylist()], np.int32)


def _numeric(batch: pa.RecordBatch, name: str) -> Floats:
    """A column as floats, NaN for null."""
    values: Floats = batch.column(name).cast(pa.float64()).to_numpy(zero_copy_only=False)
    return values
