"""`headrift heads instability`: do the heads that refusals hang on drive the instability score?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headrift.commands.common import errors


def instability(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A folder that ships or sahara wrote.", show_default=False)
    ],
    scores: Annotated[
        list[Path],
        typer.Argument(
            metavar="SCORES",
            help="Folders that `headrift score --save shares` wrote, with the same model.",
            show_default=False,
        ),
    ],
    top: Annotated[int, typer.Option(metavar="K", min=1, help="How many of the run's first heads are looked at.")] = 10,
    draws: Annotated[
        int, typer.Option(metavar="N", min=1, help="How often as many heads of the same layers are drawn.")
    ] = 200,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of these draws.")] = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the figures to this JSON file.", show_default=False)
    ] = None,
) -> None:
    """Do the first heads of a run drive the instability score?

    The score of each prompt is worked out anew from the saved shares: without these heads, with them alone, and so with
    as many heads drawn at random from the same layers. Rank correlation is with the score of all heads; AUROC of
    attacks against benign prompts, where the rows are labelled. Intervals: 95% over prompts, and for random heads the
    range of 95% of the draws.

    \b
    Exit codes: 0 shown, 1 the figures could not be written, 2 the folders cannot be used
    """
    import json

    from headrift.safety_heads.instability import instability as of_heads
    from headrift.safety_heads.instability import table

    with errors(2):
        found = [of_heads(run, folder, top, draws, seed) for folder in scores]
    typer.echo("\n\n".join(map(table, found)))
    with errors(1):
        if out is not None:
            out.write_text(json.dumps([of.numbers() for of in found], indent=1) + "\n", encoding="utf-8")
