"""Jobs that write into a folder of their own and are taken up where they were left: what they refuse, and how."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headrift.model_facts import ModelFacts, read_model


class JobError(ValueError):
    """The job cannot be done as asked; the message says why and what to do."""


def shape_of(model: Path) -> tuple[ModelFacts, int, int]:
    """A model's facts, layers and heads. ModelError, JobError where they cannot be told."""
    facts = read_model(model)
    if facts.layers is None or facts.heads is None:
        raise JobError(f"--model {model}: its config.json does not say how many layers and heads it has")
    return facts, facts.layers, facts.heads


def new_folder(out: Path, error: type[ValueError] = JobError) -> None:
    """Make the folder for results. `error` where there is something in it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise error(f"--out {out} is not an empty folder: give another")
    out.mkdir(parents=True, exist_ok=True)


def begun_before(path: Path, settings: Mapping[str, Any], resume: bool, error: type[ValueError] = JobError) -> bool:
    """Whether a job was begun in path's folder, which this file, with its `settings`, says. `error` where it is not to
    be gone on with, and where it was begun with other settings."""
    out = path.parent
    if not path.exists():
        return False
    if not resume:
        raise error(f"--out {out} has results already: give another folder, or --resume to go on with them")
    then = json.loads(path.read_text(encoding="utf-8"))["settings"]
    other = [key for key in settings if then.get(key) != settings[key]]
    if other:
        raise error(
            f"--resume {out} was begun with another {', another '.join(other)}: ask for the same, "
            "or give another folder"
        )
    return True
