"""The files that inputs stand for: files, globs and folders (hive partitions too), on this machine or behind a URL."""

from __future__ import annotations

import glob
import gzip
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from headrift.corpus.rows import KEYS, LABELS
from headrift.runs.provenance import fingerprint

KINDS = (".txt", ".jsonl", ".csv", ".parquet")
_COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_NAMED_KINDS = ".txt (a prompt a line), .jsonl (an object a line), .csv or .parquet"
_ALSO = "each but .parquet also as .gz or .zst"


class InputError(ValueError):
    """An input or its label cannot be used at all. The message names it and says what to do."""


@dataclass(frozen=True, slots=True)
class Source:
    """An input file. name: as the parts name it; kind: of KINDS; compression: "gzip", "zstd" or None; label: for rows
    without one; partition: keys of rows and their values from folders called key=value. path: within filesystem (of
    fsspec), or on this machine where that is None."""

    name: str
    path: str
    kind: str
    compression: str | None = None
    label: str | None = None
    partition: tuple[tuple[str, str], ...] = ()
    filesystem: Any = None
    stem: str = ""

    def open(self) -> IO[bytes]:
        """The file's bytes as they are."""
        if self.filesystem is None:
            return open(self.path, "rb")
        opened: IO[bytes] = self.filesystem.open(self.path, "rb")
        return opened

    def stream(self) -> IO[bytes]:
        """The file's bytes, decompressed while they are read. See `is_damage` for what that raises."""
        if self.compression == "gzip":
            return cast(IO[bytes], gzip.open(self.open()))
        if self.compression == "zstd":
            import io

            import pyarrow as pa

            # A read that meets damage gives nothing at all: small ones, so that little before it is lost.
            return io.BufferedReader(pa.CompressedInputStream(self.open(), "zstd"), 1 << 13)
        return self.open()

    def is_damage(self, error: Exception) -> bool:
        """Whether an error while reading the stream is the file's, and not the disk's or the network's."""
        if isinstance(error, EOFError | zlib.error | gzip.BadGzipFile):
            return True
        return self.compression == "zstd" and isinstance(error, OSError) and error.errno is None

    def fingerprint(self) -> dict[str, Any]:
        """The name, the size and a hash of the file's bytes (see fingerprints)."""
        with self.open() as file:
            size = file.seek(0, 2)
            file.seek(0)
            return {"name": self.name, **fingerprint(file, size)}


def find(
    inputs: Sequence[str], labels: Sequence[str] | None = None, columns: Mapping[str, str] | None = None
) -> list[Source]:
    """The files of the inputs, those of an input by name. InputError where there is something wrong with one.

    labels: one per input. columns: the names that a row's keys have here, for those that are called otherwise.
    """
    if not inputs:
        raise InputError("no input file: name at least one .txt, .jsonl, .csv or .parquet file")
    _check_labels(inputs, labels)
    found: list[Source] = []
    for given, label in zip(inputs, labels or repeat(None)):
        sources = list(_of_url(given) if "://" in given else _of_path(given))
        found += [replace(source, label=label, partition=_partition(source, columns or {})) for source in sources]
    places = [s.name if s.filesystem else str(Path(s.path).resolve()) for s in found]
    if len(set(places)) < len(places):
        twice = found[places.index(Counter(places).most_common(1)[0][0])].name
        raise InputError(f"an input is named twice: {twice}; name each file once")
    stems = Counter(_stem(source) for source in found)
    return [replace(s, stem=_stem(s) if stems[_stem(s)] == 1 else s.name) for s in found]


def _check_labels(inputs: Sequence[str], labels: Sequence[str] | None) -> None:
    for label in labels or ():
        if label not in LABELS:
            raise InputError(
                f"unknown label {label!r}: labels are {' and '.join(LABELS)}, as in --labels attack,benign"
            )
    if labels is not None and len(labels) != len(inputs):
        given, files = _plural(len(labels), "label"), _plural(len(inputs), "input")
        raise InputError(f"{given} for {files}: give each input its label, in order, as in --labels attack,benign")


def _of_path(given: str) -> Iterator[Source]:
    path = Path(given)
    if path.is_file():
        yield _source(given, given, None)
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        yield from _of_folder(given, [(str(file), str(file)) for file in files], None)
    elif glob.has_magic(given):
        matches = sorted(glob.glob(given, recursive=True))  # noqa: PTH207  Path.glob takes no absolute pattern
        if not matches:
            raise InputError(f"{given} matches no file: check the pattern")
        for match in matches:
            if Path(match).is_file():
                yield _source(match, match, None)
    elif path.exists():
        raise InputError(f"{given} is neither a file nor a folder: name a file")
    else:
        raise InputError(f"{given} does not exist: check the name")


def _of_url(given: str) -> Iterator[Source]:
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
    scheme = given.partition("://")[0]
    named = [(f"{scheme}://{file}", file) for file in sorted(files)]
    yield from _of_folder(given, named, filesystem) if files != [path] else [_source(given, path, filesystem)]


def _filesystem(url: str) -> tuple[Any, str]:
    """The filesystem behind a URL, and the path in it. S3 is read by pyarrow, which needs no further package."""
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


def _of_folder(given: str, files: Sequence[tuple[str, str]], filesystem: Any) -> Iterator[Source]:
    """The files (name, path) of a folder that are of a known kind; hidden ones (. and _) are left out."""
    some = False
    for name, path in files:
        inner = PurePosixPath(name.removeprefix(given.rstrip("/"))).parts
        if _kind(path)[0] in KINDS and not any(part.startswith((".", "_")) for part in inner):
            some = True
            yield _source(name, path, filesystem)
    if not some:
        raise InputError(f"{given} holds no input: use {_NAMED_KINDS}")


def _source(name: str, path: str, filesystem: Any) -> Source:
    kind, compression = _kind(path)
    if kind not in KINDS or (compression and kind == ".parquet"):
        raise InputError(f"{name} has a name of no known kind: use {_NAMED_KINDS}, {_ALSO}")
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
    """What the folders called key=value on the way to a file say of its rows."""
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
