"""`headrift report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headrift.commands.common import (
    errors,
)


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Folders that score wrote, of one model.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page to write, as report.html.", show_default=False)],
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Use this calibration's window and show its threshold.", show_default=False),
    ] = None,
    redact: Annotated[
        bool, typer.Option("--redact", help="Leave out all prompts, answers and system prompts; ids stay.")
    ] = False,
    fail_term: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TERM",
            help="What only the answer of an attack that succeeded holds: words, or re:REGEX. May be given many times.",
            show_default=False,
        ),
    ] = None,
    resamples: Annotated[
        int, typer.Option(metavar="N", min=0, help="Resamples that intervals are from; 0 for no intervals.")
    ] = 200,
    seed: Annotated[int, typer.Option(metavar="N", help="Another seed draws and divides the prompts otherwise.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show where errors arose.")] = False,
) -> None:
    """Make one HTML page about finished runs, with its figures beside it.

    What separates attacks from benign prompts and what does not, when and in which layers, beside length and other
    signals, and which rows to look at. The page needs no network; its figures are also in a folder beside it (of
    report.html: report-files), as PNG and SVG, with all numbers in figures.json.

    \b
    Exit codes:
      0    the page is written
      1    it could not be written
      2    the runs do not allow it, or what was asked for
      130  interrupted
    """
    from headrift.report.report import Report, Settings
    from headrift.reporter import Reporter

    settings = Settings(
        out=out,
        calibration=calibration,
        redact=redact,
        fail_terms=tuple(fail_term or ()),
        resamples=resamples,
        seed=seed,
    )
    with errors(2, verbose):
        made = Report(runs, settings, Reporter(quiet).say)
    with errors(1, verbose):
        folder = made.write()
    if not quiet:
        typer.echo(f"The page is {out}, its figures are in {folder}")
