"""What detectors and their baselines read of finished runs: signals, shares' log-odds, focus and texts of prompts."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from headrift.runs.reading import RunError, ScoreRun, floats
from headrift.signals import signals
from headrift.signals.detectors import AnyDetector
from headrift.signals.features import Prompts
from headrift.signals.features import logit_shares as logit_shares_of
from headrift.stats import Floats, Ints

# What a run may lack of what detectors read, and what to do about it.
NOT_KEPT = {
    "logit_shares": "heads' shares: score it again, which keeps them",
    "focus_heads": "heads' focus: score with --save focus",
}


def detector_columns(run: ScoreRun, reads: Collection[str]) -> list[str]:
    """The columns of a run that hold what detectors read (`Signal.reads`)."""
    values = [entry.name for entry in signals(column=True) if entry.detects]
    columns = ["score", "system_tokens", "prompt_tokens", *values]
    if "logit_shares" in reads:
        first = next(run.batches(["label", "logit_shares"]), None)
        kept = first is not None and "logit_shares" in first.schema.names
        columns += ["logit_shares"] if kept else ["shares", "instability", "n_steps"]
    return [*columns, "focus_heads"] if "focus_heads" in reads else columns


def read_prompts(runs: Sequence[ScoreRun], reads: Collection[str]) -> Iterator[tuple[int, Prompts]]:
    """Read what detectors need of all rows, batch by batch: the number of each batch's first row, and its prompts."""
    first = 0
    for run in runs:
        for batch in run.batches(detector_columns(run, reads)):
            yield first, prompts_of_batch(batch, run, reads)
            first += batch.num_rows


def read_selected(runs: Sequence[ScoreRun], selected: Ints, reads: Collection[str]) -> Prompts:
    """Read what detectors need of the selected rows, ascending."""
    parts: list[Prompts] = []
    for first, prompts in read_prompts(runs, reads):
        start, stop = np.searchsorted(selected, [first, first + len(prompts)])
        if start < stop:
            parts.append(prompts.take(selected[start:stop] - first))
    return Prompts.joined(parts)


def detector_values(runs: Sequence[ScoreRun], detector: AnyDetector, n: int) -> Floats:
    """A detector's values of all n rows, read batch by batch; instability's are of the runs' own windows.

    Raises:
        RunError: The runs did not keep what the detector reads.
    """
    values = np.full(n, np.nan)
    for first, prompts in read_prompts(runs, {detector.reads}):
        values[first : first + len(prompts)] = values_of(prompts, detector)
    return values


def values_of(prompts: Prompts, detector: AnyDetector) -> Floats:
    """A detector's values [n]. RunError if the run did not keep what it reads."""
    if getattr(prompts, detector.reads) is None:
        raise RunError(f"the calibration reads what the run did not keep, {NOT_KEPT[detector.reads]}")
    return detector.values(prompts)


def read_texts(runs: Sequence[ScoreRun], selected: Ints) -> list[str] | None:
    """Read the prompts' texts of selected rows, ascending; None if a run did not save them."""
    texts: list[str] = []
    first = 0
    for run in runs:
        for batch in run.batches(["label", "prompt"]):
            if "prompt" not in batch.schema.names:
                return None
            start, stop = np.searchsorted(selected, [first, first + batch.num_rows])
            texts += [text or "" for text in batch.column("prompt").take(selected[start:stop] - first).to_pylist()]
            first += batch.num_rows
    return texts


def prompts_of_batch(batch: pa.RecordBatch, run: ScoreRun, reads: Collection[str]) -> Prompts:
    """What detectors read of a batch that has `detector_columns`."""
    values = {entry.name: floats(batch, entry.name) for entry in signals(column=True) if entry.detects}
    layers, heads = run.model.layers, run.model.heads or 1
    blocks = 1 if run.score_range.window.empty else 2
    logit_shares = focus_heads = None
    if "logit_shares" in reads:
        logit_shares = _tensor(batch, "logit_shares", (blocks, layers, heads))
        if logit_shares is None and "shares" in batch.schema.names:
            logit_shares = _from_shares(batch, run, blocks)
    if "focus_heads" in reads:
        focus_heads = _tensor(batch, "focus_heads", (layers, heads))
    with np.errstate(invalid="ignore", divide="ignore"):
        uniform = floats(batch, "system_tokens") / floats(batch, "prompt_tokens")
    return Prompts({"instability": floats(batch, "score"), **values}, uniform, logit_shares, focus_heads)


def _tensor(batch: pa.RecordBatch, name: str, shape: tuple[int, ...]) -> NDArray[np.float32] | None:
    """A column of arrays as one array [rows, *shape], NaN for what a row does not have; None if the run lacks it.

    A row may have fewer of the first axis.

    Raises:
        RunError: An array has another size.
    """
    if name not in batch.schema.names or not pa.types.is_list(batch.schema.field(name).type):
        return None
    column, size = batch.column(name), math.prod(shape)
    sizes = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    unfit = np.flatnonzero((sizes % (size // shape[0]) != 0) | (sizes > size))
    if len(unfit):
        raise RunError(
            f"a row has {sizes[unfit[0]]:,} numbers in {name}, and a model of this shape has {size:,}: the parts do "
            "not fit run.json; score the prompts again"
        )
    result = np.full((batch.num_rows, size), np.nan, np.float32)
    result[np.arange(size) < sizes[:, None]] = column.flatten().to_numpy(zero_copy_only=False)
    return result.reshape(-1, *shape)


def _from_shares(batch: pa.RecordBatch, run: ScoreRun, blocks: int) -> NDArray[np.float32]:
    """The same from the shares of every step, as `--save shares` keeps them."""
    layers, heads = run.model.layers, run.model.heads or 1
    result = np.full((batch.num_rows, blocks, layers, heads), np.nan, np.float32)
    columns = [batch.column(name) for name in ("shares", "instability", "n_steps")]
    for target, share, instability, n_steps in zip(result, *columns):
        if share.is_valid:
            shares = share.values.to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, layers, heads)
            counted = ~np.isnan(instability.values.to_numpy(zero_copy_only=False).reshape(-1, layers))
            known = logit_shares_of(shares, counted, run.score_range.window, n_steps.as_py())
            target[: len(known)] = known
    return result
