"""The output folder: scored rows in part-*.parquet, the others in rejects-*.parquet, the run's particulars in run.json.

A file is written under a hidden name (.part-00000.parquet.tmp), fsynced, and renamed when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from headrift.corpus.journal import LOCK, UNFINISHED
from headrift.corpus.journal import NAME as JOURNAL
from headrift.corpus.rows import BadRow, Row
from headrift.results import ScoreResult
from headrift.scorer import Prompt
from headrift.signals import signals

_ROW_GROUP_BYTES = 32 << 20  # rows wait in memory up to this, then go into the unfinished file as a row group
_BATCH = 1 << 16  # rows that are read at a time
_FILES = re.compile(r"\.?(?:part|rejects)-(\d{5,})\.parquet(?:\.tmp)?")

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
# The signals' columns stand between these and those.
_LAST_COLUMNS: dict[str, pa.DataType] = {
    "flags": pa.list_(_STRING),
    "instability": pa.list_(pa.float32()),
}
# What --save adds, by its name there.
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


class OutputError(ValueError):
    """The output folder cannot be used. The message says why and what to do."""


def make_folder(folder: Path, *, resume: bool = False) -> bool:
    """Make the output folder; whether it holds a run that was begun (only with resume).

    OutputError where it is not empty and no run to resume, or cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = {path.name for path in folder.iterdir()} - {LOCK, UNFINISHED}
    except FileExistsError:
        raise OutputError(f"--out {folder} is a file: choose another name for the folder") from None
    except OSError as error:
        raise OutputError(f"--out {folder} cannot be made: {error.strerror}; choose another folder") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"--out {folder} cannot be written to: change its permissions or choose another folder")
    begun = JOURNAL in found
    if begun and not resume:
        raise OutputError(f"--out {folder} holds a run: go on with it with --resume, or choose another folder")
    if found and not begun:
        what = "holds no run that could be resumed, but other files" if resume else "exists and is not empty"
        raise OutputError(f"--out {folder} {what}: choose another folder")
    return begun


def part_schema(save: Sequence[str], *, layers: int, heads: int, regions: Sequence[str]) -> pa.Schema:
    """Columns of the parts. save: what to add, of shares, mass, focus, text and entropy (KeyError for another name).

    The metadata, JSON under b"headrift", holds `layers`, `heads`, `regions` and the `shapes` of the flattened columns.
    """
    kinds = _kinds(save)
    shapes = {name: shape for name, shape in _SHAPES.items() if name in kinds}
    about = {"layers": layers, "heads": heads, "regions": list(regions), "shapes": shapes}
    return pa.schema(kinds, metadata={b"headrift": json.dumps(about).encode()})


def columns_of(names: Iterable[str]) -> dict[str, pa.DataType]:
    """Columns that every part of a scoring run has, with their types."""
    every = _every_column()
    return {name: every[name] for name in names}


def columns(save: Sequence[str]) -> list[str]:
    """The names of the parts' columns (see part_schema)."""
    return list(_kinds(save))


def _every_column() -> dict[str, pa.DataType]:
    """The columns that every part has, with their types."""
    measured = {entry.name: _FLOAT for entry in signals(column=True)}
    return {**_FIRST_COLUMNS, **measured, **_LAST_COLUMNS}


def _kinds(save: Sequence[str]) -> dict[str, pa.DataType]:
    unknown = set(save) - set(_SAVED)
    if unknown:
        raise KeyError(f"nothing is saved by the name {sorted(unknown)}; there are {', '.join(_SAVED)}")
    kinds = _every_column()
    for kind, added in _SAVED.items():
        kinds |= added if kind in save else {}
    return kinds


def record_of(row: Row, result: ScoreResult, *, replay: bool = False) -> Record:
    """A result as the columns of a part, the ones that --save adds among them; arrays are flattened, step 0 first.
    replay: whether the logged answer was scored."""
    named = {name: getattr(result, name) for name in (*_FIRST_COLUMNS, *_LAST_COLUMNS) if hasattr(result, name)}
    stats, heads, mass = result.logit_stats, result.focus_heads, result.mass
    measured = {entry.name: result.signals.get(entry.name) for entry in signals(column=True)}
    return {**named, **measured} | {
        "id": row.id,
        "source": row.source,
        "row": row.row,
        "label": row.label,
        "category": row.category,
        "group": group_of(row.prompt, replay=replay),
        "instability": result.instability.ravel(),
        "shares": result.shares.astype(np.float16).ravel(),
        "mass": None if mass is None else mass.ravel(),
        "focus_heads": None if heads is None else heads.ravel(),
        "prompt": text_of(row.prompt),
        "text": result.text,
        "entropy_steps": None if stats is None else np.ascontiguousarray(stats[:, 0]),
    }


def group_of(prompt: Prompt, *, replay: bool = False) -> str:
    """16 hex digits that prompts share which differ in nothing but the system prompt, case, spacing and Unicode form.

    Of the prompt, of all messages after the leading system ones (roles, texts, tool calls but their ids), or of the
    token ids outside the system region. replay: a last assistant message that is the logged answer is no part of it.
    """
    if prompt.token_ids is not None:
        start, end = prompt.regions.get("system", (0, 0))
        content = json.dumps([*prompt.token_ids[:start], *prompt.token_ids[end:]])
    elif prompt.messages is not None:
        turns = [_turn(message) for message in dropwhile(_is_system, prompt.messages)]
        if replay and prompt.response is None and prompt.response_ids is None and turns[-1][0] == "assistant":
            turns.pop()
        only_user = len(turns) == 1 and turns[0][0] == "user"  # the same as a prompt that is given as a text
        content = turns[0][1] if only_user else json.dumps(turns, ensure_ascii=False)
    else:
        content = _normalised(prompt.prompt or "")
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _is_system(message: Mapping[str, Any]) -> bool:
    return message.get("role") in ("system", "developer")


def _turn(message: Mapping[str, Any]) -> list[str]:
    """Role, text, and of each tool call its name and arguments, of a message that is known to be well formed."""
    content = message.get("content")
    text = content if isinstance(content, str) else "\n".join(part["text"] for part in content or [])
    functions = [call["function"] for call in message.get("tool_calls") or []]
    calls = [_normalised(f"{of['name']} {_arguments(of.get('arguments'))}") for of in functions]
    return [str(message.get("role")), _normalised(text), *calls]


def _arguments(given: Any) -> str:
    """A call's arguments, an object or a JSON text, as one text."""
    try:
        given = json.loads(given) if isinstance(given, str) else given
    except ValueError:
        pass
    return json.dumps(given, sort_keys=True, ensure_ascii=False)


def _normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def text_of(prompt: Prompt) -> str:
    """The prompt as the row brought it: its text, or its messages or token ids as JSON."""
    if prompt.prompt is not None:
        return prompt.prompt
    return json.dumps(prompt.messages if prompt.messages is not None else prompt.token_ids, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a shard's files hold: rows of the part and of the rejects, and bytes; 0 for a file that is not there."""

    scored: int
    rejected: int
    part_bytes: int
    rejects_bytes: int


class ShardFiles:
    """Writes a shard's rows: part-<number>.parquet and rejects-<number>.parquet, neither without rows.

    folder: must exist. schema: of the records that are added, as part_schema makes it. complete: adds columns to them,
    a batch at a time, before they are written. OSError where the disk fails. Until `publish` nothing is there under
    these names; `discard` drops what was added.
    """

    def __init__(self, folder: Path, number: int, schema: pa.Schema, complete: Complete = lambda batch: batch) -> None:
        self._folder = folder
        self._part = _File(folder / f"part-{number:05d}.parquet", schema, complete)
        self._rejects = _File(folder / f"rejects-{number:05d}.parquet", _REJECTS)

    def add(self, record: Record) -> None:
        """A scored row, of record_of."""
        self._part.append(record)

    def reject(self, row: Row | BadRow, reason: str, detail: str) -> None:
        """A row that has no place in the parts, and why."""
        self._rejects.append({"source": row.source, "row": row.row, "id": row.id, "reason": reason, "detail": detail})

    @property
    def rows(self) -> int:
        """Rows added so far."""
        return self._part.rows + self._rejects.rows

    def publish(self) -> Sizes:
        """Finish both files and give them their names."""
        part, rejects = self._part.finish(), self._rejects.finish()
        _sync_folder(self._folder)
        return Sizes(self._part.rows, self._rejects.rows, part, rejects)

    def discard(self) -> None:
        """Leave nothing behind of an unfinished shard."""
        self._part.discard()
        self._rejects.discard()


class _File:
    """A Parquet file to be; no row, no file."""

    def __init__(self, path: Path, schema: pa.Schema, complete: Complete = lambda batch: batch) -> None:
        self._path, self._schema, self._complete = path, schema, complete
        self._temporary = path.with_name(f".{path.name}.tmp")
        self.rows = 0
        self._n_bytes = 0  # of the rows that wait
        self._waiting: list[Record] = []
        self._writer: pq.ParquetWriter | None = None

    def append(self, record: Record) -> None:
        kept = {name: record[name] for name in self._schema.names}
        self._waiting.append(kept)
        self.rows += 1
        self._n_bytes += sum(value.nbytes for value in kept.values() if isinstance(value, np.ndarray))
        if self._n_bytes >= _ROW_GROUP_BYTES:
            self._flush()

    def finish(self) -> int:
        """Write what waits, and name the file; its bytes, 0 without rows."""
        if not self.rows:
            return 0
        self._flush()
        assert self._writer is not None
        self._writer.close()
        return _publish(self._temporary, self._path)

    def discard(self) -> None:
        """Close and remove what was written."""
        if self._writer is not None:
            try:
                self._writer.close()  # which writes a footer, and on a full disk fails once more
            except OSError:
                pass
        self._temporary.unlink(missing_ok=True)

    def _flush(self) -> None:
        if not self._waiting:
            return
        columns = [_column([record[field.name] for record in self._waiting], field.type) for field in self._schema]
        batch = self._complete(pa.record_batch(columns, schema=self._schema))
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._temporary, batch.schema, compression="zstd")
        self._writer.write_batch(batch)
        self._waiting, self._n_bytes = [], 0


def read_batches(folder: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The rows of all finished parts in the folder, in order, with these columns, some 65,000 at a time."""
    for path in sorted(folder.glob("part-*.parquet")):
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(_BATCH, columns=list(columns))


def shard_files(folder: Path) -> dict[str, int]:
    """The names of all files of shards in the folder, unfinished ones too, with their shard's number."""
    matches = ((path.name, _FILES.fullmatch(path.name)) for path in folder.iterdir())
    return {name: int(match[1]) for name, match in matches if match}


def remove_unfinished(folder: Path, finished: Collection[int]) -> None:
    """Remove what a run that broke off left of shards that are not finished."""
    for name, number in shard_files(folder).items():
        if number not in finished or name.startswith("."):
            (folder / name).unlink()


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    if not pa.types.is_list(kind) or kind.value_type == _STRING:
        return pa.array(values, kind)
    sizes = [0 if value is None else value.size for value in values]
    offsets = pa.array(np.cumsum([0, *sizes]), pa.int32())
    present = [value for value in values if value is not None]
    flat = pa.array(np.concatenate(present) if present else [], kind.value_type)
    return pa.ListArray.from_arrays(offsets, flat, type=kind, mask=pa.array([value is None for value in values]))


def _publish(temporary: Path, name: Path) -> int:
    """Put a complete file in its place, safe from a power cut; its bytes."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
    temporary.replace(name)
    return size


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder as safe as the files."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_run(folder: Path, particulars: Mapping[str, Any]) -> None:
    """Write run.json, or write it anew; at no moment is it there in part."""
    temporary = folder / ".run.json.tmp"
    try:
        temporary.write_text(json.dumps(particulars, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        _publish(temporary, folder / "run.json")
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def status_of_run(folder: Path) -> str | None:
    """The status in a run.json; None where there is none."""
    try:
        return str(json.loads((folder / "run.json").read_text(encoding="utf-8"))["status"])
    except (FileNotFoundError, ValueError, KeyError):
        return None
