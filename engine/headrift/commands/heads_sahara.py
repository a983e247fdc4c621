"""`headrift heads sahara`: the group of heads that turns the queries' subspace most."""

from __future__ import annotations

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


def sahara(
    inputs: Queries,
    model: Model,
    out: Out,
    steps: Annotated[int, typer.Option(metavar="N", help="How many heads the group is to have.")] = 2,
    r_main: Annotated[int, typer.Option(metavar="R", help="How many directions span the queries' subspace.")] = 1,
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
    """Find the group of heads whose ablation turns what the model makes of all the queries most (Sahara).

    The last hidden states of the queries span a subspace: their R leading left singular vectors. An ablation turns it,
    by principal angles in degrees, of which the sum counts. Step 1 ablates every head alone (generalised SHIPS); each
    further step ablates those chosen so far and one more. undifferentiated: a head's query is all but nothing, so that
    it attends everything alike; scaling: its output is; mean_query, mean_output: the mean over the layer's heads stands
    in. No weight is changed or written.

    \b
    Into the folder: angles/ (Parquet, a row for a step and head), sahara.json
    (settings, the group, the ranking of each step), heatmap.png (of step 1).

    \b
    Exit codes:
      0    done
      1    broken off: the engine or the disk failed; go on with --resume
      2    nothing was begun, because of what was asked for
      130  interrupted; go on with --resume
    """
    from headrift.safety_heads.sahara_job import Asked, SaharaJob, table
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
            steps=steps,
            r_main=r_main,
        )
        job = SaharaJob(asked)
    rows = job.rows
    say(f"{len(job.queries)} queries, {len(job.heads)} heads, a group of {steps}: {rows:,} rows to run", quiet)

    def kept() -> str:
        return f"the angles of {job.angles_left} heads are missing; go on with --resume"

    with errors(1, verbose, kept), progress_bar("rows", rows, unit="rows/s", hidden=quiet or not rows) as on_rows:
        found = job.run(on_rows, verbose)
    typer.echo(table(found.steps, top))
    say(f"{found.seconds:.1f} s in the engine; results: {out}", quiet)
