"""Why a row scored as it did: its text, its place among the run's scores, and the layers and steps that carry it."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from headrift import signal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

# From little to much: told apart without colours.
_SHADES = " ░▒▓█"
_MOST_ROWS, _MOST_STEPS = 32, 16
_MOST_TEXT = 2000  # characters of a prompt or an answer that are printed
_TOP = 3


class ExplainError(ValueError):
    """The run or the row is not there, or cannot be read. The message says what to do."""


@dataclass(frozen=True, slots=True)
class Explained:
    """A row of a run's parts with all its columns, and what it is measured by.

    instability: [steps, layers], NaN where not counted; share: mean of the heads' shares [steps, layers], None where
    the run did not save them. percentile: percent of the run's scores that are at most this one, None without a score;
    n_scores: how many there are. kept: whether the run kept texts; redacted: whether it was told not to.
    """

    row: Mapping[str, Any]
    instability: NDArray[np.float64]
    share: NDArray[np.float64] | None
    window: signal.Window
    layers: tuple[int, int]
    percentile: float | None
    n_scores: int
    kept: bool
    redacted: bool

    @property
    def scored(self) -> NDArray[np.float64]:
        """The cells of the window and the trimmed layers, [steps, layers], which the score is the mean of."""
        return self.instability[self.window.start : self.window.end + 1, slice(*self.layers)]


def explain(run: Path, wanted: str) -> Explained:
    """The row with this id. ExplainError where the folder is no finished run or has no such row among its parts."""
    import pyarrow as pa
    import pyarrow.dataset as ds

    settings = _settings(run)
    parts = sorted(run.glob("part-*.parquet"))
    if not parts:
        raise ExplainError(f"{run} has no parts: no row of this run was scored")
    try:
        dataset = ds.dataset(parts)
        found = dataset.to_table(filter=ds.field("id") == wanted)
        if not found.num_rows:
            raise ExplainError(_not_there(run, wanted, dataset))
        scores = dataset.to_table(columns=["score"])["score"].drop_null().to_numpy()
    except (pa.ArrowException, OSError) as error:
        raise ExplainError(f"the parts in {run} cannot be read: {str(error).splitlines()[0]}") from error
    row = found.slice(0, 1).to_pylist()[0]
    about = json.loads(dataset.schema.metadata[b"headrift"])
    n_layers, n_heads = about["layers"], about["heads"]
    instability = np.array(row.pop("instability"), np.float64).reshape(-1, n_layers)
    share = None
    if row.get("shares") is not None:
        share = np.array(row.pop("shares"), np.float64).reshape(-1, n_layers, n_heads).mean(axis=2)
    score = row["score"]
    return Explained(
        row=row,
        instability=instability,
        share=share,
        window=signal.Window.parse(settings["window"]),
        layers=signal.layer_range(n_layers, settings["drop_shallow"], settings["drop_deep"]),
        percentile=None if score is None else float((scores <= score).mean() * 100),
        n_scores=len(scores),
        kept="text" in found.schema.names,
        redacted=settings.get("redact", False),
    )


def _settings(run: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((run / "run.json").read_text(encoding="utf-8"))["settings"])
    except FileNotFoundError:
        raise ExplainError(f"{run} is no run (no run.json): give a folder that `headrift score` wrote") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExplainError(f"{run / 'run.json'} cannot be read: {error}") from error


def _not_there(run: Path, wanted: str, dataset: Any) -> str:
    import pyarrow.dataset as ds

    rejects = sorted(run.glob("rejects-*.parquet"))
    if rejects:
        row = ds.dataset(rejects).to_table(filter=ds.field("id") == wanted).slice(0, 1).to_pylist()
        if row:
            return f"the row {wanted!r} was rejected, {row[0]['reason']}: {printable(row[0]['detail'])}"
    some = dataset.head(3, columns=["id"])["id"].to_pylist()
    return f"no row of {run} has the id {wanted!r}; ids there look like {', '.join(map(repr, some))}"


def show(console: Console, of: Explained) -> None:
    """Print it, in 80 columns."""

    def line(text: str = "") -> None:
        console.print(printable(text), markup=False, highlight=False)

    row = of.row
    about = [row["id"], row["label"], row["category"], *(row["flags"] or [])]
    line(", ".join(filter(None, about)))
    line(f"{row['source']}, row {row['row']}")
    _show_texts(line, of)
    _show_score(line, of)
    panels = {"instability": of.instability} | ({} if of.share is None else {"mean share of the heads": of.share})
    console.print()
    for text in _heatmaps(panels, of.layers):
        console.print(text)
    line(f"steps across, layers down; scored: steps {of.window} and layers {_span(of.layers)} (marked |)")
    if of.share is None:
        line("the heads' shares were not kept: score with --save shares to see them too")


def _show_texts(line: Any, of: Explained) -> None:
    if not of.kept:
        why = "the run was told to keep none (--redact)" if of.redacted else "score with --save text to keep them"
        line(f"prompt and answer were not kept: {why}")
        return
    for name, key in (("prompt", "prompt"), ("answer", "text")):
        text = of.row[key] or ""
        line(f"\n{name}: {text if len(text) <= _MOST_TEXT else f'{text[:_MOST_TEXT]}... ({len(text):,} characters)'}")


def _show_score(line: Any, of: Explained) -> None:
    row = of.row
    line()
    if row["score"] is None:
        line(f"no score: {row['reason']} (the answer has steps 0 to {row['n_steps']}, the window is {of.window})")
        return
    line(f"score {row['score']:.4f}: higher than or equal to {of.percentile:.1f}% of this run's {of.n_scores:,} scores")
    first_step, first_layer = of.window.start, of.layers[0]
    line("carried most by (mean instability, part of the score):")
    line(f"  layers {_top(of.scored, 0, first_layer)}")
    line(f"  steps  {_top(of.scored, 1, first_step)}")


def _top(cells: NDArray[np.float64], axis: int, first: int) -> str:
    """The layers (axis 0 is averaged) or steps with the highest means, and each one's part of the whole score."""
    counted = ~np.isnan(cells)
    sums = np.where(counted, cells, 0).sum(axis=axis)
    n = counted.sum(axis=axis)
    means = np.divide(sums, n, out=np.full(len(n), -1.0), where=n > 0)
    total = sums.sum() or 1.0
    best = [i for i in np.argsort(-means, kind="stable")[:_TOP] if n[i]]
    return ", ".join(f"{first + i} ({means[i]:.3f}, {sums[i] / total:.0%})" for i in best)


def _heatmaps(panels: Mapping[str, NDArray[np.float64]], layers: tuple[int, int]) -> list[Text]:
    """The panels side by side, two columns to a step; neighbours are averaged where there are too many."""
    from rich.text import Text

    rows, steps = next(iter(panels.values())).T.shape
    down, across = -(-rows // _MOST_ROWS), -(-steps // _MOST_STEPS)
    width = 2 * -(-steps // across)
    width = max(width, *(len(name) + 14 for name in panels))
    lines = [Text("        "), Text("layer   ")]
    marks = "".join(f"{step:>2}" if step < 100 else "  " for step in range(0, steps, across))
    for name, values in panels.items():
        low, high = _limits(values)
        lines[0].append(f"{name} {low:.2f}-{high:.2f}".ljust(width + 2))
        lines[1].append(marks.ljust(width + 2))
    for top in range(0, rows, down):
        inside = layers[0] <= top < layers[1]
        text = Text(f"{top:>5} {'|' if inside else ' '} ")
        for values in panels.values():
            low, high = _limits(values)
            for left in range(0, steps, across):
                cell = values[left : left + across, top : top + down]
                text.append(*_cell(cell[~np.isnan(cell)], low, high))
            text.append(" " * (width + 2 - 2 * -(-steps // across)))
        lines.append(text)
    for text in lines:
        text.rstrip()
    return lines


def _limits(values: NDArray[np.float64]) -> tuple[float, float]:
    there = values[~np.isnan(values)]
    return (float(there.min()), float(there.max())) if there.size else (0.0, 0.0)


def _cell(values: NDArray[np.float64], low: float, high: float) -> tuple[str, str]:
    """Two characters, and their colour: of little (dark) to much (bright)."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    if not values.size:
        return "· ", ""
    part = (float(values.mean()) - low) / (high - low) if high > low else 0.0
    shade = _SHADES[min(int(part * len(_SHADES)), len(_SHADES) - 1)]
    return shade * 2, f"{to_hex(colormaps['viridis'](part))} on #202020"


def write_png(path: Path, of: Explained) -> None:
    """The heatmaps as a PNG file. OSError where it cannot be written."""
    from headrift.figures import heatmaps_png

    panels = {"instability (std of the heads' share)": of.instability}
    if of.share is not None:
        panels["mean over the heads of the system prompt's share"] = of.share
    score = "no score" if of.row["score"] is None else f"score {of.row['score']:.4f}"
    window = (of.window.start, of.window.end)
    heatmaps_png(path, panels, window=window, layers=of.layers, title=f"{of.row['id']}: {score}")


def printable(text: str) -> str:
    """The text with characters that could drive the terminal (a prompt may bring them) spelled out."""
    return "".join(
        character
        if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
        else ascii(character)[1:-1]
        for character in text
    )


def _span(layers: tuple[int, int]) -> str:
    return f"{layers[0]} to {layers[1] - 1}"
