"""Why a row scored as it did: its text, its place among the run's scores, the layers and steps that matter most.

With a calibration also whether the row is flagged, and which heads a readout or novelty flags it by.
"""

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

from headrift.calibration.artifact import Calibration, Prediction
from headrift.runs.detector_input import prompts_of_batch, values_of
from headrift.runs.reading import RunError, ScoreRun, open_run
from headrift.signal import ScoreRange
from headrift.signals import signals
from headrift.signals.detectors import Novelty, Readout
from headrift.terminal import print_table, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_SHADES = " ░▒▓█"  # from little to much, told apart without colours
_MAX_ROWS, _MAX_STEPS, _MAX_HEADS = 32, 16, 32
_MAX_TEXT = 2000  # characters of a prompt or an answer that are printed
_TOP = 3
_TOP_HEADS = 5


@dataclass(frozen=True, slots=True)
class Detected:
    """What a calibration says of a row; heads: what each head adds [layers, heads], of a readout or novelty."""

    calibration: Calibration
    prediction: Prediction
    heads: NDArray[np.float64] | None

    @property
    def verdict(self) -> str:
        """Whether the row is flagged, and by what."""
        value, threshold = self.prediction.detector, self.calibration.threshold
        if value is None:
            return "not flagged: no value"
        flagged, sign = ("FLAGGED", ">=") if self.prediction.flagged else ("not flagged", "<")
        return f"{flagged}: value {value:.4f} {sign} threshold {threshold:.4f}, p = {self.prediction.p_value:.3g}"

    @property
    def sum(self) -> str:
        """How the value comes of what the heads add."""
        detector, total = self.calibration.detector, 0.0 if self.heads is None else self.heads.sum()
        if isinstance(detector, Readout):
            return f"value (log-odds of an attack) = intercept {detector.intercept:+.4f} + heads {total:+.4f}"
        return f"value (distance from benign prompts) = square root of the heads' sum, {total:.4f}"


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
    detected: Detected | None = None

    @property
    def has_window(self) -> bool:
        """Whether the run has steps that are scored."""
        return not self.score_range.window.empty

    @property
    def layers(self) -> tuple[int, int]:
        return self.score_range.layers(self.instability.shape[1])

    @property
    def scored(self) -> NDArray[np.float64]:
        """The cells [steps, layers] that the score is the mean of."""
        window = self.score_range.window
        return self.instability[window.start : window.end + 1, slice(*self.layers)]


def explain(folder: Path, row_id: str, calibration: Calibration | None = None) -> Explanation:
    """Explain the row with this id.

    Raises:
        RunError: The folder is not a run, has no such row among its parts, or not what the calibration reads.
        CalibrationError: The calibration is of another model, window or layers.
    """
    run = open_run(folder, finished=False)
    if calibration is not None:
        own = run.score_range
        calibration.check(run.model, own.window, own.drop_shallow, own.drop_deep, run.replay)
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
        detected=None if calibration is None else _detect(calibration, rows.slice(0, 1), run),
    )


def _detect(calibration: Calibration, row: pa.Table, run: ScoreRun) -> Detected:
    """What the calibration says of one row of the run."""
    detector = calibration.detector
    prompts = prompts_of_batch(row.combine_chunks().to_batches()[0], run, {detector.reads})
    (value,) = values_of(prompts, detector)
    if np.isnan(value):
        return Detected(calibration, calibration.judge(None), None)
    heads = detector.contributions(prompts)[0] if isinstance(detector, Readout | Novelty) else None
    return Detected(calibration, calibration.judge(float(value)), heads)


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

    row, window, detected = explanation.row, explanation.score_range.window, explanation.detected
    layers = explanation.layers if explanation.has_window else (0, 0)
    if detected is not None:
        line(detected.verdict)
        line(f"detector: {detected.calibration.label}\n")
    line(", ".join(filter(None, [row["id"], row["label"], row["category"], *(row["flags"] or [])])))
    line(f"{row['source']}, row {row['row']}")
    if "text" in row:
        for name, text in (("prompt", row["prompt"] or ""), ("answer", row["text"] or "")):
            shown = text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}... ({len(text):,} characters)"
            if name == "prompt" or explanation.has_window:
                line(f"\n{name}: {shown}")
    else:
        why = "the run left texts out (--redact)" if explanation.redacted else "score with --save text to keep them"
        line(f"prompt and answer were not kept: {why}")
    line()
    if not explanation.has_window:
        line(f"no score: {row['reason']} (the run recorded step 0, the prompt's last token, alone)")
    elif row["score"] is None:
        line(f"no score: {row['reason']} (the answer has steps 0 to {row['n_steps']}, the window is {window})")
    else:
        place = f"higher than or equal to {explanation.percentile:.1f}% of this run's {explanation.n_scores:,} scores"
        line(f"score {row['score']:.4f}: {place}")
        line("contributing most (mean instability, part of the score):")
        line(f"  layers {_top(explanation.scored, 0, layers[0])}")
        line(f"  steps  {_top(explanation.scored, 1, window.start)}")
    known = [
        f"{entry.label} {row[entry.name]:.3f}" for entry in signals(column=True) if row.get(entry.name) is not None
    ]
    known += [f"{entry.label} {row[entry.name]:,}" for entry in signals(length=True) if row.get(entry.name)]
    for text in wrap(f"signals: {', '.join(known)}", 80) if known else ():
        line(text)
    if detected is not None and detected.heads is not None:
        line(f"\n{detected.sum}")
        print_table(console, ("heads for a flag", "adds", "heads against", "adds"), _top_heads(detected.heads))
        line()
        for heatmap_line in _heatmaps({"what each head adds,": detected.heads.T}, (0, 0), signed=True):
            console.print(heatmap_line)
        line("heads across, layers down; + for a flag, - against, darker: more")
    line()
    panels = {"instability": explanation.instability}
    if explanation.share is not None:
        panels["mean share of the heads"] = explanation.share
    for heatmap_line in _heatmaps(panels, layers):
        console.print(heatmap_line)
    scored = f"; scored: steps {window} and layers {layers[0]} to {layers[1] - 1} (marked |)"
    line(f"steps across, layers down{scored}" if explanation.has_window else "step 0, layers down")
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


def _top_heads(heads: NDArray[np.float64]) -> list[tuple[str, str, str, str]]:
    """Rows of a table: the heads that add most, and those that take most away."""
    order = np.argsort(-heads, axis=None, kind="stable")

    def cells(flat: int, *, above: bool) -> tuple[str, str]:
        layer, head = np.unravel_index(flat, heads.shape)
        value = heads[layer, head]
        return (f"layer {layer}, head {head}", f"{value:+.3f}") if (value > 0) == above and value else ("", "")

    pairs = zip(order[:_TOP_HEADS], order[::-1][:_TOP_HEADS])
    return [(*cells(most, above=True), *cells(least, above=False)) for most, least in pairs]


def _heatmaps(
    panels: Mapping[str, NDArray[np.float64]], layers: tuple[int, int], *, signed: bool = False
) -> list[Text]:
    """Draw panels next to each other, two columns per step; neighbours are averaged if there are too many.

    Args:
        panels: values [steps, layers] by name.
        layers: the scored ones, marked.
        signed: draw numbers on both sides of 0, each with its sign; the panel's columns are heads.
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_hex
    from rich.text import Text

    from headrift.figures import diverging

    steps, n_layers = next(iter(panels.values())).shape
    down, across = -(-n_layers // _MAX_ROWS), -(-steps // (_MAX_HEADS if signed else _MAX_STEPS))
    width = max(2 * -(-steps // across), *(len(name) + 14 for name in panels)) + 2
    tops = range(0, n_layers, down)
    lines = [Text("        "), Text("layer   ")]
    lines += [Text(f"{top:>5} {'|' if layers[0] <= top < layers[1] else ' '} ") for top in tops]
    marks = "".join(f"{step:>2}" if step < 100 else "  " for step in range(0, steps, across))
    colours = diverging() if signed else colormaps["viridis"]
    for name, values in panels.items():
        valid = values[~np.isnan(values)]
        low, high = (float(valid.min()), float(valid.max())) if valid.size else (0.0, 0.0)
        if signed:
            high = max(high, -low)
            low = -high
        lines[0].append(f"{name} {low:.2f}{' to ' if signed else '-'}{high:.2f}".ljust(width))
        lines[1].append(marks.ljust(width))
        for top, text in zip(tops, lines[2:]):
            for left in range(0, steps, across):
                block = values[left : left + across, top : top + down]
                cell = block[~np.isnan(block)]
                if not cell.size:
                    text.append("· ")
                    continue
                part = (float(cell.mean()) - low) / (high - low) if high > low else 0.0  # dark for little, then bright
                text.append(_signed(part) if signed else _shade(part) * 2, f"{to_hex(colours(part))} on #202020")
            text.append(" " * (width - len(marks)))
    for text in lines:
        text.rstrip()
    return lines


def _shade(part: float) -> str:
    return _SHADES[min(int(part * len(_SHADES)), len(_SHADES) - 1)]


def _signed(part: float) -> str:
    """A sign and a shade for a number from 0 (the lowest) over 0.5 (nothing) to 1."""
    shade = _shade(abs(2 * part - 1))
    return "  " if shade == " " else ("+" if part > 0.5 else "-") + shade


def write_png(path: Path, explanation: Explanation) -> None:
    """Write the heatmaps as a PNG file. OSError if that fails."""
    from headrift.figures import heatmaps_png

    panels = {"instability (std of the heads' share)": explanation.instability}
    if explanation.share is not None:
        panels["mean over the heads of the system prompt's share"] = explanation.share
    row, window, detected = explanation.row, explanation.score_range.window, explanation.detected
    title, heads = f"{row['id']}: " + ("no score" if row["score"] is None else f"score {row['score']:.4f}"), {}
    if detected is not None:
        title = f"{detected.verdict}; {row['id']}"
        heads = {} if detected.heads is None else {"what each head adds (orange: for a flag)": detected.heads}
    window_steps = (window.start, window.end)
    heatmaps_png(path, panels, window=window_steps, layers=explanation.layers, title=title, heads=heads)
