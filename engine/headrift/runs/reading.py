"""The reader of finished runs: run.json, checked once, and the rows in batches."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from headrift.runs.folder import write_json
from headrift.signal import ScoreRange, Window

RUN = "run.json"
_BATCH_ROWS = 4096  # with 40 steps of 32 layers, 20 MB
_BATCH_ROWS_OF_HEADS = 64  # of columns with a number per head: with 32 heads and 5 regions, 50 MB
_COLUMNS_OF_HEADS = {"shares", "mass", "focus_heads"}
_MODEL_FACTS = {
    "fingerprint": "the model",
    "dtype": "the type it is computed in",
    "layers": "the number of layers",
    "heads": "the number of heads",
    "chat_template_sha256": "the chat template",
}


class RunError(ValueError):
    """A folder does not contain a run that can be used. The message says why and what to do."""


class ModelIdentity(BaseModel):
    """What scores depend on; None for what is not known. `name` is the name of the model's folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str | None
    fingerprint: str | None
    dtype: str | None
    layers: int
    heads: int | None
    chat_template_sha256: str | None

    def differences(self, other: ModelIdentity) -> list[str]:
        """Name, in words, what is not the same; the folder's name does not matter."""
        return [words for name, words in _MODEL_FACTS.items() if getattr(self, name) != getattr(other, name)]


@dataclass(frozen=True, slots=True)
class ScoreRun:
    """A run of `headrift score`. `batches` reads the rows with these columns, without those that the run lacks."""

    name: str  # the folder, as it was given
    model: ModelIdentity
    steps: int  # the last recorded step
    score_range: ScoreRange
    replay: bool
    batches: Callable[[Sequence[str]], Iterator[pa.RecordBatch]]
    about: Mapping[str, Any] = field(default_factory=dict)  # run.json

    @property
    def folder(self) -> Path:
        """The folder."""
        return Path(self.name)


def open_run(folder: Path, *, finished: bool = True) -> ScoreRun:
    """Open a folder that `headrift score` wrote.

    Raises:
        RunError: The folder is not such a run, has no part, or is not finished though `finished` is true.
    """
    about = read_json(folder, RUN, "score")
    try:
        settings, engine, model = about["settings"], about["engine"], about["model"]
        if (command := settings.get("command", "score")) != "score":
            raise RunError(f"{folder} was made by `headrift {command}`: give folders that `headrift score` wrote")
        if finished and about["status"] != "done":
            raise RunError(f"{folder} is not finished: resume it first (headrift score ... --resume)")
        identity = ModelIdentity(
            name=Path(model["path"]).name,
            fingerprint=model["fingerprint"],
            dtype=engine["dtype"],
            layers=engine["layers"],
            heads=engine["heads"],
            chat_template_sha256=about["chat_template_sha256"],
        )
        score_range = ScoreRange(Window.parse(settings["window"]), settings["drop_shallow"], settings["drop_deep"])
        steps, replay = settings["steps"], settings["replay"]
    except RunError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{folder / RUN} cannot be read: {error!r}; score the prompts again") from error
    if not any(folder.glob("part-*.parquet")):
        raise RunError(f"{folder} has no parts: no row of this run was scored")
    return ScoreRun(str(folder), identity, steps, score_range, replay, partial(read_batches, folder), about)


def read_json(folder: Path, name: str, command: str) -> dict[str, Any]:
    """Read the JSON file of a folder that a command wrote. RunError if it is missing or damaged."""
    path = folder / name
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"{folder} is not a run (no {name}): give a folder that `headrift {command}` wrote") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise RunError(f"{path} cannot be read: it is not a JSON object")
    return value


def write_run(folder: Path, about: Mapping[str, Any]) -> None:
    """Write run.json, or replace it."""
    write_json(folder / RUN, about)


def run_status(folder: Path) -> str | None:
    """Return the status in run.json; None if there is none."""
    try:
        return str(read_json(folder, RUN, "score").get("status"))
    except RunError:
        return None


def read_batches(folder: Path, columns: Sequence[str], batch_rows: int | None = None) -> Iterator[pa.RecordBatch]:
    """Read these columns of all finished parts in a folder, in order, by default in batches of some MB.

    Columns that the parts do not have are left out. RunError if a part is damaged.
    """
    if batch_rows is None:
        batch_rows = _BATCH_ROWS_OF_HEADS if _COLUMNS_OF_HEADS & set(columns) else _BATCH_ROWS
    for path in sorted(folder.glob("part-*.parquet")):
        try:
            with pq.ParquetFile(path, pre_buffer=False) as file:
                yield from file.iter_batches(batch_rows, columns=list(columns))
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise RunError(f"{path} cannot be read ({reason}): score the prompts again") from error
