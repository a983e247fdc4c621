"""`headrift doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def doctor(
    model: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Look at this model too, without loading it.", show_default=False),
    ] = None,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="The steps that the recorder's memory is for.")] = 12,
) -> None:
    """Say what this machine can run, and what is missing.

    Each thing that is missing comes with how to get it. With --model also whether the model can be scored here, and the
    memory that it takes.

    \b
    Exit codes: 0 ready, 1 something is missing or the model cannot be scored
    """
    from headrift.doctor import examine

    if not examine(typer.echo, model, steps):
        raise typer.Exit(1)
