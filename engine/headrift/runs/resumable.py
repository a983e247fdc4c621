"""Jobs whose work is known beforehand as a set of parts: an interrupted one computes only the parts that are missing.

`headrift score` and `headrift gate` have too many rows for that; they keep a journal (`headrift.runs.journal`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from headrift.runs.folder import JobError, atomic_path, can_resume, write_json


class ResumableParts:
    """A job's output folder: a JSON file with settings and results, and Parquet parts.

    A part is in the folder whole or not at all. The JSON file is written when the job begins, with `settings` and
    `about`, and again at the end, with the results too.

    Args:
        out: Output folder, which is made if it does not exist.
        summary: Name of the JSON file.
        settings: What determines the numbers, as JSON. A job resumes only with equal settings.
        about: What else the file records, such as model, inputs and versions.
        resume: Continue the job in `out`, if there is one.
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
        if self.resumed:
            self._check_settings(self.read_summary()["settings"])
        else:
            self.write_summary(results or {})

    def _check_settings(self, before: Mapping[str, Any]) -> None:
        # Through JSON, in which a tuple is a list.
        now = json.loads(json.dumps(self._settings))
        changed = [name for name in now if before.get(name) != now[name]]
        if changed:
            raise JobError(
                f"--resume: the job in {self.out} has another {', another '.join(changed)}: use the same options, or "
                "choose another folder"
            )

    def missing(self, names: Iterable[str]) -> list[str]:
        """Return which of these parts are still to be computed, in their order."""
        return [name for name in names if not (self.out / name).exists()]

    def written(self, pattern: str) -> list[str]:
        """Return the names of the parts in the folder that match a glob pattern, sorted."""
        return sorted(path.relative_to(self.out).as_posix() for path in self.out.glob(pattern))

    def write(self, name: str, table: pa.Table) -> None:
        """Write a part. `name` is a path within the folder; folders in it are made."""
        path = self.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            pq.write_table(table, temporary, compression="zstd")

    def write_records(self, name: str, records: Iterable[Mapping[str, Any]], schema: pa.Schema) -> None:
        """Write a part from one mapping a row, of which the schema's columns are taken."""
        self.write(name, table_from_records(records, schema))

    def read(self, names: Iterable[str]) -> pa.Table | None:
        """Read parts as one table; None without any name."""
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


def table_from_records(records: Iterable[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Make a table of the schema's columns from one mapping a row; a missing column is a KeyError."""
    rows = list(records)
    columns = [pa.array([row[field.name] for row in rows], field.type) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)
