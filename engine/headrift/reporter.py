"""Says on standard error what is being done, for commands that take a while."""

from __future__ import annotations

from collections.abc import Iterator
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
