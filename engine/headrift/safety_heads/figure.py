"""The layer x head heatmap of scores, as a PNG file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headrift.figures import new_figure, save, short


def heatmap_png(path: Path, panels: Mapping[str, NDArray[np.float64]], *, title: str) -> None:
    """Scores [layers, heads] by what they are, side by side, on logarithmic scales; hatched: heads that were not asked
    for (NaN). OSError where it cannot be written."""
    from matplotlib.colors import LogNorm

    layers, heads = next(iter(panels.values())).shape
    figure = new_figure(1.2 + len(panels) * max(3.2, 0.22 * heads + 1.8), max(3.2, 0.17 * layers + 1.4))
    for axes, (label, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        there = values[np.isfinite(values) & (values > 0)]
        # Heads span many orders of magnitude; what is below a millionth of the most is as good as nothing.
        most = float(there.max()) if there.size else 1.0
        least = max(float(there.min()) if there.size else most / 10, most * 1e-6)
        least = min(least, most / 10)
        axes.patch.set(hatch="xx", edgecolor="#999999", facecolor="white")
        shown = np.ma.masked_invalid(np.where(np.isfinite(values), np.maximum(values, least), np.nan))
        image = axes.imshow(shown, aspect="auto", interpolation="nearest", cmap="viridis", norm=LogNorm(least, most))
        axes.set(xlabel="head", ylabel="layer (0: nearest the input)")
        axes.locator_params(integer=True)
        figure.colorbar(image, ax=axes, label=label)
    figure.suptitle(short(title, 90), fontsize=10, parse_math=False, wrap=True)
    save(figure, path)
