"""How the CPU kernels are compiled and cached."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numba


@cache
def _folder() -> str:
    """The folder of compiled kernels: one per state of these sources, in the first place that can be written.

    numba notices a change of a kernel's own file, not of the helpers compiled into it, so a stale kernel could live on.
    """
    sources = sorted(Path(__file__).parent.glob("*.py"))
    name = f"numba-{hashlib.sha256(b''.join(path.read_bytes() for path in sources)).hexdigest()[:12]}"
    places = [Path(__file__).parent / "__pycache__"]
    with suppress(RuntimeError):  # a user without a home
        places.append(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "headrift")
    for place in places:
        if _writable(place / name):
            return str(place / name)
    # Compiled code is run as it lies there: of a place that all may write to, only a folder of one's own will do.
    place = Path(tempfile.gettempdir()) / f"headrift-{os.getuid()}"
    if _private(place) and _writable(place / name):
        return str(place / name)
    return tempfile.mkdtemp(prefix="headrift-")


def _writable(folder: Path) -> bool:
    """Whether files can be made in a folder, which is made too."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A mode says too little: nothing about root, or how a file system is mounted.
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def _private(folder: Path) -> bool:
    """Whether only this user can write to a folder, which is made if it does not exist."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022


@contextmanager
def cache_folder() -> Iterator[None]:
    """What numba compiles with `cache=True` inside is cached by the state of all kernel sources."""
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = before or _folder()
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before


def kernel(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`numba.njit(cache=True, **options)` with the cache kept by the state of all kernel sources."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        with cache_folder():
            return numba.njit(cache=True, **options)(function)

    return decorate
