"""The page's section on a calibration: its threshold, what it promises, and how these runs fare at it."""

from __future__ import annotations

import numpy as np

from headrift.calibration.evidence import CONFOUNDS
from headrift.calibration.printing import AT_THRESHOLD, RANKED
from headrift.calibration.record import Calibration, Figure
from headrift.calibration.runs import Run
from headrift.calibration.verdicts import drift
from headrift.report.gather import Gathered, ReportError
from headrift.report.output import Block, Output, Points, Section, Table, Text
from headrift.report.words import interval, sentence
from headrift.signal import ScoreRange, Window
from headrift.stats import exact_interval


def cell_of(calibration: Calibration, runs: list[Run]) -> ScoreRange:
    """The window and layers to score these runs over. CalibrationError for another model, ReportError where the runs
    did not record that window."""
    cell = ScoreRange(Window.parse(calibration.window), calibration.drop_shallow, calibration.drop_deep)
    calibration.check(runs[0].model, cell.window, cell.drop_shallow, cell.drop_deep)
    steps = min(run.steps for run in runs)
    if cell.window.end > steps:
        raise ReportError(
            f"the calibration's window is steps {cell.window}, and the runs recorded {steps}: score the prompts anew "
            f"with --steps {cell.window.end}"
        )
    return cell


def calibrated(calibration: Calibration, of: Gathered, output: Output) -> Section:
    """The section."""
    output.numbers(calibration=calibration.model_dump(mode="json", exclude={"scores", "data"}))
    setting = calibration.setting
    said = [
        f"A row is flagged where its score is at or above {calibration.threshold:.6f} (steps {calibration.window}, "
        f"layers {calibration.layers[0]} to {calibration.layers[1] - 1}). Promise: {setting.promise}. It rests on "
        f"{setting.n:,} distinct benign prompts, of which {setting.flagged:,} are flagged.",
    ]
    own = calibration.data.fingerprint == of.rows.fingerprint
    if own:
        said.append(
            "It was made from these very runs: the table of these runs is in sample, the held-out figures are not."
        )
    blocks: list[Block] = [Text(said), _of_these_runs(calibration, of, output), _held_out(calibration)]
    if calibration.contamination:
        rows = [
            (
                f"{at.contamination:.1%}",
                f"{at.lowest_fpr:.2%} to {at.highest_fpr:.2%}",
                "too few prompts" if at.threshold is None else f"{at.threshold:.6f}",
            )
            for at in calibration.contamination
        ]
        names = ("if so many of its prompts were attacks", "benign prompts flagged", "threshold for the target")
        blocks.append(Table(names, rows))
    notes = [*calibration.notes]
    if not own:
        notes.append(_drift(calibration, of, output))
    blocks.append(Points([sentence(note) for note in notes]))
    return Section("calibration", "At the calibration's threshold", blocks)


def _of_these_runs(calibration: Calibration, of: Gathered, output: Output) -> Table:
    rows, numbers = [], {}
    for label in of.classes:
        mine = of.samples.row[of.samples.mine(label)]
        flagged = int(calibration.apply(of.score[mine]).flagged.sum())
        bounds = exact_interval(flagged, len(mine))
        rows.append((label, f"{len(mine):,}", f"{flagged:,}", f"{flagged / len(mine):.1%}", interval(bounds, 3)))
        numbers[label] = {"prompts": len(mine), "flagged": flagged, "interval": bounds}
    output.numbers(flagged=numbers)
    caption = f"These runs, each distinct prompt once{of.summary.sampled}"
    return Table(("class", "prompts", "flagged", "fraction", "95% interval"), rows, caption)


def _held_out(calibration: Calibration) -> Table:
    names = {**RANKED, **AT_THRESHOLD}
    rows = [(said, *_cells(calibration.figures.get(name))) for name, said in names.items()]
    rows += [(f"{said} alone, AUROC", *_cells(calibration.confounds.get(name))) for name, said in CONFOUNDS.items()]
    rows = [row for row in rows if row[1]]
    return Table(("the calibration's own figures", "", "95% interval", "how"), rows)


def _cells(figure: Figure | None) -> tuple[str, str, str]:
    if figure is None or figure.value is None:
        return "", "", ""
    return f"{figure.value:.3f}", "" if figure.interval is None else interval(figure.interval, 3), figure.how


def _drift(calibration: Calibration, of: Gathered, output: Output) -> str:
    """Whether benign scores are still those of the calibration."""
    benign = of.score[of.samples.row[of.samples.mine("benign")]]
    found = drift(benign, calibration)
    if found is None:
        return "Drift cannot be told: no row here is labelled benign."
    output.numbers(drift={"distance": found.distance, "p_value": found.p_value, "n": int(np.size(benign))})
    if found.warning:
        return f"Drift: {found.warning}."
    return (
        f"No drift seen: the benign scores here are at a Kolmogorov-Smirnov distance of {found.distance:.2f} from "
        f"those that set the threshold (p {found.p_value:.2g})."
    )
