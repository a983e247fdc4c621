"""The report's figures: one panel each (or two with the same steps), so wide that a phone shows their words.

Colours as in headrift.figures; differences and AUROCs go from benign's blue over white to the attacks' orange.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from headrift.figures import COLOURS, Curve, draw_curves, draw_heatmap, draw_scores, new_figure, short, to_show
from headrift.report.gather import Floats
from headrift.report.measure import Along, Grid, OfRun, Relation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.8  # inches: on a phone the smallest letters are still 9 pixels high
_SMALL = 4.0
_MANY = 3000  # points of all classes, above which they are counted in hexagons
_MARKERS = {"attack": "^", "benign": "o", "unlabelled": "s"}
_LINES = {"attack": "-", "benign": "--", "unlabelled": "-."}
_SIGNALS = (("#000000", "-"), ("#0072B2", "--"), ("#D55E00", "-."), ("#009E73", ":"), ("#CC79A7", (0, (5, 1, 1, 1))))
STEP = "step (0: the prompt's last token)"
INSTABILITY = "instability (std of the heads' share)"
AUROC = "AUROC (0.5: chance)"


@contextmanager
def style() -> Iterator[None]:
    """What all figures here have in common."""
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


def scores(groups: Mapping[tuple[str, str], Floats], threshold: float | None) -> Figure:
    """Scores by class and category, and the threshold where there is one."""
    shown = to_show(groups)
    figure, axes = _one(1.3 + 0.31 * len(shown), least=2.6)
    draw_scores(axes, shown)
    axes.set_xlabel(f"score: mean {INSTABILITY}")
    if threshold is not None:
        axes.axvline(threshold, color="black", linewidth=1.2, linestyle=(0, (4, 2)))
        axes.annotate(
            "threshold", (threshold, 1.0), xycoords=("data", "axes fraction"), ha="center", va="bottom",
            fontsize="small",
        )  # fmt: skip
    return figure


def roc(curves: Sequence[Curve], most: float = 1.0) -> Figure:
    """ROC curves up to a false positive rate."""
    figure, axes = _one(4.3)
    draw_curves(axes, curves)
    if most < 1:
        reached = max(float(curve.tpr[np.searchsorted(curve.fpr, most, side="right") - 1]) for curve in curves)
        bands = [curve.band[1][curve.grid <= most].max() for curve in curves if curve.band is not None]
        axes.set(xlim=(-0.01 * most, most * 1.01), ylim=(-0.01, min(1.01, max(reached, *bands, 0.1) * 1.5)))
        axes.legend(loc="upper left", fontsize="small")
    return figure


def coverage(rows: Mapping[str, Mapping[str, tuple[float, float, float]]]) -> Figure:
    """By what is counted, by class: a fraction with its interval, as bars."""
    labels = list(next(iter(rows.values())))
    figure, axes = _one(0.9 + 0.38 * len(rows) * len(labels), least=2.2)
    place, ticks = 0.0, []
    for fractions in rows.values():
        for label in labels:
            value, low, high = fractions[label]
            axes.barh(place, value * 100, height=0.8, color=COLOURS[label], alpha=0.75)
            errors = [[max(0, value - low) * 100], [max(0, high - value) * 100]]
            axes.errorbar(value * 100, place, xerr=errors, color="black", capsize=3, linewidth=1.2)
            ticks.append((place, label))
            place += 1
        place += 0.6
    axes.set_yticks([at for at, _ in ticks], [label for _, label in ticks])
    for at, name in zip((ticks[i][0] for i in range(0, len(ticks), len(labels))), rows):
        axes.annotate(name, (0.01, at - 0.48), xycoords=("axes fraction", "data"), va="bottom", fontsize="small")
    axes.set_ylim(place - 0.9, -1.0)
    axes.set_xlim(0, 100)
    axes.set_xlabel("rows of the class, % (lines: 95% interval)")
    return figure


def forest(rows: Sequence[tuple[str, float, tuple[float, float] | None]], note: str = AUROC) -> Figure:
    """Names with AUROCs and their intervals, one below the other."""
    figure, axes = _one(1.0 + 0.33 * len(rows), least=2.2)
    for place, (_, value, interval) in enumerate(rows):
        low, high = interval or (value, value)
        axes.plot([low, high], [place, place], color="#333333", linewidth=2, solid_capstyle="butt")
        colour = COLOURS["attack"] if low > 0.5 else COLOURS["benign"] if high < 0.5 else "#777777"
        filled = colour if interval else "white"
        axes.plot(value, place, "o", color=colour, markerfacecolor=filled, markersize=7)
        axes.annotate(
            f"{value:.2f}", (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize="small",
            annotation_clip=False,
        )  # fmt: skip
    axes.axvline(0.5, color="#999999", linewidth=1, linestyle=":")
    axes.set_yticks(range(len(rows)), [short(name, 30) for name, *_ in rows], parse_math=False)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(note)
    axes.grid(axis="x", alpha=0.3)
    return figure


def by_run(runs: Sequence[OfRun]) -> Figure:
    """Each run's AUROC of the score, and of prompt length."""
    rows = []
    for run in runs:
        for name, measured in (("score", run.score), ("length", run.length)):
            if measured is not None:
                rows.append((f"{short(run.name, 20)}: {name}", measured.auroc, measured.auroc_interval))
    return forest(rows)


def along_steps(found: Along, window: tuple[int, int]) -> Figure:
    """AUROC at each step, and below it which fraction of answers still goes on."""
    figure = new_figure(WIDTH, 4.9)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    _with_band(above, found)
    _reach(below, found)
    for axes in (above, below):
        axes.axvspan(window[0] - 0.5, window[1] + 0.5, color="#000000", alpha=0.06, linewidth=0)
    below.set_ylabel("answers that\nreach it, %")
    below.set_xlabel("step of the answer (shaded: the window)")
    below.locator_params(axis="x", integer=True)
    return figure


def along_layers(
    found: Along, means: Mapping[str, Floats], spread: Mapping[str, Floats], scored: tuple[int, int]
) -> Figure:
    """Each layer's mean instability over the window by class with its quartiles [2, layers], and its AUROC."""
    figure = new_figure(WIDTH, 4.9)
    if np.isfinite(found.auroc).any():
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        _with_band(below, found)
        below.set_ylabel("AUROC\n(0.5: chance)")
    else:
        above = below = figure.subplots()
    for label, profile in means.items():
        colour = COLOURS[label]
        above.fill_between(found.at, *spread[label], color=colour, alpha=0.15, linewidth=0)
        above.plot(found.at, profile, color=colour, linestyle=_LINES[label], label=f"{label}: mean, middle half")
    above.set_ylabel(INSTABILITY)
    above.set_ylim(bottom=0)
    if means:
        above.legend(fontsize="small")
    for axes in {above, below}:
        axes.axvspan(scored[0] - 0.5, scored[1] - 0.5, color="#000000", alpha=0.06, linewidth=0)
    below.set_xlabel("layer (0: nearest the input; shaded: scored)")
    below.locator_params(axis="x", integer=True)
    return figure


def windows(found: Grid, own: tuple[int, int]) -> Figure:
    """AUROC of all windows; the one that is scored is marked."""
    figure, axes = _one(4.3)
    far = max(0.1, float(np.nanmax(np.abs(found.auroc - 0.5))))
    edges = _edges(found.starts)
    axes.patch.set(facecolor="#eeeeee")
    values = np.ma.masked_invalid(found.auroc.T)
    image = axes.pcolormesh(edges, edges, values, cmap=_diverging(), vmin=0.5 - far, vmax=0.5 + far, rasterized=True)
    axes.plot(*own, marker="s", markersize=9, markerfacecolor="none", markeredgecolor="black", markeredgewidth=1.8)
    axes.set_xlabel("first step of the window")
    axes.set_ylabel("last step of the window (square: scored)")
    axes.locator_params(integer=True)
    figure.colorbar(image, ax=axes, label="AUROC (orange: attacks higher; 0.5: chance)")
    return figure


def heatmap(
    values: Floats,
    label: str,
    *,
    window: tuple[int, int],
    layers: tuple[int, int],
    limits: tuple[float, float],
    small: bool = False,
) -> Figure:
    """Instability [steps, layers]. limits: what the darkest and the brightest stand for."""
    figure = new_figure(_SMALL, _SMALL * 0.9) if small else new_figure(WIDTH, 4.2)
    axes = figure.subplots()
    draw_heatmap(axes, values, label, window=window, layers=layers, vmin=limits[0], vmax=limits[1])
    axes.set_xlabel(STEP)
    return figure


def difference(values: Floats, *, window: tuple[int, int], layers: tuple[int, int]) -> Figure:
    """Attacks' mean instability minus benign prompts' [steps, layers]; white is 0."""
    far = float(np.nanmax(np.abs(values), initial=1e-6))
    colours = {"cmap": _diverging(), "vmin": -far, "vmax": far}
    figure, axes = _one(4.2)
    draw_heatmap(axes, values, "attack minus benign", window=window, layers=layers, frame="black", **colours)
    axes.set_xlabel(STEP)
    return figure


def against(found: Relation, name: str) -> Figure:
    """Scores against another number: points, or where there are many, hexagons of each class."""
    sizes = {label: len(values) for label, values in found.values.items() if len(values)}
    if sum(sizes.values()) <= _MANY:
        figure, axes = _one(4.0)
        for label in sizes:
            _points(axes, label, found)
        axes.legend(fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), frameon=False, borderaxespad=0)
        every = [axes]
    else:
        figure = new_figure(WIDTH, 0.6 + 3.0 * len(sizes))
        every = list(figure.subplots(len(sizes), 1, sharex=True, sharey=True, squeeze=False)[:, 0])
        for axes, label in zip(every, sizes):
            drawn = axes.hexbin(
                found.values[label], found.scores[label], gridsize=40, bins="log", cmap="viridis", mincnt=1
            )
            figure.colorbar(drawn, ax=axes, label="prompts")
            axes.set_title(_with_r(label, found))
    for axes in every:
        axes.set_ylabel("score")
    every[-1].set_xlabel(name)
    return figure


def signals_by_step(lines: Sequence[tuple[str, Floats, Floats, Floats | None]]) -> Figure:
    """Signals' AUROC by step: name, steps, AUROC, and a band [2, steps] or None."""
    figure, axes = _one(4.1)
    for (name, at, values, band), (colour, line) in zip(lines, _SIGNALS):
        if band is not None:
            axes.fill_between(at, *band, color=colour, alpha=0.12, linewidth=0)
        axes.plot(at, values, color=colour, linestyle=line, label=name)
    axes.axhline(0.5, color="#999999", linewidth=1, linestyle=":")
    axes.set_xlabel(STEP)
    axes.set_ylabel(AUROC)
    axes.locator_params(axis="x", integer=True)
    axes.legend(fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderaxespad=0)
    return figure


def _one(height: float, least: float = 0.0) -> tuple[Figure, Axes]:
    figure = new_figure(WIDTH, max(height, least))
    return figure, figure.subplots()


def _with_band(axes: Axes, found: Along) -> None:
    axes.fill_between(found.at, found.low, found.high, color="#000000", alpha=0.15, linewidth=0)
    marker = "o" if len(found.at) == 1 else ""
    axes.plot(found.at, found.auroc, color="#000000", marker=marker)
    axes.axhline(0.5, color="#999999", linewidth=1, linestyle=":")
    axes.set_ylabel(AUROC)


def _reach(axes: Axes, found: Along) -> None:
    for label, reach in found.reach.items():
        axes.plot(found.at, reach * 100, color=COLOURS[label], linestyle=_LINES[label], label=label)
    axes.set_ylim(0, 105)
    axes.legend(fontsize="small")


def _points(axes: Axes, label: str, found: Relation) -> None:
    look: dict[str, Any] = {"marker": _MARKERS[label], "color": COLOURS[label], "alpha": 0.5, "linewidth": 0}
    axes.scatter(found.values[label], found.scores[label], s=18, rasterized=True, label=_with_r(label, found), **look)


def _with_r(label: str, found: Relation) -> str:
    r = found.spearman[label]
    return label if r is None else f"{label}: Spearman's r {r:+.2f}"


def _edges(at: np.ndarray) -> Floats:
    """The borders between places that a mesh is drawn with."""
    if len(at) == 1:
        return np.array([at[0] - 0.5, at[0] + 0.5])
    middle = (at[1:] + at[:-1]) / 2
    return np.array([2 * at[0] - middle[0], *middle, 2 * at[-1] - middle[-1]])


def _diverging() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("benign_attack", [COLOURS["benign"], "#f7f7f7", COLOURS["attack"]])
