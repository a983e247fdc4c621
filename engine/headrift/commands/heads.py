"""`headrift heads`: which attention heads refusals depend on, by ablating them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from headrift.commands import options

heads = typer.Typer(
    name="heads",
    help="Which attention heads do refusals depend on? Ablate them one by one, or together.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

KindName = Literal["undifferentiated", "scaling", "mean_query", "mean_output"]
LabelName = Literal["attack", "benign"]
_KINDS = "undifferentiated, scaling, mean_query or mean_output"
Label = Annotated[
    LabelName | None, typer.Option(metavar="LABEL", help="Only queries labelled attack, or benign.", show_default=False)
]
RUN = typer.Argument(metavar="RUN", help="Folder that `headrift heads ships` or `sahara` wrote.", show_default=False)


@dataclass(frozen=True)
class QueryOptions:
    """Which queries are put to which model, and how."""

    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT...", help="Queries: .txt, .jsonl, .csv or .parquet.", show_default=False),
    ]
    model: options.Model
    out: options.Out
    form: Annotated[
        Literal["chat", "query", "text"],
        typer.Option(
            "--as",
            metavar="FORM",
            help="chat: a message in the model's chat template; query: '## Query:... ## Answer:'; text: plain.",
        ),
    ] = "chat"
    system_prompt_file: options.SystemPromptFile = None
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=NAME",
            help="Name of a key or column in the inputs, as in prompt=goal; `input` is known. Repeatable.",
            show_default=False,
        ),
    ] = None

    def config(self) -> dict[str, Any]:
        """These options as fields of a job's config. ValueError if one is malformed."""
        return {
            "inputs": tuple(self.inputs),
            "model": self.model,
            "out": self.out,
            "form": self.form,
            "system_prompt": options.read_system_prompt(self.system_prompt_file),
            "columns": options.parse_columns(self.column),
        }


@dataclass(frozen=True)
class SearchOptions:
    """Which heads are ablated with which queries, and how."""

    kind: Annotated[KindName, typer.Option(metavar="KIND", help=f"{_KINDS}: see above.")] = "undifferentiated"
    epsilon: Annotated[
        float, typer.Option(metavar="X", help="Factor of an undifferentiated query or scaled output.")
    ] = 1e-5
    only: Annotated[
        str | None,
        typer.Option("--heads", metavar="L:H,...", help="Only these heads, as in 3:0,11:7.", show_default=False),
    ] = None
    quick: Annotated[bool, typer.Option("--quick", help="A look: 64 heads drawn at random, the first 5 queries.")] = (
        False
    )
    label: Label = None
    limit: options.Limit = None
    resume: options.Resume = False

    def config(self) -> dict[str, Any]:
        """These options as fields of a job's config. ValueError if one is malformed."""
        names = ("kind", "epsilon", "quick", "label", "limit", "resume")
        return {"heads": parse_heads(self.only), **{name: getattr(self, name) for name in names}}


@dataclass(frozen=True)
class EvaluateOptions:
    """Which heads are ablated together, and what that is compared with."""

    only: Annotated[
        str | None,
        typer.Option("--heads", metavar="L:H,...", help="Ablate these heads, as in 3:0,11:7.", show_default=False),
    ] = None
    run: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="RUN", help="Or the first heads of a run of ships or sahara.", show_default=False
        ),
    ] = None
    top: Annotated[
        int | None, typer.Option(metavar="K", min=1, help="How many heads to take --from the run.", show_default=False)
    ] = None
    kind: Annotated[
        KindName | None,
        typer.Option(metavar="KIND", help=f"{_KINDS} (default: as in the run, or the first).", show_default=False),
    ] = None
    epsilon: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Factor of an undifferentiated query or scaled output (default: as in the run, or 1e-5).",
            show_default=False,
        ),
    ] = None
    tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Longest answer, in tokens.")] = 64
    draws: Annotated[
        int, typer.Option(metavar="N", min=0, help="How often as many other heads, drawn at random, are ablated.")
    ] = 3
    seed: options.Seed = 0
    labels: options.Labels = None
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Use only the first N queries of each label.", show_default=False),
    ] = None
    quick: Annotated[
        bool, typer.Option("--quick", help="A look: 5 queries of each label, 32 tokens, one draw, less text.")
    ] = False
    keep_completions: Annotated[
        bool, typer.Option("--keep-completions", help="Keep the answers' texts too, in answers.parquet.")
    ] = False
    choosing_queries: Annotated[
        Literal["refuse", "leave-out", "keep"],
        typer.Option(
            metavar="WHAT",
            help="If queries chose the heads (--from): refuse to evaluate; leave-out: evaluate with the others; keep "
            "them, and mark the results as not held out.",
        ),
    ] = "refuse"

    def config(self) -> dict[str, Any]:
        """These options as fields of a job's config. ValueError if one is malformed."""
        values = vars(self) | {"heads": parse_heads(self.only), "labels": options.parse_labels(self.labels)}
        return {name: value for name, value in values.items() if name != "only"}


Top = Annotated[int, typer.Option(metavar="N", min=1, help="How many heads the table shows.")]


def parse_heads(text: str | None) -> tuple[tuple[int, int], ...] | None:
    """Parse --heads. ValueError if it is not a list of LAYER:HEAD."""
    if text is None:
        return None
    heads = []
    for part in text.split(","):
        layer, colon, head = part.partition(":")
        if not colon or not layer.strip().isdecimal() or not head.strip().isdecimal():
            raise ValueError(f"--heads {text}: {part.strip()!r} is not LAYER:HEAD, as in 3:0,11:7")
        heads.append((int(layer), int(head)))
    if len(set(heads)) < len(heads):
        raise ValueError(f"--heads {text} names a head twice")
    return tuple(heads)


def ships(
    *,
    queries: QueryOptions,
    search: SearchOptions,
    top: Top = 20,
    engine: options.EngineOptions,
    messages: options.Messages,
) -> None:
    """Rank a model's heads by how far ablating each moves the first token of the answer (SHIPS).

    A score is KL(p || p_ablated) in nats, at the last prompt token. Kinds of ablation: undifferentiated scales the
    head's query to nearly zero, so that it attends to everything equally; scaling does so with its output; mean_query
    and mean_output replace it by the mean over the layer's heads. No weight is changed or written.

    \b
    Writes to the folder: scores/ (Parquet, a file per query, a row per head),
    ships.json (settings, ranking), heatmap.png.
    """
    from headrift.safety_heads.jobs import HeadsConfig, ShipsJob
    from headrift.safety_heads.ships import table

    reporter = messages.reporter()
    with reporter.errors(2):
        job = ShipsJob(HeadsConfig(**queries.config(), **search.config(), **engine.config()))
    n, n_heads = len(job.queries), len(job.heads)
    rows = (n_heads + 1) * (n - job.done)
    reporter.say(f"{n} queries, {n_heads} heads: {rows:,} rows to run")
    with (
        reporter.errors(1, lambda: f"{job.done} of {n} queries are done; rerun with --resume"),
        reporter.progress_bar("rows", rows, unit="rows/s") as on_rows,
    ):
        result = job.run(on_rows, messages.verbose)
    print(table(result.ranked, n, top))
    if result.agreement is not None:
        print(f"agreement of the queries' rankings: {result.agreement:.2f} (mean rank correlation)")
    reporter.say(f"{result.seconds:.1f} s in the engine; results: {queries.out}")


def sahara(
    *,
    queries: QueryOptions,
    search: SearchOptions,
    steps: Annotated[int, typer.Option(metavar="N", help="Size of the group.")] = 2,
    r_main: Annotated[int, typer.Option(metavar="R", help="Number of directions of the queries' subspace.")] = 1,
    top: Top = 20,
    engine: options.EngineOptions,
    messages: options.Messages,
) -> None:
    """Find the group of heads whose ablation turns the queries' hidden states most (Sahara).

    The last hidden states of all queries span a subspace: their R leading left singular vectors. An ablation turns it
    by principal angles, whose sum in degrees is a head's score. Step 1 ablates every head alone (generalised SHIPS);
    each further step ablates those chosen so far and one more. Kinds of ablation: undifferentiated scales the head's
    query to nearly zero, so that it attends to everything equally; scaling does so with its output; mean_query and
    mean_output replace it by the mean over the layer's heads. No weight is changed or written.

    \b
    Writes to the folder: angles/ (Parquet, a row per step and head), sahara.json
    (settings, the group, the ranking of each step), heatmap.png (of step 1).
    """
    from headrift.safety_heads.jobs import HeadsConfig, SaharaJob
    from headrift.safety_heads.sahara import table

    reporter = messages.reporter()
    with reporter.errors(2):
        options_of_job = {**queries.config(), **search.config(), **engine.config()}
        job = SaharaJob(HeadsConfig(**options_of_job, steps=steps, r_main=r_main))
    rows = job.rows
    reporter.say(f"{len(job.queries)} queries, {len(job.heads)} heads, a group of {steps}: {rows:,} rows to run")
    with (
        reporter.errors(1, lambda: f"the angles of {job.angles_left} heads are missing; rerun with --resume"),
        reporter.progress_bar("rows", rows, unit="rows/s") as on_rows,
    ):
        result = job.run(on_rows, messages.verbose)
    print(table(result.steps, top))
    reporter.say(f"{result.seconds:.1f} s in the engine; results: {queries.out}")


def evaluate(
    *,
    queries: QueryOptions,
    arms: EvaluateOptions,
    engine: options.EngineOptions,
    messages: options.Messages,
) -> None:
    """Ablate chosen heads together: does the model refuse less, and what else changes?

    The same queries are answered by the model as it is, with the chosen heads ablated, and with as many other heads
    drawn at random; a neutral text is read in each of these ways. Use queries that did not choose the heads: rates of
    those that did are not held out. Refusals are recognised by rule. Attack success is
    the rate of attacks that are not refused, and no more than that. No weight is changed or written, and no answer is
    kept without --keep-completions.

    \b
    Writes to the folder: evaluate.json (settings, rates with intervals),
    answers.parquet (a row per query and arm), arms.png.
    """
    from headrift.safety_heads.evaluate import EvaluateConfig, EvaluateJob
    from headrift.safety_heads.refusals import table

    reporter = messages.reporter()
    with reporter.errors(2):
        job = EvaluateJob(EvaluateConfig(**queries.config(), **arms.config(), **engine.config()))
    chosen = ", ".join(f"{layer}:{head}" for layer, head in job.heads)
    reporter.say(f"{len(job.queries)} queries in {len(job.arms)} arms; {job.kind}: {chosen}")
    with reporter.errors(1), reporter.progress_bar("rows", job.rows, unit="rows/s") as on_rows:
        result = job.run(on_rows, messages.verbose)
    print(table(result.arms, result.controls, str(result.chosen_on)))
    reporter.say(f"{result.seconds:.1f} s in the engine; results: {queries.out}")


def overlap(
    *,
    first: Annotated[Path, RUN],
    second: Annotated[Path, RUN],
    top: Annotated[int, typer.Option(metavar="N", min=1, help="How many heads of each ranking are compared.")] = 10,
    label: Label = None,
    out: options.JsonOut = None,
) -> None:
    """Compare the leading heads of two runs: of two models of one family, or two sets of queries.

    A run of ships is compared by the heads' mean KL, one of sahara by their angles in step 1.
    """
    from headrift.safety_heads.overlap import overlap as compare
    from headrift.safety_heads.overlap import table

    reporter = options.Messages().reporter()
    with reporter.errors(2):
        result = compare(first, second, top, label)
    print(table(result))
    with reporter.errors(1):
        _write_json(out, asdict(result))


def instability(
    *,
    run: Annotated[Path, RUN],
    scores: Annotated[
        list[Path],
        typer.Argument(
            metavar="SCORES",
            help="Folders that `headrift score --save shares` wrote, with the same model.",
            show_default=False,
        ),
    ],
    top: Annotated[int, typer.Option(metavar="K", min=1, help="How many of the run's first heads are used.")] = 10,
    draws: Annotated[
        int, typer.Option(metavar="N", min=1, help="How often as many heads of the same layers are drawn.")
    ] = 200,
    seed: options.Seed = 0,
    out: options.JsonOut = None,
) -> None:
    """Do the first heads of a run drive the instability score?

    The score of each prompt is computed again from the saved shares: without these heads, with them alone, and the same
    for as many heads drawn at random from the same layers. Rank correlation is with the score of all heads; AUROC is of
    attacks against benign prompts, if the rows are labelled. Intervals: 95% over prompts, and for random heads the
    range of 95% of the draws.
    """
    from headrift.safety_heads.instability import instability as analyse
    from headrift.safety_heads.instability import table

    reporter = options.Messages().reporter()
    with reporter.errors(2):
        results = [analyse(run, folder, top, draws, seed) for folder in scores]
    print("\n\n".join(map(table, results)))
    with reporter.errors(1):
        _write_json(out, [result.to_json() for result in results])


def _write_json(out: Path | None, value: Any) -> None:
    if out is not None:
        out.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


options.add_commands(heads, ships, sahara, exit_codes=options.RESUMABLE)
options.add_commands(heads, evaluate, overlap, instability, exit_codes=options.NOT_RESUMABLE)
