"""Output folders: files that appear whole or not at all, and whether a folder is new or has a job to resume."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOCK = ".lock"


class JobError(ValueError):
    """A job cannot start in this folder or with these options. The message says why and what to do."""


def temporary_path(path: Path) -> Path:
    """Return the hidden name under which a file is written until it is complete."""
    return path.with_name(f".{path.name}.tmp")


def publish(path: Path) -> int:
    """Rename the complete temporary file of `path`, safe from a power cut; return its size in bytes."""
    temporary = temporary_path(path)
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
    temporary.replace(path)
    sync_folder(path.parent)
    return size


def sync_folder(folder: Path) -> None:
    """Flush the names of a folder's files to the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, which becomes `path` when the block ends.

    If the block raises, the temporary file is removed and what was at `path` before is unchanged.
    """
    temporary = temporary_path(path)
    try:
        yield temporary
        publish(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, indented and whole or not at all."""
    # A file name that is not Unicode is a lone surrogate in Python, and \udc80 in JSON.
    text = json.dumps(value, indent=2, ensure_ascii=False).encode(errors="backslashreplace")
    with atomic_path(path) as temporary:
        temporary.write_bytes(text + b"\n")


def new_folder(out: Path) -> None:
    """Make an output folder with its parents. JobError if it is not empty, or cannot be made or written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        names = [path.name for path in out.iterdir()]
    except FileExistsError:
        raise JobError(f"--out {out} is a file: choose another name for the folder") from None
    except OSError as error:
        raise JobError(f"--out {out} cannot be made: {error.strerror}; choose another folder") from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise JobError(f"--out {out} cannot be written to: change its permissions or choose another folder")
    # A job that was killed at its very start leaves these.
    if any(name != LOCK and not (name.startswith(".") and name.endswith(".tmp")) for name in names):
        raise JobError(f"--out {out} is not empty and has no run to resume: choose another folder")


def can_resume(out: Path, marker: str, *, resume: bool) -> bool:
    """Tell whether the output folder has a job to resume: the file `marker`. If not, make the folder.

    Raises:
        JobError: There is a job and `resume` is false, or `new_folder` refuses.
    """
    if not (out / marker).exists():
        new_folder(out)
        return False
    if not resume:
        raise JobError(f"--out {out} has a run already: resume it with --resume, or choose another folder")
    return True
