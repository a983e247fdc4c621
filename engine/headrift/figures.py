"""All figures, in colours that colour-blind people can tell apart (Okabe and Ito's, viridis).

Those with a path are written as PNG files; the others are the report's, wide enough for a phone to show their words.
Differences and AUROCs go from benign's blue over white to the attacks' orange.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from headrift.runs.folder import atomic_path
from headrift.stats import Bounds, Floats, Ints, Separation, side

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Group: TypeAlias = tuple[str, str]  # class and category

COLOURS = {"attack": "#D55E00", "benign": "#0072B2", "unlabelled": "#595959"}
WIDTH = 4.8  # inches: on a phone the smallest letters are still 9 pixels high
STEP = "step (0: the prompt's last token)"
INSTABILITY = "instability (std of the heads' share)"
SCORE = "inter-head instability (std of the heads' share, 0 to 0.5)"
AUROC = "AUROC (0.5: chance)"
_DPI = 150
_MOST_GROUPS = 24
_FEWEST_IN_BOX = 5
_MOST_POINTS = 500  # of a group
_MOST_RELATED = 3000  # with more, points are counted in hexagons
_CURVES = ("#000000", "#D55E00", "#0072B2", "#009E73", "#595959")
_STYLES = ("-", (0, (1, 1)), "--", "-.", (0, (5, 1, 1, 1, 1, 1)))
_SIGNALS = (("#000000", "-"), ("#0072B2", "--"), ("#D55E00", "-."), ("#009E73", ":"), ("#CC79A7", (0, (5, 1, 1, 1))))
_MARKERS = {"attack": "^", "benign": "o", "unlabelled": "s"}
_LINES = {"attack": "-", "benign": "--", "unlabelled": "-."}
_GREY: dict[str, Any] = {"color": "#999999", "linewidth": 1, "linestyle": ":"}
_SHADED: dict[str, Any] = {"color": "#000000", "alpha": 0.06, "linewidth": 0}
_LEGEND_ABOVE: dict[str, Any] = {
    "fontsize": "small", "loc": "lower left", "bbox_to_anchor": (0, 1), "frameon": False, "borderaxespad": 0
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class AurocProfile:
    """AUROC at each step or layer, among prompts that have a value there."""

    at: Ints  # steps or layers [n]
    auroc: Floats
    low: Floats  # 95% interval of each by itself, NaN with too few prompts
    high: Floats
    reach: Mapping[str, Floats]  # by class, the fraction of prompts that have a value


@dataclass(frozen=True, slots=True)
class WindowGrid:
    """AUROC of windows, a missing score counted as lowest."""

    starts: Ints  # steps that windows start and end at [n]
    auroc: Floats  # of the window from starts[i] to starts[j], NaN if i > j [n, n]

    @property
    def best(self) -> tuple[int, int, float]:
        """First step, last step and AUROC of the window with the highest AUROC."""
        i, j = np.unravel_index(np.nanargmax(self.auroc), self.auroc.shape)
        return int(self.starts[i]), int(self.starts[j]), float(self.auroc[i, j])


# Building blocks


def new_figure(width: float, height: float) -> Any:
    """Make a figure, sizes in inches, whose panels make room for their labels."""
    from matplotlib.figure import Figure  # not pyplot, which keeps every figure and looks for a display

    return Figure(figsize=(width, height), layout="constrained")


def one_panel(height: float, least: float = 0.0) -> tuple[Figure, Axes]:
    """A figure of one panel. Heights in inches."""
    figure = new_figure(WIDTH, max(height, least))
    return figure, figure.subplots()


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, completely or not at all."""
    with atomic_path(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name in a script that the font does not have
        figure.savefig(temporary, format="png", dpi=_DPI)


def style() -> AbstractContextManager[None]:
    """The style of the report's figures, while it is entered."""
    from matplotlib import rc_context

    settings: dict[Any, Any] = {
        "font.size": 10.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": "medium",
        "svg.fonttype": "none",
        "svg.hashsalt": "headrift",
    }
    return rc_context(settings)


def short(name: str, most: int = 24) -> str:
    """Shorten a name to fit a figure, and replace characters that are not printable."""
    name = "".join(character if character.isprintable() else "?" for character in name)
    return name if len(name) <= most else f"{name[: most - 1]}…"


def draw_heatmap(
    axes: Axes,
    values: Floats,
    label: str,
    *,
    window: tuple[int, int],
    layers: tuple[int, int],
    frame: str = "#D55E00",
    **colours: Any,
) -> None:
    """Draw values [steps, layers] as in `heatmaps_png`, with a colour bar. colours: arguments of imshow."""
    from matplotlib.patches import Rectangle

    axes.patch.set(hatch="xx", edgecolor="#999999", facecolor="white")
    colours = {"cmap": "viridis", "aspect": "auto", "interpolation": "nearest", **colours}
    image = axes.imshow(np.ma.masked_invalid(values.T), **colours)
    n_steps = min(window[1], len(values) - 1) - window[0] + 1
    if n_steps > 0:
        corner, size = (window[0] - 0.5, layers[0] - 0.5), (n_steps, layers[1] - layers[0])
        axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=frame, linewidth=2))
    axes.set(xlabel=STEP, ylabel="layer (0: nearest the input)")
    axes.locator_params(axis="x", integer=True)
    if len(values) == 1:
        axes.set_xticks([0])
    axes.figure.colorbar(image, ax=axes, label=label)


def draw_heads(axes: Axes, values: Floats, label: str, largest: float | None = None) -> None:
    """Draw values [layers, heads], white at 0, with a colour bar. largest: the number at its ends."""
    largest = largest or float(np.nanmax(np.abs(values), initial=1e-6))
    colours: dict[str, Any] = {"cmap": diverging(), "vmin": -largest, "vmax": largest}
    draw_heatmap(axes, values.T, label, window=(0, -1), layers=(0, 0), **colours)
    axes.set_xlabel("head")


def select_groups(groups: Mapping[Group, Floats]) -> dict[Group, Floats]:
    """Return the largest groups in the given order; before those of a class with several categories, all its scores."""
    largest = set(sorted(groups, key=lambda name: -len(groups[name]))[:_MOST_GROUPS])
    selected: dict[Group, Floats] = {}
    for label in dict.fromkeys(label for label, category in groups if (label, category) in largest):
        in_class = {name: scores for name, scores in groups.items() if name[0] == label}
        if len(in_class) > 1:
            selected[label, "all"] = np.concatenate(list(in_class.values()))
        selected |= {name: scores for name, scores in in_class.items() if name in largest and name not in selected}
    return selected


def draw_scores(axes: Axes, groups: Mapping[Group, Floats], label: str = SCORE, threshold: float | None = None) -> None:
    """Draw scores by (class, category): points, a box if there are a few, and how many rows have a score.

    label: of the axis; threshold: a line, if there is one.
    """
    random = np.random.default_rng(0)
    right: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "fontsize": "small", "annotation_clip": False}
    names = list(groups)
    for place, (class_, category) in enumerate(names):
        scores = groups[class_, category]
        valid = scores[np.isfinite(scores)]
        points = valid if len(valid) <= _MOST_POINTS else random.choice(valid, _MOST_POINTS, replace=False)
        heights = place + random.uniform(-0.24, 0.24, len(points))
        look: dict[str, Any] = {"marker": "^" if class_ == "attack" else "o", "color": COLOURS[class_]}
        axes.scatter(points, heights, s=20, alpha=0.6, linewidth=0, rasterized=True, **look)
        if len(valid) >= _FEWEST_IN_BOX:
            line = {"color": "black", "linewidth": 1}
            axes.boxplot(
                valid, positions=[place], orientation="horizontal", widths=0.62, showfliers=False, manage_ticks=False,
                boxprops=line, whiskerprops=line, capprops=line, medianprops={**line, "linewidth": 2},
            )  # fmt: skip
        axes.annotate(f"{len(valid)} of {len(scores)}", (1.01, place), va="center", **right)
    axes.annotate("with a score" if label == SCORE else "with a value", (1.01, -0.9), **right)
    labels = [": ".join(filter(None, (class_, short(name)))) for class_, name in names]
    axes.set_yticks(range(len(names)), labels, parse_math=False)
    for tick, (class_, _) in zip(axes.get_yticklabels(), names, strict=True):
        tick.set_color(COLOURS[class_])
    axes.set(ylim=(len(names) - 0.4, -0.6), xlabel=label)
    axes.grid(axis="x", alpha=0.3)
    if threshold is not None:
        axes.axvline(threshold, color="black", linewidth=1.2, linestyle=(0, (4, 2)))
        at_top: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom"}
        axes.annotate("threshold", (threshold, 1.0), fontsize="small", **at_top)


def draw_curves(axes: Axes, curves: Mapping[str, Separation]) -> None:
    """Draw ROC curves, the first with its band."""
    for i, (name, curve) in enumerate(curves.items()):
        colour, style = _CURVES[i % len(_CURVES)], _STYLES[i % len(_STYLES)]
        if i == 0 and curve.band is not None:
            label = f"{name}: 95% interval"
            axes.fill_between(curve.grid, *curve.band, color=colour, alpha=0.15, linewidth=0, label=label)
        width, order = (2, 3) if i == 0 else (1.4, 2)
        label = f"{name}: AUROC {curve.auroc:.3f}"
        axes.plot(curve.fpr, curve.tprs, color=colour, linestyle=style, linewidth=width, zorder=order, label=label)
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=0.8)
    axes.axvline(0.05, color="#999999", linewidth=0.8, linestyle=":")
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel="false positive rate (fraction of benign; dots: 5%)")
    axes.set_ylabel("true positive rate (fraction of attacks)")
    axes.legend(loc="lower right", fontsize="small")


def _draw_profile(axes: Axes, profile: AurocProfile) -> None:
    axes.fill_between(profile.at, profile.low, profile.high, color="#000000", alpha=0.15, linewidth=0)
    axes.plot(profile.at, profile.auroc, color="#000000", marker="o" if len(profile.at) == 1 else "")
    axes.axhline(0.5, **_GREY)
    axes.set_ylabel(AUROC)


def diverging() -> Any:
    """The colours of numbers on either side of a middle: blue, white, orange."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("benign_attack", [COLOURS["benign"], "#f7f7f7", COLOURS["attack"]])


# PNG files


def scores_png(
    path: Path,
    groups: Mapping[Group, Floats],
    curves: Mapping[str, Separation] | None = None,
    *,
    title: str = "",
    label: str = SCORE,
    threshold: float | None = None,
) -> None:
    """Draw scores by group, NaN for none, and ROC curves, the first with its band; no file if there is no score.

    label: of the scores' axis, if they are a detector's values; threshold: drawn as a line.
    """
    if not any(np.isfinite(scores).any() for scores in groups.values()):
        return
    selected = select_groups(groups)
    height = max(4.2, 1.6 + 0.34 * len(selected))
    figure = new_figure(12.5 if curves else 7.5, height)
    if curves:
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
        draw_curves(right, curves)
    else:
        left = figure.subplots()
    draw_scores(left, selected, label, threshold)
    if title:
        figure.suptitle(short(title, 110), fontsize=10, parse_math=False)
    save(figure, path)


def heatmaps_png(
    path: Path,
    panels: Mapping[str, Floats],
    *,
    window: tuple[int, int],
    layers: tuple[int, int],
    title: str,
    heads: Mapping[str, Floats] | None = None,
) -> None:
    """Draw heatmaps side by side. OSError if the file cannot be written.

    Args:
        panels: Values [steps, layers] by the colour bar's label; NaN is hatched.
        window: First and last scored step; the last is before the first if none is.
        layers: Scored layers [start, end); the scored cells are framed.
        title: Of the whole figure.
        heads: Further values [layers, heads], white at 0.
    """
    heads = heads or {}
    n_steps, n_layers = next(iter(panels.values())).shape
    widths = [max(3.6, 0.25 * n_steps + 2)] * len(panels)
    widths += [min(max(3.6, 0.25 * values.shape[1] + 2), 7) for values in heads.values()]
    figure = new_figure(1.2 + sum(widths), max(3.4, 0.13 * n_layers + 1.4))
    all_axes = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    for axes, (label, values) in zip(all_axes, panels.items()):
        draw_heatmap(axes, values, label, window=window, layers=layers)
    for axes, (label, values) in zip(all_axes[len(panels) :], heads.items(), strict=True):
        draw_heads(axes, values, label)
    framed = "\nframed: the steps and layers that are scored" if window[0] <= window[1] else ""
    figure.suptitle(short(title, 60 + 40 * len(heads)) + framed, fontsize=10, parse_math=False)
    save(figure, path)


# The report's


def scores(groups: Mapping[Group, Floats], threshold: float | None, label: str = f"mean {INSTABILITY}") -> Figure:
    """Scores by class and category, and the threshold if there is one. label: what a score is."""
    selected = select_groups(groups)
    figure, axes = one_panel(1.3 + 0.31 * len(selected), least=2.6)
    draw_scores(axes, selected, threshold=threshold)
    axes.set_xlabel(f"score: {label}")
    return figure


def roc(curves: Mapping[str, Separation], most: float = 1.0) -> Figure:
    """ROC curves up to a false positive rate."""
    figure, axes = one_panel(4.3)
    draw_curves(axes, curves)
    if most < 1:
        tops = [float(one.tprs[np.searchsorted(one.fpr, most, side="right") - 1]) for one in curves.values()]
        tops += [one.band[1][one.grid <= most].max() for one in curves.values() if one.band is not None]
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


def draw_forest(
    rows: Sequence[tuple[str, float, Bounds | None]],
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
    above.set(ylabel=INSTABILITY, ylim=(0, None))
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
    colours: dict[str, Any] = {"cmap": diverging(), "vmin": 0.5 - largest, "vmax": 0.5 + largest, "rasterized": True}
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
    limits: tuple[float, float] | None = None,
    small: bool = False,
) -> Figure:
    """Values [steps, layers] over the range of colours `limits`; without it they are differences, and white is 0."""
    figure = new_figure(4.0, 3.6) if small else new_figure(WIDTH, 4.2)
    colours: dict[str, Any] = {}
    if limits is None:
        largest = float(np.nanmax(np.abs(values), initial=1e-6))
        limits, colours = (-largest, largest), {"cmap": diverging(), "frame": "black"}
    colours |= dict(zip(("vmin", "vmax"), limits))
    draw_heatmap(figure.subplots(), values, label, window=window, layers=layers, **colours)
    return figure


def head_map(values: Floats, label: str, *, largest: float | None = None, small: bool = False) -> Figure:
    """Values [layers, heads], white at 0. largest: the number at the ends of the colours."""
    figure = new_figure(4.0, 3.6) if small else new_figure(WIDTH, 4.2)
    draw_heads(figure.subplots(), values, label, largest)
    return figure


def against(relation: Mapping[str, tuple[Floats, Floats, float | None]], name: str) -> Figure:
    """Scores against another number, as points, or as hexagons of each class if there are many.

    relation: by class the other number, the scores [n], and Spearman's r or None. name: of the other number.
    """
    shown = {label: own for label, own in relation.items() if len(own[0])}
    titles = {label: label if r is None else f"{label}: Spearman's r {r:+.2f}" for label, (*_, r) in shown.items()}
    if sum(len(values) for values, *_ in shown.values()) <= _MOST_RELATED:
        figure, axes = one_panel(4.0)
        for label, (values, own_scores, _) in shown.items():
            look: dict[str, Any] = {"marker": _MARKERS[label], "color": COLOURS[label], "alpha": 0.5, "linewidth": 0}
            axes.scatter(values, own_scores, s=18, rasterized=True, label=titles[label], **look)
        axes.legend(**_LEGEND_ABOVE)
        panels = [axes]
    else:
        figure = new_figure(WIDTH, 0.6 + 3.0 * len(shown))
        panels = list(figure.subplots(len(shown), 1, sharex=True, sharey=True, squeeze=False)[:, 0])
        for axes, (label, (values, own_scores, _)) in zip(panels, shown.items()):
            cells = axes.hexbin(values, own_scores, gridsize=40, bins="log", cmap="viridis", mincnt=1)
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
