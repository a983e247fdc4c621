"""`headrift score`, `headrift gate` and, of a row in their results, `headrift explain`."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from headrift.commands import options
from headrift.terminal import Reporter

if TYPE_CHECKING:
    from headrift.corpus.job import ScoreJob


class SavedKind(StrEnum):
    """Kinds of columns that --save adds. (Typer takes no list of Literals.)"""

    SHARES = "shares"
    MASS = "mass"
    FOCUS = "focus"
    TEXT = "text"
    ENTROPY = "entropy"


DropShallow = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="Leave out this fraction of the layers at the input end (default: 0.25, or the calibration's).",
    ),
]
DropDeep = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="Leave out this fraction of the layers at the output end (default: 0.15, or the calibration's).",
    ),
]


def score(
    *,
    corpus: options.CorpusOptions,
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Record steps 0 to N of each answer (default: 12, or as many as --calibration needs)."
        ),
    ] = None,
    window: Annotated[
        str | None, typer.Option(metavar="A:B", help="Steps that are scored (default: 1:N, or the calibration's).")
    ] = None,
    replay: Annotated[
        bool, typer.Option("--replay", help="Score the logged answers (response) instead of making new ones.")
    ] = False,
    drop_shallow: DropShallow = None,
    drop_deep: DropDeep = None,
    calibration: options.Calibration = None,
    calibration_anyway: options.CalibrationAnyway = False,
    save: Annotated[
        list[SavedKind] | None,
        typer.Option(
            metavar="KIND",
            help="Add columns: shares, mass, focus, text (prompt and answer) or entropy (implies --logit-stats). "
            "Repeatable.",
        ),
    ] = None,
    logit_stats: Annotated[
        bool, typer.Option("--logit-stats", help="Record next-token entropy, top-1 probability and margin.")
    ] = False,
    engine: options.CorpusEngineOptions,
    messages: options.Messages,
) -> None:
    """Score prompts for inter-head attention instability.

    Writes to the --out folder: part-*.parquet (scored rows), rejects-*.parquet (all others, each with its reason),
    run.json (settings, versions, counts), scores.png and the journal that --resume reads; with --calibration also
    flagged-fdr.parquet (review list, at most 10% expected false alarms). A row that cannot be scored does not stop the
    others. The first Ctrl-C finishes the current shard; press again to stop now.
    """
    from headrift.calibration.artifact import Calibration
    from headrift.corpus.config import STEPS, ScoreConfig, range_options
    from headrift.corpus.job import ScoreJob

    reporter = messages.exclusive_reporter()
    kinds = tuple(sorted({kind.value for kind in save or ()}))
    with reporter.errors(2):
        applied = None if calibration is None else Calibration.load(calibration)
        config = ScoreConfig(
            **corpus.config(),
            **range_options(applied, steps=steps, window=window, drop_shallow=drop_shallow, drop_deep=drop_deep),
            **engine.config(),
            replay=replay,
            save=kinds,
            logit_stats=logit_stats or SavedKind.ENTROPY in kinds,
            calibration=applied,
            calibration_anyway=calibration_anyway,
        )
        job = ScoreJob(config, resume=corpus.resume, verbose=messages.verbose, notice=reporter.note)
        if steps is None and config.steps > STEPS:
            job.notices.append(f"steps 0 to {config.steps} are recorded: the calibration's window needs them")
    _run_job(job, reporter)


def gate(
    *,
    corpus: options.CorpusOptions,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File that `headrift calibrate` wrote: its detector's values are held to its threshold.",
        ),
    ] = None,
    calibration_anyway: options.CalibrationAnyway = False,
    threshold: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Without a calibration: block instability at or above this, 0 to 0.5. Nothing is promised; needs "
            "--window.",
        ),
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(metavar="A:B", help="Steps whose instability is held to --threshold (or the calibration's)."),
    ] = None,
    drop_shallow: DropShallow = None,
    drop_deep: DropDeep = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Length limit of an answer that is not blocked, in tokens.")
    ] = 160,
    fail_term: options.FailTerm = None,
    on_null: Annotated[
        Literal["block", "pass"] | None,
        typer.Option(
            metavar="WHAT",
            help="block or pass answers without a value, as those that end before the window (default: block them "
            "unless they are empty).",
        ),
    ] = None,
    compare_ungated: Annotated[
        bool,
        typer.Option(
            "--compare-ungated",
            help="Finish the blocked answers too, to report what the gate prevents and costs; needs --fail-term.",
        ),
    ] = False,
    engine: options.CorpusEngineOptions,
    messages: options.Messages,
) -> None:
    """Answer prompts, except those whose detector value reaches a threshold.

    The threshold is a calibration's, with what it promises, or --threshold on instability, which promises nothing.
    Each prompt is judged while it is answered: before its second token if the detector reads step 0 alone, else at the
    end of the window. At or above the threshold it is stopped there and answered with [blocked]; the others are
    answered to their end. Writes to the --out folder as `headrift score` does; the parts have the columns blocked,
    detector, text and leaked (whether the text has a --fail-term).
    """
    from headrift.calibration.artifact import Calibration
    from headrift.calibration.bare import NO_PROMISE
    from headrift.corpus.config import ScoreConfig, range_options
    from headrift.corpus.job import ScoreJob
    from headrift.corpus.scoring import Gate, GateKind
    from headrift.signal import Window

    reporter = messages.exclusive_reporter()
    with reporter.errors(2):
        if calibration is not None and threshold is None:
            applied = Calibration.load(calibration)
            end = Window.parse(applied.window).end
        elif calibration is None and threshold is not None:
            if window is None:
                raise ValueError("--threshold is on the instability over a window: give that too, as in --window 2:3")
            applied, end = None, Window.parse(window).end
        else:
            raise ValueError("give --calibration FILE, or --threshold X with --window A:B, and not both")
        config = ScoreConfig(
            **corpus.config(),
            **range_options(applied, steps=end, window=window, drop_shallow=drop_shallow, drop_deep=drop_deep),
            **engine.config(),
            calibration=applied,
            calibration_anyway=calibration_anyway,
        )
        kind = GateKind(
            config, Gate(max_new_tokens, tuple(fail_term or ()), on_null, compare_ungated, threshold=threshold)
        )
        job = ScoreJob(config, kind=kind, resume=corpus.resume, verbose=messages.verbose, notice=reporter.note)
        if threshold is not None:
            job.notices.append(NO_PROMISE)
    _run_job(job, reporter)


def _run_job(job: ScoreJob, reporter: Reporter) -> None:
    """Take a job to its end and print its closing table; exit if it fails or is interrupted."""
    out = job.config.out
    with job:
        for notice in job.notices:
            reporter.note(notice)
        before = job.kept
        if job.done:
            reporter.say(f"All {job.kept:,} rows are in {out} already")
            job.finish()
        else:
            if before:
                reporter.say(f"Continuing after {before:,} of {job.total:,} rows")
            compiling = ", a minute more the first time, for --compile" if job.config.compile else ""
            reporter.say(f"Starting vLLM with {job.config.model} (about 20 s{compiling})")
            with reporter.errors(2):
                about = job.start()
            shape = f"{about['layers']} layers x {about['heads']} heads, {about['dtype']}"
            recorder = f"recorder {about['recorder_bytes'] / 1e6:.0f} MB"
            reporter.say(f"Ready in {job.seconds['start']:.0f} s: {shape}, {recorder}")
            with reporter.errors(1, lambda: f"{job.kept:,} of {job.total:,} rows are in {out}; rerun with --resume"):
                if not job.run(progress=not reporter.quiet):
                    raise KeyboardInterrupt
    if not reporter.quiet:
        from rich.console import Console

        console = Console()
        seconds = {"start_seconds": job.seconds["start"], "score_seconds": job.seconds["scoring"]}
        job.summary().print(console, rows=job.kept - before, **seconds)
        console.print(f"\nResults are in {out}", markup=False, highlight=False, soft_wrap=True)


def explain(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A folder that `headrift score` wrote.")],
    row_id: Annotated[str, typer.Option("--id", metavar="ID", help="The row's id.")],
    calibration: options.Calibration = None,
    png: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Figure to write (default: RUN/explain-ID.png).")
    ] = None,
) -> None:
    """Show why a row scored as it did.

    Prints its prompt and answer (of a run with --save text), its score and percentile, the layers and steps that
    contribute most to the score, and heatmaps of them, which it also writes as a PNG. With a calibration it begins
    with the verdict, and shows which heads a readout or novelty flags the row by.
    """
    from rich.console import Console

    from headrift.calibration.artifact import Calibration
    from headrift.explain import explain as explain_row
    from headrift.explain import show, write_png

    with Reporter().errors(2):
        explanation = explain_row(run, row_id, None if calibration is None else Calibration.load(calibration))
    show(Console(), explanation)
    with Reporter().errors(1):
        path = png or run / f"explain-{re.sub(r'[^A-Za-z0-9._-]', '_', row_id)[:80]}.png"
        write_png(path, explanation)
    typer.echo(f"figure: {path}")
