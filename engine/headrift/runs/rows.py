"""Rows of finished runs as calibration and reports need them: what is known of each, and its instability on demand.

Rows are numbered over all runs, in their order. Per row some 70 bytes are kept; instability is read in batches, and
kept of selected rows only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from headrift.runs.reading import ModelIdentity, RunError, ScoreRun
from headrift.signal import ScoreRange, Window
from headrift.signals import signals
from headrift.stats import Floats, Ints

BENIGN, ATTACK, UNLABELLED = 0, 1, 2
HARD = "hard"  # categories of benign prompts that are made to be mistaken for attacks begin so
_CLASSES = {"benign": BENIGN, "attack": ATTACK, None: UNLABELLED}
_TEXTS = ("label", "group", "system_hash", "category")


@dataclass(frozen=True, slots=True)
class Rows:
    """What is known of each row; arrays are [rows].

    Attributes:
        label: BENIGN, ATTACK or UNLABELLED.
        group, prompt: numbers, the same for rows of the same group, and of the same group and system prompt.
        category: number of the category, -1 for none.
        counts: by name of the signal (`prompt_tokens`, ...), -1 if not known.
        signals: the runs' own columns by name, over their own windows, NaN for none; those that some row has.
        fingerprint: hash of labels, groups, lengths and scores.
    """

    label: NDArray[np.int8]
    group: Ints
    prompt: Ints
    category: NDArray[np.int32]
    counts: Mapping[str, NDArray[np.int32]]
    signals: Mapping[str, NDArray[np.float32]]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.label)


def check_alike(runs: Sequence[ScoreRun]) -> None:
    """Check that the runs' scores can be compared, and that no run is named twice. RunError otherwise."""
    first = runs[0]
    for run in runs[1:]:
        differences = first.model.differences(run.model)
        differences += ["whether answers were replayed"] * (run.replay != first.replay)
        if differences:
            raise RunError(
                f"{first.name} and {run.name} differ in {', '.join(differences)}: their scores cannot be compared; "
                "use one at a time"
            )
    names = [run.name for run in runs]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise RunError(f"{sorted(twice)[0]} is given twice: name each run once")


def read_rows(runs: Sequence[ScoreRun]) -> Rows:
    """Read all that is known of every row but its instability. RunError if there are no rows."""
    counts = [entry.name for entry in signals(length=True)]
    measured = [entry.name for entry in signals(column=True, compared=True)]
    digests = [hashlib.sha256() for _ in range(4)]
    categories: dict[str | None, int] = {None: -1}
    blocks: dict[str, list[NDArray[Any]]] = {}
    for run in runs:
        for batch in run.batches([*_TEXTS, *counts, "score", *measured]):
            group = batch.column("group").to_pylist()
            system = batch.column("system_hash").to_pylist()
            columns: dict[str, NDArray[Any]] = {
                "label": np.array([_CLASSES[label] for label in batch.column("label").to_pylist()], np.int8),
                "group": np.array([int(text, 16) for text in group], np.uint64),
                "system": np.array([int(text or "0", 16) for text in system], np.uint64),
                "category": np.array(
                    [categories.setdefault(text, len(categories) - 1) for text in batch.column("category").to_pylist()],
                    np.int32,
                ),
                **{name: np.nan_to_num(_floats(batch, name), nan=-1).astype(np.int32) for name in counts},
                **{name: _floats(batch, name).astype(np.float32) for name in measured},
            }
            contents = (
                "".join(group).encode(),
                columns["label"].tobytes(),
                columns["n_steps"].tobytes(),
                _floats(batch, "score").tobytes(),
            )
            for digest, content in zip(digests, contents):
                digest.update(content)
            for name, column in columns.items():
                blocks.setdefault(name, []).append(column)
    joined = {name: np.concatenate(blocks.pop(name)) for name in list(blocks)}
    if not joined:
        raise RunError("the runs have no rows: there is nothing to calibrate on")
    group, system = (np.unique(joined.pop(name), return_inverse=True)[1] for name in ("group", "system"))
    return Rows(
        joined["label"],
        group,
        np.unique(group * (int(system.max()) + 1) + system, return_inverse=True)[1],
        joined["category"],
        {name: joined[name] for name in counts},
        {name: joined[name] for name in measured if not np.isnan(joined[name]).all()},
        hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest(),
    )


def read_instability(
    runs: Sequence[ScoreRun], selected: Ints, steps: int
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Read the instability of selected rows, batch by batch.

    Args:
        runs: of one model.
        selected: [n] numbers of the rows, ascending.
        steps: the last step to read.

    Yields:
        Which of the selected rows, and [rows, steps + 1, layers] with NaN after an answer's end.
    """
    layers = runs[0].model.layers
    for first, instability in _batches_of_instability(runs, layers):
        start, stop = np.searchsorted(selected, [first, first + len(instability)])
        if start == stop:
            continue
        block = np.full((stop - start, steps + 1, layers), np.nan, np.float32)
        for target, row in zip(block, selected[start:stop]):
            recorded = instability[row - first][: steps + 1]
            target[: len(recorded)] = recorded
        yield slice(start, stop), block


def exact_scores(runs: Sequence[ScoreRun], rows: Rows, requests: Sequence[tuple[ScoreRange, Ints]]) -> list[Floats]:
    """Score rows by the definition, in one pass.

    Args:
        runs, rows: the runs and all their rows.
        requests: ranges, each with the numbers [n] of the rows to score over it, ascending.

    Returns:
        For each request the scores [n], NaN for none.
    """
    n_steps = rows.counts["n_steps"]
    results = [np.full(len(selected), np.nan) for _, selected in requests]
    for first, instability in _batches_of_instability(runs, runs[0].model.layers):
        for (score_range, selected), scores in zip(requests, results):
            start, stop = np.searchsorted(selected, [first, first + len(instability)])
            for place in range(start, stop):
                row = int(selected[place])
                value = score_range.score(instability[row - first], int(n_steps[row])).value
                if value is not None:
                    scores[place] = value
    return results


def _batches_of_instability(runs: Sequence[ScoreRun], layers: int) -> Iterator[tuple[int, list[NDArray[np.float32]]]]:
    """The number of each batch's first row, and its rows' instability [recorded steps, layers]."""
    first = 0
    for run in runs:
        for batch in run.batches(["instability"]):
            column = batch.column(0)
            ends = np.cumsum(column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False))
            flat = column.flatten().to_numpy(zero_copy_only=False)
            yield first, [flat[start:end].reshape(-1, layers) for start, end in zip([0, *ends[:-1]], ends)]
            first += batch.num_rows


def _floats(batch: pa.RecordBatch, name: str) -> Floats:
    """A column as floats, NaN for null or if the run does not have it."""
    if name not in batch.schema.names:
        return np.full(batch.num_rows, np.nan)
    values: Floats = batch.column(name).cast(pa.float64()).to_numpy(zero_copy_only=False)
    return values


# What the original's gather.py wrote: a folder per prompt with inter_head_std.csv, layers x time, column 0 prefill.
# Folders are <root>/benign|attacks/<slug>__<time>/ or <root>/baseline|tests/<slug>__<time>/; no model is named in them.

_CSV = "inter_head_std.csv"
_CSV_LABELS = {"benign": "benign", "baseline": "benign", "attacks": "attack", "tests": "attack"}


def open_csv(root: Path) -> ScoreRun:
    """All prompts below a folder of CSV files, as a run: its window is all steps that any answer has.

    Raises:
        RunError: There are no such files, or they do not go together.
    """
    files = sorted(root.rglob(_CSV))
    if not files:
        raise RunError(f"--import-csv {root} has no {_CSV}: give the folder that gather.py wrote its folders to")
    matrices = [_read_matrix(path) for path in files]
    layers = {len(matrix): path for matrix, path in zip(matrices, files)}
    if len(layers) > 1:
        counts = ", ".join(f"{n} in {path}" for n, path in layers.items())
        raise RunError(f"--import-csv {root} has different numbers of layers ({counts}): one model at a time")
    steps = max(matrix.shape[1] for matrix in matrices) - 1
    if not steps:
        raise RunError(f"--import-csv {root} has no step after the prefill: there is nothing to score")
    score_range = ScoreRange(Window(1, steps))
    rows = [_csv_row(path, matrix, score_range) for path, matrix in zip(files, matrices)]
    table = pa.table({name: [row[name] for row in rows] for name in rows[0]})

    def batches(names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        nothing = pa.nulls(len(table), pa.float64())
        columns = {name: table[name] if name in table.column_names else nothing for name in names}
        yield from pa.table(columns).to_batches()

    unknown = dict.fromkeys(("name", "fingerprint", "dtype", "heads", "chat_template_sha256"))
    return ScoreRun(str(root), ModelIdentity(layers=next(iter(layers)), **unknown), steps, score_range, False, batches)


def _read_matrix(path: Path) -> NDArray[np.float32]:
    """[layers, steps + 1]"""
    try:
        matrix = np.loadtxt(path, np.float32, delimiter=",", ndmin=2)
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}): it must be numbers, a line per layer") from error
    if not matrix.size:
        raise RunError(f"{path} is empty: remove its folder, or write it again")
    return matrix


def _csv_row(path: Path, matrix: NDArray[np.float32], score_range: ScoreRange) -> dict[str, object]:
    """The columns of a part that calibration reads."""
    n_steps = matrix.shape[1] - 1
    instability = np.ascontiguousarray(matrix.T)
    text = path.parent.name.rpartition("__")[0] or path.parent.name
    about = path.parent / "meta.json"
    if about.is_file():
        text = json.loads(about.read_text(encoding="utf-8")).get("user_prompt") or text
    return {
        "label": _CSV_LABELS.get(path.parent.parent.name),
        "group": hashlib.sha256(text.encode()).hexdigest()[:16],
        "score": score_range.score(instability, n_steps).value,
        "n_steps": n_steps,
        "answer_tokens": n_steps + 1,
        "instability": instability.ravel(),
    }
