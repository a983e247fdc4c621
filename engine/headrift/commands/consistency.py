"""`headrift consistency`, `train-consistency` and `evaluate-consistency`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from headrift.commands import options

if TYPE_CHECKING:
    from headrift.consistency.pairs import RejectedPair
    from headrift.terminal import Reporter

AnswerTokens = Annotated[int, typer.Option(metavar="N", min=1, help="Longest answer, in tokens.")]


@dataclass(frozen=True)
class ScoringOptions:
    """What is compared; the fields are those of ConsistencyConfig."""

    steps: Annotated[
        int, typer.Option(metavar="N", min=1, help="Compare attention at the last prompt token and N answer tokens.")
    ] = 4
    answers: Annotated[
        Literal["clean", "own"],
        typer.Option(
            metavar="WHOSE",
            help="clean: compare attention along the clean prompt's answer in both; own: along each prompt's own.",
        ),
    ] = "clean"
    answer_tokens: AnswerTokens = 16
    lora: Annotated[Path | None, typer.Option(metavar="DIR", help="Score the model with this adapter (LoRA).")] = None
    per_family: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Draw only N wrappers of each family for a question.")
    ] = None
    seed: options.Seed = 0
    resume: options.Resume = False


@dataclass(frozen=True)
class TrainOptions:
    """How a training runs; the fields are those of TrainConfig."""

    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Number of steps.")] = 100
    minutes: Annotated[
        float | None, typer.Option(metavar="M", min=0, help="Stop after M minutes even before --steps.")
    ] = None
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Pairs in a step.")] = 4
    learning_rate: Annotated[float, typer.Option("--lr", metavar="X", help="Learning rate (AdamW).")] = 3e-3
    keep: Annotated[
        float, typer.Option(metavar="X", help="Weight of a loss that keeps the model as it was on plain text; 0: none.")
    ] = 0.03
    rank: Annotated[int, typer.Option(metavar="N", min=1, help="Rank of a new LoRA.")] = 8
    target: Annotated[
        Literal["initial", "current"],
        typer.Option(metavar="NAME", help="The clean side is the initial model's, or the current one's."),
    ] = "initial"
    lora: Annotated[Path | None, typer.Option(metavar="DIR", help="Start from this adapter instead of a new one.")] = (
        None
    )
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the adapter's start and the pairs' order.")] = 0
    answer_tokens: AnswerTokens = 16
    resume: options.Resume = False


@dataclass(frozen=True)
class PairOptions:
    """Which pairs are put to which model."""

    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Questions (datasets/consistency_questions.jsonl) that are put into headrift's wrappers, or pairs: "
            ".jsonl, .csv or .parquet with the keys clean and wrapped.",
        ),
    ]
    model: options.Model
    system_prompt_file: options.SystemPromptFile = None
    column: options.Column = None
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Use only the first N questions.")] = None

    def config(self) -> dict[str, Any]:
        """These options as fields of a job's config. ValueError if one is malformed."""
        from headrift.consistency.pairs import SYSTEM_PROMPT

        return {
            "inputs": tuple(self.inputs),
            "model": self.model,
            "system_prompt": options.read_system_prompt(self.system_prompt_file) or SYSTEM_PROMPT,
            "columns": options.parse_columns(self.column),
            "limit": self.limit,
        }


def consistency(
    *,
    pairs: PairOptions,
    out: options.Out,
    scoring: ScoringOptions,
    family: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only pairs of this wrapper family. Repeatable.")
    ] = None,
    engine: options.EngineOptions,
    messages: options.Messages,
) -> None:
    """Measure how a wrapper (a hint, a role-play, an irrelevant frame) changes a model's attention and answers.

    For each pair of prompts, clean and wrapped, the attention rows of all heads are compared in the engine: their L2
    and total-variation distance on the common tokens, with 0 as the target on the wrapper's. Then: which answers flip,
    and do distance, instability or focus predict it?

    \b
    Writes to the folder: part-*.parquet (a row per pair), rejects.parquet,
    summary.json (settings, results).
    """
    from headrift.consistency.scoring import ConsistencyConfig, ScoringJob
    from headrift.consistency.summary import print_summary

    reporter = messages.reporter()
    with reporter.errors(2):
        given = {**pairs.config(), **vars(scoring), **engine.config()}
        config = ConsistencyConfig(out=out, families=tuple(family or ()), **given)
        job = ScoringJob(config, messages.verbose)
    done, n = job.done, len(job.pairs)
    questions = len({pair.question for pair in job.pairs})
    reporter.say(f"{n:,} pairs of {questions:,} questions{f', {done:,} of them done' if done else ''}")
    _say_rejected(job.rejected, reporter)
    with (
        reporter.errors(1, lambda: f"{job.done:,} of {n:,} pairs are done; rerun with --resume"),
        reporter.progress_bar("pairs", n, done, unit="pairs/s") as on_pairs,
    ):
        summary = job.run(on_pairs)
    print_summary(summary)
    reporter.say(f"{summary['engine_seconds']:.1f} s in the engine; results: {out}")


def train_consistency(
    *,
    pairs: PairOptions,
    out: options.Out,
    method: Annotated[
        str, typer.Option(metavar="NAME", help="attct, act or bct, or a weighted mixture, as in attct=1,bct=0.2.")
    ] = "attct",
    training: TrainOptions,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="L,...",
            help="Layers whose attention (attct) or residual stream (act) is compared, from 0, as in 0-9,20 (default: "
            "all).",
        ),
    ] = None,
    held_out_family: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="A wrapper family to hold out (default: one drawn by --split-seed). Repeatable."
        ),
    ] = None,
    held_out_questions: Annotated[
        float, typer.Option(metavar="PART", help="Fraction of the questions that is held out.")
    ] = 0.2,
    split_seed: Annotated[int, typer.Option(metavar="N", help="Seed of what is held out.")] = 0,
    messages: options.Messages,
) -> None:
    """Train a LoRA that keeps a model's attention (or activations, or answers) the same in and out of a wrapper.

    attct trains the attention rows of the wrapped prompt towards those of the clean one, act the residual stream, bct
    the answer towards the model's own clean one. Held-out questions and wrapper families are never trained on. Runs in
    transformers, in float32; the adapter loads in vLLM.

    \b
    Writes to the folder: adapter/ (LoRA), losses.jsonl (a line per step),
    training.json (settings, what is held out), checkpoint.pt.
    """
    from headrift.consistency.data import DataConfig
    from headrift.consistency.trainer import ADAPTER, TrainConfig, TrainingJob

    reporter = messages.reporter()
    reporter.say("Reading and rendering the pairs ...")
    with reporter.errors(2):
        families = None if held_out_family is None else tuple(held_out_family)
        read = {**pairs.config(), "split_seed": split_seed, "held_out_questions": held_out_questions}
        data = DataConfig(**read, held_out_families=families)
        config = TrainConfig(data, out, parse_weights(method), layers=parse_layers(layers), **vars(training))
        job = TrainingJob(config)
        done = job.done
    held_out = job.data.split
    names = ", ".join(sorted(held_out.families)) or "no family"
    reporter.say(f"{len(job.pairs)} pairs to train on; held out: {len(held_out.questions)} questions, {names}")
    _say_rejected([*job.data.rejected, *job.rejected], reporter)
    if config.weights.get("bct") and not done:
        reporter.say("First the model answers the clean prompts, for bct ...")
    with (
        reporter.errors(1, lambda: f"{job.done} of {config.steps} steps are done; rerun with --resume"),
        reporter.progress_bar("steps", config.steps, done, unit="steps/s") as on_step,
    ):
        result = job.run(on_step)
    print(
        f"{result.steps} steps in {result.seconds:.0f} s; mean loss of the first ten steps {result.first:.4g}, of the "
        f"last ten {result.last:.4g}"
    )
    reporter.say(f"adapter: {out / ADAPTER}; next: headrift evaluate-consistency {out}")


def evaluate_consistency(
    *,
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders that train-consistency wrote.")],
    per_family: Annotated[int, typer.Option(metavar="N", min=1, help="Wrappers of each family for a question.")] = 1,
    questions: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Use at most N of the held-out questions.")
    ] = None,
    skip: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Leave out the first N held-out questions: those that --questions N used while settings were chosen.",
        ),
    ] = 0,
    seed: options.Seed = 0,
    model: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the model, if it has moved.")] = None,
    messages: options.Messages,
) -> None:
    """Evaluate trainings: answers and attention before and after, on questions and wrappers they never saw.

    Flip rate, accuracy, sycophancy (answers that give the hinted wrong answer), attention distance between clean and
    wrapped, and the cost: accuracy without a wrapper, and the perplexity of a neutral text. With 95% intervals from
    resampling questions. Runs that held out the same share one measurement of the model before training.

    \b
    Writes to each folder: evaluation.json, replies.jsonl.
    """
    from headrift.consistency.evaluation import RESULT, EvaluationConfig, EvaluationJob, print_evaluation

    reporter = messages.reporter()
    with reporter.errors(2):
        jobs = [EvaluationJob(EvaluationConfig(run, per_family, questions, skip, seed, model)) for run in runs]
    for i, job in enumerate(jobs):
        for other in jobs[:i]:
            job.share_before(other)
        if len(jobs) > 1:
            print(f"{job.config.run}:")
        _say_rejected(job.rejected, reporter)
        with reporter.errors(1), reporter.progress_bar("prompts", job.prompts, unit="prompts/s") as on_done:
            result = job.run(on_done)
        print_evaluation(result)
        reporter.say(f"all results: {job.config.run / RESULT}")


def _say_rejected(rejected: list[RejectedPair], reporter: Reporter) -> None:
    if rejected:
        first = rejected[0]
        name = f"{first.source}, row {first.row}" if first.source else first.id
        reporter.say(f"{len(rejected):,} left out, the first: {name}: {first.reason}: {first.detail}")


def parse_weights(text: str) -> dict[str, float]:
    """Parse --method. ValueError if a weight is not a number."""
    weights = {}
    for part in text.split(","):
        name, equals, weight = part.strip().partition("=")
        try:
            weights[name] = float(weight) if equals else 1.0
        except ValueError as error:
            raise ValueError(f"--method {text}: {weight!r} is not a number, as in attct=1,bct=0.2") from error
    return weights


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """Parse --layers: numbers and ranges. ValueError if it is malformed."""
    if text is None:
        return None
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ValueError(f"--layers {text}: {part.strip()!r} is not a layer or a range, as in 0-9,20")
        layers |= set(range(int(first), int(last if dash else first) + 1))
    return tuple(sorted(layers))
