"""Tables, a record at a time: .csv with a header line, and .parquet by batches of a row group.

Records are numbered from 1, the header not counted. Columns are those of rows.KEYS; others are not read. A cell of
`messages`, `tools`, `token_ids`, `response_ids` or `regions` may hold JSON text. An empty cell of a .csv is nothing.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from headrift.corpus.rows import KEYS, PROMPTS, Unreadable, with_nested

MAX_ROW_CHARACTERS = 64 << 20
_BATCH = 64  # records of a Parquet file in memory at a time
_UNREADABLE = "the file is damaged here ({error}); write it anew, or restore it from a copy"

Fields = dict[str, Any] | Unreadable


def check_csv(path: Path) -> None:
    """ValueError, saying what is wrong, unless the first line names the columns of a table of prompts."""
    with _open(path) as file:
        try:
            _check_columns(_header(_reader(file)))
        except csv.Error as error:
            raise ValueError(f"has a first line that is not CSV ({error}): it must name the columns") from error


def count_csv(path: Path, limit: int | None = None) -> int:
    """How many records there are, good and bad; limit: stop counting there."""
    return sum(1 for _ in islice(read_csv(path), limit))


def read_csv(path: Path) -> Iterator[tuple[int, Fields]]:
    """Each record's number and fields."""
    with _open(path) as file:
        reader = _reader(file)
        header = _header(reader)
        number = 0
        while True:
            fields: Fields
            try:
                cells = next(reader, None)
                if cells is None:
                    return
                if not cells:
                    continue
                fields = _of_cells(header, cells)
            except csv.Error as error:
                fields = _csv_error(str(error))
            except Unreadable as error:
                fields = error
            number += 1
            yield number, fields


def _open(path: Path) -> IO[str]:
    # Bytes that are not UTF-8 pass as lone surrogates, so that only the records that hold them are turned down.
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def _reader(file: IO[str]) -> Iterator[list[str]]:
    csv.field_size_limit(MAX_ROW_CHARACTERS)
    # A line too long for memory comes in pieces, each of which makes a bad record.
    return csv.reader(iter(lambda: file.readline(MAX_ROW_CHARACTERS + 1), ""), strict=True)


def _header(reader: Iterator[list[str]]) -> list[str]:
    return [name.strip().encode(errors="backslashreplace").decode() for name in next(reader, [])]


def _of_cells(header: list[str], cells: list[str]) -> dict[str, Any]:
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
    return with_nested({name: cell for name, cell in zip(header, cells) if name in KEYS and cell != ""})


def _csv_error(said: str) -> Unreadable:
    if "field larger than field limit" in said:
        return Unreadable("row_too_big", f"a cell is longer than {MAX_ROW_CHARACTERS:,} characters; is a quote open?")
    if "unexpected end of data" in said:
        said = "a double quote is opened and never closed, so all that follows it was taken as one cell"
    return Unreadable("bad_csv", f"not valid CSV: {said}; put a cell in double quotes and double those in it")


def check_parquet(path: Path) -> None:
    """ValueError, saying what is wrong, unless it is a Parquet file with columns of a table of prompts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(path).names
    except (pa.ArrowException, OSError, ValueError) as error:
        said = str(error).strip().splitlines()[0].rstrip(".")
        raise ValueError(f"is no readable Parquet file ({said}): write it anew, or restore it from a copy") from error
    _check_columns(names)


def count_parquet(path: Path, limit: int | None = None) -> int:
    """How many records there are, good and bad; limit: stop counting there."""
    import pyarrow.parquet as pq

    n_rows = int(pq.read_metadata(path).num_rows)
    return n_rows if limit is None else min(n_rows, limit)


def read_parquet(path: Path) -> Iterator[tuple[int, Fields]]:
    """Each record's number and fields."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Read as it is needed: neither the file nor a row group has to fit into memory.
    with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
        columns = [name for name in file.schema_arrow.names if name in KEYS]
        first = 1
        for group in range(file.num_row_groups):
            n_rows, done = file.metadata.row_group(group).num_rows, 0
            try:
                for batch in file.iter_batches(_BATCH, row_groups=[group], columns=columns):
                    for i in range(batch.num_rows):
                        done += 1
                        yield first + done - 1, _of_record(batch, columns, i)
            except (pa.ArrowException, OSError) as error:
                why = _UNREADABLE.format(error=str(error).strip().splitlines()[0].rstrip("."))
                for number in range(first + done, first + n_rows):
                    yield number, Unreadable("unreadable_rows", why)
            first += n_rows


def _of_record(batch: Any, columns: list[str], i: int) -> Fields:
    try:
        return with_nested({name: _of_scalar(name, batch.column(name)[i]) for name in columns})
    except Unreadable as error:
        return error


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


def _check_columns(names: Iterable[str]) -> None:
    names = list(names)
    twice = [name for name, n in Counter(names).items() if n > 1 and name in KEYS]
    if twice:
        raise ValueError(f"has two columns called {twice[0]!r}: rename or drop one")
    if not set(names) & set(PROMPTS):
        found = ascii(", ".join(names))[1:-1]
        found = f"are {found[:100]}{'...' if len(found) > 100 else ''}" if found else "have no names"
        need = (
            "a column `prompt`, `messages` or `token_ids` is needed, named in a first line, with commas between names"
        )
        raise ValueError(f"has no prompts: its columns {found}; {need}")
