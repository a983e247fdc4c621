"""The files of a run: scored rows in part-*.parquet, the others in rejects-*.parquet, and the journal of both.

The journal, an SQLite file, has the run's identity, which shards are finished, and the ids that their rows brought. The
ids have to be on disk (memory stays flat in the size of the corpus), and a shard and its ids have to be recorded
together or not at all: that is a transaction. SQLite's rollback journal with full fsync survives a kill and a full
disk, and needs no shared memory.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from headrift.results import ScoreResult
from headrift.runs.folder import LOCK, JobError, atomic_path, publish, temporary_path
from headrift.signals import signals

JOURNAL = "journal.sqlite"
_JOURNAL_FORMAT = 1
_TABLES = """
CREATE TABLE job (format INTEGER, identity TEXT);
CREATE TABLE shards (
    number INTEGER PRIMARY KEY, scored INTEGER, rejected INTEGER, part_bytes INTEGER, rejects_bytes INTEGER
);
CREATE TABLE ids (hash INTEGER PRIMARY KEY) WITHOUT ROWID;
"""
_ROW_GROUP_BYTES = 32 << 20  # rows are kept in memory up to this, then written as a row group
_SHARD_FILE = re.compile(r"\.?(?:part|rejects)-(\d{5,})\.parquet(?:\.tmp)?")

_STRING, _FLOAT, _COUNT = pa.string(), pa.float64(), pa.int32()
_FIRST_COLUMNS: dict[str, pa.DataType] = {
    "id": _STRING,
    "source": _STRING,
    "row": pa.int64(),
    "label": _STRING,
    "category": _STRING,
    "source_set": _STRING,
    "group": _STRING,
    "prompt_hash": _STRING,
    "answer_hash": _STRING,
    "minhash": pa.binary(),
    "system_hash": _STRING,
    "score": _FLOAT,
    "reason": _STRING,
    "n_steps": _COUNT,
    "n_scored": _COUNT,
    "prompt_tokens": _COUNT,
    "system_tokens": _COUNT,
    "answer_tokens": _COUNT,
}
# Those that are a result's attributes as they are.
_OF_RESULT = (*list(_FIRST_COLUMNS)[list(_FIRST_COLUMNS).index("system_hash") :], "flags", "text")
# The columns of the registered signals come between these.
_LAST_COLUMNS: dict[str, pa.DataType] = {
    "flags": pa.list_(_STRING),
    "instability": pa.list_(pa.float32()),
    "logit_shares": pa.list_(pa.float16()),
}
# Columns that --save adds, by its name there.
_SAVED: dict[str, dict[str, pa.DataType]] = {
    "shares": {"shares": pa.list_(pa.float16())},
    "mass": {"mass": pa.list_(pa.float32())},
    "focus": {"focus_heads": pa.list_(pa.float32())},
    "text": {"prompt": _STRING, "text": _STRING},
    "entropy": {"entropy_steps": pa.list_(pa.float32())},
}
_SHAPES = {  # blocks: step 0 and, unless only that was recorded, the mean over the window's steps
    "instability": ["n_steps + 1", "layers"],
    "logit_shares": ["blocks", "layers", "heads"],
    "shares": ["n_steps + 1", "layers", "heads"],
    "mass": ["n_steps + 1", "layers", "heads", "regions"],
    "focus_heads": ["layers", "heads"],
    "entropy_steps": ["n_steps + 1"],
}
_REJECTS = pa.schema({"source": _STRING, "row": pa.int64(), "id": _STRING, "reason": _STRING, "detail": _STRING})

Record = dict[str, Any]
Complete = Callable[[pa.RecordBatch], pa.RecordBatch]


@dataclass(frozen=True, slots=True)
class FinishedShard:
    """A finished shard: its scored and rejected rows, and its files' sizes in bytes, 0 for a file without rows."""

    number: int
    scored: int
    rejected: int
    part_bytes: int
    rejects_bytes: int

    @property
    def rows(self) -> int:
        return self.scored + self.rejected


def column_types(save: Iterable[str] = ()) -> dict[str, pa.DataType]:
    """Return the parts' columns with their types; `save` names what --save adds."""
    types = {**_FIRST_COLUMNS, **{entry.name: _FLOAT for entry in signals(column=True)}, **_LAST_COLUMNS}
    for name in sorted(save, key=list(_SAVED).index):
        types |= _SAVED[name]
    return types


def part_schema(save: Iterable[str], *, layers: int, heads: int, regions: Sequence[str]) -> pa.Schema:
    """Make the schema of a scoring run's parts.

    The metadata, JSON under b"headrift", holds `layers`, `heads`, `regions` and the `shapes` of the flattened columns.
    """
    types = column_types(save)
    shapes = {name: shape for name, shape in _SHAPES.items() if name in types}
    metadata = {"layers": layers, "heads": heads, "regions": list(regions), "shapes": shapes}
    return pa.schema(types, metadata={b"headrift": json.dumps(metadata).encode()})


def record(row: Mapping[str, Any], result: ScoreResult) -> Record:
    """Convert a result to the columns of a part, those of every --save included; arrays are flattened, step 0 first.

    `row` has the columns that are the input row's: those up to `minhash`, and prompt.
    """
    stats, heads, mass = result.logit_stats, result.focus_heads, result.mass
    return {
        **row,
        **{name: getattr(result, name) for name in _OF_RESULT},
        **{entry.name: result.signals.get(entry.name) for entry in signals(column=True)},
        "instability": result.instability.ravel(),
        "logit_shares": None if result.logit_shares is None else result.logit_shares.astype(np.float16).ravel(),
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
        self._part.append(scored)

    def reject(self, row: Any, reason: str, detail: str) -> None:
        """Add a row, with `source`, `row` and `id`, that has no place in the parts, and why."""
        self._rejects.append({"source": row.source, "row": row.row, "id": row.id, "reason": reason, "detail": detail})

    @property
    def rows(self) -> int:
        return self._part.rows + self._rejects.rows

    def publish(self) -> FinishedShard:
        part_bytes, rejects_bytes = self._part.publish(), self._rejects.publish()
        return FinishedShard(self._number, self._part.rows, self._rejects.rows, part_bytes, rejects_bytes)

    def discard(self) -> None:
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

    def append(self, record: Record) -> None:
        kept = {name: record[name] for name in self._schema.names}
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
            with suppress(OSError):  # closing writes a footer, and on a full disk fails once more
                self._writer.close()
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


class FolderLock:
    """Keeps other processes out of an output folder until `release`, or until this process ends.

    JobError if another process has the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK
        self._file = self._path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            other = self._file.read().strip() or "unknown"
            self._file.close()
            raise JobError(
                f"--out {folder} is in use by another run (process {other}): wait for it, stop it, or choose another "
                "folder"
            ) from None
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()

    def release(self) -> None:
        if not self._file.closed:
            self._path.unlink(missing_ok=True)
            self._file.close()


class Journal:
    """The open journal of a folder: a new one of a run with this identity, JSON, or without it the folder's own.

    A context manager. OSError if the disk fails, JobError if the file is not a journal of this version.
    """

    def __init__(self, folder: Path, identity: dict[str, Any] | None = None) -> None:
        path = folder / JOURNAL
        if identity is not None:
            with _disk_errors(path), atomic_path(path) as temporary:
                temporary.unlink(missing_ok=True)
                with closing(sqlite3.connect(temporary)) as database:
                    database.executescript(_TABLES)
                    database.execute("INSERT INTO job VALUES (?, ?)", (_JOURNAL_FORMAT, json.dumps(identity)))
                    database.commit()
        self._db = sqlite3.connect(path, isolation_level=None)
        self._new_ids: dict[int, int] = {}  # hash of an id -> the row that brought it
        with _disk_errors(path):
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA cache_size = -8192")  # 8 MiB: memory stays flat in the number of ids
            job = self._db.execute("SELECT format, identity FROM job").fetchone()
        if job is None or job[0] != _JOURNAL_FORMAT:
            raise JobError(f"{path} is of another version of headrift: choose another folder")
        self.identity: dict[str, Any] = json.loads(job[1])

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc: object) -> None:
        self._db.close()

    def finished(self) -> list[FinishedShard]:
        columns = "number, scored, rejected, part_bytes, rejects_bytes"
        return [FinishedShard(*row) for row in self._db.execute(f"SELECT {columns} FROM shards ORDER BY number")]

    def take_id(self, own_id: str, row: int) -> bool:
        """Tell whether no earlier row brought this id. It is on disk when the shard of `row` is recorded."""
        key = int.from_bytes(hashlib.blake2b(own_id.encode(), digest_size=8).digest(), "big", signed=True)
        if key in self._new_ids or self._db.execute("SELECT 1 FROM ids WHERE hash = ?", (key,)).fetchone():
            return False
        self._new_ids[key] = row
        return True

    def record(self, shard: FinishedShard, stop: int) -> None:
        """Record a finished shard, whose files are in place; `stop` is the first row of the run that comes after it."""
        ids = [key for key, row in self._new_ids.items() if row < stop]
        with _disk_errors(JOURNAL):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._db.execute("INSERT INTO shards VALUES (?, ?, ?, ?, ?)", astuple(shard))
                self._db.executemany("INSERT INTO ids VALUES (?)", ((key,) for key in ids))
                self._db.execute("COMMIT")
            except sqlite3.Error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
        for key in ids:
            del self._new_ids[key]


@contextmanager
def _disk_errors(path: object) -> Iterator[None]:
    """Raise SQLite's errors as what they are: a full disk as OSError, a damaged file as JobError."""
    try:
        yield
    except sqlite3.OperationalError as error:
        code = errno.ENOSPC if "full" in str(error) else errno.EIO
        raise OSError(code, f"{path}: {error}") from error
    except sqlite3.DatabaseError as error:
        raise JobError(f"{path} is damaged ({error}): choose another folder") from error
