"""The report's figures: wide enough for a phone to show their words.

Colours as in headrift.figures; differences and AUROCs go from benign's blue over white to the attacks' orange.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from headrift.figures import COLOURS, Curve, draw_curves, draw_heatmap, draw_scores, new_figure, select_groups, short
from headrift.report.gather import Floats
from headrift.report.measure import AurocProfile, Relation, RunSeparation, WindowGrid
from headrift.stats import side

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.8  # inches: on a phone the smallest letters are still 9 pixels high
_SMALL = 4.0
_MOST_POINTS = 3000  # with more, they are counted in hexagons
_MARKERS = {"attack": "^", "benign": "o", "unlabelled": "s"}
_LINES = {"attack": "-", "benign": "--", "unlabelled": "-."}
_SIGNALS = (("#000000", "-"), ("#0072B2", "--"), ("#D55E00", "-."), ("#009E73", ":"), ("#CC79A7", (0, (5, 1, 1, 1))))
STEP = "step (0: the prompt's last token)"
INSTABILITY = "instability (std of the heads' share)"
AUROC = "AUROC (0.5: chance)"
_GREY: dict[str, Any] = {"color": "#999999", "linewidth": 1, "linestyle": ":"}
_SHADED: dict[str, Any] = {"color": "#000000", "alpha": 0.06, "linewidth": 0}
_LEGEND_ABOVE: dict[str, Any] = {
    "fontsize": "small", "loc": "lower left", "bbox_to_anchor": (0, 1), "frameon": False, "borderaxespad": 0
}  # fmt: skip


@contextmanager
def style() -> Iterator[None]:
    """The style of all figures."""
    from matplotlib import rc_context

    settings: dict[Any, Any] = {
        "font.size": 10.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": "medium",
        "svg.fonttype": "none",
        "svg.hashsalt": "headrift",
    }
    with rc_context(settings):
        yield


def one_panel(height: float, least: float = 0.0) -> tuple[Figure, Axes]:
    """A figure of one panel. Heights in inches."""
    figure = new_figure(WIDTH, max(height, least))
    return figure, figure.subplots()


def scores(groups: Mapping[tuple[str, str], Floats], threshold: float | None) -> Figure:
    """Scores by class and category, and the threshold if there is one."""
    selected = select_groups(groups)
    figure, axes = one_panel(1.3 + 0.31 * len(selected), least=2.6)
    draw_scores(axes, selected)
    axes.set_xlabel(f"score: mean {INSTABILITY}")
    if threshold is not None:
        axes.axvline(threshold, color="black", linewidth=1.2, linestyle=(0, (4, 2)))
        place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom"}
        axes.annotate("threshold", (threshold, 1.0), fontsize="small", **place)
    return figure


def roc(curves: Sequence[Curve], most: float = 1.0) -> Figure:
    """ROC curves up to a false positive rate."""
    figure, axes = one_panel(4.3)
    draw_curves(axes, curves)
    if most < 1:
        tops = [float(curve.tpr[np.searchsorted(curve.fpr, most, side="right") - 1]) for curve in curves]
        tops += [curve.band[1][curve.grid <= most].max() for curve in curves if curve.band is not None]
        axes.set(xlim=(-0.01 * most, most * 1.01), ylim=(-0.01, min(1.01, max(*tops, 0.1) * 1.5)))
        axes.legend(loc="upper left", fontsize="small")
    return figure


def coverage(fractions: Mapping[str, Mapping[str, tuple[float, float, float]]]) -> Figure:
    """Fractions of rows with their intervals as bars, by what is counted and by class."""
    labels = list(next(iter(fractions.values())))
    figure, axes = one_panel(0.9 + 0.38 * len(fractions) * len(labels), least=2.2)
    place, ticks = 0.0, []
    for name, by_class in fractions.items():
        axes.annotate(name, (0.01, place - 0.48), xycoords=("axes fraction", "data"), va="bottom", fontsize="small")
        for label in labels:
            value, low, high = by_class[label]
            axes.barh(place, value * 100, height=0.8, color=COLOURS[label], alpha=0.75)
            errors = [[max(0, value - low) * 100], [max(0, high - value) * 100]]
            axes.errorbar(value * 100, place, xerr=errors, color="black", capsize=3, linewidth=1.2)
            ticks.append((place, label))
            place += 1
        place += 0.6
    axes.set_yticks([at for at, _ in ticks], [label for _, label in ticks])
    axes.set(ylim=(place - 0.9, -1.0), xlim=(0, 100), xlabel="rows of the class, % (lines: 95% interval)")
    return figure


def forest(
    rows: Sequence[tuple[str, float, tuple[float, float] | None]],
    xlabel: str = AUROC,
    null: float = 0.5,
    colours: tuple[str, str] = (COLOURS["attack"], COLOURS["benign"]),
) -> Figure:
    """Name, number and 95% interval, one below the other; coloured if the interval is above or below `null`."""
    figure, axes = one_panel(1.0 + 0.33 * len(rows), least=2.2)
    for place, (_, value, interval) in enumerate(rows):
        low, high = interval or (value, value)
        axes.plot([low, high], [place, place], color="#333333", linewidth=2, solid_capstyle="butt")
        colour = {1: colours[0], -1: colours[1], None: "#777777"}[side(interval, null)]
        axes.plot(value, place, "o", color=colour, markerfacecolor=colour if interval else "white", markersize=7)
        text: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "va": "center", "annotation_clip": False}
        axes.annotate(f"{value:#.2g}", (1.01, place), fontsize="small", **text)
    axes.axvline(null, **_GREY)
    axes.set_yticks(range(len(rows)), [short(name, 30) for name, *_ in rows], parse_math=False)
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel=xlabel)
    axes.grid(axis="x", alpha=0.3)
    return figure


def by_run(runs: Sequence[RunSeparation]) -> Figure:
    """Each run's AUROC of the score, and of prompt length."""
    measures = [(run, name, one) for run in runs for name, one in (("score", run.score), ("length", run.length))]
    return forest(
        [(f"{short(run.name, 20)}: {name}", one.auroc, one.auroc_interval) for run, name, one in measures if one]
    )


def along_steps(profile: AurocProfile, window: tuple[int, int]) -> Figure:
    """AUROC at each step, and below it the fraction of answers that reach the step."""
    figure = new_figure(WIDTH, 4.9)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    _draw_profile(above, profile)
    for label, reach in profile.reach.items():
        below.plot(profile.at, reach * 100, color=COLOURS[label], linestyle=_LINES[label], label=label)
    below.legend(fontsize="small")
    for axes in (above, below):
        axes.axvspan(window[0] - 0.5, window[1] + 0.5, **_SHADED)
    below.set(ylim=(0, 105), ylabel="answers that\nreach it, %", xlabel="step of the answer (shaded: the window)")
    below.locator_params(axis="x", integer=True)
    return figure


def along_layers(
    profile: AurocProfile, means: Mapping[str, Floats], spread: Mapping[str, Floats], scored: tuple[int, int]
) -> Figure:
    """Each layer's mean instability by class with its quartiles [2, layers], and below it its AUROC."""
    figure = new_figure(WIDTH, 4.9)
    if np.isfinite(profile.auroc).any():
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        _draw_profile(below, profile)
        below.set_ylabel("AUROC\n(0.5: chance)")
    else:
        above = below = figure.subplots()
    for label, values in means.items():
        colour = COLOURS[label]
        above.fill_between(profile.at, *spread[label], color=colour, alpha=0.15, linewidth=0)
        above.plot(profile.at, values, color=colour, linestyle=_LINES[label], label=f"{label}: mean, middle half")
    above.set_ylabel(INSTABILITY)
    above.set_ylim(bottom=0)
    if means:
        above.legend(fontsize="small")
    for axes in {above, below}:
        axes.axvspan(scored[0] - 0.5, scored[1] - 0.5, **_SHADED)
    below.set_xlabel("layer (0: nearest the input; shaded: scored)")
    below.locator_params(axis="x", integer=True)
    return figure


def windows(grid: WindowGrid, scored: tuple[int, int]) -> Figure:
    """AUROC of all windows; the scored one is marked."""
    figure, axes = one_panel(4.3)
    largest = max(0.1, float(np.nanmax(np.abs(grid.auroc - 0.5))))
    middle = (grid.starts[1:] + grid.starts[:-1]) / 2
    edges = np.array([grid.starts[0] - 0.5, *middle, grid.starts[-1] + 0.5])
    axes.patch.set(facecolor="#eeeeee")
    colours: dict[str, Any] = {"cmap": _diverging(), "vmin": 0.5 - largest, "vmax": 0.5 + largest, "rasterized": True}
    image = axes.pcolormesh(edges, edges, np.ma.masked_invalid(grid.auroc.T), **colours)
    axes.plot(*scored, marker="s", markersize=9, markerfacecolor="none", markeredgecolor="black", markeredgewidth=1.8)
    axes.set(xlabel="first step of the window", ylabel="last step of the window (square: scored)")
    axes.locator_params(integer=True)
    figure.colorbar(image, ax=axes, label="AUROC (orange: attacks higher; 0.5: chance)")
    return figure


def heatmap(
    values: Floats,
    label: str,
    window: tuple[int, int],
    layers: tuple[int, int],
    limits: tuple[float, float],
    small: bool = False,
) -> Figure:
    """Instability [steps, layers]. limits: the values of the darkest and the brightest colour."""
    figure = new_figure(_SMALL, _SMALL * 0.9) if small else new_figure(WIDTH, 4.2)
    draw_heatmap(figure.subplots(), values, label, window=window, layers=layers, vmin=limits[0], vmax=limits[1])
    return figure


def difference(values: Floats, window: tuple[int, int], layers: tuple[int, int]) -> Figure:
    """Attacks' mean instability minus benign prompts' [steps, layers]; white is 0."""
    largest = float(np.nanmax(np.abs(values), initial=1e-6))
    colours: dict[str, Any] = {"cmap": _diverging(), "vmin": -largest, "vmax": largest, "frame": "black"}
    figure, axes = one_panel(4.2)
    draw_heatmap(axes, values, "attack minus benign", window=window, layers=layers, **colours)
    return figure


def against(relation: Relation, name: str) -> Figure:
    """Scores against another number: points, or hexagons of each class if there are many."""
    sizes = {label: len(values) for label, values in relation.values.items() if len(values)}
    titles = {
        label: label if r is None else f"{label}: Spearman's r {r:+.2f}" for label, r in relation.spearman.items()
    }
    if sum(sizes.values()) <= _MOST_POINTS:
        figure, axes = one_panel(4.0)
        for label in sizes:
            look: dict[str, Any] = {"marker": _MARKERS[label], "color": COLOURS[label], "alpha": 0.5, "linewidth": 0}
            points = relation.values[label], relation.scores[label]
            axes.scatter(*points, s=18, rasterized=True, label=titles[label], **look)
        axes.legend(**_LEGEND_ABOVE)
        panels = [axes]
    else:
        figure = new_figure(WIDTH, 0.6 + 3.0 * len(sizes))
        panels = list(figure.subplots(len(sizes), 1, sharex=True, sharey=True, squeeze=False)[:, 0])
        for axes, label in zip(panels, sizes):
            points = relation.values[label], relation.scores[label]
            cells = axes.hexbin(*points, gridsize=40, bins="log", cmap="viridis", mincnt=1)
            figure.colorbar(cells, ax=axes, label="prompts")
            axes.set_title(titles[label])
    for axes in panels:
        axes.set_ylabel("score")
    panels[-1].set_xlabel(name)
    return figure


def signals_by_step(lines: Sequence[tuple[str, Floats, Floats, Floats | None]]) -> Figure:
    """Signals' AUROC by step: name, steps, AUROC, and a band [2, steps] or None."""
    figure, axes = one_panel(4.1)
    for (name, steps, auroc, band), (colour, line) in zip(lines, _SIGNALS):
        if band is not None:
            axes.fill_between(steps, *band, color=colour, alpha=0.12, linewidth=0)
        axes.plot(steps, auroc, color=colour, linestyle=line, label=name)
    axes.axhline(0.5, **_GREY)
    axes.set(xlabel=STEP, ylabel=AUROC)
    axes.locator_params(axis="x", integer=True)
    axes.legend(ncols=2, **_LEGEND_ABOVE)
    return figure


def _draw_profile(axes: Axes, profile: AurocProfile) -> None:
    axes.fill_between(profile.at, profile.low, profile.high, color="#000000", alpha=0.15, linewidth=0)
    axes.plot(profile.at, profile.auroc, color="#000000", marker="o" if len(profile.at) == 1 else "")
    axes.axhline(0.5, **_GREY)
    axes.set_ylabel(AUROC)


def _diverging() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("benign_attack", [COLOURS["benign"], "#f7f7f7", COLOURS["attack"]])
