"""The journal of a run: its identity, which shards are finished, and the ids that their rows brought.

An SQLite file in the output folder. The ids have to be on disk (memory stays flat in the size of the corpus), and a
shard and its ids have to be recorded together or not at all: that is a transaction. SQLite's rollback journal with full
fsync survives a kill and a full disk, and needs no shared memory.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from headrift.runs.folder import LOCK, JobError, atomic_path

JOURNAL = "journal.sqlite"
_FORMAT = 1
_TABLES = """
CREATE TABLE job (format INTEGER, identity TEXT);
CREATE TABLE shards (
    number INTEGER PRIMARY KEY, scored INTEGER, rejected INTEGER, part_bytes INTEGER, rejects_bytes INTEGER
);
CREATE TABLE ids (hash INTEGER PRIMARY KEY) WITHOUT ROWID;
"""


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
        """All rows of the shard."""
        return self.scored + self.rejected


class FolderLock:
    """Keeps other processes out of an output folder until `release`, or until this process ends.

    Raises:
        JobError: Another process has the folder.
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
        """Let other processes use the folder."""
        if not self._file.closed:
            self._path.unlink(missing_ok=True)
            self._file.close()


class Journal:
    """The open journal of a folder. A context manager; OSError if the disk fails.

    Args:
        folder: The output folder.
        identity: What the run is of, as JSON, for a new journal; None to open the folder's own.

    Attributes:
        identity: What the run is of.

    Raises:
        JobError: The file is not a journal of this version.
    """

    def __init__(self, folder: Path, identity: dict[str, Any] | None = None) -> None:
        path = folder / JOURNAL
        if identity is not None:
            _create(path, identity)
        self._db = sqlite3.connect(path, isolation_level=None)
        self._new_ids: dict[int, int] = {}  # hash of an id -> the row that brought it
        with _disk_errors(path):
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA cache_size = -8192")  # 8 MiB: memory stays flat in the number of ids
            job = self._db.execute("SELECT format, identity FROM job").fetchone()
        if job is None or job[0] != _FORMAT:
            raise JobError(f"{path} is of another version of headrift: choose another folder")
        self.identity: dict[str, Any] = json.loads(job[1])

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc: object) -> None:
        self._db.close()

    def finished(self) -> list[FinishedShard]:
        """Return the finished shards, by number."""
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
        ids = []
        for key, row in self._new_ids.items():  # in order: rows read ahead of the shard come last
            if row >= stop:
                break
            ids.append(key)
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


def _create(path: Path, identity: dict[str, Any]) -> None:
    with _disk_errors(path), atomic_path(path) as temporary:
        temporary.unlink(missing_ok=True)
        with closing(sqlite3.connect(temporary)) as database:
            database.executescript(_TABLES)
            database.execute("INSERT INTO job VALUES (?, ?)", (_FORMAT, json.dumps(identity)))
            database.commit()


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
