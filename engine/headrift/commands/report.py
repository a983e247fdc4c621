"""`headrift report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headrift.commands import options


def report(
    *,
    runs: Annotated[list[Path], options.RUNS],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page to write, as report.html.")],
    calibration: options.Calibration = None,
    redact: Annotated[
        bool, typer.Option("--redact", help="Leave out prompts, answers and system prompts; ids stay.")
    ] = False,
    fail_term: options.FailTerm = None,
    resamples: options.Resamples = 200,
    seed: options.Seed = 0,
    messages: options.Messages,
) -> None:
    """Make one HTML page about finished runs, and a folder with its figures.

    Shows what separates attacks from benign prompts and what does not, when and in which layers, next to prompt length
    and other signals, and which rows to look at. The page needs no network. Its figures are also in a folder next to it
    (of report.html: report-files), as PNG and SVG, with all numbers in figures.json.
    """
    from headrift.report.report import Report, ReportConfig

    config = ReportConfig(out, calibration, redact, tuple(fail_term or ()), resamples, seed)
    reporter = messages.reporter()
    with reporter.errors(2):
        page = Report(runs, config, reporter.say)
    with reporter.errors(1):
        folder = page.write()
    if not messages.quiet:
        typer.echo(f"The page is {out}, its figures are in {folder}")
