"""Tables on a terminal, narrow enough for 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_LABEL_WIDTH = 24


def print_table(console: Console, names: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows of cells under their columns' names, after an empty line; the first column is for labels."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for i, name in enumerate(names):
        table.add_column(name, justify="right" if i else "left", min_width=0 if i else _LABEL_WIDTH)
    for row in rows:
        table.add_row(*row)
    console.print()
    console.print(table)
