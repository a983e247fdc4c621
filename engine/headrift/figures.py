"""Figures of a run as PNG files, in colours that colour-blind people can tell apart (Okabe and Ito's, viridis)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrift.runs.folder import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"attack": "#D55E00", "benign": "#0072B2", "unlabelled": "#595959"}
_CURVES = ("#000000", "#D55E00", "#0072B2", "#009E73", "#595959")
_STYLES = ("-", (0, (1, 1)), "--", "-.", (0, (5, 1, 1, 1, 1, 1)))
_MOST_GROUPS = 24
_FEWEST_IN_BOX = 5
_MOST_POINTS = 500  # of a group
_DPI = 150

Floats = NDArray[np.float64]


class Curve(NamedTuple):
    """A ROC curve."""

    name: str
    fpr: Floats  # of its corners
    tpr: Floats
    auroc: float
    grid: Floats  # false positive rates of the band
    band: Floats | None  # 95% interval of the true positive rate [2, len(grid)]


def scores_png(
    path: Path, groups: Mapping[tuple[str, str], Floats], curves: Sequence[Curve] = (), *, title: str = ""
) -> None:
    """Draw scores by class and category and, if there are any, ROC curves. No file is written if no row has a score.

    Args:
        groups: Scores by (class, category), NaN for rows without one.
        curves: The first is drawn with its band.

    Raises:
        OSError: If the file cannot be written.
    """
    if not any(np.isfinite(scores).any() for scores in groups.values()):
        return
    selected = select_groups(groups)
    height = max(4.2, 1.6 + 0.34 * len(selected))
    figure = new_figure(12.5 if curves else 7.5, height)
    left, *right = figure.subplots(1, 2, width_ratios=(1.25, 1), squeeze=False)[0] if curves else [figure.subplots()]
    draw_scores(left, selected)
    if right:
        draw_curves(right[0], curves)
    if title:
        figure.suptitle(short(title, 110), fontsize=10, parse_math=False)
    save(figure, path)


def heatmaps_png(
    path: Path, panels: Mapping[str, Floats], *, window: tuple[int, int], layers: tuple[int, int], title: str
) -> None:
    """Draw heatmaps side by side.

    Args:
        panels: Values [steps, layers] by the colour bar's label; NaN is hatched.
        window: First and last scored step.
        layers: Scored layers [start, end); the scored cells are framed.

    Raises:
        OSError: If the file cannot be written.
    """
    n_steps, n_layers = next(iter(panels.values())).shape
    figure = new_figure(1.2 + len(panels) * max(3.6, 0.25 * n_steps + 2), max(3.4, 0.13 * n_layers + 1.4))
    for axes, (label, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        draw_heatmap(axes, values, label, window=window, layers=layers)
    below = "framed: the steps and layers that are scored"
    figure.suptitle(f"{short(title, 60)}\n{below}", fontsize=10, parse_math=False)
    save(figure, path)


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
    """Draw one heatmap, as in `heatmaps_png`, with its colour bar. colours: arguments of imshow."""
    from matplotlib.patches import Rectangle

    axes.patch.set(hatch="xx", edgecolor="#999999", facecolor="white")
    colours = {"cmap": "viridis", **colours}
    image = axes.imshow(
        np.ma.masked_invalid(values.T), aspect="auto", origin="upper", interpolation="nearest", **colours
    )
    last = min(window[1], len(values) - 1)
    if window[0] <= last:
        corner = (window[0] - 0.5, layers[0] - 0.5)
        size = (last - window[0] + 1, layers[1] - layers[0])
        axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=frame, linewidth=2))
    axes.set_xlabel("step (0: the prompt's last token)")
    axes.set_ylabel("layer (0: nearest the input)")
    axes.locator_params(axis="x", integer=True)
    axes.figure.colorbar(image, ax=axes, label=label)


def select_groups(groups: Mapping[tuple[str, str], Floats]) -> dict[tuple[str, str], Floats]:
    """Return the largest groups in the given order; before those of a class with several categories, all its scores."""
    largest = set(sorted(groups, key=lambda name: -len(groups[name]))[:_MOST_GROUPS])
    selected: dict[tuple[str, str], Floats] = {}
    for label in dict.fromkeys(label for label, category in groups if (label, category) in largest):
        in_class = {name: scores for name, scores in groups.items() if name[0] == label}
        if len(in_class) > 1:
            selected[label, "all"] = np.concatenate(list(in_class.values()))
        selected |= {name: scores for name, scores in in_class.items() if name in largest and name not in selected}
    return selected


def draw_scores(axes: Axes, groups: Mapping[tuple[str, str], Floats]) -> None:
    """Draw scores by (class, category): points, a box if there are a few, and how many rows have a score."""
    random = np.random.default_rng(0)
    right: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "fontsize": "small", "annotation_clip": False}
    names = list(groups)
    for place, (label, category) in enumerate(names):
        scores = groups[label, category]
        valid, colour = scores[np.isfinite(scores)], COLOURS[label]
        points = valid if len(valid) <= _MOST_POINTS else random.choice(valid, _MOST_POINTS, replace=False)
        heights = place + random.uniform(-0.24, 0.24, len(points))
        marker = "^" if label == "attack" else "o"
        axes.scatter(points, heights, s=20, marker=marker, color=colour, alpha=0.6, linewidth=0, rasterized=True)
        if len(valid) >= _FEWEST_IN_BOX:
            line = {"color": "black", "linewidth": 1}
            axes.boxplot(
                valid, positions=[place], orientation="horizontal", widths=0.62, showfliers=False, manage_ticks=False,
                boxprops=line, whiskerprops=line, capprops=line, medianprops={**line, "linewidth": 2},
            )  # fmt: skip
        axes.annotate(f"{len(valid)} of {len(scores)}", (1.01, place), va="center", **right)
    axes.annotate("with a score", (1.01, -0.9), **right)
    labels = [": ".join(filter(None, (label, short(name)))) for label, name in names]
    axes.set_yticks(range(len(names)), labels, parse_math=False)
    for tick, (label, _) in zip(axes.get_yticklabels(), names, strict=True):
        tick.set_color(COLOURS[label])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel("inter-head instability (std of the heads' share, 0 to 0.5)")
    axes.grid(axis="x", alpha=0.3)


def draw_curves(axes: Axes, curves: Sequence[Curve]) -> None:
    """Draw ROC curves, the first with its band."""
    for i, curve in enumerate(curves):
        colour, style = _CURVES[i % len(_CURVES)], _STYLES[i % len(_STYLES)]
        if i == 0 and curve.band is not None:
            low, high = curve.band
            label = f"{curve.name}: 95% interval"
            axes.fill_between(curve.grid, low, high, color=colour, alpha=0.15, linewidth=0, label=label)
        label = f"{curve.name}: AUROC {curve.auroc:.3f}"
        width, order = (2, 3) if i == 0 else (1.4, 2)
        axes.plot(curve.fpr, curve.tpr, color=colour, linestyle=style, linewidth=width, zorder=order, label=label)
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=0.8)
    axes.axvline(0.05, color="#999999", linewidth=0.8, linestyle=":")
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    axes.set_xlabel("false positive rate (fraction of benign; dots: 5%)")
    axes.set_ylabel("true positive rate (fraction of attacks)")
    axes.legend(loc="lower right", fontsize="small")


def short(name: str, most: int = 24) -> str:
    """Shorten a name to fit a figure, and replace characters that are not printable."""
    name = "".join(character if character.isprintable() else "?" for character in name)
    return name if len(name) <= most else f"{name[: most - 1]}…"


def new_figure(width: float, height: float) -> Any:
    """Make a figure, sizes in inches, whose panels make room for their labels."""
    # Not pyplot, which keeps every figure and looks for a display.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, completely or not at all."""
    with atomic_path(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name in a script that the font does not have
        figure.savefig(temporary, format="png", dpi=_DPI)
