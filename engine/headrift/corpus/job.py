"""A job: inputs to an output folder, through an engine. `headrift score` is this with options around it.

What is made of a row, and told in the end, is the job's Kind; all the rest is the same for every kind. ScoreJob checks
all it can before a model is loaded; then `start` and `run`, in this order. The job's process reads the input, writes
the output and keeps the journal; the engine runs in a child process, which may die at any moment, as the job may: with
`resume` a new job goes on where the journal ends.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from headrift import scorer as scoring
from headrift.corpus import judging, readers, sources
from headrift.corpus.child import Child, Engine
from headrift.corpus.interrupts import Interrupts
from headrift.corpus.rows import REASONS, BadRow, Row
from headrift.corpus.scoring import Scoring, Turned
from headrift.corpus.settings import Settings, check_context, check_together, differences
from headrift.corpus.shards import rows_per_shard
from headrift.corpus.supervisor import Killer, Supervisor
from headrift.model_facts import ModelFacts, read_model
from headrift.runs.folder import JobError, can_resume
from headrift.runs.journal import JOURNAL, FinishedShard, FolderLock, Journal
from headrift.runs.parts import ShardFiles, remove_unfinished
from headrift.runs.provenance import model_fingerprint, processor, versions
from headrift.runs.reading import run_status, write_run

if TYPE_CHECKING:
    from rich.console import Console

    from headrift.corpus.ray_workers import RayWorkers

_MAX_DETAIL = 500  # characters: a detail may quote the row
# What must be the same in a resumed run of what an engine says of itself.
_OF_ENGINE = ("dtype", "layers", "heads", "regions", "max_model_len", "chat_template_sha256")


class Summary(Protocol):
    """What is told of a job in the end, from its files. rows: in parts and rejects."""

    @property
    def rows(self) -> int: ...

    def numbers(self) -> dict[str, Any]:
        """What run.json says of the rows, by keys of its own."""
        ...

    def print(self, console: Console, *, rows: int, start_seconds: float, score_seconds: float) -> None:
        """The closing table. rows: how many the engine answered now, in score_seconds; start_seconds: to start it."""
        ...


class Kind(Protocol):
    """What is made of a job's rows; scoring.Scoring is one. The engine answers a Row with a record, a dict with what
    the parts' columns need, or with a Turned, whose reason is in rows.REASONS; its `about` has what `_OF_ENGINE`
    names, and recorder_bytes."""

    def asked(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one that was begun, beside Settings: JSON by option, and
        `command` where that is not score."""
        ...

    def check(self, context: int | None) -> None:
        """ValueError where it does not fit a model whose context has so many tokens."""
        ...

    def engine(self, verbose: bool) -> Callable[[], Engine]:
        """What makes the engine, in its process: it must pickle."""
        ...

    def row_bytes(self, model: ModelFacts) -> int:
        """About what a row takes on disk."""
        ...

    def files(self, number: int, engine: dict[str, Any]) -> ShardFiles:
        """The files for a shard's records, in the job's out folder. engine: its `about`."""
        ...

    def summary(self) -> Any:
        """The Summary of the finished shards."""
        ...

    def finish(self, summary: Any, names: Sequence[str]) -> None:
        """Write what lies beside the parts of a run that is done. names: of the inputs."""
        ...


class ScoreJob:
    """A context manager, and checked on creation: ValueError where the settings cannot be, or the run to resume is one
    of other settings, and nothing was begun but the (empty) out folder.

    kind: what is made of a row; by default it is scored. resume: go on with the run in the out folder, if there is one.
    notice: told what the user should know on the way. engine: makes the engine, anywhere; by default a child process
    with vLLM. notices: what the user should know before it starts. total: rows to score or reject; kept: those in
    finished shards. done: whether that is all. seconds: what starting and scoring took, and how long of that the engine
    waited for rows.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        kind: Kind | None = None,
        resume: bool = False,
        verbose: bool = False,
        notice: Callable[[str], None] = lambda text: None,
        engine: Callable[[], Engine] | None = None,
        shard_rows: int | None = None,
    ) -> None:
        self.settings, self._notice = settings, notice
        check_together(settings)
        on_ray = _ray_workers() if settings.engine == "ray" else None
        self.window = scoring.check_settings(settings.steps, settings.window, settings.drop_shallow, settings.drop_deep)
        self._kind = kind or Scoring(settings)
        self.notices: list[str] = []
        self._sources = sources.find(settings.inputs, settings.labels, settings.columns)
        self._reader = readers.Reader(self._sources, settings.columns)
        model = read_model(settings.model)
        check_context(settings.steps, model.context)
        self._kind.check(model.context)
        n_rows = None if resume and (settings.out / JOURNAL).exists() else self._count()
        begun = can_resume(settings.out, JOURNAL, resume=resume)
        self.seconds = {"start": 0.0, "scoring": 0.0, "engine_waited": 0.0}
        self._summary: Summary | None = None
        self._open = ExitStack()
        lock = FolderLock(settings.out)
        self._open.callback(lock.release)
        try:
            self._identity = self._identified()
            self._journal = self._open.enter_context(Journal(settings.out)) if begun else None
            if self._journal is not None:
                self._check_same(self._journal)
            self._finished = self._journal.finished() if self._journal else []
            if self._journal is None:
                self._identity["rows"] = n_rows
                self._identity["shard_rows"] = shard_rows or rows_per_shard(self.total)
            self._differs = self._check_calibration()
            self._check_files()
            self._check_space(model)
        except BaseException:
            self._open.close()
            raise
        make = engine or partial(Child, self._kind.engine(verbose), verbose=verbose)
        self._supervisor: Supervisor[Row | BadRow] | RayWorkers[Row | BadRow]
        if on_ray is None:
            self._supervisor = Supervisor(make, _is_wanted, notice)
        else:
            size, workers, model_there = self._identity["shard_rows"], settings.workers, settings.model.resolve()
            self._supervisor = on_ray(
                make, _is_wanted, notice, model=model_there, shard_rows=size, workers=workers, verbose=verbose
            )

    def __enter__(self) -> ScoreJob:
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.close()

    @property
    def total(self) -> int:
        """Rows that end in the parts or the rejects."""
        return self.settings.selection.count(self._identity["rows"])

    @property
    def kept(self) -> int:
        """Rows in finished shards, rejects included."""
        return sum(shard.rows for shard in self._finished)

    @property
    def done(self) -> bool:
        """Whether every row is in a finished shard."""
        return self.kept == self.total

    def _identified(self) -> dict[str, Any]:
        """What makes this run's rows, numbers and columns: a resumed run must have the same."""
        return {
            "settings": {**self.settings.of_run(str(self.window)), **self._kind.asked()},
            "inputs": [source.fingerprint() for source in self._sources],
            "model": model_fingerprint(self.settings.model),
            "engine": None,
            "versions": versions(),
            "started": _now(),
        }

    def _check_same(self, journal: Journal) -> None:
        then = journal.identity
        found = differences(then, self._identity)
        if found:
            lines = "".join(f"\n  - {line}" for line in found)
            raise JobError(
                f"--resume: the run in {self.settings.out} is another one, so its parts would not go together:{lines}\n"
                "Ask for the same again, or choose another folder"
            )
        if then["versions"] != self._identity["versions"]:
            names = [name for name, version in then["versions"].items() if version != self._identity["versions"][name]]
            self.notices.append(f"other versions than when the run was begun: {', '.join(names)}")
        self._identity = then

    def _check_files(self) -> None:
        """The finished shards' files must be there as they were written; others are of a run that broke off."""
        out = self.settings.out
        for at, shard in enumerate(self._finished):
            sizes = {f"part-{at:05d}.parquet": shard.part_bytes, f"rejects-{at:05d}.parquet": shard.rejects_bytes}
            for name, size in sizes.items():
                there = (out / name).stat().st_size if (out / name).exists() else 0
                if there != size:
                    raise JobError(
                        f"--resume: {out / name} had {size:,} bytes when it was finished and has {there:,}: put it "
                        "back, or choose another folder"
                    )
        remove_unfinished(out, {shard.number for shard in self._finished})

    def _count(self) -> int:
        """How many rows the input has, as far as they matter; ValueError for none to score."""
        total, most = 0, self.settings.selection.most_read
        for source in self._sources:
            n = self._reader.count(source, None if most is None else most - total)
            if not n and total != most:
                self.notices.append(f"{source.name} has no rows")
            total += n
        if not self.settings.selection.count(total):
            names = ", ".join(self.settings.inputs)
            what = "no rows" if not total else f"{total} rows, and none of them for this --shard,"
            raise readers.InputError(f"{what} in {names}: there is nothing to score")
        return total

    def _check_calibration(self) -> list[str]:
        """How the calibration's model differs, if there is one; CalibrationError where it does and must not."""
        calibration, anyway = self.settings.calibration, self.settings.calibration_anyway
        return [] if calibration is None else judging.check(calibration, self._identity, anyway=anyway)

    def _check_space(self, model: ModelFacts) -> None:
        row = self._kind.row_bytes(model)
        need, free = row * (self.total - self.kept), shutil.disk_usage(self.settings.out).free
        if need > free:
            room = f"the results may take {need / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free"
            fix = "make room, choose another disk, or save less"
            raise JobError(f"--out {self.settings.out}: {room}: {fix}")

    def start(self) -> dict[str, Any]:
        """Load the model and begin, or go on with, the journal; returns what there is to know of the engine.

        EngineError, saying what to do, where the engine cannot start; JobError where it is not the one that the
        run was begun with; CalibrationError where it is not one that the calibration is for.
        """
        begun = time.monotonic()
        self._open.enter_context(self._supervisor)
        self._engine = engine = self._supervisor.begin()
        same = {name: list(v) if isinstance(v := engine[name], tuple) else v for name in _OF_ENGINE}
        if self._journal is None:
            self._identity |= {"engine": same, "recorder_bytes": engine["recorder_bytes"]}
        else:
            self._identity = {**self._journal.identity, "engine": same}
            self._check_same(self._journal)
        self._differs = self._check_calibration()
        if self._differs:
            self._notice(f"the calibration is for something else and used anyway: {' and '.join(self._differs)} differ")
        if self._journal is None:
            self._journal = self._open.enter_context(Journal(self.settings.out, self._identity))
        self.seconds["start"] = time.monotonic() - begun
        return engine

    def run(self, *, progress: bool = False) -> bool:
        """Score every row that is in no finished shard yet; whether that was all. Ctrl-C and SIGTERM: the first ends
        the run after the shard in hand, which is then False; KeyboardInterrupt at the second.

        OSError where the disk fails, EngineError where the engine does, over and over. Finished shards are kept.
        """
        assert self._journal is not None
        begun = time.monotonic()
        self._write_run("running")
        try:
            with Interrupts(self._stopping) as interrupts:
                for _ in self._shards(self._journal, interrupts, progress):
                    if interrupts.asked:
                        break
        finally:
            self.seconds["scoring"] = time.monotonic() - begun
            self.seconds["engine_waited"] = self._supervisor.waited
            if not self.done:
                self._write_run("unfinished")
        if self.done:
            self.finish()
        return self.done

    def finish(self) -> None:
        """Write what lies beside the parts and then run.json, unless that was done already: a run may be killed at its
        very end."""
        if run_status(self.settings.out) != "done":
            summary = self.summary()
            self._kind.finish(summary, [source.stem for source in self._sources])
            self._write_run("done", summary)

    def summary(self) -> Any:
        """The Summary of the finished shards, of the job's kind."""
        if self._summary is None or self._summary.rows != self.kept:
            self._summary = self._kind.summary()
        return self._summary

    def _stopping(self) -> None:
        self._notice("stopping after the shard in hand; once more stops at once, and loses that shard")

    def _shards(self, journal: Journal, interrupts: Interrupts, progress: bool) -> Iterator[FinishedShard]:
        """Each further shard, once it is done and noted."""
        size = self._identity["shard_rows"]
        answers = self._supervisor.answers(self._rows(journal))
        if progress:
            answers = scoring.with_progress(answers, self.total, self.kept)
        # Closed by hand where it breaks off, or else the progress bar would outlive the engine.
        with closing(answers):
            while not self.done and not interrupts.asked:
                number, rows = len(self._finished), min(size, self.total - self.kept)
                files = self._kind.files(number, self._engine)
                try:
                    while files.rows < rows:
                        answered = next(answers, None)
                        if answered is None:
                            raise readers.InputError(
                                "the input has fewer rows than when it was counted: do not change it"
                            )
                        self._keep(*answered, files)
                    shard = files.publish()
                    journal.record(shard, number * size + rows)
                except BaseException:
                    files.discard()
                    raise
                self._finished.append(shard)
                yield shard

    def _rows(self, journal: Journal) -> Iterator[Row | BadRow]:
        """The rows that are in no finished shard."""
        left, at = self.kept, self.kept

        def marks() -> Iterator[bool]:
            nonlocal left
            for mine in self.settings.selection.marks(self._identity["rows"]):
                yield mine and not left
                left -= mine and left > 0

        def take_id(own_id: str) -> bool:
            return journal.take_id(own_id, at)

        for row in self._reader.rows(marks(), take_id):
            yield row
            at += 1

    def _keep(self, row: Row | BadRow, answer: Any, files: ShardFiles) -> None:
        """Put a row where it belongs, into the part or the rejects."""
        if isinstance(answer, dict):
            files.add(answer)
            return
        if isinstance(row, BadRow):
            reason, detail = row.reason, row.detail
        elif isinstance(answer, Killer):
            reason, detail = (
                "engine_died",
                f"the engine died each time it was given this row ({answer.how}); leave it out",
            )
        else:
            assert isinstance(answer, Turned)
            reason, detail = answer.reason, answer.detail
        detail = REASONS[reason] if self.settings.redact else detail
        files.reject(row, reason, detail if len(detail) <= _MAX_DETAIL else f"{detail[:_MAX_DETAIL]}...")

    def _write_run(self, status: str, summary: Summary | None = None) -> None:
        identity = self._identity
        engine = {name: value for name, value in identity["engine"].items() if name != "chat_template_sha256"}
        particulars = {
            "status": status,
            "started": identity["started"],
            "finished": None if status == "running" else _now(),
            "settings": identity["settings"],
            "versions": versions(),
            "model": {"path": str(self.settings.model), **identity["model"]},
            "chat_template_sha256": identity["engine"]["chat_template_sha256"],
            "engine": {**engine, "recorder_bytes": identity["recorder_bytes"]},
            "host": {"cpu": processor()[0], "cores": os.cpu_count()},
            "inputs": identity["inputs"],
            "shards": {"finished": len(self._finished), "rows": identity["shard_rows"], "rows_kept": self.kept},
            "engine_restarts": self._supervisor.restarts,
            "seconds": self.seconds,
        }
        if (calibration := self.settings.calibration) is not None:
            particulars["calibration"] = judging.particulars(calibration, self._differs)
        if summary is not None:
            particulars |= summary.numbers()
        write_run(self.settings.out, particulars)


def _is_wanted(row: Row | BadRow) -> bool:
    return isinstance(row, Row)


def _ray_workers() -> type[RayWorkers]:
    try:
        from headrift.corpus.ray_workers import RayWorkers
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ValueError(
            "--engine ray needs Ray, which is not installed: pip install 'headrift[ray]' on this machine and on the "
            "others of the cluster"
        ) from None
    return RayWorkers


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
