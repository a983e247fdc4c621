"""`headrift selftest`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from headrift.commands.common import (
    AttentionBackend,
    AttentionBackendName,
    DType,
    DTypeOption,
    Model,
    Verbose,
    errors,
)


def selftest(
    model: Model,
    prompts: Annotated[int, typer.Option(metavar="N", min=2, help="How many prompts; built-in chats.")] = 16,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Record steps 0 to N of each answer.")] = 12,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Rounds of the timing with and without probes.")] = 5,
    dtype: DTypeOption = DType.AUTO,
    reference: Annotated[
        bool, typer.Option("--reference/--no-reference", help="Compare with transformers, if the model fits in memory.")
    ] = True,
    attention_backend: AttentionBackend = AttentionBackendName.AUTO,
    engine_arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="An engine argument of vLLM, its value as JSON or a plain word. Repeatable.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write all figures to this JSON file.", show_default=False)
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Check on this machine, with this model, that what headrift measures is right.

    The first thing to run on a new machine. The same prompts are answered with and without probes, by vLLM without
    headrift, and by transformers; each check is a line with its figure and the bar that it is held to. The cost of
    probing is measured too, and not judged. About two minutes with the demonstration model on two cores.

    \b
    Exit codes:
      0    all passed
      1    a check failed, or an engine broke on the way
      2    nothing was begun, because of what was asked for
      130  interrupted
    """
    from headrift.reporter import Reporter
    from headrift.selftest.run import Options, SelfTest

    with errors(2, verbose):
        settings = dict(map(_engine_argument, engine_arg or ()))
        if dtype is not DType.AUTO:
            settings["dtype"] = dtype.value
        if out is not None and (out.is_dir() or not out.parent.is_dir()):
            raise ValueError(f"--out {out} is a folder, or is in none: name a file in a folder that exists")
        options = Options(str(model), prompts, steps, rounds, reference, attention_backend.value, settings, verbose)
        test = SelfTest(options, typer.echo, Reporter().step)
        test.start()
    with errors(1, verbose):
        passed = test.run()
        if out is not None:
            test.write(out)
            typer.echo(f"figures: {out}")
    if not passed:
        raise typer.Exit(1)


def _engine_argument(given: str) -> tuple[str, Any]:
    name, equals, value = given.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"--engine-arg {given} is not KEY=VALUE, as in max_model_len=2048")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
