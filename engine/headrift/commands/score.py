"""`headrift score`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from headrift.commands.common import (
    AttentionBackend,
    AttentionBackendName,
    DType,
    EngineName,
    errors,
    say,
    system_prompt_of,
)


class Save(StrEnum):
    """What --save adds to the parts."""

    SHARES = "shares"
    MASS = "mass"
    FOCUS = "focus"
    TEXT = "text"
    ENTROPY = "entropy"


def score(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT",
            help=".txt (a prompt a line, # comments), .jsonl (an object a line), .csv or .parquet files, also .gz and "
            ".zst; globs, folders and URLs (s3://...) of such. Keys or columns: prompt and system, or messages and "
            "tools, or token_ids and regions; id, label, category, response.",
            show_default=False,
        ),
    ],
    model: Annotated[Path, typer.Option(metavar="DIR", help="The model's folder.", show_default=False)],
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="A new or empty folder for the results; or see --resume.", show_default=False),
    ],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out where it broke off; all else as it was.")
    ] = False,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="A label for each INPUT, attack or benign, for rows without one.", show_default=False
        ),
    ] = None,
    system_prompt_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The system prompt of rows that bring none.", show_default=False),
    ] = None,
    steps: Annotated[int, typer.Option(metavar="N", help="Record steps 0 to N of each answer.")] = 12,
    window: Annotated[
        str | None,
        typer.Option(metavar="A:B", help="The steps that are scored; 1:N where not given.", show_default=False),
    ] = None,
    replay: Annotated[
        bool, typer.Option("--replay", help="Score the logged answers (response) instead of making new ones.")
    ] = False,
    drop_shallow: Annotated[
        float, typer.Option(metavar="X", help="Leave out this fraction of the layers at the input end.")
    ] = 0.25,
    drop_deep: Annotated[
        float, typer.Option(metavar="X", help="Leave out this fraction of the layers at the output end.")
    ] = 0.15,
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
    region: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A region that rows with token ids name, beside system, user and tool. Repeatable.",
            show_default=False,
        ),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=NAME",
            help="What the inputs call a key or column, as in prompt=text. Repeatable.",
            show_default=False,
        ),
    ] = None,
    redact: Annotated[
        bool, typer.Option("--redact", help="Write no prompt, answer or system prompt to any output.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Stop after the first N rows.", show_default=False)
    ] = None,
    sample: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Only N rows, drawn from the whole input.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Another seed draws another --sample.")] = 0,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Only every N-th row from the I-th: one of N runs that have all rows together.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        DType, typer.Option(metavar="TYPE", help="float32, bfloat16 or float16; auto suits the machine.")
    ] = DType.AUTO,
    attention_backend: AttentionBackend = AttentionBackendName.AUTO,
    engine: Annotated[
        EngineName,
        typer.Option(metavar="NAME", help="local: an engine on this machine; ray: engines on a Ray cluster."),
    ] = EngineName.LOCAL,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="With --engine ray: so many engines; where not given, one for each GPU, or else for each machine.",
            show_default=False,
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Let vLLM log, and show where errors arose.")
    ] = False,
) -> None:
    """Score prompts for inter-head attention instability.

    Writes to the --out folder: part-*.parquet (the scored rows), rejects-*.parquet (the others, each with its reason),
    run.json (settings, versions, counts), scores.png and the journal that --resume reads. A row that cannot be scored
    does not stop the others. The first Ctrl-C stops after the shard in hand, the second at once.

    \b
    Exit codes:
      0    done: every row is in the parts or the rejects
      1    broken off: the engine or the disk failed; go on with --resume
      2    nothing was scored, because of what was asked for
      130  interrupted; go on with --resume
    """
    from headrift.corpus.job import ScoreJob
    from headrift.corpus.settings import Settings
    from headrift.corpus.shards import Selection, parse_shard

    kinds = sorted({kind.value for kind in save or []})
    with errors(2):
        if quiet and verbose:
            raise ValueError("--quiet and --verbose contradict each other: choose one")
        settings = Settings(
            inputs=tuple(inputs),
            model=model,
            out=out,
            labels=None if labels is None else tuple(label.strip() for label in labels.split(",")),
            system_prompt=None if system_prompt_file is None else system_prompt_of(system_prompt_file),
            steps=steps,
            window=window,
            drop_shallow=drop_shallow,
            drop_deep=drop_deep,
            replay=replay,
            save=tuple(kinds),
            regions=tuple(region or ()),
            logit_stats=logit_stats or Save.ENTROPY in kinds,
            redact=redact,
            selection=Selection(limit, sample, seed, None if shard is None else parse_shard(shard)),
            columns=dict(map(_column, column or ())),
            dtype=dtype.value,
            attention_backend=attention_backend.value,
            engine=engine.value,
            workers=workers,
        )
        job = ScoreJob(settings, resume=resume, verbose=verbose, notice=lambda text: say(f"Note: {text}", quiet))
    with job:
        for notice in job.notices:
            say(f"Note: {notice}", quiet)
        before = job.kept
        if job.done:
            say(f"All {job.kept:,} rows are in {out} already", quiet)
            job.finish()
        else:
            if before:
                say(f"Going on after {before:,} of {job.total:,} rows", quiet)
            say(f"Starting vLLM with {model} (about 20 s)", quiet)
            with errors(2, verbose):
                about = job.start()
            shape = f"{about['layers']} layers x {about['heads']} heads, {about['dtype']}"
            recorder = f"recorder {about['recorder_bytes'] / 1e6:.0f} MB"
            say(f"Ready in {job.seconds['start']:.0f} s: {shape}, {recorder}", quiet)

            def kept() -> str:
                return f"{job.kept:,} of {job.total:,} rows are in {out}; --resume goes on from there"

            with errors(1, verbose, kept):
                if not job.run(progress=not quiet):
                    raise KeyboardInterrupt
    if not quiet:
        from rich.console import Console

        console = Console()
        seconds = {"start_seconds": job.seconds["start"], "score_seconds": job.seconds["scoring"]}
        job.summary().print(console, rows=job.kept - before, **seconds)
        console.print(f"\nResults are in {out}", markup=False, highlight=False, soft_wrap=True)


def _column(given: str) -> tuple[str, str]:
    key, equals, name = given.partition("=")
    if not equals or not name:
        raise ValueError(f"--column {given} is not KEY=NAME, as in prompt=text")
    return key, name
