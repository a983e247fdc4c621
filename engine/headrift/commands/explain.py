"""`headrift explain`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from headrift.commands.common import (
    errors,
)


def explain(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A folder that score wrote.", show_default=False)],
    wanted: Annotated[str, typer.Option("--id", metavar="X", help="The row's id.", show_default=False)],
    png: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where to put the figure; RUN/explain-X.png where not given."),
    ] = None,
) -> None:
    """Show why a row scored as it did.

    Prints its prompt and answer (of a run with --save text), its score and percentile, the layers and steps that
    carry the score, and heatmaps of them, which it also writes as a PNG.

    \b
    Exit codes: 0 shown, 1 the figure could not be written, 2 no such run or row
    """
    from rich.console import Console

    from headrift.explain import explain as look_up
    from headrift.explain import show, write_png

    with errors(2):
        found = look_up(run, wanted)
    show(Console(), found)
    with errors(1):
        path = png or run / f"explain-{re.sub(r'[^A-Za-z0-9._-]', '_', wanted)[:80]}.png"
        write_png(path, found)
    typer.echo(f"figure: {path}")
