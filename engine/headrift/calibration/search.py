"""Which window and layers tell attacks from benign prompts best, of all there are.

Instability is summed once over steps and layers (a summed-area table), so that the score of a candidate - a window and
a trim of the layers - takes four look-ups a row. Each row's score is put into one of 255 bins of its candidate once;
after that an AUROC is a histogram, also if rows count several times (bootstrap) or are left out (folds). Bins only
choose: what is chosen is measured without them.

Of candidates that are about as good as the best, the one that averages most is chosen: with few samples the best of
thousands is mostly lucky, and a short window that shone in part A fades on other prompts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import product

import numpy as np
from numpy.typing import NDArray

from headrift import signal
from headrift.signal import ScoreRange
from headrift.stats import Bools, Floats, Ints
from headrift_kernels.cpu.compile import kernel

_SHALLOW = (0.25, 0.0, 0.1, 0.2, 0.33, 0.4, 0.5)  # the defaults first: they win ties
_DEEP = (0.15, 0.0, 0.05, 0.1, 0.2, 0.3, 0.4)
_MOST_STEPS = 160  # of more steps, windows begin and end at this many, evenly spread
_BINS = 256  # the lowest is for rows without a score
_TOLERANCE = 0.5  # "about as good": within this many standard errors of the best AUROC
_WIDTH = 4.0  # bins cover the mean -+ this many standard deviations; what is beyond is in the outermost ones


def grid(steps: int, n_layers: int) -> list[ScoreRange]:
    """All windows in steps 1 to `steps`, with all trims that differ.

    The first of equals is chosen, so windows that end early come first, and trims near the default's.
    """
    trims: dict[tuple[int, int], tuple[float, float]] = {}
    for shallow, deep in product(_SHALLOW, _DEEP):
        trims.setdefault(signal.layer_range(n_layers, shallow, deep), (shallow, deep))
    bounds = np.unique(np.linspace(1, steps, min(steps, _MOST_STEPS)).round().astype(int)).tolist()
    windows = [signal.Window(start, end) for end in bounds for start in bounds if start <= end]
    return [ScoreRange(window, *trim) for window in windows for trim in trims.values()]


class SumTable:
    """Sums and counts of instability over the steps 1..t and layers 0..l [steps + 1, layers + 1, rows]."""

    def __init__(self, n: int, steps: int, layers: int) -> None:
        shape = (steps + 1, layers + 1, n)
        self.sums, self.counts = np.zeros(shape), np.zeros(shape, np.int32)

    def put(self, rows: slice, instability: NDArray[np.float32]) -> None:
        """Fill in rows' instability [rows, steps + 1, layers], step 0 first, NaN where not counted."""
        cells = np.moveaxis(instability[:, 1:], 0, -1)
        counted = ~np.isnan(cells)
        self.sums[1:, 1:, rows] = np.where(counted, cells, 0).astype(np.float64).cumsum(axis=0).cumsum(axis=1)
        self.counts[1:, 1:, rows] = counted.cumsum(axis=0, dtype=np.int32).cumsum(axis=1)

    def select(self, rows: Ints) -> SumTable:
        """A copy with these rows only."""
        part = SumTable.__new__(SumTable)
        part.sums, part.counts = self.sums[..., rows], self.counts[..., rows]
        return part

    def negated(self) -> SumTable:
        """The same with the sign of every sum turned."""
        part = SumTable.__new__(SumTable)
        part.sums, part.counts = -self.sums, self.counts
        return part

    def scores(self, candidate: ScoreRange) -> Floats:
        """The scores of all rows, as signal.score has them but for rounding; NaN for none."""
        first, last, start, end = self.bounds(candidate)
        scores = np.empty(self.sums.shape[-1])
        _scores(self.sums, self.counts, first, last, start, end, scores)
        return scores

    def bounds(self, candidate: ScoreRange) -> tuple[int, int, int, int]:
        """Where a candidate begins and ends in the table: steps, then layers."""
        return candidate.window.start - 1, candidate.window.end, *candidate.layers(self.sums.shape[1] - 1)


class Search:
    """All candidates' binned scores of the rows that choose, each row taken for a sample of its own."""

    def __init__(
        self, sums: SumTable, candidates: Sequence[ScoreRange], attack: Bools, fold: Ints, n_folds: int
    ) -> None:
        self.candidates = list(candidates)
        segment = fold * 2 + attack
        self._order = np.argsort(segment, kind="stable")
        self._ends = np.searchsorted(segment[self._order], np.arange(n_folds * 2 + 1))
        ordered = sums.select(self._order)
        bounds = np.array([sums.bounds(candidate) for candidate in self.candidates])
        self._size = (bounds[:, 1] - bounds[:, 0]) * (bounds[:, 3] - bounds[:, 2])
        self._bins = np.empty((len(self.candidates), len(attack)), np.uint8)

        def fill(part: slice) -> None:
            _bin(ordered.sums, ordered.counts, bounds[part], self._bins[part])

        self._in_threads(fill)
        self._n_folds = n_folds

    def aurocs(self, weights: Ints) -> Floats:
        """Each candidate's AUROC, no score lowest, outside each fold and on all rows [candidates, folds + 1].

        weights: [rows] how often each counts. 0.5 if a class has no rows.
        """
        aurocs = np.empty((len(self.candidates), self._n_folds + 1))
        ordered = weights[self._order]

        def fill(part: slice) -> None:
            _aurocs(self._bins[part], ordered, self._ends, aurocs[part])

        self._in_threads(fill)
        return aurocs

    def best(self, weights: Ints) -> list[ScoreRange]:
        """The candidate chosen outside each fold, and on all rows: the largest of those with about the best AUROC."""
        samples = np.array(
            [[self._n_samples(weights, fold, attack) for attack in (0, 1)] for fold in range(self._n_folds)]
        )
        outside = np.concatenate([samples.sum(axis=0) - samples, samples.sum(axis=0, keepdims=True)])
        chosen = []
        for aurocs, (n_benign, n_attack) in zip(self.aurocs(weights).T, outside):
            highest = float(aurocs.max())
            enough = aurocs >= highest - _TOLERANCE * standard_error(highest, int(n_attack), int(n_benign))
            chosen.append(self.candidates[int(np.where(enough, self._size, 0).argmax())])
        return chosen

    def _n_samples(self, weights: Ints, fold: int, attack: int) -> int:
        start, end = self._ends[fold * 2 + attack : fold * 2 + attack + 2]
        return int(weights[self._order[start:end]].sum())

    def _in_threads(self, work: Callable[[slice], None]) -> None:
        size = max(1, len(self.candidates) // (8 * self._pool._max_workers))
        parts = [slice(first, first + size) for first in range(0, len(self.candidates), size)]
        for _ in self._pool.map(work, parts):
            pass

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(os.cpu_count())


def standard_error(auroc: float, n_attack: int, n_benign: int) -> float:
    """Standard error of an AUROC (Hanley and McNeil 1982); infinite if a class has no samples."""
    if not n_attack or not n_benign:
        return float("inf")
    q1, q2 = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
    variance = auroc * (1 - auroc) + (n_attack - 1) * (q1 - auroc**2) + (n_benign - 1) * (q2 - auroc**2)
    return float(np.sqrt(max(variance, 0.0) / (n_attack * n_benign)))


@kernel(nogil=True)
def _scores(sums, counts, first, last, start, end, out):
    for i in range(out.shape[0]):
        n = counts[last, end, i] - counts[first, end, i] - counts[last, start, i] + counts[first, start, i]
        total = sums[last, end, i] - sums[first, end, i] - sums[last, start, i] + sums[first, start, i]
        out[i] = total / n if n > 0 else np.nan


@kernel(nogil=True)
def _bin(sums, counts, bounds, bins):
    """Bin 0 for no score, else 1 to 255, from low to high."""
    scores = np.empty(bins.shape[1])
    for c in range(bins.shape[0]):
        _scores(sums, counts, bounds[c, 0], bounds[c, 1], bounds[c, 2], bounds[c, 3], scores)
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
            histogram = counts[segment // 2, segment % 2]
            for i in range(ends[segment], ends[segment + 1]):
                histogram[bins[c, i]] += weights[i]
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
