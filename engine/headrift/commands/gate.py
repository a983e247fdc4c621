"""`headrift gate`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from headrift.commands import jobs
from headrift.commands.common import (
    AttentionBackend,
    AttentionBackendName,
    DType,
    DTypeOption,
    EngineName,
    Model,
    Verbose,
    errors,
    say,
)


class OnNullName(StrEnum):
    """What --on-null takes."""

    BLOCK = "block"
    PASS = "pass"


def gate(
    inputs: jobs.Inputs,
    model: Model,
    calibration: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="What `headrift calibrate` wrote: the window and layers that are scored, and the threshold.",
            show_default=False,
        ),
    ],
    out: jobs.Out,
    resume: jobs.Resume = False,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="The most tokens of an answer that is not blocked.")
    ] = 160,
    fail_term: Annotated[
        list[str] | None,
        typer.Option(
            metavar="T",
            help="What a good answer never holds: a word or words, found whole, in any case; or re:PATTERN, a regular "
            "expression. Repeatable.",
            show_default=False,
        ),
    ] = None,
    on_null: Annotated[
        OnNullName | None,
        typer.Option(
            metavar="WHAT",
            help="block or pass answers that end before the window, which have no score; where not given they are "
            "blocked unless they are empty.",
            show_default=False,
        ),
    ] = None,
    compare_ungated: Annotated[
        bool,
        typer.Option(
            "--compare-ungated",
            help="Finish the blocked answers too, to say what the gate prevents and what it costs; needs --fail-term.",
        ),
    ] = False,
    calibration_anyway: jobs.CalibrationAnyway = False,
    labels: jobs.Labels = None,
    system_prompt_file: jobs.SystemPromptFile = None,
    region: jobs.Region = None,
    column: jobs.Column = None,
    redact: jobs.Redact = False,
    limit: jobs.Limit = None,
    sample: jobs.Sample = None,
    seed: jobs.Seed = 0,
    shard: jobs.Shard = None,
    dtype: DTypeOption = DType.AUTO,
    attention_backend: AttentionBackend = AttentionBackendName.AUTO,
    compile_model: jobs.Compile = False,
    engine: jobs.Engine = EngineName.LOCAL,
    workers: jobs.Workers = None,
    quiet: jobs.Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Answer prompts, but for those whose score is at or above a calibration's threshold.

    The model answers as far as the calibration's window goes; a prompt that scores at or above the threshold is stopped
    there and answered with [blocked], the others are answered on. Writes to the --out folder as `headrift score` does;
    the parts have the columns blocked, score, text and leaked (whether the text holds a --fail-term).

    \b
    Exit codes:
      0    done: every row is in the parts or the rejects
      1    broken off: the engine or the disk failed; go on with --resume
      2    nothing was answered, because of what was asked for
      130  interrupted; go on with --resume
    """
    from headrift.calibration.record import Calibration
    from headrift.corpus.gating import Gate, Gating, OnNull
    from headrift.corpus.job import ScoreJob
    from headrift.corpus.settings import Settings, window_of
    from headrift.signal import Window

    with errors(2):
        jobs.check_verbosity(quiet, verbose)
        judge = Calibration.load(calibration)
        settings = Settings(
            inputs=tuple(inputs),
            model=model,
            out=out,
            **window_of(judge, steps=Window.parse(judge.window).end),
            **jobs.asked_of_rows(
                labels=labels,
                system_prompt_file=system_prompt_file,
                limit=limit,
                sample=sample,
                seed=seed,
                shard=shard,
                region=region,
                column=column,
                dtype=dtype,
                attention_backend=attention_backend,
                compile_model=compile_model,
                engine=engine,
                workers=workers,
            ),
            redact=redact,
            calibration=judge,
            calibration_anyway=calibration_anyway,
        )
        null = None if on_null is None else OnNull(on_null.value)
        kind = Gating(settings, Gate(max_new_tokens, tuple(fail_term or ()), null, compare_ungated))
        job = ScoreJob(
            settings, kind=kind, resume=resume, verbose=verbose, notice=lambda text: say(f"Note: {text}", quiet)
        )
    jobs.carry_out(job, quiet=quiet, verbose=verbose)
