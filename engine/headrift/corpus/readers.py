"""Input files, read a row at a time: every row that is not skipped is a Row to score or a BadRow that says why not.

.txt: a prompt a line; lines that begin with # are comments. .jsonl: a JSON object a line. .csv and .parquet: see
tables. Keys or columns: `prompt` (and `system`), `messages` (OpenAI chat form, and `tools`) or `token_ids` (and
`regions`), with `id`, `label`, `category`, `response` or `response_ids` where there are any. Blank lines are skipped,
keys that have no meaning here are ignored, and null is the same as nothing.

A record is found first and understood later, so that those that are not wanted cost little. Where a file is damaged,
all before the damage is read, and the damage is a bad row.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from headrift.corpus import tables
from headrift.corpus.rows import (
    KEYS,
    BadRow,
    Fields,
    Row,
    TakeId,
    Unreadable,
    kind,
    make_row,
    parsed,
    with_whole_characters,
)
from headrift.corpus.sources import InputError, Source

MAX_LINE_BYTES = 64 << 20
_DAMAGED = "the file is damaged or cut off here, after row {last} ({error}); restore it from a copy"

Records = Iterator[tuple[int, Any]]


class Reader:
    """Reads rows of sources. columns: for keys of a row that the files call otherwise, their names there.

    InputError, for a file that cannot be used at all; OSError, later, where one cannot be read on.
    """

    def __init__(self, sources: Sequence[Source], columns: Mapping[str, str] | None = None) -> None:
        unknown = set(columns or {}) - set(KEYS)
        if unknown:
            raise InputError(f"a row has no key {sorted(unknown)[0]!r}: --column KEY=NAME takes {', '.join(KEYS)}")
        self._sources = sources
        self._names = {(columns or {}).get(key, key): key for key in KEYS}
        for source in sources:
            self._check(source)

    def _check(self, source: Source) -> None:
        try:
            _FORMATS[source.kind].check(source, self._names)
        except (EOFError, OSError) as error:
            said = getattr(error, "strerror", None) or error
            raise InputError(f"{source.name} cannot be read: {said}") from error
        except ValueError as error:
            raise InputError(f"{source.name} {error}") from error

    def count(self, source: Source, limit: int | None = None) -> int:
        """How many rows a source has, good and bad, without looking into them; limit: stop counting there."""
        return _FORMATS[source.kind].count(source, limit)

    def rows(self, marks: Iterator[bool] | None = None, take_id: TakeId | None = None) -> Iterator[Row | BadRow]:
        """The rows in order, one at a time. marks: which to take, until they end. take_id: see rows.make_row."""
        for source in self._sources:
            format_ = _FORMATS[source.kind]
            for number, record in _records(source, self._names):
                if marks is not None:
                    wanted = next(marks, None)
                    if wanted is None:
                        return
                    if not wanted:
                        continue
                fields: Fields
                try:
                    fields = format_.fields(record, self._names)
                    fields |= {key: value for key, value in source.partition if fields.get(key) is None}
                except Unreadable as error:
                    fields = error
                yield make_row(source.name, number, f"{source.stem}:{number}", source.label, fields, take_id)


def fields_of(source: Source, names: Mapping[str, str]) -> Iterator[tuple[int, Fields]]:
    """Each record's number and its fields, by the keys that `names` has for their names, or why it cannot be read; for
    files of other rows than prompts. InputError where the file cannot be opened."""
    try:
        source.open().close()
    except OSError as error:
        raise InputError(f"{source.name} cannot be read: {error.strerror or error}") from error
    for number, record in _records(source, names):
        try:
            yield number, _FORMATS[source.kind].fields(record, names)
        except Unreadable as error:
            yield number, error


def _records(source: Source, names: Mapping[str, str]) -> Records:
    """A source's records by their numbers; where it is damaged, an Unreadable and then no more."""
    last = 0
    try:
        for last, record in _FORMATS[source.kind].records(source, names):
            yield last, record
    except Exception as error:
        if not source.is_damage(error):
            raise
        yield last + 1, Unreadable("damaged_file", _DAMAGED.format(last=last, error=str(error).strip().rstrip(".")))


def _lines(source: Source, names: Mapping[str, str], *, comments: bool) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines without their ends, None for one too long; neither blank ones nor comments."""
    with source.stream() as file:
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


def _text(line: bytes | Unreadable | None) -> str:
    if isinstance(line, Unreadable):
        raise line
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


def _prompt(line: bytes | Unreadable | None, names: Mapping[str, str]) -> dict[str, Any]:
    return {"prompt": _text(line)}


def _object(line: bytes | Unreadable | None, names: Mapping[str, str]) -> dict[str, Any]:
    text = _text(line)
    given = parsed(text)
    if not isinstance(given, dict):
        fix = """write one object a line, as in {"prompt": "..."}"""
        raise Unreadable("not_an_object", f"the line is {kind(given)}, not a JSON object; {fix}")
    found = {names[name]: value for name, value in given.items() if name in names and value is not None}
    return with_whole_characters(found, text)


@dataclass(frozen=True, slots=True)
class _Format:
    """How files of a kind are checked (ValueError), counted (up to a limit) and read: `records`, and what a record's
    `fields` are, by key, where `names` are the names of the keys."""

    check: Callable[[Source, Mapping[str, str]], None]
    count: Callable[[Source, int | None], int]
    records: Callable[[Source, Mapping[str, str]], Records]
    fields: Callable[[Any, Mapping[str, str]], dict[str, Any]]


def _opened(source: Source, names: Mapping[str, str]) -> None:
    source.open().close()


def _counted(source: Source, limit: int | None) -> int:
    return sum(1 for _ in islice(_records(source, {}), limit))


_FORMATS = {
    ".txt": _Format(_opened, _counted, partial(_lines, comments=True), _prompt),
    ".jsonl": _Format(_opened, _counted, partial(_lines, comments=False), _object),
    ".csv": _Format(tables.check_csv, _counted, tables.csv_records, tables.csv_fields),
    ".parquet": _Format(tables.check_parquet, tables.count_parquet, tables.parquet_records, tables.parquet_fields),
}
