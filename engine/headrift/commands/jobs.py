"""What the commands share that take rows through an engine: their options, and the way from a job to its end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrift.commands.common import AttentionBackendName, DType, EngineName, column_of, errors, say, system_prompt_of

if TYPE_CHECKING:
    from headrift.corpus.job import ScoreJob

Inputs = Annotated[
    list[str],
    typer.Argument(
        metavar="INPUT",
        help=".txt (a prompt a line, # comments), .jsonl (an object a line), .csv or .parquet files, also .gz and "
        ".zst; globs, folders and URLs (s3://...) of such. Keys or columns: prompt and system, or messages and "
        "tools, or token_ids and regions; id, label, category, response.",
        show_default=False,
    ),
]
Out = Annotated[
    Path,
    typer.Option(metavar="DIR", help="A new or empty folder for the results; or see --resume.", show_default=False),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the run in --out where it broke off; all else as it was.")
]
Labels = Annotated[
    str | None,
    typer.Option(
        metavar="A,B", help="A label for each INPUT, attack or benign, for rows without one.", show_default=False
    ),
]
SystemPromptFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The system prompt of rows that bring none.", show_default=False),
]
CalibrationAnyway = Annotated[
    bool,
    typer.Option(
        "--calibration-anyway", help="Use the calibration for another model, type or chat template than its own."
    ),
]
Region = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="A region that rows with token ids name, beside system, user, tool and bos. Repeatable.",
        show_default=False,
    ),
]
Column = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=NAME",
        help="What the inputs call a key or column, as in prompt=text. Repeatable.",
        show_default=False,
    ),
]
Redact = Annotated[bool, typer.Option("--redact", help="Write no prompt, answer or system prompt to any output.")]
Limit = Annotated[int | None, typer.Option(metavar="N", min=1, help="Stop after the first N rows.", show_default=False)]
Sample = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Only N rows, drawn from the whole input.", show_default=False),
]
Seed = Annotated[int, typer.Option(metavar="N", help="Another seed draws another --sample.")]
Shard = Annotated[
    str | None,
    typer.Option(
        metavar="I/N",
        help="Only every N-th row from the I-th: one of N runs that have all rows together.",
        show_default=False,
    ),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="On a CPU, compile the model with torch.compile. With the demonstration model that is hardly faster: try "
        "it before a long job. The first start takes a minute longer, later ones some seconds. (On a GPU vLLM compiles "
        "anyway.)",
    ),
]
Engine = Annotated[
    EngineName,
    typer.Option(metavar="NAME", help="local: an engine on this machine; ray: engines on a Ray cluster."),
]
Workers = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="With --engine ray: so many engines; where not given, one for each GPU, or else for each machine.",
        show_default=False,
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]


def check_verbosity(quiet: bool, verbose: bool) -> None:
    """ValueError for both."""
    if quiet and verbose:
        raise ValueError("--quiet and --verbose contradict each other: choose one")


def asked_of_rows(
    *,
    labels: str | None,
    system_prompt_file: Path | None,
    limit: int | None,
    sample: int | None,
    seed: int,
    shard: str | None,
    region: list[str] | None,
    column: list[str] | None,
    dtype: DType,
    attention_backend: AttentionBackendName,
    compile_model: bool,
    engine: EngineName,
    workers: int | None,
) -> dict[str, Any]:
    """These options as Settings has them. ValueError where one is malformed."""
    from headrift.corpus.shards import Selection, parse_shard

    return {
        "labels": None if labels is None else tuple(label.strip() for label in labels.split(",")),
        "system_prompt": None if system_prompt_file is None else system_prompt_of(system_prompt_file),
        "selection": Selection(limit, sample, seed, None if shard is None else parse_shard(shard)),
        "regions": tuple(region or ()),
        "columns": dict(map(column_of, column or ())),
        "dtype": dtype.value,
        "attention_backend": attention_backend.value,
        "compile": compile_model,
        "engine": engine.value,
        "workers": workers,
    }


def carry_out(job: ScoreJob, *, quiet: bool, verbose: bool) -> None:
    """Take a job to its end, and print what came of it; ends the command where it breaks off."""
    out, model = job.settings.out, job.settings.model
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
            compiling = ", a minute more the first time, for --compile" if job.settings.compile else ""
            say(f"Starting vLLM with {model} (about 20 s{compiling})", quiet)
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
