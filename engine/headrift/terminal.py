"""What commands print: notes, steps, progress bars and errors on standard error, tables on standard output."""

from __future__ import annotations

import errno
import sys
import time
import traceback
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_TABLE_WIDTH, _BETWEEN = 80, 3  # between two columns
LABEL_WIDTH = 24
NO_SPACE = "no space left on the disk: make room, or choose another disk"


class Reporter:
    """What a command says on standard error while it works; errors even if `quiet`, tracebacks if `verbose`."""

    def __init__(self, quiet: bool = False, verbose: bool = False) -> None:
        from rich.console import Console

        self.quiet, self.verbose = quiet, verbose
        self.console = Console(stderr=True, quiet=quiet, highlight=False)

    def say(self, text: str) -> None:
        """Print a line unless quiet."""
        self.console.print(text, markup=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Print a line about something the user should know, unless quiet."""
        self.say(f"Note: {text}")

    @contextmanager
    def step(self, text: str) -> Iterator[Any]:
        """Show what is being done: with a spinner on a terminal, as a line elsewhere."""
        if self.console.is_terminal:
            with self.console.status(text) as status:
                yield status
        else:
            self.say(f"{text} ...")
            yield None

    def progress_bar(
        self, label: str, total: int, done: int = 0, *, unit: str
    ) -> AbstractContextManager[Callable[[int], None]]:
        """A progress_bar, hidden if quiet or if nothing is left to do."""
        return progress_bar(label, total, done, unit=unit, hidden=self.quiet or done >= total)

    @contextmanager
    def errors(self, code: int, progress: Callable[[], str] | None = None) -> Iterator[None]:
        """Exit with `code` and one line on standard error if something expected goes wrong, with 130 on Ctrl-C.

        EngineError, RefusedError, TokenizerError, InputError and their like are all RuntimeError or ValueError.
        `progress` says what is finished by then and how to continue; it is printed behind the error.
        """
        try:
            yield
        except KeyboardInterrupt:
            message, code = "Interrupted", 130
        except (OSError, RuntimeError, ValueError) as error:
            if self.verbose:
                traceback.print_exc()
            full = isinstance(error, OSError) and error.errno == errno.ENOSPC
            message = f"Error: {NO_SPACE if full else error}"
        else:
            return
        print(f"{message} ({progress()})" if progress else message, file=sys.stderr)
        raise SystemExit(code)


@contextmanager
def progress_bar(
    label: str, total: int | None, done: int = 0, *, unit: str, hidden: bool = False
) -> Iterator[Callable[[int], None]]:
    """Show a bar with rate and time left on standard error.

    Args:
        label: What is counted, printed before the bar.
        total: How many there will be; None if unknown.
        done: How many were finished before this run. The rate leaves them out.
        unit: Unit of the rate, as in "rows/s".

    Yields:
        A function to call with the number of further ones that are done.
    """
    from rich import progress
    from rich.console import Console

    columns = (
        *("{task.description}", progress.BarColumn(), progress.MofNCompleteColumn(), "{task.fields[rate]}"),
        *(progress.TimeElapsedColumn(), "left", progress.TimeRemainingColumn()),
    )
    with progress.Progress(*columns, console=Console(stderr=True), disable=hidden) as bar:
        task = bar.add_task(label, total=total, completed=done, rate="")
        start, count = time.monotonic(), 0

        def advance(more: int) -> None:
            nonlocal count
            count += more
            # Results come in bursts, so the rate is over the whole run.
            bar.update(task, advance=more, rate=f"{count / (time.monotonic() - start):.1f} {unit}")

        yield advance


def print_table(console: Console, names: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print an empty line and a table of at most 80 columns; its first column is for labels, the others for numbers."""
    from rich import box
    from rich.table import Table

    rows = list(rows)
    numbers = [max(map(len, column)) for column in zip(names, *rows)][1:]
    labels = min(LABEL_WIDTH, _TABLE_WIDTH - sum(width + _BETWEEN for width in numbers))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for i, name in enumerate(names):
        table.add_column(name, justify="right" if i else "left", min_width=0 if i else max(labels, 0))
    for row in rows:
        table.add_row(*row)
    console.print()
    console.print(table)


def printable(text: str) -> str:
    """Spell out characters that could drive the terminal; a prompt may bring them."""
    return "".join(
        character
        if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
        else ascii(character)[1:-1]
        for character in text
    )
