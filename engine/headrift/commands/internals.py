"""`headrift internals`: what system prompts change inside a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headrift.commands.common import DType, DTypeOption, Model, Out, Quiet, Resume, Verbose, errors, say


def internals(
    model: Model,
    system_prompts: Annotated[
        Path, typer.Option(metavar="DIR", help="A folder with a .txt file for each system prompt.", show_default=False)
    ],
    prompts: Annotated[
        list[str],
        typer.Option(metavar="FILE", help="Prompts: .txt, .jsonl, .csv or .parquet. Repeatable.", show_default=False),
    ],
    out: Out,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="The first N prompts only.", show_default=False)
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A look: 4 system prompts, the first 6 prompts.")] = False,
    drop_sentences: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="For the first N prompts, drop each sentence in turn, and put the system text elsewhere; 0: neither.",
        ),
    ] = 8,
    attention: Annotated[
        bool,
        typer.Option(
            "--attention/--no-attention",
            help="Measure where the model looks, and what the sentences do to the instability; vLLM starts for that.",
        ),
    ] = True,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of the answer that are compared.")] = 8,
    features: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A TOML file with further features of phrases.", show_default=False),
    ] = None,
    dtype: DTypeOption = DType.AUTO,
    seed: Annotated[int, typer.Option(metavar="N", help="Another seed gives other draws for the intervals.")] = 0,
    resume: Resume = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """What do system prompts change inside a model, and in what it says? Which of their sentences do it?

    Every prompt runs without a system prompt, under each, and under neutral text of exactly as many tokens. Compared
    are residual stream, attention output and MLP output of every layer, at the prompt's own tokens and at the last
    token before the answer, and the answer's first tokens: in transformers, in float32 unless --dtype says otherwise.
    Where the model looks meanwhile, and how evenly (entropy), is measured by the engine of `headrift score`, and so is
    what dropped sentences do to the inter-head instability, of the first 4 prompts.

    \b
    Into the folder: components/, cka/, placements/, sentences/, attention/,
    instability/ (Parquet, a file a system prompt), rejects.parquet, internals.json
    (settings, all figures), report.html and its figures.

    \b
    Exit codes:
      0    done
      1    broken off: memory or the disk failed; go on with --resume
      2    nothing was begun, because of what was asked for
      130  interrupted; go on with --resume
    """
    with errors(2, verbose):
        from headrift.internals.job import Asked, InternalsJob

        job = InternalsJob(
            Asked(
                model=model,
                system_prompts=system_prompts,
                prompts=tuple(prompts),
                out=out,
                limit=limit,
                quick=quick,
                drop_sentences=drop_sentences,
                steps=steps,
                attention=attention,
                features=features,
                dtype=dtype.value,
                seed=seed,
                resume=resume,
            )
        )
    from headrift.reporter import progress_bar

    rows = job.rows
    say(f"{len(job.questions)} prompts, {len(job.systems)} system prompts: {rows:,} rows to run", quiet)
    say(f"Without a system prompt means: {job.renderer.baseline}", quiet)
    if job.rejected:
        first = job.rejected[0]
        say(f"{len(job.rejected)} rejected, the first: {first.id}: {first.detail}", quiet)

    def kept() -> str:
        return f"{job.done}; go on with --resume"

    with errors(1, verbose, kept), progress_bar("rows", rows, unit="rows/s", hidden=quiet or not rows) as on_rows:
        found = job.run(on_rows, verbose)
    for sentence in found["summary"]:
        typer.echo(sentence)
    for question, statements in found["findings"].items():
        typer.echo(f"\n{question}")
        for statement in statements:
            typer.echo(f"- {statement}")
    say(f"\n{found['seconds']:.1f} s; results: {out}, the page: {out / 'report.html'}", quiet)
