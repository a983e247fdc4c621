"""What the commands of `headrift heads` share: their options."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class KindName(StrEnum):
    """What --kind takes; the kinds of headrift.ablation."""

    UNDIFFERENTIATED = "undifferentiated"
    SCALING = "scaling"
    MEAN_QUERY = "mean_query"
    MEAN_OUTPUT = "mean_output"


class LabelName(StrEnum):
    """What --label takes."""

    ATTACK = "attack"
    BENIGN = "benign"


class FormName(StrEnum):
    """What --as takes; the forms of headrift.safety_heads.queries."""

    CHAT = "chat"
    QUERY = "query"
    TEXT = "text"


Queries = Annotated[
    list[str],
    typer.Argument(metavar="INPUT...", help="Queries: .txt, .jsonl, .csv or .parquet.", show_default=False),
]
Kind = Annotated[
    KindName,
    typer.Option(metavar="KIND", help="undifferentiated, scaling, mean_query or mean_output: see above."),
]
Epsilon = Annotated[
    float, typer.Option(metavar="X", help="The factor of an undifferentiated query or a scaled output.")
]
OnlyHeads = Annotated[
    str | None,
    typer.Option("--heads", metavar="L:H,...", help="Only these heads, as in 3:0,11:7.", show_default=False),
]
Quick = Annotated[bool, typer.Option("--quick", help="A look: 64 heads drawn at random, the first 5 queries.")]
Label = Annotated[
    LabelName | None,
    typer.Option(metavar="LABEL", help="Only queries labelled attack, or benign.", show_default=False),
]
Limit = Annotated[int | None, typer.Option(metavar="N", min=1, help="The first N queries only.", show_default=False)]
Form = Annotated[
    FormName,
    typer.Option(
        "--as",
        metavar="FORM",
        help="chat: a message in the model's chat template; query: '## Query:... ## Answer:'; text: as it is.",
    ),
]
Column = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=NAME",
        help="What the inputs call a key, as in prompt=goal. A column `input` is known. Repeatable.",
        show_default=False,
    ),
]
Top = Annotated[int, typer.Option(metavar="N", min=1, help="How many heads the table shows.")]


def heads_of(given: str | None) -> tuple[tuple[int, int], ...] | None:
    """What --heads names. ValueError where it is no list of heads."""
    if given is None:
        return None
    found = []
    for part in given.split(","):
        layer, colon, head = part.partition(":")
        if not colon or not layer.strip().isdecimal() or not head.strip().isdecimal():
            raise ValueError(f"--heads {given}: {part.strip()!r} is not LAYER:HEAD, as in 3:0,11:7")
        found.append((int(layer), int(head)))
    if len(set(found)) < len(found):
        raise ValueError(f"--heads {given} names a head twice")
    return tuple(found)
