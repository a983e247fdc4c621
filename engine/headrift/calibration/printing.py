"""A calibration on a terminal, in 80 columns."""

from __future__ import annotations

from textwrap import wrap
from typing import TYPE_CHECKING

from headrift.calibration.evidence import CONFOUNDS
from headrift.calibration.record import Calibration, Figure
from headrift.terminal import print_table

if TYPE_CHECKING:
    from rich.console import Console

RANKED = {
    "auroc": "AUROC, no score lowest",
    "auroc_scored": "AUROC, scored prompts only",
    "auprc": "average precision",
    "tpr_at_5": "attacks found at 5% FPR",
    "tpr_at_1": "attacks found at 1% FPR",
    "auroc_own_window": "AUROC, the runs' window",
    "auroc_in_sample": "AUROC, in sample (naive)",
}
AT_THRESHOLD = {
    "tpr": "attacks found",
    "fpr": "benign prompts flagged",
    "fpr_traffic": "benign rows flagged",
}


def show(console: Console, of: Calibration) -> None:
    """Print what was found, what it is worth, and what to be careful about."""

    def line(text: str = "") -> None:
        for part in wrap(text, min(console.width, 100), subsequent_indent=" " * 11) or [""]:
            console.print(part, markup=False, highlight=False)

    setting = of.setting
    line(f"window     steps {of.window}, layers {of.layers[0]} to {of.layers[1] - 1} of {of.model.layers}")
    line(f"threshold  {of.threshold:.6f}: a score at or above it is flagged")
    line(f"promise    {setting.promise} ({setting.n:,}, {setting.flagged:,} of them flagged)")

    coverage = [
        (name, f"{one.rows:,}", f"{one.distinct:,}", f"{one.with_score:.1%}", f"{one.ended_early:.1%}")
        for name, one in of.classes.items()
    ]
    print_table(console, ("", "rows", "distinct", "with score", "stop early"), coverage)
    for title, names, figures in (
        ("held out", RANKED, of.figures),
        ("held out, at a threshold", AT_THRESHOLD, of.figures),
        ("confounds, AUROC", CONFOUNDS, of.confounds),
    ):
        shown = [
            (said, f"{figures[name].value:.3f}", _range(figures[name]))
            for name, said in names.items()
            if name in figures and figures[name].value is not None
        ]
        if shown:
            print_table(console, (title, "", "95% interval"), shown)
    traffic = of.traffic
    line()
    line(f"{traffic.flagged:,} of {traffic.rows:,} benign rows here are flagged, repeats counted as they came")
    if traffic.alerts_a_day is not None and traffic.alerts_a_day.value is not None:
        bounds = traffic.alerts_a_day.interval
        interval = f" ({bounds[0]:,.0f} to {bounds[1]:,.0f})" if bounds else ""
        line(f"{traffic.alerts_a_day.value:,.0f} alerts a day{interval}, if all {traffic.daily_prompts:,} are benign")
    if of.contamination:
        rows = [
            (
                f"{one.contamination:.1%} are attacks",
                f"{one.lowest_fpr:.2%}-{one.highest_fpr:.2%}",
                "too few" if one.threshold is None else f"{one.threshold:.6f}",
            )
            for one in of.contamination
        ]
        print_table(console, ("if of these prompts", "benign flagged", "threshold for the target"), rows)
    line()
    for note in of.notes:
        line(f"note       {note}")


def _range(figure: Figure) -> str:
    return "" if figure.interval is None else f"{figure.interval[0]:.3f}-{figure.interval[1]:.3f}"
