"""`headrift calibrate`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from headrift.commands.common import (
    errors,
)


class ThresholdRule(StrEnum):
    """What --rule takes."""

    BINOMIAL = "binomial"
    CONFORMAL = "conformal"


def calibrate(
    out: Annotated[Path, typer.Option(metavar="FILE", help="The calibration, as JSON, to write.", show_default=False)],
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RUN", help="Folders that score wrote, of one model.", show_default=False),
    ] = None,
    target_fpr: Annotated[
        float, typer.Option(metavar="X", help="The fraction of distinct benign prompts that may be flagged.")
    ] = 0.05,
    rule: Annotated[
        ThresholdRule,
        typer.Option(metavar="RULE", help="binomial: at most that, with 95% confidence; conformal: that on average."),
    ] = ThresholdRule.BINOMIAL,
    benign_only: Annotated[
        bool,
        typer.Option(
            "--benign-only", help="There are no attacks: a threshold from benign or unlabelled prompts alone."
        ),
    ] = False,
    contamination: Annotated[
        float, typer.Option(metavar="X", help="With --benign-only: allow for this fraction of attacks among them.")
    ] = 0.01,
    daily_prompts: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Prompts a day, to say how many alerts a day.", show_default=False),
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(
            metavar="A:B", help="Do not search: these steps, and the layers that the runs scored.", show_default=False
        ),
    ] = None,
    by_category: Annotated[
        bool, typer.Option("--by-category", help="Cross-validate with whole categories held out.")
    ] = False,
    folds: Annotated[int, typer.Option(metavar="N", min=2, help="Folds of the cross-validation.")] = 5,
    resamples: Annotated[
        int, typer.Option(metavar="N", min=0, help="Resamples that intervals are from; 0 for no intervals.")
    ] = 200,
    seed: Annotated[int, typer.Option(metavar="N", help="Another seed divides the prompts otherwise.")] = 0,
    import_csv: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Instead of runs: the folders that the original's gather.py wrote.", show_default=False
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show where errors arose.")] = False,
) -> None:
    """Choose window and layers, set a threshold that holds on new prompts, and say how well it does.

    Works from finished runs whose rows are labelled, or with --benign-only from a log. Part of the benign prompts
    chooses, the rest sets the threshold; the figures are of prompts that had no part in either.

    \b
    Exit codes:
      0    the calibration is written
      1    it could not be written
      2    the runs do not allow it, or what was asked for
      130  interrupted
    """
    from headrift.calibration.calibrate import calibrate as work_out
    from headrift.calibration.printing import show
    from headrift.calibration.runs import open_run
    from headrift.calibration.settings import CalibrationError, Rule, Settings
    from headrift.reporter import Reporter
    from headrift.signal import Window

    with errors(2, verbose):
        if bool(runs) == (import_csv is not None):
            raise CalibrationError("give folders that `headrift score` wrote, or --import-csv DIR, and not both")
        if out.is_dir() or not out.parent.is_dir():
            raise CalibrationError(f"--out {out} is a folder, or is in none: name a file in a folder that exists")
        settings = Settings(
            target_fpr=target_fpr,
            rule=Rule(rule.value),
            benign_only=benign_only,
            contamination=contamination,
            daily_prompts=daily_prompts,
            window=None if window is None else Window.parse(window),
            by_category=by_category,
            folds=folds,
            resamples=resamples,
            seed=seed,
        )
        if import_csv is not None:
            from headrift.calibration.original import open_csv

            opened = [open_csv(import_csv)]
        else:
            opened = [open_run(run) for run in runs or ()]
        found = work_out(opened, settings, Reporter(quiet).say)
    with errors(1, verbose):
        found.save(out)
    if not quiet:
        from rich.console import Console

        console = Console()
        show(console, found)
        console.print(f"\nThe calibration is in {out}", markup=False, highlight=False, soft_wrap=True)
