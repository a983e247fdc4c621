"""`headrift internals`: what system prompts change inside a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headrift.commands import options


def internals(
    *,
    model: options.Model,
    system_prompts: Annotated[
        Path, typer.Option(metavar="DIR", help="A folder with a .txt file for each system prompt.")
    ],
    prompts: Annotated[
        list[str], typer.Option(metavar="FILE", help="Prompts: .txt, .jsonl, .csv or .parquet. Repeatable.")
    ],
    out: options.Out,
    limit: options.Limit = None,
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
        Path | None, typer.Option(metavar="FILE", help="A TOML file with further features of phrases.")
    ] = None,
    dtype: options.DType = "auto",
    seed: options.Seed = 0,
    resume: options.Resume = False,
    messages: options.Messages,
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
    """
    reporter = messages.reporter()
    with reporter.errors(2):
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
                dtype=dtype,
                seed=seed,
                resume=resume,
            )
        )
    rows = job.rows
    reporter.say(f"{len(job.questions)} prompts, {len(job.systems)} system prompts: {rows:,} rows to run")
    reporter.say(f"Without a system prompt means: {job.renderer.baseline}")
    if job.rejected:
        first = job.rejected[0]
        reporter.say(f"{len(job.rejected)} rejected, the first: {first.id}: {first.detail}")

    with (
        reporter.errors(1, lambda: f"{job.done}; rerun with --resume"),
        reporter.progress_bar("rows", rows, unit="rows/s") as on_rows,
    ):
        found = job.run(on_rows, messages.verbose)
    for sentence in found["summary"]:
        typer.echo(sentence)
    for question, statements in found["findings"].items():
        typer.echo(f"\n{question}")
        for statement in statements:
            typer.echo(f"- {statement}")
    reporter.say(f"\n{found['seconds']:.1f} s; results: {out}, the page: {out / 'report.html'}")
