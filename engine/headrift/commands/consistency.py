"""`headrift consistency`: is the question attended to alike with and without words around it?"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from headrift.commands.common import (
    AttentionBackend,
    AttentionBackendName,
    Column,
    DType,
    DTypeOption,
    Model,
    Out,
    Quiet,
    Resume,
    SystemPromptFile,
    Verbose,
    column_of,
    errors,
    say,
    system_prompt_of,
)


class AnswersName(StrEnum):
    """What --answers takes; scoring.ANSWERS."""

    CLEAN = "clean"
    OWN = "own"


def consistency(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Questions (datasets/consistency_questions.jsonl) that are put into headrift's wrappers, or pairs: "
            ".jsonl, .csv or .parquet with the keys clean and wrapped.",
            show_default=False,
        ),
    ],
    model: Model,
    out: Out,
    steps: Annotated[
        int, typer.Option(metavar="N", min=1, help="Compare attention at the last prompt token and N answer tokens.")
    ] = 4,
    answers: Annotated[
        AnswersName,
        typer.Option(
            metavar="WHOSE",
            help="clean: attention is compared along the clean prompt's answer in both; own: along each one's own.",
        ),
    ] = AnswersName.CLEAN,
    answer_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="The longest answer, in tokens.")] = 16,
    lora: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Score the model with this adapter (LoRA) in it.", show_default=False),
    ] = None,
    family: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only pairs of this wrapper family. Repeatable.", show_default=False),
    ] = None,
    per_family: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Only N wrappers of each family around a question, drawn.", show_default=False
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="The first N questions only.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Draws wrappers, and resamples for the intervals.")] = 0,
    system_prompt_file: SystemPromptFile = None,
    column: Column = None,
    dtype: DTypeOption = DType.AUTO,
    attention_backend: AttentionBackend = AttentionBackendName.AUTO,
    resume: Resume = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure what a wrapper (a hint, a role-play, an irrelevant frame) does to a model's attention and answers.

    Of each pair of prompts, clean and wrapped, the attention rows of all heads are compared in the engine: their L2 and
    total-variation distance on the tokens that both have, with 0 as the target on the wrapper's. Then: which answers
    flip, and do distance, instability or focus tell?

    \b
    Into the folder: part-*.parquet (a row a pair), rejects.parquet,
    summary.json (settings, figures).

    \b
    Exit codes:
      0    done
      1    broken off: the engine or the disk failed; go on with --resume
      2    nothing was begun, because of what was asked for
      130  interrupted; go on with --resume
    """
    from headrift.consistency.pairs import SYSTEM_PROMPT
    from headrift.consistency.predicting import print_summary
    from headrift.consistency.scoring_job import Asked, ScoringJob
    from headrift.terminal import progress_bar

    with errors(2, verbose):
        asked = Asked(
            inputs=tuple(inputs),
            model=model,
            out=out,
            system_prompt=SYSTEM_PROMPT if system_prompt_file is None else system_prompt_of(system_prompt_file),
            steps=steps,
            answer_tokens=answer_tokens,
            answers=answers.value,
            families=tuple(family or ()),
            per_family=per_family,
            limit=limit,
            seed=seed,
            columns=dict(map(column_of, column or ())),
            lora=lora,
            dtype=dtype.value,
            attention_backend=attention_backend.value,
            resume=resume,
        )
        job = ScoringJob(asked, verbose)
    done, pairs = job.done, len(job.pairs)
    questions = len({pair.question for pair in job.pairs})
    say(f"{pairs:,} pairs of {questions:,} questions{f', {done:,} of them done' if done else ''}", quiet)
    if job.rejected:
        first = job.rejected[0]
        say(f"{len(job.rejected):,} left out, the first: {first.id}: {first.reason}: {first.detail}", quiet)

    def kept() -> str:
        return f"{job.done:,} of {pairs:,} pairs are done; go on with --resume"

    hidden = quiet or done == pairs
    with errors(1, verbose, kept), progress_bar("pairs", pairs, done, unit="pairs/s", hidden=hidden) as on_pairs:
        found = job.run(on_pairs)
    print_summary(found)
    say(f"{found['engine_seconds']:.1f} s in the engine; results: {out}", quiet)
