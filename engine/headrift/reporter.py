"""Says on standard error what is being done, for work that takes a while."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Reporter:
    """Status lines on standard error: live on a terminal, one line a step elsewhere."""

    def __init__(self, quiet: bool = False) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, quiet=quiet, highlight=False)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def step(self, text: str) -> Iterator[Any]:
        if self.console.is_terminal:
            with self.console.status(text) as status:
                yield status
        else:
            self.say(f"{text} ...")
            yield None


@contextmanager
def progress_bar(
    what: str, total: int | None, done: int = 0, *, unit: str, hidden: bool = False
) -> Iterator[Callable[[int], None]]:
    """A bar with rate and time left, told how many more are done. total: how many there will be, None if that is not
    known; done: how many of them were done before."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=hidden) as bar:
        task = bar.add_task(what, total=total, completed=done, rate="")
        begun, n = time.monotonic(), 0

        def advance(more: int) -> None:
            nonlocal n
            n += more
            # Results come in bursts, so the rate is over all of the run.
            bar.update(task, advance=more, rate=f"{n / (time.monotonic() - begun):.1f} {unit}")

        yield advance
