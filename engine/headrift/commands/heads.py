"""`headrift heads`: attention heads ablated one by one, and what that does to the answer."""

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
    Resume,
    SystemPromptFile,
    Verbose,
    column_of,
    errors,
    say,
    system_prompt_of,
)
from headrift.commands.heads_common import (
    Column,
    Epsilon,
    Form,
    FormName,
    Kind,
    KindName,
    Label,
    Limit,
    OnlyHeads,
    Queries,
    Quick,
    Top,
    heads_of,
)
from headrift.commands.heads_evaluate import evaluate
from headrift.commands.heads_instability import instability
from headrift.commands.heads_sahara import sahara

heads = typer.Typer(
    name="heads",
    help="Ablate attention heads one by one: which of them does a refusal hang on?",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@heads.callback()
def _group() -> None:
    """Ablate attention heads one by one: which of them does a refusal hang on?"""


@heads.command()
def ships(
    inputs: Queries,
    model: Model,
    out: Out,
    kind: Kind = KindName.UNDIFFERENTIATED,
    epsilon: Epsilon = 1e-5,
    only: OnlyHeads = None,
    quick: Quick = False,
    label: Label = None,
    limit: Limit = None,
    form: Form = FormName.CHAT,
    system_prompt_file: SystemPromptFile = None,
    column: Column = None,
    top: Top = 20,
    dtype: DTypeOption = DType.AUTO,
    attention_backend: AttentionBackend = AttentionBackendName.AUTO,
    resume: Resume = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Rank a model's heads by how far the ablation of each moves the first token of the answer (SHIPS).

    Every head's ablation is a row of the engine's batches. A score is KL(p || p_ablated) in nats, at the last prompt
    token. undifferentiated: the head's query is all but nothing, so that it attends everything alike; scaling: its
    output is; mean_query, mean_output: the mean over the layer's heads stands in. No weight is changed or written.

    \b
    Into the folder: scores/ (Parquet, a file a query, a row a head), ships.json
    (settings, ranking), heatmap.png.

    \b
    Exit codes:
      0    done
      1    broken off: the engine or the disk failed; go on with --resume
      2    nothing was begun, because of what was asked for
      130  interrupted; go on with --resume
    """
    from headrift.safety_heads.base import Asked
    from headrift.safety_heads.job import ShipsJob
    from headrift.safety_heads.ranking import table
    from headrift.terminal import progress_bar

    with errors(2, verbose):
        asked = Asked(
            inputs=tuple(inputs),
            model=model,
            out=out,
            kind=kind.value,
            epsilon=epsilon,
            heads=heads_of(only),
            quick=quick,
            label=None if label is None else label.value,
            limit=limit,
            form=form.value,
            system_prompt=None if system_prompt_file is None else system_prompt_of(system_prompt_file),
            columns=dict(map(column_of, column or ())),
            dtype=dtype.value,
            attention_backend=attention_backend.value,
            resume=resume,
        )
        job = ShipsJob(asked)
    queries, of_query = len(job.queries), len(job.heads)
    rows = (of_query + 1) * (queries - len(job.done))
    say(f"{queries} queries, {of_query} heads: {rows:,} rows to run", quiet)

    def kept() -> str:
        return f"{len(job.done)} of {queries} queries are done; go on with --resume"

    with errors(1, verbose, kept), progress_bar("rows", rows, unit="rows/s", hidden=quiet or not rows) as on_rows:
        found = job.run(on_rows, verbose)
    typer.echo(table(found.ranked, queries, top))
    if found.agreement is not None:
        typer.echo(f"the queries' rankings agree with a mean rank correlation of {found.agreement:.2f}")
    say(f"{found.seconds:.1f} s in the engine; results: {out}", quiet)


@heads.command()
def overlap(
    first: Annotated[
        Path, typer.Argument(metavar="RUN", help="A folder that ships or sahara wrote.", show_default=False)
    ],
    second: Annotated[Path, typer.Argument(metavar="RUN", help="Another one.", show_default=False)],
    top: Annotated[int, typer.Option(metavar="N", min=1, help="How many heads of each ranking are compared.")] = 10,
    label: Label = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the figures to this JSON file.", show_default=False)
    ] = None,
) -> None:
    """Do two runs find the same heads? Of two models of one family, say, or by two sets of queries.

    A run of ships is compared by the heads' mean KL, one of sahara by their angles in step 1.

    \b
    Exit codes: 0 shown, 1 the figures could not be written, 2 the runs cannot be compared
    """
    import json

    from headrift.safety_heads.overlap import overlap as compare

    with errors(2):
        found = compare(first, second, top, None if label is None else label.value)
    shared = ", ".join(f"{layer}:{head}" for layer, head in found.shared) or "none"
    typer.echo(f"of the first {top} heads of {found.heads}, {len(found.shared)} are the same: {shared}")
    typer.echo(
        f"Jaccard {found.jaccard:.2f}; by chance {found.by_chance:.1f} heads would be the same, and so many or more "
        f"with a probability of {found.p_value:.2g}"
    )
    typer.echo(f"rank correlation of all {found.heads} heads: {found.rank_correlation:.3f}")
    with errors(1):
        if out is not None:
            out.write_text(json.dumps(found.numbers(), indent=1) + "\n", encoding="utf-8")


for command in (sahara, evaluate, instability):
    heads.command()(command)
