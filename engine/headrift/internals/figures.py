"""Figures of what was measured, one panel each. Colours (Okabe and Ito's, and viridis) as elsewhere in headrift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from headrift.figures import new_figure, short
from headrift.internals.comparing import NEUTRAL, SYSTEM
from headrift.internals.components import COMPONENTS
from headrift.internals.estimates import Figure, Figures, Floats
from headrift.internals.tables import Compared
from headrift.report.plots import WIDTH

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#595959")
LAYER = "layer (0: nearest the input)"


def by_layer(
    system: Figures, neutral: Figures, what: str, names: Sequence[str] = COMPONENTS, place: Any = "upper left"
) -> Drawing:
    """A line a component, or other name, over layers, with its interval; dashed: with neutral text instead of the
    system prompt. place: of the legend."""
    figure, axes = _one(3.6)
    layers = np.arange(len(system.value))
    for i, (name, colour) in enumerate(zip(names, _COLOURS)):
        axes.plot(layers, system.value[:, i], color=colour, label=name)
        axes.fill_between(layers, system.low[:, i], system.high[:, i], color=colour, alpha=0.2, linewidth=0)
        axes.plot(layers, neutral.value[:, i], color=colour, linestyle="--", linewidth=1)
    axes.plot([], [], color="#333333", linestyle="--", linewidth=1, label="with neutral text")
    axes.set(xlabel=LAYER, ylabel=what)
    axes.legend(fontsize="small", loc=place)
    return figure


def cka(value: Floats, chance: Floats) -> Drawing:
    """CKA by layer, a line a component; dotted: with the prompts in random order."""
    figure, axes = _one(3.6)
    for i, (name, colour) in enumerate(zip(COMPONENTS, _COLOURS)):
        axes.plot(value[:, i], color=colour, label=name)
        axes.plot(chance[:, i], color=colour, linestyle=":", linewidth=1)
    axes.plot([], [], color="#333333", linestyle=":", linewidth=1, label="by chance")
    axes.set(xlabel=LAYER, ylabel="linear CKA over prompts", ylim=(0, 1.02))
    axes.legend(fontsize="small", loc="upper left")
    return figure


def by_system(figures: Figures, systems: Sequence[str]) -> Drawing:
    """Cosine [systems, components] as a heatmap with its numbers."""
    figure, axes = _one(1.2 + 0.3 * len(systems), least=2.4)
    image = axes.imshow(figures.value, aspect="auto", cmap="viridis", interpolation="nearest")
    middle = (np.nanmin(figures.value) + np.nanmax(figures.value)) / 2
    for i, j in np.ndindex(*figures.value.shape):
        colour = "black" if figures.value[i, j] > middle else "white"
        axes.text(j, i, f"{figures.value[i, j]:.2f}", ha="center", va="center", color=colour, fontsize="small")
    axes.set_xticks(range(len(COMPONENTS)), COMPONENTS)
    axes.set_yticks(range(len(systems)), [short(name) for name in systems], parse_math=False)
    axes.figure.colorbar(image, ax=axes, label="cosine, mean over layers and prompts")
    return figure


def correlations(figures: Figures, what: str) -> Drawing:
    """A correlation by layer, a line a component with its interval."""
    figure, axes = _one(3.6)
    layers = np.arange(len(figures.value))
    for i, (name, colour) in enumerate(zip(COMPONENTS, _COLOURS)):
        axes.plot(layers, figures.value[:, i], color=colour, label=name)
        axes.fill_between(layers, figures.low[:, i], figures.high[:, i], color=colour, alpha=0.2, linewidth=0)
    axes.axhline(0, color="#999999", linewidth=0.8)
    axes.set(xlabel=LAYER, ylabel=what)
    axes.legend(fontsize="small", loc="upper left")
    return figure


def lengths(of: Compared, measure: str, words: str) -> Drawing:
    """The mean effect of each system prompt and of the neutral text of its length, over its tokens."""
    figure, axes = _one(3.8)
    tokens = np.nanmean(of.numbers[SYSTEM, "system_tokens"][:, of.own], axis=0)
    for name, which, colour, marker in (
        ("system prompt", SYSTEM, _COLOURS[0], "o"),
        ("neutral text", NEUTRAL, _COLOURS[1], "s"),
    ):
        values = of.effect(measure, which)[:, of.own]
        axes.scatter(tokens, np.nanmean(values, axis=0), color=colour, marker=marker, s=26, label=name)
    axes.set_xscale("log")
    axes.set(xlabel="tokens of the system prompt", ylabel=f"{words}, mean over prompts")
    axes.legend(fontsize="small", loc="upper left")
    return figure


def forest(rows: Sequence[tuple[str, Figure]], what: str) -> Drawing:
    """Names with a number and its interval, one below the other, and a line at 0; filled: the interval leaves out 0."""
    figure, axes = _one(1.0 + 0.3 * len(rows), least=2.2)
    for place, (_, of) in enumerate(rows):
        if of.interval is not None:
            axes.plot(of.interval, [place, place], color="#333333", linewidth=1.6, solid_capstyle="butt")
        colour = _COLOURS[0] if of.shown else "#777777"
        axes.plot(of.value, place, "o", color=colour, markerfacecolor=colour if of.shown else "white", markersize=6)
    axes.axvline(0, color="#999999", linewidth=1, linestyle=":")
    axes.set_yticks(range(len(rows)), [short(name, 34) for name, _ in rows], parse_math=False)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(what)
    axes.grid(axis="x", alpha=0.3)
    return figure


def lines(values: Mapping[str, Floats], what: str, over: str = LAYER) -> Drawing:
    """A line for each name over layers, or over something else."""
    figure, axes = _one(3.6)
    for (name, of), colour in zip(values.items(), _COLOURS):
        axes.plot(of, color=colour, label=name)
    axes.set(xlabel=over, ylabel=what)
    axes.legend(fontsize="small", loc="upper left")
    return figure


def heads(mass: Floats) -> Drawing:
    """A mass [layers, heads] as a heatmap."""
    figure, axes = _one(1.4 + 0.11 * len(mass))
    image = axes.imshow(mass, aspect="auto", cmap="viridis", interpolation="nearest", vmin=0)
    axes.set(xlabel="head", ylabel=LAYER)
    axes.locator_params(integer=True)
    axes.figure.colorbar(image, ax=axes, label="part of the attention")
    return figure


def _one(height: float, least: float = 2.6) -> tuple[Drawing, Axes]:
    figure: Any = new_figure(WIDTH, max(least, height))
    return figure, figure.subplots()
