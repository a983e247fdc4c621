"""The reader of finished runs: run.json, checked once, the parts in batches, and what is known of each row.

Rows are numbered over all runs, in their order. Per row some 70 bytes are kept; instability is read in batches, and
kept of selected rows only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from headrift.near_duplicates import NUMBERS, minhash, near_groups
from headrift.signal import ScoreRange, Window
from headrift.signals import signals
from headrift.stats import Floats, Ints

RUN = "run.json"
_BATCH_ROWS = 4096  # with 40 steps of 32 layers, 20 MB
_BATCH_ROWS_OF_HEADS = 64  # of columns with a number per head: with 32 heads and 5 regions, 50 MB
_COLUMNS_OF_HEADS = {"shares", "mass", "focus_heads"}
_BATCH_ROWS_OF_MEANS = 1024  # of columns with two numbers per head: with 32 layers of 32 heads, 4 MB
_MODEL_FACTS = {
    "fingerprint": "the model",
    "dtype": "the type it is computed in",
    "layers": "the number of layers",
    "heads": "the number of heads",
    "chat_template_sha256": "the chat template",
}
BENIGN, ATTACK, UNLABELLED = 0, 1, 2
HARD = "hard"  # categories of benign prompts that are made to be mistaken for attacks begin so
_CLASSES = {"benign": BENIGN, "attack": ATTACK, None: UNLABELLED}
_TEXTS = ("label", "group", "category")
_HASHES = ("group", "prompt_hash", "answer_hash", "system_hash")  # what tells samples apart
_MANY_PROMPTS = 1_000  # from which near duplicates are looked for if no row has a group of its own
# What the original's gather.py wrote: a folder per prompt with inter_head_std.csv, layers x time, column 0 prefill.
# Folders are <root>/benign|attacks/<slug>__<time>/ or <root>/baseline|tests/<slug>__<time>/, in what was published
# attack/ for attacks/; no model is named in them.
_CSV = "inter_head_std.csv"
_CSV_LABELS = {"benign": "benign", "baseline": "benign", "attack": "attack", "attacks": "attack", "tests": "attack"}


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
        batch_rows = _BATCH_ROWS_OF_MEANS if "logit_shares" in columns else _BATCH_ROWS
        if _COLUMNS_OF_HEADS & set(columns):
            batch_rows = _BATCH_ROWS_OF_HEADS
    for path in sorted(folder.glob("part-*.parquet")):
        try:
            with pq.ParquetFile(path, pre_buffer=False) as file:
                yield from file.iter_batches(batch_rows, columns=list(columns))
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise RunError(f"{path} cannot be read ({reason}): score the prompts again") from error


class Grouping(StrEnum):
    """What makes rows a group: AUTO takes NEAR if no row has a group of its own and there are over 1,000 prompts."""

    AUTO = "auto"
    OWN = "own"  # the key `group` of a row, else its prompt
    NEAR = "near"  # prompts that are nearly the same


@dataclass(frozen=True, slots=True)
class Grouped:
    """What the groups of rows are: `by` is OWN or NEAR; `keys`, whether rows have groups of their own.

    `note` is what a reader must know of it, or None.
    """

    by: Grouping = Grouping.OWN
    keys: bool = False
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Rows:
    """What is known of each row; arrays are [rows].

    Attributes:
        label: BENIGN, ATTACK or UNLABELLED.
        group: number of the group, of rows that may depend on each other; see `grouped`.
        prompt: number of the prompt, the same for exact repeats: the same text, system prompt and, in replay, answer.
        grouped: what the groups are.
        category: number of the category, -1 for none.
        source: number of the source among `sources`: the row's `source_set`, else its input file.
        counts: by name of the signal (`prompt_tokens`, ...), -1 if not known.
        signals: the runs' own columns by name, over their own windows, NaN for none; those that some row has.
        fingerprint: hash of labels, groups, lengths and scores.
    """

    label: NDArray[np.int8]
    group: Ints
    prompt: Ints
    category: NDArray[np.int32]
    source: NDArray[np.int32]
    sources: list[str]
    counts: Mapping[str, NDArray[np.int32]]
    signals: Mapping[str, NDArray[np.float32]]
    fingerprint: str
    grouped: Grouped

    def __len__(self) -> int:
        return len(self.label)


def check_alike(runs: Sequence[ScoreRun]) -> None:
    """Check that the runs' scores can be compared, and that no run is named twice. RunError otherwise."""
    first = runs[0]
    for run in runs[1:]:
        differences = first.model.differences(run.model)
        differences += ["whether answers were replayed"] * (run.replay != first.replay)
        if differences:
            raise RunError(
                f"{first.name} and {run.name} differ in {', '.join(differences)}: their scores cannot be compared; "
                "use one at a time"
            )
    names = [run.name for run in runs]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise RunError(f"{sorted(twice)[0]} is given twice: name each run once")


def hashes(batch: pa.RecordBatch, name: str, instead: str | None = None) -> NDArray[np.uint64]:
    """A column of hashes as numbers, 0 for none. instead: the column to take in parts of an earlier version."""
    missing = name not in batch.schema.names or batch.column(name).null_count == batch.num_rows
    if missing and instead is not None:
        name, missing = instead, instead not in batch.schema.names
    if missing:
        return np.zeros(batch.num_rows, np.uint64)
    return np.array([int(text or "0", 16) for text in batch.column(name).to_pylist()], np.uint64)


def prompt_keys(batch: pa.RecordBatch) -> NDArray[np.uint64]:
    """A number for each row of a batch with `_HASHES`, the same for exact repeats.

    These have the same prompt, system prompt and, in replay, answer.
    """
    prompt, answer = hashes(batch, "prompt_hash", "group"), hashes(batch, "answer_hash")
    return mix(prompt ^ mix(hashes(batch, "system_hash") ^ mix(answer)))


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash each number (splitmix64), so that a sample does not depend on what the numbers are."""
    with np.errstate(over="ignore"):
        x = values + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
        return mixed


def read_rows(runs: Sequence[ScoreRun], grouping: Grouping = Grouping.AUTO) -> Rows:
    """Read all that is known of every row but its instability. RunError if there are no rows."""
    counts = [entry.name for entry in signals(length=True)]
    measured = [entry.name for entry in signals(column=True, compared=True)]
    digests = [hashlib.sha256() for _ in range(4)]
    categories: dict[str | None, int] = {None: -1}
    sources: dict[str, int] = {}
    blocks: dict[str, list[NDArray[Any]]] = {}
    for run in runs:
        for batch in run.batches([*_TEXTS, *_HASHES[1:], "source", "source_set", *counts, "score", *measured]):
            group = batch.column("group").to_pylist()
            columns: dict[str, NDArray[Any]] = {
                "label": np.array([_CLASSES[label] for label in batch.column("label").to_pylist()], np.int8),
                "group": hashes(batch, "group"),
                "text": hashes(batch, "prompt_hash", "group"),
                "prompt": prompt_keys(batch),
                "category": np.array(
                    [categories.setdefault(text, len(categories) - 1) for text in batch.column("category").to_pylist()],
                    np.int32,
                ),
                "source": _sources(batch, run.name, sources),
                **{name: np.nan_to_num(floats(batch, name), nan=-1).astype(np.int32) for name in counts},
                **{name: floats(batch, name).astype(np.float32) for name in measured},
            }
            arrays = (columns["label"], columns["n_steps"], floats(batch, "score"))
            contents = ["".join(group).encode(), *(array.tobytes() for array in arrays)]
            for digest, content in zip(digests, contents):
                digest.update(content)
            for name, column in columns.items():
                blocks.setdefault(name, []).append(column)
    joined = {name: np.concatenate(blocks.pop(name)) for name in list(blocks)}
    if not joined:
        raise RunError("the runs have no rows: there is nothing to calibrate on")
    names = ("group", "text", "prompt")
    group, text, prompt = (np.unique(joined.pop(name), return_inverse=True)[1] for name in names)
    group, grouped = group_prompts(group, text, partial(_minhashes, runs), grouping)
    return Rows(
        joined["label"],
        group,
        prompt,
        joined["category"],
        joined["source"],
        list(sources),
        {name: joined[name] for name in counts},
        {name: joined[name] for name in measured if not np.isnan(joined[name]).all()},
        hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest(),
        grouped,
    )


def group_prompts(
    group: Ints,
    text: Ints,
    minhashes: Callable[[Ints], NDArray[np.uint16] | None],
    grouping: Grouping = Grouping.AUTO,
) -> tuple[Ints, Grouped]:
    """The groups of rows, and what they are.

    Args:
        group, text: [rows] numbers of the rows' own groups and of their texts, from 0.
        minhashes: of numbers of rows [n], their texts' MinHashes [n, NUMBERS]; None if they are not known.
        grouping: what makes a group.
    """
    n, first = int(text.max()) + 1, np.unique(text, return_index=True)[1]
    # Without a key a row's group is its text.
    keys = len(np.unique(group)) != n or bool((group[first][text] != group).any())
    if grouping is Grouping.OWN or (grouping is Grouping.AUTO and (keys or n <= _MANY_PROMPTS)):
        if not keys:
            return group, Grouped()
        n_groups = int(group.max()) + 1
        return group, Grouped(keys=True, note=f"{n:,} prompts are in {n_groups:,} groups, by the rows' own `group`")
    signatures = minhashes(first)
    if signatures is None:
        if grouping is Grouping.NEAR:
            raise RunError(
                "--group near compares the prompts, and the runs kept nothing of them: score without --redact, or give "
                "the rows groups of their own (--column group=NAME)"
            )
        return group, Grouped(
            note="near duplicates were not looked for, as the runs kept nothing of the prompts: if many are made from "
            "few templates, the promise does not hold; give the rows groups of their own (--column group=NAME)"
        )
    near = near_groups(signatures)
    n_groups = int(near.max()) + 1
    largest = int(np.bincount(near).max())
    note = f"no near duplicates are among {n:,} prompts"
    if n_groups < n:
        note = f"{n:,} prompts are in {n_groups:,} groups of near duplicates, the largest of {largest:,} (--group near)"
    return near[text], Grouped(Grouping.NEAR, keys, note)


def sketches(batch: pa.RecordBatch) -> NDArray[np.uint16] | None:
    """The MinHashes of a batch's prompts [rows, NUMBERS]; None if its part did not keep them."""
    if "minhash" not in batch.schema.names or batch.column("minhash").null_count:
        return None
    return np.frombuffer(b"".join(batch.column("minhash").to_pylist()), np.uint16).reshape(-1, NUMBERS)


def _minhashes(runs: Sequence[ScoreRun], selected: Ints) -> NDArray[np.uint16] | None:
    """The MinHashes of the prompts of rows with these numbers [n]: [n, NUMBERS].

    Of a run without them they are made of the prompts that it saved; None if it has neither.
    """
    order = np.argsort(selected)
    signatures = np.empty((len(selected), NUMBERS), np.uint16)
    first = 0
    for run in runs:
        for batch in run.batches(["label", "minhash", "prompt"]):
            start, stop = np.searchsorted(selected[order], [first, first + batch.num_rows])
            places = order[start:stop]
            part = batch.take(pa.array(selected[places] - first))
            first += batch.num_rows
            kept = sketches(part)
            if kept is not None:
                signatures[places] = kept
            elif "prompt" in part.schema.names and not part.column("prompt").null_count:
                for place, text in zip(places, part.column("prompt").to_pylist()):
                    signatures[place] = minhash(text.casefold())
            else:
                return None
    return signatures


def _sources(batch: pa.RecordBatch, run: str, known: dict[str, int]) -> NDArray[np.int32]:
    """Each row's source as a number of the known ones, to which new ones are added."""
    names = pa.scalar(Path(run).name)
    if "source" in batch.schema.names:
        names = pc.coalesce(pc.replace_substring_regex(batch.column("source").cast("string"), r"^.*/", ""), names)
    if "source_set" in batch.schema.names:
        names = pc.coalesce(batch.column("source_set").cast("string"), names)
    if isinstance(names, pa.Scalar):
        return np.full(batch.num_rows, known.setdefault(names.as_py(), len(known)), np.int32)
    encoded = names.dictionary_encode()
    numbers = [known.setdefault(name, len(known)) for name in encoded.dictionary.to_pylist()]
    return np.array(numbers, np.int32)[encoded.indices.to_numpy()]


def read_instability(
    runs: Sequence[ScoreRun], selected: Ints, steps: int
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Read the instability of selected rows, batch by batch.

    Args:
        selected: [n] numbers of the rows, ascending.
        steps: the last step to read.

    Yields:
        Which of the selected rows, and [rows, steps + 1, layers] with NaN after an answer's end.
    """
    layers = runs[0].model.layers
    for first, instability in _batches_of_instability(runs, layers):
        start, stop = np.searchsorted(selected, [first, first + len(instability)])
        if start == stop:
            continue
        block = np.full((stop - start, steps + 1, layers), np.nan, np.float32)
        for target, row in zip(block, selected[start:stop]):
            recorded = instability[row - first][: steps + 1]
            target[: len(recorded)] = recorded
        yield slice(start, stop), block


def exact_scores(runs: Sequence[ScoreRun], rows: Rows, requests: Sequence[tuple[ScoreRange, Ints]]) -> list[Floats]:
    """Score rows by the definition, in one pass.

    `requests` are ranges, each with the numbers [n] of the rows to score over it, ascending. Returns for each of them
    the scores [n], NaN for none.
    """
    n_steps = rows.counts["n_steps"]
    results = [np.full(len(selected), np.nan) for _, selected in requests]
    for first, instability in _batches_of_instability(runs, runs[0].model.layers):
        for (score_range, selected), scores in zip(requests, results):
            start, stop = np.searchsorted(selected, [first, first + len(instability)])
            for place in range(start, stop):
                row = int(selected[place])
                value = score_range.score(instability[row - first], int(n_steps[row])).value
                if value is not None:
                    scores[place] = value
    return results


def _batches_of_instability(runs: Sequence[ScoreRun], layers: int) -> Iterator[tuple[int, list[NDArray[np.float32]]]]:
    """The number of each batch's first row, and its rows' instability [recorded steps, layers]."""
    first = 0
    for run in runs:
        for batch in run.batches(["instability"]):
            column = batch.column(0)
            ends = np.cumsum(column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False))
            flat = column.flatten().to_numpy(zero_copy_only=False)
            yield first, [flat[start:end].reshape(-1, layers) for start, end in zip([0, *ends[:-1]], ends)]
            first += batch.num_rows


def floats(batch: pa.RecordBatch, name: str) -> Floats:
    """A column as floats, NaN for null or if the run does not have it."""
    if name not in batch.schema.names:
        return np.full(batch.num_rows, np.nan)
    values: Floats = batch.column(name).cast(pa.float64()).to_numpy(zero_copy_only=False)
    return values


def open_csv(root: Path) -> ScoreRun:
    """All prompts below a folder of CSV files, as a run: its window is all steps that any answer has.

    RunError if there are no such files, or they do not go together.
    """
    files = sorted(root.rglob(_CSV))
    if not files:
        raise RunError(f"--import-csv {root} has no {_CSV}: give the folder that gather.py wrote its folders to")
    matrices = [_read_matrix(path) for path in files]
    layers = {len(matrix): path for matrix, path in zip(matrices, files)}
    if len(layers) > 1:
        counts = ", ".join(f"{n} in {path}" for n, path in layers.items())
        raise RunError(f"--import-csv {root} has different numbers of layers ({counts}): one model at a time")
    steps = max(matrix.shape[1] for matrix in matrices) - 1
    if not steps:
        raise RunError(f"--import-csv {root} has no step after the prefill: there is nothing to score")
    score_range = ScoreRange(Window(1, steps))
    rows = [_csv_row(path, matrix, score_range) for path, matrix in zip(files, matrices)]
    table = pa.table({name: [row[name] for row in rows] for name in rows[0]})

    def batches(names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        nothing = pa.nulls(len(table), pa.float64())
        columns = {name: table[name] if name in table.column_names else nothing for name in names}
        yield from pa.table(columns).to_batches()

    unknown = dict.fromkeys(("name", "fingerprint", "dtype", "heads", "chat_template_sha256"))
    return ScoreRun(str(root), ModelIdentity(layers=next(iter(layers)), **unknown), steps, score_range, False, batches)


def _read_matrix(path: Path) -> NDArray[np.float32]:
    """[layers, steps + 1]"""
    try:
        matrix = np.loadtxt(path, np.float32, delimiter=",", ndmin=2)
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}): it must be numbers, a line per layer") from error
    if not matrix.size:
        raise RunError(f"{path} is empty: remove its folder, or write it again")
    return matrix


def _csv_row(path: Path, matrix: NDArray[np.float32], score_range: ScoreRange) -> dict[str, object]:
    """The columns of a part that calibration reads."""
    n_steps = matrix.shape[1] - 1
    instability = np.ascontiguousarray(matrix.T)
    text = (path.parent.name.rpartition("__")[0] or path.parent.name).replace("_", " ")
    about = path.parent / "meta.json"
    if about.is_file():
        text = json.loads(about.read_text(encoding="utf-8")).get("user_prompt") or text
    return {
        "label": _CSV_LABELS.get(path.parent.parent.name),
        "group": hashlib.sha256(text.encode()).hexdigest()[:16],
        "prompt": text,
        "score": score_range.score(instability, n_steps).value,
        "n_steps": n_steps,
        "answer_tokens": n_steps + 1,
        "instability": instability.ravel(),
    }
