"""Input files, read a row at a time: every row that is not skipped is a Row to score or a BadRow that says why not.

.txt: a prompt a line; lines that begin with # are comments. .jsonl: a JSON object a line. .csv and .parquet: see
tables. Keys or columns: `prompt` (and `system`), `messages` (OpenAI chat form, and `tools`) or `token_ids` (and
`regions`), with `id`, `label`, `category`, `response` or `response_ids` where there are any. Blank lines are skipped,
keys that have no meaning here are ignored, and null is the same as nothing.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from headrift.corpus import tables
from headrift.corpus.rows import KEYS, LABELS, BadRow, Row, Rows, Unreadable, kind, parsed, with_whole_characters

MAX_LINE_BYTES = 64 << 20

_Numbered = Iterator[tuple[int, tables.Fields]]


class InputError(ValueError):
    """An input or its label cannot be used at all. The message names it and says what to do."""


def check_inputs(inputs: Sequence[Path], labels: Sequence[str] | None = None) -> None:
    """InputError unless there are inputs, each a readable file of a known kind, and the labels, if any, fit them."""
    if not inputs:
        raise InputError("no input file: name at least one .txt, .jsonl, .csv or .parquet file")
    for path in inputs:
        if path.is_dir():
            raise InputError(f"{path} is a folder: name the files in it")
        if path.suffix.lower() not in _FORMATS:
            kinds = ".txt (a prompt a line), .jsonl (an object a line), .csv or .parquet"
            raise InputError(f"{path} has a name of no known kind: use {kinds}")
        try:
            path.open("rb").close()
            _FORMATS[path.suffix.lower()].check(path)
        except FileNotFoundError:
            raise InputError(f"{path} does not exist: check the name") from None
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise InputError(f"{path} {error}") from error
    if len({path.resolve() for path in inputs}) < len(inputs):
        raise InputError(f"an input is named twice: {', '.join(map(str, inputs))}; name each file once")
    if labels is None:
        return
    for label in labels:
        if label not in LABELS:
            raise InputError(
                f"unknown label {label!r}: labels are {' and '.join(LABELS)}, as in --labels attack,benign"
            )
    if len(labels) != len(inputs):
        given, files = _plural(len(labels), "label"), _plural(len(inputs), "input")
        raise InputError(f"{given} for {files}: give each input its label, in order, as in --labels attack,benign")


def read_rows(inputs: Sequence[Path], labels: Sequence[str] | None = None) -> Iterator[Row | BadRow]:
    """The rows of the inputs in order, one at a time. labels: one per input, for the rows that bring none.

    InputError at the call, before anything is read (see check_inputs); OSError where a file cannot be read on. An id
    that an earlier row brought makes a BadRow: the ids are remembered, in some 70 bytes each.
    """
    check_inputs(inputs, labels)
    return _rows(inputs, labels or [None] * len(inputs))


def count_rows(path: Path, limit: int | None = None) -> int:
    """How many rows read_rows makes of an input, good and bad, without looking into them; limit: stop counting there.

    OSError where it cannot be read.
    """
    return _FORMATS[path.suffix.lower()].count(path, limit)


def _rows(inputs: Sequence[Path], labels: Sequence[str | None]) -> Iterator[Row | BadRow]:
    rows = Rows()
    stems = [path.stem for path in inputs]
    for path, label in zip(inputs, labels, strict=True):
        # File names need not be valid Unicode; what is written to Parquet has to be.
        source = str(path).encode(errors="backslashreplace").decode()
        stem = path.stem.encode(errors="backslashreplace").decode() if stems.count(path.stem) == 1 else source
        for number, fields in _FORMATS[path.suffix.lower()].read(path):
            yield rows.make(source, number, f"{stem}:{number}", label, fields)


def _lines(path: Path, *, comments: bool) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines without their ends, None for one too long; neither blank ones nor comments."""
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
                while (rest := file.readline(1 << 20)) and not rest.endswith(b"\n"):
                    pass
                yield number, None
                continue
            line = (raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw).rstrip(b"\r\n")
            text = line.strip()
            if text and not (comments and text.startswith(b"#")):
                yield number, line


def _read_lines(path: Path, *, comments: bool, fields: Callable[[str], dict[str, Any]]) -> _Numbered:
    for number, line in _lines(path, comments=comments):
        try:
            yield number, fields(_text(line))
        except Unreadable as error:
            yield number, error


def _text(line: bytes | None) -> str:
    if line is None:
        fix = "is the file one JSON list? write an object a line"
        raise Unreadable("row_too_big", f"the line is longer than {MAX_LINE_BYTES:,} bytes; {fix}")
    if b"\0" in line:
        raise Unreadable("nul_byte", "the line holds a NUL byte: the file is no text, or UTF-16; convert it to UTF-8")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        where = f"byte {error.start + 1} of the line (0x{line[error.start]:02x})"
        raise Unreadable("invalid_utf8", f"{where} is not valid UTF-8; convert the file to UTF-8") from error


def _object(text: str) -> dict[str, Any]:
    given = parsed(text)
    if not isinstance(given, dict):
        fix = """write one object a line, as in {"prompt": "..."}"""
        raise Unreadable("not_an_object", f"the line is {kind(given)}, not a JSON object; {fix}")
    return with_whole_characters({key: given[key] for key in KEYS if key in given}, text)


def _plural(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


@dataclass(frozen=True, slots=True)
class _Format:
    """How files of a kind are checked (ValueError), counted and read."""

    check: Callable[[Path], None]
    count: Callable[[Path, int | None], int]
    read: Callable[[Path], _Numbered]


def _format_of_lines(*, comments: bool, fields: Callable[[str], dict[str, Any]]) -> _Format:
    return _Format(
        check=lambda path: None,
        count=lambda path, limit: sum(1 for _ in islice(_lines(path, comments=comments), limit)),
        read=partial(_read_lines, comments=comments, fields=fields),
    )


_FORMATS = {
    ".txt": _format_of_lines(comments=True, fields=lambda text: {"prompt": text}),
    ".jsonl": _format_of_lines(comments=False, fields=_object),
    ".csv": _Format(tables.check_csv, tables.count_csv, tables.read_csv),
    ".parquet": _Format(tables.check_parquet, tables.count_parquet, tables.read_parquet),
}
