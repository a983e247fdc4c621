"""The journal of a run: what it is a run of, which shards are done, and the ids that their rows brought.

An SQLite file in the output folder. A line of text a shard would do for the shards alone, but the ids have to be on
disk too (memory stays flat in the size of the corpus), and a shard and its ids have to be written together or not at
all: that is a transaction. SQLite's rollback journal and full fsync survive a kill and a full disk, and need no shared
memory.
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

NAME = "journal.sqlite"
LOCK, UNFINISHED = ".lock", ".journal.sqlite.tmp"  # which may lie in a folder in which no run was begun
_FORMAT = 1
_TABLES = """
CREATE TABLE job (format INTEGER, identity TEXT);
CREATE TABLE shards (
    number INTEGER PRIMARY KEY, scored INTEGER, rejected INTEGER, part_bytes INTEGER, rejects_bytes INTEGER
);
CREATE TABLE ids (hash INTEGER PRIMARY KEY) WITHOUT ROWID;
"""


class JournalError(ValueError):
    """The output folder cannot be worked in. The message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished shard: scored and rejected rows, and the sizes of their files in bytes, 0 where there is none."""

    number: int
    scored: int
    rejected: int
    part_bytes: int
    rejects_bytes: int

    @property
    def rows(self) -> int:
        """All rows of the shard."""
        return self.scored + self.rejected


def has_journal(folder: Path) -> bool:
    """Whether a run was begun in a folder."""
    return (folder / NAME).exists()


class Lock:
    """Holds the folder for this process; JournalError where another one has it. It dies with its process."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK
        self._file = self._path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            other = self._file.read().strip() or "unknown"
            self._file.close()
            raise JournalError(
                f"--out {folder} is in use by another run (process {other}): wait for it, stop it, or choose another "
                "folder"
            ) from None
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()

    def release(self) -> None:
        """Let the folder go."""
        if not self._file.closed:
            self._path.unlink(missing_ok=True)
            self._file.close()


class Journal:
    """An open journal. A context manager. OSError where the disk fails."""

    def __init__(self, folder: Path, identity: dict[str, Any] | None = None) -> None:
        """Open the folder's journal or, with the identity of a new run, make one; JournalError where it is no such."""
        path = folder / NAME
        if identity is not None:
            _make(folder, identity)
        self._db = sqlite3.connect(path, isolation_level=None)
        self._new_ids: dict[int, int] = {}
        with _disk_errors(path):
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA cache_size = -8192")  # 8 MiB: memory stays flat in the number of ids
            found = self._db.execute("SELECT format, identity FROM job").fetchone()
        if found is None or found[0] != _FORMAT:
            raise JournalError(f"{path} is of another version of headrift: choose another folder")
        self.identity: dict[str, Any] = json.loads(found[1])

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc: object) -> None:
        self._db.close()

    def finished(self) -> list[Finished]:
        """The finished shards, by number."""
        columns = "number, scored, rejected, part_bytes, rejects_bytes"
        return [Finished(*row) for row in self._db.execute(f"SELECT {columns} FROM shards ORDER BY number")]

    def take_id(self, own_id: str, row: int) -> bool:
        """Whether no earlier row brought this id. It is on disk once the shard of `row` (of the run's) is noted."""
        key = int.from_bytes(hashlib.blake2b(own_id.encode(), digest_size=8).digest(), "big", signed=True)
        if key in self._new_ids or self._db.execute("SELECT 1 FROM ids WHERE hash = ?", (key,)).fetchone():
            return False
        self._new_ids[key] = row
        return True

    def note(self, shard: Finished, stop: int) -> None:
        """A shard is done, its files in place; stop: the first row (of the run's) that comes after it."""
        ids = []
        for key, row in self._new_ids.items():  # in order: rows read ahead of the shard come last
            if row >= stop:
                break
            ids.append(key)
        with _disk_errors(NAME):
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


def _make(folder: Path, identity: dict[str, Any]) -> None:
    """Make a journal: at no moment is it there in part."""
    temporary = folder / UNFINISHED
    temporary.unlink(missing_ok=True)
    with _disk_errors(folder / NAME), closing(sqlite3.connect(temporary)) as database:
        database.executescript(_TABLES)
        database.execute("INSERT INTO job VALUES (?, ?)", (_FORMAT, json.dumps(identity)))
        database.commit()
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(folder / NAME)


@contextmanager
def _disk_errors(path: object) -> Iterator[None]:
    """SQLite's complaints as what they are: no room is an OSError, a damaged file a JournalError."""
    try:
        yield
    except sqlite3.OperationalError as error:
        full = "full" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, f"{path}: {error}") from error
    except sqlite3.DatabaseError as error:
        raise JournalError(f"{path} is damaged ({error}): choose another folder") from error
