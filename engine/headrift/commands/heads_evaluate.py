"""`headrift heads evaluate`: are refusals lost with chosen heads, and what else is?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headrift.commands.common import (
    AttentionBackend,
    AttentionBackendName,
    DType,
    DTypeOption,
    Model,
    Out,
    Quiet,
    SystemPromptFile,
    Verbose,
    column_of,
    errors,
    say,
    system_prompt_of,
)
from headrift.commands.heads_common import (
    Column,
    Form,
    FormName,
    KindName,
    Queries,
    heads_of,
)
from headrift.commands.options import Labels


def evaluate(
    inputs: Queries,
    model: Model,
    out: Out,
    only: Annotated[
        str | None,
        typer.Option("--heads", metavar="L:H,...", help="Ablate these heads, as in 3:0,11:7.", show_default=False),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="RUN", help="Or the first heads of this folder of ships or sahara.", show_default=False
        ),
    ] = None,
    top: Annotated[int | None, typer.Option(metavar="K", min=1, help="So many of them.", show_default=False)] = None,
    kind: Annotated[
        KindName | None,
        typer.Option(
            metavar="KIND",
            help="undifferentiated, scaling, mean_query or mean_output; as in the run, or undifferentiated.",
            show_default=False,
        ),
    ] = None,
    epsilon: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="The factor of an undifferentiated query or a scaled output; as in the run, or 1e-5.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(metavar="N", min=1, help="The most tokens of an answer.")] = 64,
    draws: Annotated[
        int, typer.Option(metavar="N", min=0, help="How often as many other heads, drawn at random, are ablated.")
    ] = 3,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of these draws.")] = 0,
    labels: Labels = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="The first N queries of each label.", show_default=False)
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A look: 5 queries of each label, 32 tokens, one draw, less text.")
    ] = False,
    form: Form = FormName.CHAT,
    system_prompt_file: SystemPromptFile = None,
    column: Column = None,
    keep_completions: Annotated[
        bool, typer.Option("--keep-completions", help="Keep the answers' texts, too, in answers.parquet.")
    ] = False,
    dtype: DTypeOption = DType.AUTO,
    attention_backend: AttentionBackend = AttentionBackendName.AUTO,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Ablate chosen heads together: are refusals lost with them, and what else is?

    The same queries are answered by the model as it is, with the chosen heads ablated, and with as many others drawn at
    random; a neutral text is read in each of these ways. Refusals are told by rule. Attack success is the rate of
    attacks that are not refused, and no more than that. It measures: no weight is changed or written, and no answer is
    kept unless --keep-completions asks for it.

    \b
    Into the folder: evaluate.json (settings, rates with intervals),
    answers.parquet (a row a query and arm), arms.png.

    \b
    Exit codes:
      0    done
      1    broken off: the engine or the disk failed
      2    nothing was begun, because of what was asked for
      130  interrupted
    """
    from headrift.safety_heads.arms import table
    from headrift.safety_heads.evaluate import Asked, EvaluateJob
    from headrift.terminal import progress_bar

    with errors(2, verbose):
        asked = Asked(
            inputs=tuple(inputs),
            model=model,
            out=out,
            heads=heads_of(only),
            run=run,
            top=top,
            kind=None if kind is None else kind.value,
            epsilon=epsilon,
            tokens=tokens,
            draws=draws,
            seed=seed,
            limit=limit,
            quick=quick,
            labels=None if labels is None else tuple(label.strip() for label in labels.split(",")),
            form=form.value,
            system_prompt=None if system_prompt_file is None else system_prompt_of(system_prompt_file),
            columns=dict(map(column_of, column or ())),
            dtype=dtype.value,
            attention_backend=attention_backend.value,
            keep_completions=keep_completions,
        )
        job = EvaluateJob(asked)
    heads = ", ".join(f"{layer}:{head}" for layer, head in job.heads)
    say(f"{len(job.queries)} queries in {len(job.arms)} arms; {job.kind}: {heads}", quiet)
    with errors(1, verbose), progress_bar("rows", job.rows, unit="rows/s", hidden=quiet) as on_rows:
        found = job.run(on_rows, verbose)
    typer.echo(table(found.arms, found.controls))
    say(f"{found.seconds:.1f} s in the engine; results: {out}", quiet)
