"""`headrift score`."""

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


class Save(StrEnum):
    """What --save adds to the parts."""

    SHARES = "shares"
    MASS = "mass"
    FOCUS = "focus"
    TEXT = "text"
    ENTROPY = "entropy"


def score(
    inputs: jobs.Inputs,
    model: Model,
    out: jobs.Out,
    resume: jobs.Resume = False,
    labels: jobs.Labels = None,
    system_prompt_file: jobs.SystemPromptFile = None,
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Record steps 0 to N of each answer; where not given 12, or as many as --calibration needs.",
            show_default=False,
        ),
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(
            metavar="A:B",
            help="The steps that are scored; 1:N, or the calibration's, where not given.",
            show_default=False,
        ),
    ] = None,
    replay: Annotated[
        bool, typer.Option("--replay", help="Score the logged answers (response) instead of making new ones.")
    ] = False,
    drop_shallow: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Leave out this fraction of the layers at the input end; 0.25, or the calibration's, if not given.",
            show_default=False,
        ),
    ] = None,
    drop_deep: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Leave out this fraction of the layers at the output end; 0.15, or the calibration's, if not given.",
            show_default=False,
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What `headrift calibrate` wrote: score its window and layers, and say whether a row is flagged.",
            show_default=False,
        ),
    ] = None,
    calibration_anyway: jobs.CalibrationAnyway = False,
    save: Annotated[
        list[Save] | None,
        typer.Option(
            metavar="KIND",
            help="Add columns: shares, mass, focus, text (prompt and answer) or entropy (implies --logit-stats). "
            "Repeatable.",
            show_default=False,
        ),
    ] = None,
    logit_stats: Annotated[
        bool, typer.Option("--logit-stats", help="Record next-token entropy, top-1 probability and margin.")
    ] = False,
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
    """Score prompts for inter-head attention instability.

    Writes to the --out folder: part-*.parquet (the scored rows), rejects-*.parquet (the others, each with its reason),
    run.json (settings, versions, counts), scores.png and the journal that --resume reads; with --calibration also
    flagged-fdr.parquet (a list of rows few of which are benign). A row that cannot be scored does not stop the others.
    The first Ctrl-C stops after the shard in hand, the second at once.

    \b
    Exit codes:
      0    done: every row is in the parts or the rejects
      1    broken off: the engine or the disk failed; go on with --resume
      2    nothing was scored, because of what was asked for
      130  interrupted; go on with --resume
    """
    from headrift.calibration.record import Calibration
    from headrift.corpus.job import ScoreJob
    from headrift.corpus.settings import STEPS, Settings, window_of

    kinds = sorted({kind.value for kind in save or []})
    with errors(2):
        jobs.check_verbosity(quiet, verbose)
        judge = None if calibration is None else Calibration.load(calibration)
        settings = Settings(
            inputs=tuple(inputs),
            model=model,
            out=out,
            **window_of(judge, steps=steps, window=window, drop_shallow=drop_shallow, drop_deep=drop_deep),
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
            replay=replay,
            save=tuple(kinds),
            logit_stats=logit_stats or Save.ENTROPY in kinds,
            redact=redact,
            calibration=judge,
            calibration_anyway=calibration_anyway,
        )
        job = ScoreJob(settings, resume=resume, verbose=verbose, notice=lambda text: say(f"Note: {text}", quiet))
        if steps is None and settings.steps > STEPS:
            job.notices.append(f"steps 0 to {settings.steps} are recorded, as far as the calibration's window goes")
    jobs.carry_out(job, quiet=quiet, verbose=verbose)
