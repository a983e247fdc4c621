"""Why a row scored as it did: its text, its place among the run's scores, and the layers and steps that matter most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from numpy.typing import NDArray

from headrift.runs.reading import RunError, open_run
from headrift.signal import ScoreRange
from headrift.signals import signals
from headrift.terminal import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_SHADES = " ░▒▓█"  # from little to much, told apart without colours
_MAX_ROWS, _MAX_STEPS = 32, 16
_MAX_TEXT = 2000  # characters of a prompt or an answer that are printed
_TOP = 3


@dataclass(frozen=True, slots=True)
class Explanation:
    """A row of a run's parts, and what its score is made of."""

    row: Mapping[str, Any]  # its columns
    instability: NDArray[np.float64]  # [steps, layers], NaN if not counted
    share: NDArray[np.float64] | None  # mean of the heads' shares [steps, layers]; None if the run did not save them
    score_range: ScoreRange
    percentile: float | None  # percent of the run's scores that are at most this one; None without a score
    n_scores: int  # of the run
    redacted: bool

    @property
    def layers(self) -> tuple[int, int]:
        return self.score_range.layers(self.instability.shape[1])

    @property
    def scored(self) -> NDArray[np.float64]:
        """The cells [steps, layers] that the score is the mean of."""
        window = self.score_range.window
        return self.instability[window.start : window.end + 1, slice(*self.layers)]


def explain(folder: Path, row_id: str) -> Explanation:
    """Explain the row with this id. RunError if the folder is not a run, or has no such row among its parts."""
    run = open_run(folder, finished=False)
    try:
        dataset = ds.dataset(sorted(folder.glob("part-*.parquet")))
        rows = dataset.to_table(filter=ds.field("id") == row_id)
        if not rows.num_rows:
            raise RunError(_why_not(folder, row_id, dataset))
        scores = dataset.to_table(columns=["score"])["score"].drop_null().to_numpy()
    except (pa.ArrowException, OSError) as error:
        raise RunError(f"the parts in {folder} cannot be read: {str(error).splitlines()[0]}") from error
    row = rows.slice(0, 1).to_pylist()[0]
    layers, heads = run.model.layers, run.model.heads or 1
    share = None
    if row.get("shares") is not None:
        share = np.array(row.pop("shares"), np.float64).reshape(-1, layers, heads).mean(axis=2)
    return Explanation(
        row=row,
        instability=np.array(row.pop("instability"), np.float64).reshape(-1, layers),
        share=share,
        score_range=run.score_range,
        percentile=None if row["score"] is None else float((scores <= row["score"]).mean() * 100),
        n_scores=len(scores),
        redacted=run.about["settings"].get("redact", False),
    )


def _why_not(folder: Path, row_id: str, dataset: ds.Dataset) -> str:
    rejects = sorted(folder.glob("rejects-*.parquet"))
    if rejects:
        rejected = ds.dataset(rejects).to_table(filter=ds.field("id") == row_id).slice(0, 1).to_pylist()
        if rejected:
            return f"the row {row_id!r} was rejected, {rejected[0]['reason']}: {printable(rejected[0]['detail'])}"
    some = dataset.head(3, columns=["id"])["id"].to_pylist()
    return f"no row of {folder} has the id {row_id!r}; ids there look like {', '.join(map(repr, some))}"


def show(console: Console, explanation: Explanation) -> None:
    """Print the explanation, in 80 columns."""

    def line(text: str = "") -> None:
        console.print(printable(text), markup=False, highlight=False)

    row, layers, window = explanation.row, explanation.layers, explanation.score_range.window
    line(", ".join(filter(None, [row["id"], row["label"], row["category"], *(row["flags"] or [])])))
    line(f"{row['source']}, row {row['row']}")
    if "text" in row:
        for name, text in (("prompt", row["prompt"] or ""), ("answer", row["text"] or "")):
            shown = text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}... ({len(text):,} characters)"
            line(f"\n{name}: {shown}")
    else:
        why = "the run left texts out (--redact)" if explanation.redacted else "score with --save text to keep them"
        line(f"prompt and answer were not kept: {why}")
    line()
    if row["score"] is None:
        line(f"no score: {row['reason']} (the answer has steps 0 to {row['n_steps']}, the window is {window})")
    else:
        place = f"higher than or equal to {explanation.percentile:.1f}% of this run's {explanation.n_scores:,} scores"
        line(f"score {row['score']:.4f}: {place}")
        line("contributing most (mean instability, part of the score):")
        line(f"  layers {_top(explanation.scored, 0, layers[0])}")
        line(f"  steps  {_top(explanation.scored, 1, window.start)}")
        known = [(entry.label, row[entry.name]) for entry in signals(column=True) if row.get(entry.name) is not None]
        for text in wrap(f"signals: {', '.join(f'{label} {value:.3f}' for label, value in known)}", 80):
            line(text)
    line()
    panels = {"instability": explanation.instability}
    if explanation.share is not None:
        panels["mean share of the heads"] = explanation.share
    for heatmap_line in _heatmaps(panels, layers):
        console.print(heatmap_line)
    line(f"steps across, layers down; scored: steps {window} and layers {layers[0]} to {layers[1] - 1} (marked |)")
    if explanation.share is None:
        line("the heads' shares were not kept: score with --save shares to see them too")


def _top(cells: NDArray[np.float64], axis: int, first: int) -> str:
    """List the layers (axis 0 is averaged) or steps with the highest means, and each one's part of the score."""
    counted = ~np.isnan(cells)
    sums = np.where(counted, cells, 0).sum(axis=axis)
    n = counted.sum(axis=axis)
    means = np.divide(sums, n, out=np.full(len(n), -1.0), where=n > 0)
    total = sums.sum() or 1.0
    best = [i for i in np.argsort(-means, kind="stable")[:_TOP] if n[i]]
    return ", ".join(f"{first + i} ({means[i]:.3f}, {sums[i] / total:.0%})" for i in best)


def _heatmaps(panels: Mapping[str, NDArray[np.float64]], layers: tuple[int, int]) -> list[Text]:
    """Draw panels next to each other, two columns per step; neighbours are averaged if there are too many."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex
    from rich.text import Text

    steps, n_layers = next(iter(panels.values())).shape
    down, across = -(-n_layers // _MAX_ROWS), -(-steps // _MAX_STEPS)
    width = max(2 * -(-steps // across), *(len(name) + 14 for name in panels)) + 2
    tops = range(0, n_layers, down)
    lines = [Text("        "), Text("layer   ")]
    lines += [Text(f"{top:>5} {'|' if layers[0] <= top < layers[1] else ' '} ") for top in tops]
    marks = "".join(f"{step:>2}" if step < 100 else "  " for step in range(0, steps, across))
    for name, values in panels.items():
        valid = values[~np.isnan(values)]
        low, high = (float(valid.min()), float(valid.max())) if valid.size else (0.0, 0.0)
        lines[0].append(f"{name} {low:.2f}-{high:.2f}".ljust(width))
        lines[1].append(marks.ljust(width))
        for top, text in zip(tops, lines[2:]):
            for left in range(0, steps, across):
                block = values[left : left + across, top : top + down]
                cell = block[~np.isnan(block)]
                if not cell.size:
                    text.append("· ")
                    continue
                part = (float(cell.mean()) - low) / (high - low) if high > low else 0.0  # dark for little, then bright
                shade = _SHADES[min(int(part * len(_SHADES)), len(_SHADES) - 1)]
                text.append(shade * 2, f"{to_hex(colormaps['viridis'](part))} on #202020")
            text.append(" " * (width - len(marks)))
    for text in lines:
        text.rstrip()
    return lines


def write_png(path: Path, explanation: Explanation) -> None:
    """Write the heatmaps as a PNG file. OSError if that fails."""
    from headrift.figures import heatmaps_png

    panels = {"instability (std of the heads' share)": explanation.instability}
    if explanation.share is not None:
        panels["mean over the heads of the system prompt's share"] = explanation.share
    row, window = explanation.row, explanation.score_range.window
    title = f"{row['id']}: " + ("no score" if row["score"] is None else f"score {row['score']:.4f}")
    heatmaps_png(path, panels, window=(window.start, window.end), layers=explanation.layers, title=title)
