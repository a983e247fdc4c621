"""Input files, read a row at a time: a row that is not skipped is a Row to score or a BadRow with the reason why not.

.txt: a prompt per line; lines that begin with # are comments. .jsonl: a JSON object per line. .csv: with a header line.
.parquet. Keys or columns: `prompt` (and `system`), `messages` (OpenAI chat form, and `tools`) or `token_ids` (and
`regions`); optional are `id`, `label`, `category`, and `response` or `response_ids`. Blank lines are skipped, unknown
keys are ignored, and null, or an empty cell of a .csv, is the same as nothing.

Finding a record and reading its fields are two steps, so that rows that are not selected cost little. A damaged file is
read up to the damage, which is a bad row.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from headrift.corpus.rows import (
    KEYS,
    PROMPTS,
    BadRow,
    Fields,
    Row,
    RowError,
    TakeId,
    check_characters,
    kind_of,
    make_row,
    parse_json,
    parse_nested,
)
from headrift.corpus.sources import InputError, Source

MAX_LINE_BYTES = 64 << 20
MAX_CELL_CHARACTERS = 64 << 20
_PARQUET_BATCH = 64  # records of a Parquet file in memory at a time
_NUL = "has a NUL byte: the file is not a text, or is UTF-16; convert it to UTF-8"


class Reader:
    """Reads rows of sources; `columns` has the files' own names for keys of a row.

    InputError if a file cannot be used at all; OSError, later, if one cannot be read any further.
    """

    def __init__(self, sources: Sequence[Source], columns: Mapping[str, str] | None = None) -> None:
        unknown = set(columns or {}) - set(KEYS)
        if unknown:
            raise InputError(f"a row has no key {sorted(unknown)[0]!r}: --column KEY=NAME takes {', '.join(KEYS)}")
        keys = {(columns or {}).get(key, key): key for key in KEYS}
        self._formats = {source: _FORMATS[source.kind](source, keys) for source in sources}
        for source, file in self._formats.items():
            try:
                file.check()
            except (EOFError, OSError) as error:
                reason = getattr(error, "strerror", None) or error
                raise InputError(f"{source.name} cannot be read: {reason}") from error
            except ValueError as error:
                raise InputError(f"{source.name} {error}") from error

    def count(self, source: Source, limit: int | None = None) -> int:
        return self._formats[source].count(limit)

    def rows(self, selected: Iterator[bool] | None = None, take_id: TakeId | None = None) -> Iterator[Row | BadRow]:
        """Read the rows in order; `selected` tells of each row whether to read it, and ends the reading."""
        for source, file in self._formats.items():
            for number, record in file.records_until_damage():
                if selected is not None:
                    take = next(selected, None)
                    if take is None:
                        return
                    if not take:
                        continue
                fields = file.read(record)
                if isinstance(fields, dict):
                    fields |= {key: value for key, value in source.partition if fields.get(key) is None}
                yield make_row(source.name, number, f"{source.stem}:{number}", source.label, fields, take_id)


def read_fields(source: Source, keys: Mapping[str, str]) -> Iterator[tuple[int, Fields]]:
    """Read a file of other rows than prompts: each record's number, and its fields or why they cannot be read.

    `keys` has the key of each name or column that is read. InputError if the file cannot be opened.
    """
    try:
        source.open().close()
    except OSError as error:
        raise InputError(f"{source.name} cannot be read: {error.strerror or error}") from error
    file = _FORMATS[source.kind](source, keys)
    for number, record in file.records_until_damage():
        yield number, file.read(record)


class _Format:
    """How a file of one kind is read. `keys` has the row's key for each name in the file."""

    def __init__(self, source: Source, keys: Mapping[str, str]) -> None:
        self.source, self.keys = source, keys

    def check(self) -> None:
        """ValueError, saying what is wrong, if the file is not of this kind."""
        self.source.open().close()

    def count(self, limit: int | None) -> int:
        """Count the records, good and bad, up to a limit."""
        return sum(1 for _ in islice(self.records_until_damage(), limit))

    def records(self) -> Iterator[tuple[int, Any]]:
        """Find the numbered records."""
        raise NotImplementedError

    def fields(self, record: Any) -> dict[str, Any]:
        """Return a record's values by key. RowError if it cannot be read."""
        raise NotImplementedError

    def read(self, record: Any) -> Fields:
        """Return a record's values by key, or why it cannot be read."""
        try:
            if isinstance(record, RowError):
                raise record
            return self.fields(record)
        except RowError as error:
            return error

    def records_until_damage(self) -> Iterator[tuple[int, Any]]:
        """Find the records; if the file is damaged, the last one is a RowError."""
        last = 0
        try:
            for last, record in self.records():
                yield last, record
        except Exception as error:
            if not self.source.is_damage(error):
                raise
            where = f"after row {last} ({str(error).strip().rstrip('.')})"
            detail = f"the file is damaged or cut off here, {where}; restore it from a copy"
            yield last + 1, RowError("damaged_file", detail)


class _Text(_Format):
    """A prompt per line."""

    comments = True

    def records(self) -> Iterator[tuple[int, bytes | None]]:
        """Find the lines, without their ends, None for one that is too long; neither blank ones nor comments."""
        with self.source.stream() as file:
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
                if text and not (self.comments and text.startswith(b"#")):
                    yield number, line

    def fields(self, record: bytes | None) -> dict[str, Any]:
        return {"prompt": _decode(record)}


class _JsonLines(_Text):
    """A JSON object per line."""

    comments = False

    def fields(self, record: bytes | None) -> dict[str, Any]:
        text = _decode(record)
        value = parse_json(text)
        if not isinstance(value, dict):
            fix = """write one object per line, as in {"prompt": "..."}"""
            raise RowError("not_an_object", f"the line is {kind_of(value)}, not a JSON object; {fix}")
        fields = {self.keys[name]: item for name, item in value.items() if name in self.keys and item is not None}
        return dict(check_characters(fields, text))


def _decode(line: bytes | None) -> str:
    if line is None:
        fix = "is the file one JSON list? write an object per line"
        raise RowError("row_too_big", f"the line is longer than {MAX_LINE_BYTES:,} bytes; {fix}")
    if b"\0" in line:
        raise RowError("nul_byte", f"the line {_NUL}")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        where = f"byte {error.start + 1} of the line (0x{line[error.start]:02x})"
        raise RowError("invalid_utf8", f"{where} is not valid UTF-8; convert the file to UTF-8") from error


class _Csv(_Format):
    """Records of cells under a header line."""

    def check(self) -> None:
        with self._open() as file:
            try:
                _check_columns(_header(_csv_reader(file)), self.keys)
            except csv.Error as error:
                raise ValueError(f"has a first line that is not CSV ({error}): it must name the columns") from error

    def records(self) -> Iterator[tuple[int, tuple[list[str], list[str]] | RowError]]:
        """Find the records: the header and the cells."""
        with self._open() as file:
            reader = _csv_reader(file)
            header = _header(reader)
            number = 0
            while True:
                try:
                    cells: list[str] | RowError | None = next(reader, None)
                except csv.Error as error:
                    cells = _csv_error(str(error))
                if cells is None:
                    return
                if cells:  # not a blank line
                    number += 1
                    yield number, cells if isinstance(cells, RowError) else (header, cells)

    def fields(self, record: tuple[list[str], list[str]]) -> dict[str, Any]:
        header, cells = record
        if any("\0" in cell for cell in cells):
            raise RowError("nul_byte", f"the record {_NUL}")
        for name, cell in chain(zip(header, cells), [("the record", "".join(cells[len(header) :]))]):
            try:
                cell.encode()
            except UnicodeEncodeError as error:
                byte = ord(error.object[error.start]) - 0xDC00
                detail = f"a byte of `{name}` (0x{byte:02x}) is not valid UTF-8; convert the file to UTF-8"
                raise RowError("invalid_utf8", detail) from error
        if len(cells) != len(header):
            detail = f"the record has {len(cells)} cells, and the first line names {len(header)} columns"
            raise RowError("wrong_columns", f"{detail}; put cells with commas or line breaks in double quotes")
        return parse_nested({self.keys[name]: cell for name, cell in zip(header, cells) if cell and name in self.keys})

    def _open(self) -> io.TextIOWrapper:
        # Bytes that are not UTF-8 pass as lone surrogates, so that only the records that have them are rejected.
        return io.TextIOWrapper(self.source.stream(), encoding="utf-8-sig", errors="surrogateescape", newline="")


def _csv_reader(file: io.TextIOWrapper) -> Iterator[list[str]]:
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    # A line too long for memory comes in pieces, each of which makes a bad record.
    return csv.reader(iter(lambda: file.readline(MAX_CELL_CHARACTERS + 1), ""), strict=True)


def _header(reader: Iterator[list[str]]) -> list[str]:
    return [name.strip().encode(errors="backslashreplace").decode() for name in next(reader, [])]


def _csv_error(message: str) -> RowError:
    if "field larger than field limit" in message:
        return RowError("row_too_big", f"a cell is longer than {MAX_CELL_CHARACTERS:,} characters; is a quote open?")
    if "unexpected end of data" in message:
        message = "a double quote is opened and never closed, so all that follows it was taken as one cell"
    return RowError("bad_csv", f"not valid CSV: {message}; put a cell in double quotes and double those in it")


class _Parquet(_Format):
    """Rows of a Parquet file, found by batches of a row group."""

    def check(self) -> None:
        with self.source.open() as file:
            try:
                columns = pq.read_schema(file).names
            except (pa.ArrowException, OSError, ValueError) as error:
                what = f"is not a readable Parquet file ({_first_line(error)})"
                raise ValueError(f"{what}: write it again, or restore it from a copy") from error
        _check_columns(columns, self.keys)

    def count(self, limit: int | None) -> int:
        with self.source.open() as file:
            n_rows = int(pq.read_metadata(file).num_rows)
        return n_rows if limit is None else min(n_rows, limit)

    def records(self) -> Iterator[tuple[int, tuple[pa.RecordBatch, int] | RowError]]:
        """Find the records: a batch and the place in it."""
        # Read as it is needed: neither the file nor a row group has to fit into memory.
        with self.source.open() as opened, pq.ParquetFile(opened, buffer_size=1 << 20, pre_buffer=False) as file:
            columns = [name for name in file.schema_arrow.names if name in self.keys]
            first = 1
            for group in range(file.num_row_groups):
                n_rows, done = file.metadata.row_group(group).num_rows, 0
                try:
                    for batch in file.iter_batches(_PARQUET_BATCH, row_groups=[group], columns=columns):
                        for i in range(batch.num_rows):
                            done += 1
                            yield first + done - 1, (batch, i)
                except (pa.ArrowException, OSError) as error:
                    if getattr(error, "errno", None) is not None:  # the disk's or the network's, not the file's
                        raise
                    where = f"in row group {group + 1} ({_first_line(error)})"
                    detail = f"the file is damaged here, {where}; write it again, or restore it from a copy"
                    for number in range(first + done, first + n_rows):
                        yield number, RowError("unreadable_rows", detail)
                first += n_rows

    def fields(self, record: tuple[pa.RecordBatch, int]) -> dict[str, Any]:
        batch, i = record
        cells = ((self.keys[name], column[i]) for name, column in zip(batch.schema.names, batch.columns))
        return parse_nested({key: _cell_value(key, cell) for key, cell in cells})


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _cell_value(key: str, scalar: pa.Scalar) -> Any:
    """Return a cell as JSON would have it. RowError if it has no such form."""
    try:
        return _without_nulls(scalar.as_py())
    except UnicodeDecodeError as error:
        raise RowError("invalid_utf8", f"`{key}` is not valid UTF-8; write the column again from UTF-8") from error
    except (ValueError, OverflowError, ImportError) as error:  # such as a time that Python cannot represent
        raise RowError("wrong_type", f"`{key}` is a {scalar.type} that cannot be read; make it a text") from error


def _without_nulls(value: Any) -> Any:
    """Leave out nulls of structs: a struct has every field that any struct in its column has."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


def _check_columns(columns: Iterable[str], keys: Mapping[str, str]) -> None:
    """ValueError, saying what is wrong, unless these are the columns of a table of prompts."""
    columns = list(columns)
    twice = [name for name, n in Counter(columns).items() if n > 1 and name in keys]
    if twice:
        raise ValueError(f"has two columns called {twice[0]!r}: rename or drop one")
    if not {keys[name] for name in columns if name in keys} & set(PROMPTS):
        names = ascii(", ".join(columns))[1:-1]
        actual = f"are {names[:100]}{'...' if len(names) > 100 else ''}" if names else "have no names"
        raise ValueError(
            f"has no prompts: its columns {actual}; name a column `prompt`, `messages` or `token_ids` in the first "
            "line, or say which it is: --column prompt=NAME"
        )


_FORMATS: dict[str, type[_Format]] = {".txt": _Text, ".jsonl": _JsonLines, ".csv": _Csv, ".parquet": _Parquet}
