"""A job: inputs to an output folder, through an engine.

What is made of a row depends on the kind (ScoreKind or GateKind of `scoring`). The job's process reads the
input, renders and tokenises the prompts, writes the output and keeps the journal; the engine runs in a child process,
which may die at any moment, as the job may: with `resume` a new job continues where the journal ends.
"""

from __future__ import annotations

import os
import pickle
import shutil
import signal as signals
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

from headrift.corpus import judging, readers, sources
from headrift.corpus.config import ScoreConfig, check_context, differences, rows_per_shard
from headrift.corpus.rows import REASONS, BadRow, Row
from headrift.corpus.scoring import ScoreKind
from headrift.corpus.summary import Summary
from headrift.corpus.worker import Engine, EngineProcess, PoisonRow, Supervisor
from headrift.model_facts import read_model
from headrift.prepare import SKIP, PrepareConfig, Prepared, Preparer, StreamPreparer
from headrift.probed_engine import ProbedEngine
from headrift.results import Rejected, ScoreResult
from headrift.runs.folder import JobError, can_resume, model_fingerprint, processor, versions, write_json
from headrift.runs.parts import JOURNAL, FolderLock, Journal, ShardFiles, remove_unfinished
from headrift.runs.reading import RUN, run_status
from headrift.scorer import engine_factory, with_progress

if TYPE_CHECKING:
    from headrift.corpus.ray_workers import RayWorkers

_MAX_DETAIL = 500  # characters: a detail may quote the row
# What must be the same in a resumed run of what an engine says of itself.
_ENGINE_IDENTITY = ("dtype", "layers", "heads", "regions", "max_model_len", "chat_template_sha256")

# A row of the input with its request, or why there is none; None for a row that could not be read.
PreparedRow = tuple[Row | BadRow, Prepared | Rejected | None]


class ScoreJob:
    """A scoring job, checked on creation as far as that goes without the model; then `start` and `run`.

    A context manager.

    Args:
        resume: Continue the run in the out folder, if there is one.
        notice: Called with what the user should know on the way.
        engine: Makes the engine, anywhere; by default the kind's in a child process, or in this one if
            `scorer.engine_factory` is replaced.

    Attributes:
        notices: What the user should know before it starts.
        seconds: What starting and scoring took, and for how long of that the engine waited for rows.

    Raises:
        ValueError: If options contradict each other, or the run to resume is another one. Nothing was begun then but
            the (empty) out folder.
    """

    def __init__(
        self,
        config: ScoreConfig,
        *,
        kind: ScoreKind | None = None,
        resume: bool = False,
        verbose: bool = False,
        notice: Callable[[str], None] = lambda text: None,
        engine: Callable[[], Engine] | None = None,
        shard_rows: int | None = None,
    ) -> None:
        self.config, self._notice = config, notice
        ray_workers = _ray_workers() if config.engine == "ray" else None
        self._kind = kind or ScoreKind(config)
        self.notices: list[str] = []
        self._sources = sources.find(config.inputs, config.labels, config.columns)
        self._reader = readers.Reader(self._sources, config.columns)
        model = read_model(config.model)
        check_context(config.steps, model.context)
        self._kind.check(model.context)
        n_rows = None if resume and (config.out / JOURNAL).exists() else self._count()
        begun = can_resume(config.out, JOURNAL, resume=resume)
        self.seconds = {"start": 0.0, "scoring": 0.0, "engine_waited": 0.0}
        self._summary: Summary | None = None
        self._open = ExitStack()
        lock = FolderLock(config.out)
        self._open.callback(lock.release)
        try:
            self._identity: dict[str, Any] = {
                "settings": {**config.identity(), **self._kind.identity()},
                "inputs": [source.fingerprint() for source in self._sources],
                "model": model_fingerprint(config.model),
                "engine": None,
                "versions": versions(),
                "started": _now(),
            }
            self._journal = self._open.enter_context(Journal(config.out)) if begun else None
            if self._journal is not None:
                self._check_same(self._journal)
            self._finished = self._journal.finished() if self._journal else []
            if self._journal is None:
                self._identity["rows"] = n_rows
                self._identity["shard_rows"] = shard_rows or rows_per_shard(self.total)
            self._differs = self._check_calibration()
            self._check_files()
            self._check_space(self._kind.row_bytes(model))
        except BaseException:
            self._open.close()
            raise
        make = engine or self._kind.engine(verbose)
        if engine is None and engine_factory.get() is ProbedEngine:
            make = partial(EngineProcess, make, verbose=verbose)
        self._supervisor: Supervisor[PreparedRow] | RayWorkers[PreparedRow]
        if ray_workers is None:
            self._supervisor = Supervisor(make, _request_of, notice)
        else:
            self._supervisor = ray_workers(
                make,
                _request_of,
                notice,
                model=config.model.resolve(),
                shard_rows=self._identity["shard_rows"],
                workers=config.workers,
                verbose=verbose,
            )

    def __enter__(self) -> ScoreJob:
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.close()

    @property
    def total(self) -> int:
        return self.config.selection.count(self._identity["rows"])

    @property
    def kept(self) -> int:
        """Rows in finished shards, rejects included."""
        return sum(shard.rows for shard in self._finished)

    @property
    def done(self) -> bool:
        return self.kept == self.total

    def _check_same(self, journal: Journal) -> None:
        then = journal.identity
        if changes := differences(then, self._identity):
            lines = "".join(f"\n  - {line}" for line in changes)
            raise JobError(
                f"--resume: the run in {self.config.out} is another one, so its parts would not go together:{lines}\n"
                "Use the same options, or choose another folder"
            )
        if then["versions"] != self._identity["versions"]:
            names = [name for name, version in then["versions"].items() if version != self._identity["versions"][name]]
            self.notices.append(f"other versions than when the run was begun: {', '.join(names)}")
        self._identity = then

    def _check_files(self) -> None:
        """Check that the finished shards' files are as they were written; remove those of an unfinished one."""
        out = self.config.out
        for at, shard in enumerate(self._finished):
            sizes = {f"part-{at:05d}.parquet": shard.part_bytes, f"rejects-{at:05d}.parquet": shard.rejects_bytes}
            for name, size in sizes.items():
                now = (out / name).stat().st_size if (out / name).exists() else 0
                if now != size:
                    raise JobError(
                        f"--resume: {out / name} had {size:,} bytes when it was finished and has {now:,}: put it back, "
                        "or choose another folder"
                    )
        remove_unfinished(out, {shard.number for shard in self._finished})

    def _count(self) -> int:
        """Count the rows of the input, as far as they matter; ValueError if there is none to score."""
        total, most = 0, self.config.selection.max_read
        for source in self._sources:
            n = self._reader.count(source, None if most is None else most - total)
            if not n and total != most:
                self.notices.append(f"{source.name} has no rows")
            total += n
        if not self.config.selection.count(total):
            names = ", ".join(self.config.inputs)
            what = "no rows" if not total else f"{total} rows, and none of them for this --shard,"
            raise readers.InputError(f"{what} in {names}: there is nothing to score")
        return total

    def _check_calibration(self) -> list[str]:
        """How the calibration's model differs, if there is one; CalibrationError if it must not."""
        calibration, anyway = self.config.calibration, self.config.calibration_anyway
        return [] if calibration is None else judging.check(calibration, self._identity, anyway=anyway)

    def _check_space(self, row_bytes: int) -> None:
        need, free = row_bytes * (self.total - self.kept), shutil.disk_usage(self.config.out).free
        if need > free:
            room = f"the results may take {need / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free"
            fix = "make room, choose another disk, or save less"
            raise JobError(f"--out {self.config.out}: {room}: {fix}")

    def start(self) -> dict[str, Any]:
        """Load the model and begin, or continue, the journal; return what there is to know of the engine.

        Raises:
            EngineError, TokenizerError: With what to do, if the engine cannot start or prompts cannot be rendered.
            JobError: If the engine is not the one that the run was begun with.
            CalibrationError: If the calibration is not for this engine.
        """
        begun = time.monotonic()
        self._open.enter_context(self._supervisor)
        self._engine = engine = self._supervisor.begin()
        check_context(self.config.steps, engine["max_model_len"])
        prepare = PrepareConfig(
            system_prompt=self.config.system_prompt,
            steps=self.config.steps,
            regions=tuple(engine["regions"]),
            vocabulary=engine["vocabulary"],
            max_model_len=engine["max_model_len"],
            answer_tokens=self._kind.answer_tokens,
        )
        workers = min(engine["prepare_workers"], (os.cpu_count() or 1) - 1)
        self._preparer = StreamPreparer(Preparer(prepare, pickle.loads(engine["tokenizer"])), workers)
        self._open.callback(self._preparer.close)
        same = {name: list(v) if isinstance(v := engine[name], tuple) else v for name in _ENGINE_IDENTITY}
        if self._journal is None:
            self._identity |= {"engine": same, "recorder_bytes": engine["recorder_bytes"]}
        else:
            self._identity = {**self._journal.identity, "engine": same}
            self._check_same(self._journal)
        self._differs = self._check_calibration()
        if self._differs:
            self._notice(f"the calibration is for something else and used anyway: {' and '.join(self._differs)} differ")
        if self._journal is None:
            self._journal = self._open.enter_context(Journal(self.config.out, self._identity))
        self.seconds["start"] = time.monotonic() - begun
        return engine

    def run(self, *, progress: bool = False) -> bool:
        """Score every row that is in no finished shard yet; return whether that was all.

        The first Ctrl-C or SIGTERM finishes the current shard and returns False, the second raises KeyboardInterrupt.
        OSError if the disk fails, EngineError if the engine does, again and again; finished shards are kept.
        """
        assert self._journal is not None
        begun = time.monotonic()
        self._write_run("running")
        try:
            stopping = "finishing the current shard; press again to stop now, and lose that shard"
            with stopped_by_signals(partial(self._notice, stopping)) as stopped:
                self._score(self._journal, stopped, progress)
        finally:
            self.seconds["scoring"] = time.monotonic() - begun
            self.seconds["engine_waited"] = self._supervisor.waited
            if not self.done:
                self._write_run("unfinished")
        if self.done:
            self.finish()
        return self.done

    def finish(self) -> None:
        """Write what comes after the parts, and run.json, unless that is done: a run may be killed at its very end."""
        if run_status(self.config.out) != "done":
            summary = self.summary()
            self._kind.finish(summary, [source.stem for source in self._sources])
            self._write_run("done", summary)

    def summary(self) -> Summary:
        """The closing table of the finished shards, of the job's kind."""
        if self._summary is None or self._summary.rows != self.kept:
            self._summary = self._kind.summary()
        return self._summary

    def _score(self, journal: Journal, stopped: Callable[[], bool], progress: bool) -> None:
        """Score the further shards, each of which is in the journal once it is finished, until all are or `stopped`."""
        size = self._identity["shard_rows"]
        prepared = self._preparer.stream(
            self._rows(journal), lambda row: row.prompt if isinstance(row, Row) else SKIP, self.config.replay
        )
        answers = self._supervisor.answers(prepared)
        if progress:
            answers = with_progress(answers, self.total, self.kept)
        # Closed here when a run is interrupted, or else the progress bar would outlive the engine.
        with closing(answers):
            while not self.done and not stopped():
                number, rows = len(self._finished), min(size, self.total - self.kept)
                files = self._kind.files(number, self._engine)
                try:
                    while files.rows < rows:
                        if (answered := next(answers, None)) is None:
                            what = "the input has fewer rows than when it was counted: do not change it"
                            raise readers.InputError(what)
                        self._keep(*answered, files)
                    shard = files.publish()
                    journal.record(shard, number * size + rows)
                except BaseException:
                    files.discard()
                    raise
                self._finished.append(shard)

    def _rows(self, journal: Journal) -> Iterator[Row | BadRow]:
        """The rows that are in no finished shard."""
        left, at = self.kept, self.kept

        def marks() -> Iterator[bool]:
            nonlocal left
            for selected in self.config.selection.selected(self._identity["rows"]):
                yield selected and not left
                left -= selected and left > 0

        def take_id(own_id: str) -> bool:
            return journal.take_id(own_id, at)

        for row in self._reader.rows(marks(), take_id):
            yield row
            at += 1

    def _keep(self, prepared_row: PreparedRow, answer: ScoreResult | PoisonRow | None, files: ShardFiles) -> None:
        """Put a row where it belongs, into the part or the rejects."""
        row, prepared = prepared_row
        if isinstance(row, BadRow):
            reason, detail = row.reason, row.detail
        elif isinstance(prepared, Rejected):
            reason, detail = prepared.reason, prepared.detail
        elif isinstance(answer, PoisonRow):
            reason = "engine_died"
            detail = f"the engine died each time it was given this row ({answer.how}); leave it out"
        else:
            assert answer is not None
            files.add(self._kind.record(row, answer))
            return
        detail = REASONS[reason] if self.config.redact else detail
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
            "model": {"path": str(self.config.model), **identity["model"]},
            "chat_template_sha256": identity["engine"]["chat_template_sha256"],
            "engine": {**engine, "recorder_bytes": identity["recorder_bytes"]},
            "host": {"cpu": processor()[0], "cores": os.cpu_count()},
            "inputs": identity["inputs"],
            "shards": {"finished": len(self._finished), "rows": identity["shard_rows"], "rows_kept": self.kept},
            "engine_restarts": self._supervisor.restarts,
            "seconds": self.seconds,
        }
        if (calibration := self.config.calibration) is not None:
            particulars["calibration"] = {
                "sha256": calibration.sha256,
                "threshold": calibration.threshold,
                "target_fpr": calibration.setting.target_fpr,
                "promise": calibration.setting.promise,
                "differs": self._differs,
            }
        if summary is not None:
            particulars |= summary.numbers()
        write_json(self.config.out / RUN, particulars)


@contextmanager
def stopped_by_signals(notice: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM: the first calls `notice`, the second raises KeyboardInterrupt.

    Yields whether there was one. Outside a program's main thread, where signals do not arrive, nothing happens.
    """
    stopped = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        if stopped:
            raise KeyboardInterrupt
        stopped = True
        notice()

    in_main_thread = threading.current_thread() is threading.main_thread()
    names = (signals.SIGINT, signals.SIGTERM) if in_main_thread else ()
    before = {name: signals.signal(name, interrupt) for name in names}
    try:
        yield lambda: stopped
    finally:
        for name, handler in before.items():
            signals.signal(name, handler)


def _request_of(prepared_row: PreparedRow) -> Prepared | None:
    prepared = prepared_row[1]
    return prepared if isinstance(prepared, Prepared) else None


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
