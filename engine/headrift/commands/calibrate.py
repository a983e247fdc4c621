"""`headrift calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from headrift.commands import options


def calibrate(
    *,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The calibration, as JSON, to write.")],
    runs: Annotated[list[Path] | None, options.RUNS] = None,
    signal: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="What to detect by: auto (the best on held-out prompts), instability, agreement, focus, readout, "
            "novelty or another signal of `headrift score`.",
        ),
    ] = "auto",
    steps: Annotated[
        int | None,
        typer.Option(metavar="0", min=0, max=0, help="0: use step 0 alone, the prefill, if the runs have more."),
    ] = None,
    normal: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="A run of your own traffic, benign or unlabelled: standardises the readout learned on RUN... and sets "
            "the threshold.",
        ),
    ] = None,
    readout: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Use the readout of this calibration instead of learning one."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write the calibration even if it turns out not usable.")
    ] = False,
    target_fpr: Annotated[
        float, typer.Option(metavar="X", help="Fraction of distinct benign prompts that may be flagged.")
    ] = 0.05,
    rule: Annotated[
        Literal["binomial", "conformal"],
        typer.Option(
            metavar="RULE", help="binomial: at most --target-fpr, with 95% confidence; conformal: on average."
        ),
    ] = "binomial",
    benign_only: Annotated[
        bool,
        typer.Option("--benign-only", help="Set the threshold from benign or unlabelled prompts, without attacks."),
    ] = False,
    contamination: Annotated[
        float, typer.Option(metavar="X", help="With --benign-only: allow for this fraction of attacks among them.")
    ] = 0.01,
    daily_prompts: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Prompts a day, to estimate alerts a day.")
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(metavar="A:B", help="Use these steps, and the layers that the runs scored, instead of a search."),
    ] = None,
    by_category: Annotated[
        bool, typer.Option("--by-category", help="Cross-validate with whole categories held out.")
    ] = False,
    group: Annotated[
        Literal["auto", "own", "near"],
        typer.Option(
            metavar="HOW",
            help="What is kept together, and counts as one for the threshold: own, the rows' key `group`, else the "
            "same prompt; near, near duplicates; auto, near above 1,000 prompts without such a key.",
        ),
    ] = "auto",
    folds: Annotated[int, typer.Option(metavar="N", min=2, help="Folds of the cross-validation.")] = 5,
    resamples: options.Resamples = 200,
    seed: options.Seed = 0,
    import_csv: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Instead of runs: the folders that the original's gather.py wrote."),
    ] = None,
    messages: options.Messages,
) -> None:
    """Choose what to detect by, set a threshold that holds on new prompts, and measure how well it does.

    Works on finished runs whose rows are labelled, or with --benign-only on a log. Part of the benign prompts chooses,
    the rest sets the threshold; the figures are of prompts used for neither. The first lines say whether it is usable.
    """
    from headrift.calibration.artifact import Calibration
    from headrift.calibration.calibrate import calibrate as make_calibration
    from headrift.calibration.calibrate import print_calibration
    from headrift.calibration.thresholds import CalibrateConfig, CalibrationError, Rule
    from headrift.runs.reading import Grouping, open_run
    from headrift.signal import Window

    reporter = messages.reporter()
    with reporter.errors(2):
        if bool(runs) == (import_csv is not None):
            raise CalibrationError("give folders that `headrift score` wrote, or --import-csv DIR, and not both")
        options.check_file_to_write(out)
        config = CalibrateConfig(
            target_fpr=target_fpr,
            rule=Rule(rule),
            benign_only=benign_only,
            contamination=contamination,
            daily_prompts=daily_prompts,
            window=None if window is None else Window.parse(window),
            signal=signal,
            prefill_only=steps == 0,
            by_category=by_category,
            grouping=Grouping(group),
            folds=folds,
            resamples=resamples,
            seed=seed,
        )
        if import_csv is not None:
            from headrift.runs.reading import open_csv

            opened = [open_csv(import_csv)]
        else:
            opened = [open_run(run) for run in runs or ()]
        calibration = make_calibration(
            opened,
            config,
            reporter.say,
            normal=None if normal is None else open_run(normal),
            readout=None if readout is None else Calibration.load(readout),
        )
    assert calibration.verdict is not None
    written = force or calibration.verdict.usable != "no"
    if written:
        with reporter.errors(1):
            calibration.save(out)
    if not messages.quiet:
        from rich.console import Console

        console = Console()
        print_calibration(console, calibration)
        if written:
            console.print(f"\nThe calibration is in {out}", markup=False, highlight=False, soft_wrap=True)
    with reporter.errors(1):
        if not written:
            raise CalibrationError(f"{out} was not written, as the calibration is not usable: give --force to write it")
