"""Tables, a record at a time: .csv with a header line, and .parquet by batches of a row group.

Records are numbered from 1, the header not counted. Columns are those whose names are known; others are not read. A
cell of `messages`, `tools`, `token_ids`, `response_ids` or `regions` may hold JSON text. An empty cell of a .csv is
nothing.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import IO, Any

from headrift.corpus.rows import PROMPTS, Unreadable, with_nested
from headrift.corpus.sources import Source

MAX_ROW_CHARACTERS = 64 << 20
_BATCH = 64  # records of a Parquet file in memory at a time
CsvRecord = tuple[list[str], list[str]]  # the header and the cells
_UNREADABLE = "the file is damaged here, in row group {group} ({error}); write it anew, or restore it from a copy"


def check_csv(source: Source, names: Mapping[str, str]) -> None:
    """ValueError, saying what is wrong, unless the first line names the columns of a table of prompts."""
    with _open(source) as file:
        try:
            _check_columns(_header(_reader(file)), names)
        except csv.Error as error:
            raise ValueError(f"has a first line that is not CSV ({error}): it must name the columns") from error


def csv_records(source: Source, names: Mapping[str, str]) -> Iterator[tuple[int, CsvRecord | Unreadable]]:
    """Each record's number, and the header with its cells."""
    with _open(source) as file:
        reader = _reader(file)
        header = _header(reader)
        number = 0
        while True:
            record: CsvRecord | Unreadable
            try:
                cells = next(reader, None)
                if cells is None:
                    return
                if not cells:
                    continue
                record = header, cells
            except csv.Error as error:
                record = _csv_error(str(error))
            number += 1
            yield number, record


def csv_fields(record: CsvRecord | Unreadable, names: Mapping[str, str]) -> dict[str, Any]:
    """A record's fields by key. Unreadable for a broken one."""
    if isinstance(record, Unreadable):
        raise record
    header, cells = record
    if any("\0" in cell for cell in cells):
        raise Unreadable("nul_byte", "the record holds a NUL byte: the file is no text, or UTF-16; convert it to UTF-8")
    for name, cell in chain(zip(header, cells), [("the record", "".join(cells[len(header) :]))]):
        try:
            cell.encode()
        except UnicodeEncodeError as error:
            byte = ord(error.object[error.start]) - 0xDC00
            detail = f"a byte of `{name}` (0x{byte:02x}) is not valid UTF-8; convert the file to UTF-8"
            raise Unreadable("invalid_utf8", detail) from error
    if len(cells) != len(header):
        detail = f"the record has {len(cells)} cells, and the first line names {len(header)} columns; put cells with "
        raise Unreadable("wrong_columns", detail + "commas or line breaks in double quotes")
    return with_nested({names[name]: cell for name, cell in zip(header, cells) if name in names and cell != ""})


def _open(source: Source) -> IO[str]:
    # Bytes that are not UTF-8 pass as lone surrogates, so that only the records that hold them are turned down.
    return io.TextIOWrapper(source.stream(), encoding="utf-8-sig", errors="surrogateescape", newline="")


def _reader(file: IO[str]) -> Iterator[list[str]]:
    csv.field_size_limit(MAX_ROW_CHARACTERS)
    # A line too long for memory comes in pieces, each of which makes a bad record.
    return csv.reader(iter(lambda: file.readline(MAX_ROW_CHARACTERS + 1), ""), strict=True)


def _header(reader: Iterator[list[str]]) -> list[str]:
    return [name.strip().encode(errors="backslashreplace").decode() for name in next(reader, [])]


def _csv_error(said: str) -> Unreadable:
    if "field larger than field limit" in said:
        return Unreadable("row_too_big", f"a cell is longer than {MAX_ROW_CHARACTERS:,} characters; is a quote open?")
    if "unexpected end of data" in said:
        said = "a double quote is opened and never closed, so all that follows it was taken as one cell"
    return Unreadable("bad_csv", f"not valid CSV: {said}; put a cell in double quotes and double those in it")


def check_parquet(source: Source, names: Mapping[str, str]) -> None:
    """ValueError, saying what is wrong, unless it is a Parquet file with columns of a table of prompts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with source.open() as file:
        try:
            columns = pq.read_schema(file).names
        except (pa.ArrowException, OSError, ValueError) as error:
            said = _first_line(error)
            raise ValueError(
                f"is no readable Parquet file ({said}): write it anew, or restore it from a copy"
            ) from error
    _check_columns(columns, names)


def count_parquet(source: Source, limit: int | None = None) -> int:
    """How many records there are, good and bad; limit: stop counting there."""
    import pyarrow.parquet as pq

    with source.open() as file:
        n_rows = int(pq.read_metadata(file).num_rows)
    return n_rows if limit is None else min(n_rows, limit)


def parquet_records(source: Source, names: Mapping[str, str]) -> Iterator[tuple[int, tuple[Any, int] | Unreadable]]:
    """Each record's number, and the batch that it is in with its place there."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Read as it is needed: neither the file nor a row group has to fit into memory.
    with source.open() as opened, pq.ParquetFile(opened, buffer_size=1 << 20, pre_buffer=False) as file:
        columns = [name for name in file.schema_arrow.names if name in names]
        first = 1
        for group in range(file.num_row_groups):
            n_rows, done = file.metadata.row_group(group).num_rows, 0
            try:
                for batch in file.iter_batches(_BATCH, row_groups=[group], columns=columns):
                    for i in range(batch.num_rows):
                        done += 1
                        yield first + done - 1, (batch, i)
            except (pa.ArrowException, OSError) as error:
                if getattr(error, "errno", None) is not None:  # the disk's or the network's, and not the file's
                    raise
                why = _UNREADABLE.format(group=group + 1, error=_first_line(error))
                for number in range(first + done, first + n_rows):
                    yield number, Unreadable("unreadable_rows", why)
            first += n_rows


def parquet_fields(record: tuple[Any, int] | Unreadable, names: Mapping[str, str]) -> dict[str, Any]:
    """A record's fields by key. Unreadable for one that has no such form."""
    if isinstance(record, Unreadable):
        raise record
    batch, i = record
    cells = ((names[name], column[i]) for name, column in zip(batch.schema.names, batch.columns))
    return with_nested({key: _of_scalar(key, cell) for key, cell in cells})


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _of_scalar(name: str, scalar: Any) -> Any:
    """A cell as JSON would hold it. Unreadable for what has no such form."""
    try:
        return _without_nulls(scalar.as_py())
    except UnicodeDecodeError as error:
        raise Unreadable("invalid_utf8", f"`{name}` is not valid UTF-8; write the column anew from UTF-8") from error
    except (ValueError, OverflowError, ImportError) as error:  # a time that Python cannot hold, and the like
        raise Unreadable("wrong_type", f"`{name}` is a {scalar.type} that cannot be read; make it a text") from error


def _without_nulls(value: Any) -> Any:
    """Every struct in a column has all the fields that any of them has, so a null there is nothing at all."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


def _check_columns(columns: Iterable[str], names: Mapping[str, str]) -> None:
    columns = list(columns)
    twice = [name for name, n in Counter(columns).items() if n > 1 and name in names]
    if twice:
        raise ValueError(f"has two columns called {twice[0]!r}: rename or drop one")
    if not {names[name] for name in columns if name in names} & set(PROMPTS):
        found = ascii(", ".join(columns))[1:-1]
        found = f"are {found[:100]}{'...' if len(found) > 100 else ''}" if found else "have no names"
        need = (
            "a column `prompt`, `messages` or `token_ids` is needed, named in a first line, with commas between names"
        )
        raise ValueError(f"has no prompts: its columns {found}; {need}, or say which it is: --column prompt=NAME")
