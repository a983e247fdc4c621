"""What a finished run of `ships` or `sahara` found: what other commands take from its folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrift.runs.folder import JobError
from headrift.safety_heads import job, sahara_job
from headrift.safety_heads.ships import Head

_FILES = job.SETTINGS, sahara_job.SETTINGS


@dataclass(frozen=True, slots=True)
class Leading:
    """heads: those of a ranking (ships) or a group (sahara), the first that matter most; of: how many there are. kind,
    epsilon, model: how they were ablated and in which model (its fingerprint)."""

    heads: tuple[Head, ...]
    of: int
    kind: str
    epsilon: float
    model: str


@contextmanager
def found_by(run: Path) -> Iterator[tuple[str, Any]]:
    """The name of a finished run's file, and what it holds.

    JobError where the folder is none or the run is not finished, and where what it holds turns out, in the `with`
    block, to be something else.
    """
    path = next((run / name for name in _FILES if (run / name).is_file()), None)
    if path is None:
        raise JobError(f"{run} holds no results of `headrift heads ships` or `sahara` (no {' or '.join(_FILES)})")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if "heads" not in found:
            raise JobError(f"{run} is not finished: go on with it, --resume")
        yield path.name, found
    except (OSError, LookupError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise JobError(f"{path} cannot be read: {error!r}") from error


def leading_heads(run: Path, top: int | None = None) -> Leading:
    """The first `top` heads of a finished run of `ships` or `sahara`; without `top` all that it found.

    JobError where the folder is none, the run is not finished, or it found fewer.
    """
    with found_by(run) as (_, found):
        settings = found["settings"]
        heads = tuple((int(head["layer"]), int(head["head"])) for head in found["heads"])
        how = str(settings["kind"]), float(settings["epsilon"]), str(settings["model"])
    if top is not None and top > len(heads):
        raise JobError(f"--top {top}: {run} found {len(heads)} heads; give {len(heads)} at most")
    return Leading(heads[:top], len(heads), *how)
