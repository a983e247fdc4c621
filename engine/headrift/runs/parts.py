"""The files of a run's rows: scored rows in part-*.parquet, the others in rejects-*.parquet."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from headrift.results import ScoreResult
from headrift.runs.folder import publish, temporary_path
from headrift.runs.journal import FinishedShard
from headrift.signals import signals

_ROW_GROUP_BYTES = 32 << 20  # rows are kept in memory up to this, then written as a row group
_SHARD_FILE = re.compile(r"\.?(?:part|rejects)-(\d{5,})\.parquet(?:\.tmp)?")

_STRING, _FLOAT, _COUNT = pa.string(), pa.float64(), pa.int32()
_FIRST_COLUMNS: dict[str, pa.DataType] = {
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
}
# The columns of the registered signals come between these.
_LAST_COLUMNS: dict[str, pa.DataType] = {
    "flags": pa.list_(_STRING),
    "instability": pa.list_(pa.float32()),
}
# Columns that --save adds, by its name there.
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
Complete = Callable[[pa.RecordBatch], pa.RecordBatch]


class InputRow(Protocol):
    """What tells a row of the input from all others."""

    @property
    def source(self) -> str: ...
    @property
    def row(self) -> int: ...
    @property
    def id(self) -> str: ...


def column_types(save: Iterable[str] = ()) -> dict[str, pa.DataType]:
    """Return the parts' columns with their types; `save` names what --save adds, KeyError for another name."""
    types = {**_FIRST_COLUMNS, **dict.fromkeys(_signal_names(), _FLOAT), **_LAST_COLUMNS}
    save = set(save)
    if unknown := save - set(_SAVED):
        raise KeyError(f"nothing is saved by the name {sorted(unknown)}; there are {', '.join(_SAVED)}")
    for name, added in _SAVED.items():
        types |= added if name in save else {}
    return types


def _signal_names() -> list[str]:
    return [entry.name for entry in signals(column=True)]


def part_schema(save: Iterable[str], *, layers: int, heads: int, regions: Sequence[str]) -> pa.Schema:
    """Make the schema of a scoring run's parts.

    The metadata, JSON under b"headrift", holds `layers`, `heads`, `regions` and the `shapes` of the flattened columns.
    """
    types = column_types(save)
    shapes = {name: shape for name, shape in _SHAPES.items() if name in types}
    metadata = {"layers": layers, "heads": heads, "regions": list(regions), "shapes": shapes}
    return pa.schema(types, metadata={b"headrift": json.dumps(metadata).encode()})


def record(row: Mapping[str, Any], result: ScoreResult) -> Record:
    """Convert a result to the columns of a part, those of every --save included.

    Args:
        row: Columns that are the input row's: id, source, row, label, category, group and prompt.
        result: What scoring it gave. Its arrays are flattened, step 0 first.
    """
    stats, heads, mass = result.logit_stats, result.focus_heads, result.mass
    return {
        **row,
        "system_hash": result.system_hash,
        "score": result.score,
        "reason": result.reason,
        "n_steps": result.n_steps,
        "n_scored": result.n_scored,
        "prompt_tokens": result.prompt_tokens,
        "system_tokens": result.system_tokens,
        "answer_tokens": result.answer_tokens,
        **{name: result.signals.get(name) for name in _signal_names()},
        "flags": result.flags,
        "text": result.text,
        "instability": result.instability.ravel(),
        "shares": result.shares.astype(np.float16).ravel(),
        "mass": None if mass is None else mass.ravel(),
        "focus_heads": None if heads is None else heads.ravel(),
        "entropy_steps": None if stats is None else np.ascontiguousarray(stats[:, 0]),
    }


class ShardFiles:
    """Writes a shard's rows to part-<number>.parquet and rejects-<number>.parquet; a file without rows is left out.

    Until `publish` nothing has these names; `discard` drops what was added. `complete` adds columns to a batch before
    it is written. OSError if the disk fails.
    """

    def __init__(self, folder: Path, number: int, schema: pa.Schema, complete: Complete = lambda batch: batch) -> None:
        self._number = number
        self._part = _RecordFile(folder / f"part-{number:05d}.parquet", schema, complete)
        self._rejects = _RecordFile(folder / f"rejects-{number:05d}.parquet", _REJECTS)

    def add(self, scored: Record) -> None:
        """Add a scored row (see `record`)."""
        self._part.append(scored)

    def reject(self, row: InputRow, reason: str, detail: str) -> None:
        """Add a row that has no place in the parts, and why."""
        self._rejects.append({"source": row.source, "row": row.row, "id": row.id, "reason": reason, "detail": detail})

    @property
    def rows(self) -> int:
        """Rows added so far."""
        return self._part.rows + self._rejects.rows

    def publish(self) -> FinishedShard:
        """Complete both files and give them their names."""
        part_bytes, rejects_bytes = self._part.publish(), self._rejects.publish()
        return FinishedShard(self._number, self._part.rows, self._rejects.rows, part_bytes, rejects_bytes)

    def discard(self) -> None:
        """Remove what was written of an unfinished shard."""
        self._part.discard()
        self._rejects.discard()


class _RecordFile:
    """A Parquet file that is written record by record; without a record there is no file."""

    def __init__(self, path: Path, schema: pa.Schema, complete: Complete = lambda batch: batch) -> None:
        self._path, self._schema, self._complete = path, schema, complete
        self.rows = 0
        self._pending: list[Record] = []
        self._pending_bytes = 0
        self._writer: pq.ParquetWriter | None = None

    def append(self, added: Record) -> None:
        kept = {name: added[name] for name in self._schema.names}
        self._pending.append(kept)
        self.rows += 1
        self._pending_bytes += sum(value.nbytes for value in kept.values() if isinstance(value, np.ndarray))
        if self._pending_bytes >= _ROW_GROUP_BYTES:
            self._flush()

    def publish(self) -> int:
        """Write what is pending and name the file; return its bytes, 0 without rows."""
        if not self.rows:
            return 0
        self._flush()
        assert self._writer is not None
        self._writer.close()
        return publish(self._path)

    def discard(self) -> None:
        if self._writer is not None:
            try:
                self._writer.close()  # which writes a footer, and on a full disk fails once more
            except OSError:
                pass
        temporary_path(self._path).unlink(missing_ok=True)

    def _flush(self) -> None:
        if not self._pending:
            return
        columns = [_column([one[field.name] for one in self._pending], field.type) for field in self._schema]
        batch = self._complete(pa.record_batch(columns, schema=self._schema))
        if self._writer is None:
            self._writer = pq.ParquetWriter(temporary_path(self._path), batch.schema, compression="zstd")
        self._writer.write_batch(batch)
        self._pending, self._pending_bytes = [], 0


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    """Make a column; lists of numbers come as arrays, which are joined without going through Python objects."""
    if not pa.types.is_list(kind) or kind.value_type == _STRING:
        return pa.array(values, kind)
    sizes = [0 if value is None else value.size for value in values]
    offsets = pa.array(np.cumsum([0, *sizes]), pa.int32())
    present = [value for value in values if value is not None]
    flat = pa.array(np.concatenate(present) if present else [], kind.value_type)
    return pa.ListArray.from_arrays(offsets, flat, type=kind, mask=pa.array([value is None for value in values]))


def remove_unfinished(folder: Path, finished: Collection[int]) -> None:
    """Remove what an interrupted run left of shards that are not finished."""
    for path in folder.iterdir():
        match = _SHARD_FILE.fullmatch(path.name)
        if match and (int(match[1]) not in finished or path.name.startswith(".")):
            path.unlink()
