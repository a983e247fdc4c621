"""Bars with intervals, one panel a figure of the arms, as a PNG file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from headrift.figures import new_figure, save, short
from headrift.safety_heads.rates import Interval

_COLOURS = {"clean": "#0072B2", "ablated": "#D55E00"}
_OTHER = "#999999"


def bars_png(
    path: Path,
    names: Sequence[str],
    panels: Mapping[str, Sequence[tuple[float, Interval | None] | None]],
    *,
    title: str,
) -> None:
    """names: of the arms; panels: by title each arm's value and its interval, None for no bar. OSError where it cannot
    be written."""
    figure = new_figure(1 + 2.6 * len(panels), 3.6)
    for axes, (panel, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for place, (name, of) in enumerate(zip(names, values, strict=True)):
            if of is None:
                continue
            value, interval = of
            axes.bar(place, value, color=_COLOURS.get(name, _OTHER), width=0.7)
            if interval is not None:
                # Of a rate of 0 or 1 Wilson's interval ends there but for rounding.
                reach = np.maximum([[value - interval[0]], [interval[1] - value]], 0)
                axes.errorbar(place, value, yerr=reach, color="black", capsize=3, linewidth=1)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", parse_math=False)
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.set_title(panel, fontsize=9)
        if panel.startswith("perplexity"):
            axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        else:
            axes.set_ylim(0, 1.02)
        axes.grid(axis="y", alpha=0.3)
    figure.suptitle(short(title, 110), fontsize=10, parse_math=False)
    save(figure, path)
