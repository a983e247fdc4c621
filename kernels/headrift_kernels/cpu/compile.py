"""How the CPU kernels are compiled and cached."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numba


@cache
def _folder() -> str:
    """Where compiled kernels are kept: a folder for each state of these sources.

    numba notices a change of a kernel's own file, not of the helpers compiled into it, so a stale kernel could live on.
    Empty where nothing can be written beside the sources: numba then keeps its own folder in the user's home.
    """
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    folder = Path(__file__).parent / "__pycache__" / f"numba-{digest}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return ""
    return str(folder) if os.access(folder, os.W_OK) else ""


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
