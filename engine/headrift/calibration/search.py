"""Which window and layers tell attacks from benign prompts best, of all there are.

Instability is summed once over steps and layers (a summed-area table), so that the score of any cell - a window and a
trim of the layers - takes four looks a row. Each row's score is put into one of 255 bins of its cell once; after that
an AUROC is a histogram, also where rows count several times (bootstrap) or are left out (folds). Bins only choose: what
is chosen is measured without them.

Of cells that are about as good as the best, the one that is the mean of most is chosen: with few samples the best of
thousands is mostly lucky, and a short window that shone in part A fades on other prompts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import product
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from headrift import signal
from headrift.signal import ScoreRange
from headrift_kernels.cpu.compile import kernel

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]

_SHALLOW = (0.25, 0.0, 0.1, 0.2, 0.33, 0.4, 0.5)  # the defaults first: they win ties
_DEEP = (0.15, 0.0, 0.05, 0.1, 0.2, 0.3, 0.4)
_MOST_STEPS = 160  # of more steps, windows begin and end at this many, evenly spread
_BINS = 256  # the lowest is for rows without a score
_ABOUT = 0.5  # "about as good": within so many standard errors of the best AUROC
_WIDTH = 4.0  # bins cover the mean -+ so many standard deviations; what lies beyond is in the outermost ones


def grid(steps: int, n_layers: int) -> list[ScoreRange]:
    """All windows in steps 1 to `steps`, with all trims that differ. The first of equals is chosen, so windows
    that end early come first, and trims near the default's."""
    trims: dict[tuple[int, int], tuple[float, float]] = {}
    for shallow, deep in product(_SHALLOW, _DEEP):
        trims.setdefault(signal.layer_range(n_layers, shallow, deep), (shallow, deep))
    at = np.unique(np.linspace(1, steps, min(steps, _MOST_STEPS)).round().astype(int)).tolist()
    windows = [signal.Window(start, end) for end in at for start in at if start <= end]
    return [ScoreRange(window, *trim) for window in windows for trim in trims.values()]


class Sums:
    """Sums and counts of instability over the steps 1..t and layers 0..l, of n rows."""

    def __init__(self, n: int, steps: int, layers: int) -> None:
        shape = (steps + 1, layers + 1, n)
        self.sums, self.counts = np.zeros(shape), np.zeros(shape, np.int32)

    def put(self, rows: slice, instability: NDArray[np.float32]) -> None:
        """Rows' instability [rows, steps + 1, layers], step 0 first, NaN where not counted."""
        cells = np.moveaxis(instability[:, 1:], 0, -1)
        there = ~np.isnan(cells)
        self.sums[1:, 1:, rows] = np.where(there, cells, 0).astype(np.float64).cumsum(axis=0).cumsum(axis=1)
        self.counts[1:, 1:, rows] = there.cumsum(axis=0, dtype=np.int32).cumsum(axis=1)

    def of(self, rows: Ints) -> Sums:
        """A copy, of these rows only."""
        part = Sums.__new__(Sums)
        part.sums, part.counts = self.sums[..., rows], self.counts[..., rows]
        return part

    def scores(self, cell: ScoreRange) -> Floats:
        """The scores of all rows, as signal.score has them but for rounding; NaN for none."""
        first, last, start, end = self.bounds(cell)
        found = np.empty(self.sums.shape[-1])
        _cell_scores(self.sums, self.counts, first, last, start, end, found)
        return found

    def bounds(self, cell: ScoreRange) -> tuple[int, int, int, int]:
        """A cell as places in the table."""
        return cell.window.start - 1, cell.window.end, *cell.layers(self.sums.shape[1] - 1)


class Search:
    """All cells' binned scores of the rows that choose.

    attack, fold: of each row. The rows are taken to be each a sample of its own; weights say how often one counts.
    """

    def __init__(
        self, sums: Sums, cells: Sequence[ScoreRange], attack: NDArray[np.bool_], fold: Ints, n_folds: int
    ) -> None:
        self.cells = list(cells)
        segment = fold * 2 + attack
        self._order = np.argsort(segment, kind="stable")
        self._ends = np.searchsorted(segment[self._order], np.arange(n_folds * 2 + 1))
        ordered = sums.of(self._order)
        bounds = np.array([sums.bounds(cell) for cell in self.cells])
        self._size = (bounds[:, 1] - bounds[:, 0]) * (bounds[:, 3] - bounds[:, 2])
        self._bins = np.empty((len(self.cells), len(attack)), np.uint8)

        def fill(part: slice) -> None:
            _bin(ordered.sums, ordered.counts, bounds[part], self._bins[part])

        self._threads(fill)
        self._n_folds = n_folds

    def aurocs(self, weights: Ints) -> Floats:
        """Each cell's AUROC, no score lowest, on the rows outside each fold, and on all of them: [cells, folds + 1].
        0.5 where a class has no rows."""
        found = np.empty((len(self.cells), self._n_folds + 1))
        ordered = weights[self._order]

        def fill(part: slice) -> None:
            _aurocs(self._bins[part], ordered, self._ends, found[part])

        self._threads(fill)
        return found

    def best(self, weights: Ints) -> list[ScoreRange]:
        """The cell chosen outside each fold, and on all rows: of those with about the highest AUROC the largest, and of
        these the first."""
        samples = np.array([[self._times(weights, fold, of) for of in (0, 1)] for fold in range(self._n_folds)])
        outside = np.concatenate([samples.sum(axis=0) - samples, samples.sum(axis=0, keepdims=True)])
        chosen = []
        for aurocs, (n_benign, n_attack) in zip(self.aurocs(weights).T, outside):
            highest = float(aurocs.max())
            enough = aurocs >= highest - _ABOUT * standard_error(highest, int(n_attack), int(n_benign))
            chosen.append(self.cells[int(np.where(enough, self._size, 0).argmax())])
        return chosen

    def _times(self, weights: Ints, fold: int, attack: int) -> int:
        """How many samples of a class a fold has."""
        start, end = self._ends[fold * 2 + attack : fold * 2 + attack + 2]
        return int(weights[self._order[start:end]].sum())

    def _threads(self, work: Callable[[slice], None]) -> None:
        size = max(1, len(self.cells) // (8 * self._pool._max_workers))
        parts = [slice(at, at + size) for at in range(0, len(self.cells), size)]
        for _ in self._pool.map(work, parts):
            pass

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(os.cpu_count())


def standard_error(auroc: float, n_attack: int, n_benign: int) -> float:
    """Of an AUROC from so many samples (Hanley and McNeil 1982); infinite without samples of both classes."""
    if not n_attack or not n_benign:
        return float("inf")
    of_attack, of_benign = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
    variance = auroc * (1 - auroc) + (n_attack - 1) * (of_attack - auroc**2) + (n_benign - 1) * (of_benign - auroc**2)
    return float(np.sqrt(max(variance, 0.0) / (n_attack * n_benign)))


@kernel(nogil=True)
def _cell_scores(sums, counts, first, last, start, end, out):
    for i in range(out.shape[0]):
        n = counts[last, end, i] - counts[first, end, i] - counts[last, start, i] + counts[first, start, i]
        total = sums[last, end, i] - sums[first, end, i] - sums[last, start, i] + sums[first, start, i]
        out[i] = total / n if n > 0 else np.nan


@kernel(nogil=True)
def _bin(sums, counts, bounds, bins):
    """Bin 0 for no score, else 1 to 255, from low to high."""
    scores = np.empty(bins.shape[1])
    for c in range(bins.shape[0]):
        _cell_scores(sums, counts, bounds[c, 0], bounds[c, 1], bounds[c, 2], bounds[c, 3], scores)
        n = 0
        mean = 0.0
        for x in scores:
            if x == x:
                n += 1
                mean += x
        mean /= max(n, 1)
        spread = 0.0
        for x in scores:
            if x == x:
                spread += (x - mean) ** 2
        spread = max(np.sqrt(spread / max(n, 1)), 1e-12)
        low = mean - _WIDTH * spread
        scale = (_BINS - 1) / (2 * _WIDTH * spread)
        for i in range(scores.shape[0]):
            x = scores[i]
            bins[c, i] = 1 + min(max(int((x - low) * scale), 0), _BINS - 2) if x == x else 0


@kernel(nogil=True)
def _aurocs(bins, weights, ends, out):
    """ends: where the rows of fold 0 benign, fold 0 attack, fold 1 benign, ... begin, and the last end."""
    n_folds = out.shape[1] - 1
    counts = np.empty((n_folds + 1, 2, _BINS), np.int64)
    for c in range(bins.shape[0]):
        counts[:] = 0
        for segment in range(2 * n_folds):
            of = counts[segment // 2, segment % 2]
            for i in range(ends[segment], ends[segment + 1]):
                of[bins[c, i]] += weights[i]
        for fold in range(n_folds):
            counts[n_folds] += counts[fold]
        for fold in range(n_folds + 1):
            below = 0
            attacks = 0
            doubled = 0
            for b in range(_BINS):
                benign = counts[n_folds, 0, b]
                attack = counts[n_folds, 1, b]
                if fold < n_folds:
                    benign -= counts[fold, 0, b]
                    attack -= counts[fold, 1, b]
                doubled += attack * (2 * below + benign)
                below += benign
                attacks += attack
            pairs = attacks * below
            out[c, fold] = doubled / (2.0 * pairs) if pairs > 0 else 0.5
