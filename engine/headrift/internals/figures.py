"""The figures of internal changes, one panel each. Colours (Okabe and Ito's, viridis) as elsewhere in headrift."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from headrift.figures import short
from headrift.internals.analysis import Changes
from headrift.internals.comparing import NEUTRAL, SYSTEM
from headrift.internals.components import COMPONENTS
from headrift.internals.estimates import Estimate, Estimates
from headrift.report import plots
from headrift.stats import Floats

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#595959")
LAYER = "layer (0: nearest the input)"


def lines(
    values: Estimates | Floats, names: Sequence[str], ylabel: str, other: Floats | None = None, other_name: str = "",
    xlabel: str = LAYER,
) -> Figure:  # fmt: skip
    """A line for each name over layers or steps [n, names], with its interval; dashed: the other values."""
    figure, axes = plots.one_panel(3.6)
    value = values.value if isinstance(values, Estimates) else values
    for i, (name, colour) in enumerate(zip(names, _COLOURS)):
        axes.plot(value[:, i], color=colour, label=name)
        if isinstance(values, Estimates):
            low, high = values.low[:, i], values.high[:, i]
            axes.fill_between(np.arange(len(value)), low, high, color=colour, alpha=0.2, linewidth=0)
        if other is not None:
            axes.plot(other[:, i], color=colour, linestyle="--", linewidth=1)
    if other is not None:
        axes.plot([], [], color="#333333", linestyle="--", linewidth=1, label=other_name)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend(fontsize="small", loc="best")
    return figure


def by_system(estimates: Estimates, systems: Sequence[str]) -> Figure:
    """Cosine [systems, components] as a heatmap with its numbers."""
    figure, axes = plots.one_panel(1.2 + 0.3 * len(systems), least=2.4)
    values = estimates.value
    image = axes.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": "small"}
    for i, j in np.ndindex(*values.shape):
        axes.text(j, i, f"{values[i, j]:.2f}", color="black" if values[i, j] > middle else "white", **look)
    axes.set_xticks(range(len(COMPONENTS)), COMPONENTS)
    axes.set_yticks(range(len(systems)), [short(name) for name in systems], parse_math=False)
    figure.colorbar(image, ax=axes, label="cosine, mean over layers and prompts")
    return figure


def lengths(changes: Changes, measure: str, ylabel: str) -> Figure:
    """Mean effect of each system prompt, and of the neutral text of its length, over its tokens."""
    figure, axes = plots.one_panel(3.8)
    tokens = np.nanmean(changes.numbers[SYSTEM, "system_tokens"][:, changes.own], axis=0)
    rows = (("system prompt", SYSTEM, _COLOURS[0], "o"), ("neutral text", NEUTRAL, _COLOURS[1], "s"))
    for name, comparison, colour, marker in rows:
        means = np.nanmean(changes.effect(measure, comparison)[:, changes.own], axis=0)
        axes.scatter(tokens, means, color=colour, marker=marker, s=26, label=name)
    axes.set(xscale="log", xlabel="tokens of the system prompt", ylabel=f"{ylabel}, mean over prompts")
    axes.legend(fontsize="small", loc="upper left")
    return figure


def forest(rows: Iterable[tuple[str, Estimate]], xlabel: str) -> Figure:
    """Estimates with their intervals, one below the other; coloured if the interval leaves out 0."""
    return plots.forest([(name, one.value, one.interval) for name, one in rows], xlabel, 0.0, (_COLOURS[0],) * 2)


def heads(mass: Floats) -> Figure:
    """A mass [layers, heads] as a heatmap."""
    figure, axes = plots.one_panel(1.4 + 0.11 * len(mass), least=2.6)
    image = axes.imshow(mass, aspect="auto", cmap="viridis", interpolation="nearest", vmin=0)
    axes.set(xlabel="head", ylabel=LAYER)
    axes.locator_params(integer=True)
    figure.colorbar(image, ax=axes, label="part of the attention")
    return figure
