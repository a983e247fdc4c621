"""`headrift explain`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from headrift.terminal import Reporter


def explain(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A folder that `headrift score` wrote.")],
    row_id: Annotated[str, typer.Option("--id", metavar="ID", help="The row's id.")],
    png: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Figure to write (default: RUN/explain-ID.png).")
    ] = None,
) -> None:
    """Show why a row scored as it did.

    Prints its prompt and answer (of a run with --save text), its score and percentile, the layers and steps that
    contribute most to the score, and heatmaps of them, which it also writes as a PNG.
    """
    from rich.console import Console

    from headrift.explain import explain as explain_row
    from headrift.explain import show, write_png

    with Reporter().errors(2):
        explanation = explain_row(run, row_id)
    show(Console(), explanation)
    with Reporter().errors(1):
        path = png or run / f"explain-{re.sub(r'[^A-Za-z0-9._-]', '_', row_id)[:80]}.png"
        write_png(path, explanation)
    typer.echo(f"figure: {path}")
