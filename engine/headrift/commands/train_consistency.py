"""`headrift train-consistency` and `headrift evaluate-consistency`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headrift.commands.common import (
    Column,
    Model,
    Quiet,
    SystemPromptFile,
    Verbose,
    column_of,
    errors,
    say,
    system_prompt_of,
)

if TYPE_CHECKING:
    from headrift.consistency.pairs import RejectedPair


class TargetName(StrEnum):
    """What --target takes."""

    INITIAL = "initial"
    CURRENT = "current"


def train_consistency(
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
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new folder for the training.", show_default=False)],
    method: Annotated[
        str,
        typer.Option(metavar="NAME", help="attct, act or bct, or a mixture with weights, as in attct=1,bct=0.2."),
    ] = "attct",
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="How many steps.")] = 100,
    minutes: Annotated[
        float | None,
        typer.Option(metavar="M", min=0, help="Stop after so many minutes, whatever --steps says.", show_default=False),
    ] = None,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Pairs in a step.")] = 4,
    lr: Annotated[float, typer.Option("--lr", metavar="X", help="Learning rate (AdamW).")] = 3e-3,
    keep: Annotated[
        float, typer.Option(metavar="X", help="Weight of a loss that keeps the model as it was on plain text; 0: none.")
    ] = 0.03,
    rank: Annotated[int, typer.Option(metavar="N", min=1, help="Rank of a new LoRA.")] = 8,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="L,...",
            help="Layers whose attention (attct) or residual stream (act) is compared, from 0, as in 0-9,20; else all.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        TargetName,
        typer.Option(metavar="NAME", help="The clean side is the initial model's, or the current one's."),
    ] = TargetName.INITIAL,
    lora: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Start from this adapter instead of a new one.", show_default=False),
    ] = None,
    held_out_family: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A wrapper family to hold out; else one by --split-seed. Repeatable.",
            show_default=False,
        ),
    ] = None,
    held_out_questions: Annotated[
        float, typer.Option(metavar="PART", help="The part of the questions that is held out.")
    ] = 0.2,
    split_seed: Annotated[int, typer.Option(metavar="N", help="Draws what is held out.")] = 0,
    seed: Annotated[int, typer.Option(metavar="N", help="Draws the adapter's start and the pairs' order.")] = 0,
    answer_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="The longest answer, in tokens.")] = 16,
    system_prompt_file: SystemPromptFile = None,
    column: Column = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="The first N questions only.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the training in --out.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train a LoRA that keeps a model's attention (or activations, or answers) the same when a wrapper is put around a
    question.

    attct draws the attention rows of the wrapped prompt to those of the clean one, act the residual stream, bct the
    answer to the model's own clean one. Held-out questions and wrapper families are never trained on. Runs in
    transformers, in float32; the adapter loads in vLLM.

    \b
    Into the folder: adapter/ (LoRA), losses.jsonl (a line a step),
    training.json (settings, what is held out), checkpoint.pt.

    \b
    Exit codes:
      0    done
      1    broken off: go on with --resume
      2    nothing was begun, because of what was asked for
      130  interrupted; go on with --resume
    """
    from headrift.consistency.pairs import SYSTEM_PROMPT
    from headrift.consistency.trainer import Asked, TrainingJob
    from headrift.consistency.training_data import DataAsked
    from headrift.terminal import progress_bar

    say("Reading and rendering the pairs ...", quiet)
    with errors(2, verbose):
        data = DataAsked(
            inputs=tuple(inputs),
            model=model,
            system_prompt=SYSTEM_PROMPT if system_prompt_file is None else system_prompt_of(system_prompt_file),
            columns=dict(map(column_of, column or ())),
            split_seed=split_seed,
            held_out_questions=held_out_questions,
            held_out_families=None if held_out_family is None else tuple(held_out_family),
            limit=limit,
        )
        job = TrainingJob(
            Asked(
                data=data,
                out=out,
                weights=_weights(method),
                steps=steps,
                minutes=minutes,
                batch=batch,
                learning_rate=lr,
                keep=keep,
                rank=rank,
                layers=_layers(layers),
                target=target.value,
                seed=seed,
                answer_tokens=answer_tokens,
                lora=lora,
                resume=resume,
            )
        )
        done = job.done
    split = job.data.split
    kept = ", ".join(sorted(split.families)) or "no family"
    say(f"{len(job.pairs)} pairs to train on; held out: {len(split.questions)} questions, {kept}", quiet)
    _say_rejected([*job.data.rejected, *job.rejected], quiet)
    if job.asked.weights.get("bct") and not done:
        say("First the model answers the clean prompts itself, which bct trains on ...", quiet)

    def after() -> str:
        return f"{job.done} of {steps} steps are done; go on with --resume"

    with errors(1, verbose, after), progress_bar("steps", steps, done, unit="steps/s", hidden=quiet) as on_step:
        found = job.run(on_step)
    typer.echo(
        f"{found.steps} steps in {found.seconds:.0f} s; mean loss of the first ten {found.first:.4g}, of the last ten "
        f"{found.last:.4g}"
    )
    say(f"adapter: {out / 'adapter'}; what it changed: headrift evaluate-consistency {out}", quiet)


def evaluate_consistency(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Folders that train-consistency wrote.", show_default=False),
    ],
    per_family: Annotated[int, typer.Option(metavar="N", min=1, help="Wrappers of each family around a question.")] = 1,
    questions: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="At most N of the held-out questions.", show_default=False),
    ] = None,
    skip: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Leave out the first N held-out questions: those that --questions N asked while settings were chosen.",
        ),
    ] = 0,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Draws questions and wrappers, and resamples for the intervals.")
    ] = 0,
    model: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The model's folder, if it has moved.", show_default=False),
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """What a training changed: answers and attention before and after, on questions and wrappers it never saw.

    Flip rate, accuracy, sycophancy (answers with the wrong answer that was hinted at), attention distance between clean
    and wrapped, and the cost: accuracy without a wrapper, and the perplexity of a neutral text. With 95% intervals from
    drawing questions anew.

    \b
    Of several runs that held out the same, the model as it was is asked once.

    \b
    Into each folder: evaluation.json, replies.jsonl.
    Exit codes: 0 done, 1 failed on the way, 2 the folder cannot be evaluated
    """
    from headrift.consistency.evaluation_job import RESULT, Asked, EvaluationJob
    from headrift.consistency.printing import print_evaluation
    from headrift.terminal import progress_bar

    with errors(2, verbose):
        jobs = [EvaluationJob(Asked(run, per_family, questions, skip, seed, model)) for run in runs]
    for i, job in enumerate(jobs):
        for other in jobs[:i]:
            job.share_before(other)
        if len(jobs) > 1:
            typer.echo(f"{job.asked.run}:")
        _say_rejected(job.rejected, quiet)
        with errors(1, verbose), progress_bar("prompts", job.prompts, unit="prompts/s", hidden=quiet) as on_done:
            found = job.run(on_done)
        print_evaluation(found)
        say(f"all figures: {job.asked.run / RESULT}", quiet)


def _say_rejected(rejected: list[RejectedPair], quiet: bool) -> None:
    if rejected:
        first = rejected[0]
        where = f"{first.source}, row {first.row}" if first.source else first.id
        say(f"{len(rejected)} left out, the first: {where}: {first.reason}: {first.detail}", quiet)


def _weights(given: str) -> dict[str, float]:
    weights = {}
    for part in given.split(","):
        name, equals, weight = part.strip().partition("=")
        try:
            weights[name] = float(weight) if equals else 1.0
        except ValueError as error:
            raise ValueError(f"--method {given}: {weight!r} is no number, as in attct=1,bct=0.2") from error
    return weights


def _layers(given: str | None) -> tuple[int, ...] | None:
    if given is None:
        return None
    found: set[int] = set()
    for part in given.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ValueError(f"--layers {given}: {part.strip()!r} is no layer and no range, as in 0-9,20")
        found |= set(range(int(first), int(last if dash else first) + 1))
    return tuple(sorted(found))
