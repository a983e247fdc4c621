"""`headrift gate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from headrift.commands import options
from headrift.commands.score import run_job


def gate(
    *,
    corpus: options.CorpusOptions,
    calibration: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="File that `headrift calibrate` wrote: its window and layers are scored against its threshold.",
        ),
    ],
    calibration_anyway: options.CalibrationAnyway = False,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Length limit of an answer that is not blocked, in tokens.")
    ] = 160,
    fail_term: options.FailTerm = None,
    on_null: Annotated[
        Literal["block", "pass"] | None,
        typer.Option(
            metavar="WHAT",
            help="block or pass answers that end before the window and so have no score (default: block them unless "
            "they are empty).",
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
    """Answer prompts, except those whose score reaches a calibration's threshold.

    Each answer is scored while it is made, over the calibration's window. A prompt that scores at or above the
    threshold is stopped there and answered with [blocked]; the others are answered to their end. Writes to the --out
    folder as `headrift score` does; the parts have the columns blocked, score, text and leaked (whether the text has a
    --fail-term).
    """
    from headrift.calibration.artifact import Calibration
    from headrift.corpus.config import ScoreConfig, range_options
    from headrift.corpus.gating import Gate, GateKind, OnNull
    from headrift.corpus.job import ScoreJob
    from headrift.signal import Window

    reporter = messages.exclusive_reporter()
    with reporter.errors(2):
        applied = Calibration.load(calibration)
        config = ScoreConfig(
            **corpus.config(),
            **range_options(applied, steps=Window.parse(applied.window).end),
            **engine.config(),
            calibration=applied,
            calibration_anyway=calibration_anyway,
        )
        null = None if on_null is None else OnNull(on_null)
        kind = GateKind(config, Gate(max_new_tokens, tuple(fail_term or ()), null, compare_ungated))
        job = ScoreJob(config, kind=kind, resume=corpus.resume, verbose=messages.verbose, notice=reporter.note)
    run_job(job, reporter)
