"""The files that inputs name: files, globs and folders (hive partitions too), on this machine or behind a URL."""

from __future__ import annotations

import glob
import gzip
import io
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from headrift.corpus.rows import KEYS, LABELS
from headrift.runs.folder import fingerprint

KINDS = (".txt", ".jsonl", ".csv", ".parquet")
_COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_NAMED_KINDS = ".txt (a prompt per line), .jsonl (an object per line), .csv or .parquet"


class InputError(ValueError):
    """An input or its label cannot be used at all. The message names it and says what to do."""


@dataclass(frozen=True, slots=True)
class Source:
    """An input file."""

    name: str  # as the parts name it
    path: str  # in `filesystem`
    kind: str  # of KINDS
    compression: str | None = None  # gzip or zstd
    label: str | None = None  # of rows that bring none
    partition: tuple[tuple[str, str], ...] = ()  # keys and values of its rows, from folders called key=value
    filesystem: Any = None  # of fsspec; None for this machine
    stem: str = ""  # what ids of rows that bring none begin with

    def open(self) -> IO[bytes]:
        """Open the file's bytes as they are."""
        return open(self.path, "rb") if self.filesystem is None else self.filesystem.open(self.path, "rb")

    def stream(self) -> IO[bytes]:
        """Open the file's bytes, decompressed while they are read; `is_damage` tells what errors mean."""
        if self.compression == "gzip":
            return cast(IO[bytes], gzip.open(self.open()))
        if self.compression == "zstd":
            import pyarrow as pa

            # A read that meets damage gives nothing at all: small ones, so that little before it is lost.
            return io.BufferedReader(pa.CompressedInputStream(self.open(), "zstd"), 1 << 13)
        return self.open()

    def is_damage(self, error: Exception) -> bool:
        """Tell whether an error while reading the stream is the file's, and not the disk's or the network's."""
        if isinstance(error, EOFError | zlib.error | gzip.BadGzipFile):
            return True
        return self.compression == "zstd" and isinstance(error, OSError) and error.errno is None

    def fingerprint(self) -> dict[str, Any]:
        """Return the name, the size and a hash of the file's bytes (see `runs.folder.fingerprint`)."""
        with self.open() as file:
            return {"name": self.name, **fingerprint(file)}


def find(
    inputs: Sequence[str], labels: Sequence[str] | None = None, columns: Mapping[str, str] | None = None
) -> list[Source]:
    """Find the files of the inputs; those of one input are in the order of their names.

    `columns` has the files' own names for keys of a row. InputError if an input or a label cannot be used.
    """
    if not inputs:
        raise InputError("no input file: name at least one .txt, .jsonl, .csv or .parquet file")
    if unknown := set(labels or ()) - set(LABELS):
        raise InputError(f"unknown label {min(unknown)!r}: labels are {' and '.join(LABELS)}")
    if labels is not None and len(labels) != len(inputs):
        given, files = _plural(len(labels), "label"), _plural(len(inputs), "input")
        raise InputError(f"{given} for {files}: give each input its label, in order, as in --labels attack,benign")
    sources: list[Source] = []
    for given, label in zip(inputs, labels or repeat(None)):
        files_of_input = _find_url(given) if "://" in given else _find_path(given)
        sources += [replace(one, label=label, partition=_partition(one, columns or {})) for one in files_of_input]
    places = [source.name if source.filesystem else str(Path(source.path).resolve()) for source in sources]
    if len(set(places)) < len(places):
        twice = sources[places.index(Counter(places).most_common(1)[0][0])].name
        raise InputError(f"an input is named twice: {twice}; name each file once")
    stems = Counter(_stem(source) for source in sources)
    return [replace(one, stem=_stem(one) if stems[_stem(one)] == 1 else one.name) for one in sources]


def _find_path(given: str) -> Iterator[Source]:
    path = Path(given)
    if path.is_file():
        yield _source(given, given)
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        yield from _find_in_folder(given, [(str(file), str(file)) for file in files])
    elif glob.has_magic(given):
        matches = sorted(glob.glob(given, recursive=True))  # noqa: PTH207  Path.glob takes no absolute pattern
        if not matches:
            raise InputError(f"{given} matches no file: check the pattern")
        for match in matches:
            if Path(match).is_file():
                yield _source(match, match)
    elif path.exists():
        raise InputError(f"{given} is neither a file nor a folder: name a file")
    else:
        raise InputError(f"{given} does not exist: check the name")


def _find_url(given: str) -> Iterator[Source]:
    try:
        filesystem, path = _filesystem(given)
        magic = glob.has_magic(path)
        if magic:
            files = [file for file in filesystem.glob(path) if filesystem.isfile(file)]
        else:
            alone = filesystem.info(path)["type"] == "file"
            files = [path] if alone else filesystem.find(path)
    except InputError:
        raise
    except FileNotFoundError:
        files = []
    except Exception as error:  # each protocol has errors of its own
        raise InputError(f"{given} cannot be read: {str(error).strip() or type(error).__name__}") from error
    if not files:
        what = "matches no file: check the pattern" if magic else "does not exist: check the name"
        raise InputError(f"{given} {what}")
    if files == [path]:
        yield _source(given, path, filesystem)
    else:
        scheme = given.partition("://")[0]
        yield from _find_in_folder(given, [(f"{scheme}://{file}", file) for file in sorted(files)], filesystem)


def _filesystem(url: str) -> tuple[Any, str]:
    """Return the filesystem behind a URL, and the path in it. S3 is read by pyarrow, which needs no other package."""
    from fsspec.core import url_to_fs

    scheme, _, rest = url.partition("://")
    if scheme == "s3":
        from fsspec.implementations.arrow import ArrowFSWrapper
        from pyarrow.fs import S3FileSystem

        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        return ArrowFSWrapper(S3FileSystem(endpoint_override=endpoint)), rest
    try:
        filesystem, path = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise InputError(f"{url} cannot be read: {error}") from error
    return filesystem, path


def _find_in_folder(given: str, files: Sequence[tuple[str, str]], filesystem: Any = None) -> Iterator[Source]:
    """Find the files (name, path) of a known kind; hidden ones (. and _) are left out."""
    some = False
    for name, path in files:
        inner = PurePosixPath(name.removeprefix(given.rstrip("/"))).parts
        if _kind(path)[0] in KINDS and not any(part.startswith((".", "_")) for part in inner):
            some = True
            yield _source(name, path, filesystem)
    if not some:
        raise InputError(f"{given} contains no input: use {_NAMED_KINDS}")


def _source(name: str, path: str, filesystem: Any = None) -> Source:
    kind, compression = _kind(path)
    if kind not in KINDS or (compression and kind == ".parquet"):
        raise InputError(f"{name} is not of a known kind: use {_NAMED_KINDS}, each but .parquet also as .gz or .zst")
    # File names need not be valid Unicode; what is written to Parquet has to be.
    return Source(_unicode(name), path, kind, compression, filesystem=filesystem)


def _kind(path: str) -> tuple[str, str | None]:
    name = PurePosixPath(path)
    compression = _COMPRESSED.get(name.suffix.lower())
    return (name.with_suffix("") if compression else name).suffix.lower(), compression


def _stem(source: Source) -> str:
    name = PurePosixPath(_unicode(source.path))
    return (name.with_suffix("") if source.compression else name).stem


def _unicode(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


def _partition(source: Source, columns: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Return what folders called key=value on the way to a file say of its rows."""
    if "=" not in source.path:
        return ()
    import pyarrow as pa
    import pyarrow.dataset as ds

    keys = {columns.get(key, key): key for key in KEYS}
    hive = ds.HivePartitioning(pa.schema([(name, pa.string()) for name in keys]))
    values = ds.get_partition_keys(hive.parse(_unicode(source.path)))
    return tuple((keys[name], value) for name, value in values.items() if value is not None)


def _plural(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"
