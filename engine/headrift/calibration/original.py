"""What the original's gather.py wrote: a folder per prompt with inter_head_std.csv, layers x time, column 0 prefill.

Folders are <root>/benign|attacks/<slug>__<time>/ or <root>/baseline|tests/<slug>__<time>/. No model is named in them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from headrift import signal
from headrift.calibration.runs import SIGNALS, Run
from headrift.calibration.settings import CalibrationError
from headrift.runs.reading import ModelIdentity
from headrift.signal import ScoreRange

_FILE = "inter_head_std.csv"
_LABELS = {"benign": "benign", "baseline": "benign", "attacks": "attack", "tests": "attack"}


def open_csv(root: Path) -> Run:
    """All prompts below a folder, as a run: its window is all steps that any answer has, its layers the defaults.
    CalibrationError where there are none, or they do not go together."""
    files = sorted(root.rglob(_FILE))
    if not files:
        raise CalibrationError(
            f"--import-csv {root} holds no {_FILE}: give the folder that gather.py wrote its folders to"
        )
    matrices = [_matrix(path) for path in files]
    layers = {len(matrix): path for matrix, path in zip(matrices, files)}
    if len(layers) > 1:
        told = ", ".join(f"{n} in {path}" for n, path in layers.items())
        raise CalibrationError(f"--import-csv {root} holds different numbers of layers ({told}): one model at a time")
    steps = max(matrix.shape[1] for matrix in matrices) - 1
    if not steps:
        raise CalibrationError(f"--import-csv {root} holds no step after the prefill: there is nothing to score")
    cell = ScoreRange(signal.Window(1, steps))
    columns = [_row(path, matrix, cell) for path, matrix in zip(files, matrices)]
    table = pa.table({name: [row[name] for row in columns] for name in columns[0]})

    def batches(names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        missing = {name: pa.nulls(len(table), pa.float64()) for name in names if name not in table.column_names}
        given = {name: table[name] for name in names if name in table.column_names}
        yield from pa.table({**given, **missing}).select(names).to_batches()

    model = ModelIdentity(
        name=None, fingerprint=None, dtype=None, layers=next(iter(layers)), heads=None, chat_template_sha256=None
    )
    return Run(str(root), model, steps, cell, False, batches)


def _matrix(path: Path) -> NDArray[np.float32]:
    """[layers, steps + 1]"""
    try:
        matrix = np.loadtxt(path, np.float32, delimiter=",", ndmin=2)
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{path} cannot be read ({error}): it must be numbers, a line per layer") from error
    if not matrix.size:
        raise CalibrationError(f"{path} is empty: remove its folder, or write it anew")
    return matrix


def _row(path: Path, matrix: NDArray[np.float32], cell: ScoreRange) -> dict[str, object]:
    """The columns of a part that calibration reads."""
    n_steps = matrix.shape[1] - 1
    instability = np.ascontiguousarray(matrix.T)
    text = path.parent.name.rpartition("__")[0] or path.parent.name
    about = path.parent / "meta.json"
    if about.is_file():
        text = json.loads(about.read_text(encoding="utf-8")).get("user_prompt") or text
    return {
        "label": _LABELS.get(path.parent.parent.name),
        "category": None,
        "group": hashlib.sha256(text.encode()).hexdigest()[:16],
        "score": cell.score(instability, n_steps).value,
        "n_steps": n_steps,
        "prompt_tokens": None,
        "answer_tokens": n_steps + 1,
        "instability": instability.ravel(),
        **dict.fromkeys(SIGNALS),
    }
