"""`headrift selftest`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from headrift.commands import options


def selftest(
    *,
    model: options.Model,
    prompts: Annotated[int, typer.Option(metavar="N", min=2, help="Number of prompts (built-in chats).")] = 16,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Record steps 0 to N of each answer.")] = 12,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Rounds of the timing with and without probes.")] = 5,
    reference: Annotated[
        bool, typer.Option("--reference/--no-reference", help="Compare with transformers, if the model fits in memory.")
    ] = True,
    engine: options.EngineOptions,
    engine_arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="An engine argument of vLLM; the value is JSON or a plain word. Repeatable."
        ),
    ] = None,
    out: options.JsonOut = None,
    verbose: options.Verbose = False,
) -> None:
    """Check on this machine, with this model, that headrift measures correctly.

    Run it first on a new machine. The same prompts are answered with and without probes, by vLLM without headrift, and
    by transformers. Each check is a line with its figure and the limit that it has to keep. The cost of probing is
    measured too, without a limit. About two minutes with the demonstration model on two cores.
    """
    from headrift.selftest.run import SelfTest, SelfTestConfig

    reporter = options.Messages(verbose=verbose).reporter()
    with reporter.errors(2):
        engine_args = dict(map(_parse_engine_arg, engine_arg or ()))
        if engine.dtype != "auto":
            engine_args["dtype"] = engine.dtype
        if out is not None:
            options.check_file_to_write(out)
        test = SelfTest(
            SelfTestConfig(
                str(model), prompts, steps, rounds, reference, engine.attention_backend, engine_args, verbose
            ),
            typer.echo,
            reporter.step,
        )
        test.start()
    with reporter.errors(1):
        passed = test.run()
        if out is not None:
            test.write(out)
            typer.echo(f"figures: {out}")
    if not passed:
        raise typer.Exit(1)


def _parse_engine_arg(text: str) -> tuple[str, Any]:
    name, value = options.parse_pair(text, "--engine-arg", "KEY=VALUE", "max_model_len=2048")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
