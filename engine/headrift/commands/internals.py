"""`headrift internals`: what system prompts change inside a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from headrift.commands import options


@dataclass(frozen=True)
class InternalsOptions:
    """What is compared in which model; fields of the job's config."""

    model: options.Model
    system_prompts: Annotated[
        Path, typer.Option(metavar="DIR", help="A folder with a .txt file for each system prompt.")
    ]
    prompts: Annotated[
        list[str], typer.Option(metavar="FILE", help="Prompts: .txt, .jsonl, .csv or .parquet. Repeatable.")
    ]
    out: options.Out
    limit: options.Limit = None
    quick: Annotated[bool, typer.Option("--quick", help="Quick: 4 system prompts, the first 6 prompts.")] = False
    drop_sentences: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Number of prompts for which each sentence is dropped in turn and the system prompt is put elsewhere.",
        ),
    ] = 8
    attention: Annotated[
        bool,
        typer.Option(
            "--attention/--no-attention",
            help="Measure attention, and what sentences do to the instability, which starts vLLM.",
        ),
    ] = True
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Number of answer tokens to compare.")] = 8
    features: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A TOML file with more features of sentences."),
    ] = None
    dtype: options.DType = "auto"
    resume: options.Resume = False


def internals(*, measured: InternalsOptions, messages: options.Messages) -> None:
    """Measure what system prompts change inside a model and in its answers, and which of their sentences do it.

    Every prompt runs without a system prompt, under each, and under neutral text of exactly as many tokens. Compared
    are the residual stream and the attention and MLP outputs of every layer, at the question's tokens and at the last
    token before the answer, and the answer's first tokens: in transformers, in float32 unless --dtype says otherwise.
    The engine of `headrift score` measures where the model looks, how evenly (entropy), and what dropped sentences do
    to the inter-head instability, of the first 4 prompts.

    \b
    Writes components/, cka/, placements/, sentences/, attention/, instability/
    (Parquet, a file for each system prompt), rejects.parquet, internals.json
    (settings, all numbers), report.html and its figures.
    """
    reporter = messages.reporter()
    with reporter.errors(2):
        from headrift.internals.job import InternalsConfig, InternalsJob

        job = InternalsJob(InternalsConfig(**vars(measured) | {"prompts": tuple(measured.prompts)}))
    rows = job.rows
    reporter.say(f"{len(job.questions)} prompts, {len(job.systems)} system prompts: {rows:,} rows to run")
    reporter.say(f"Without a system prompt means: {job.renderer.baseline}")
    if job.rejects:
        first = job.rejects[0]
        reporter.say(f"{len(job.rejects)} rejected, the first: {first.id}: {first.detail}")
    with reporter.errors(1, job.progress), reporter.progress_bar("rows", rows, unit="rows/s") as on_rows:
        results = job.run(on_rows, messages.verbose)

    from headrift.internals.page import print_findings

    print_findings({"In short": results["summary"], **results["findings"]})
    reporter.say(f"\n{results['seconds']:.1f} s; results: {measured.out}, the page: {measured.out / 'report.html'}")
