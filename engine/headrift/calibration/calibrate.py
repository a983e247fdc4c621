"""Runs in, a calibration out: samples and parts, the search, the exact scores, the threshold, the figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from headrift._version import __version__
from headrift.calibration import evidence, validation
from headrift.calibration.evidence import Chosen
from headrift.calibration.record import Calibration, Data
from headrift.calibration.runs import UNLABELLED, Rows, Run, blocks, check_alike, exact_scores, read_rows
from headrift.calibration.search import Search, Sums, grid
from headrift.calibration.settings import CalibrationError, Settings
from headrift.calibration.thresholds import allowed, threshold
from headrift.calibration.units import Division, divide, target_of
from headrift.signal import ScoreRange

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Say: TypeAlias = Callable[[str], None]


def calibrate(runs: Sequence[Run], settings: Settings, say: Say = lambda text: None) -> Calibration:
    """Choose, set and measure. say: told of each stage. CalibrationError where the runs do not allow it."""
    check_alike(runs)
    steps = min(run.steps for run in runs)
    cells = _cells(runs, steps, settings)
    say("reading the rows")
    rows = read_rows(runs)
    division = divide(rows, settings, len(cells))
    chosen = _choose(runs, rows, division, cells, steps, settings, say)
    of_b = chosen.scores[division.sets]
    target = target_of(settings)
    cut = threshold(of_b, np.ones(len(of_b), np.int64), target, settings.rule)
    above = allowed(len(of_b), target, settings.rule)
    if cut is None or above is None:
        raise CalibrationError(
            f"no benign prompt has a score in steps {chosen.cell.window}: choose an earlier --window, or check the runs"
        )
    figures = evidence.figures(chosen, division, settings.resamples)
    confounds = {} if settings.benign_only else evidence.confounds(rows, division, settings.resamples)
    return Calibration(
        headrift=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        benign_only=settings.benign_only,
        model=runs[0].model,
        window=str(chosen.cell.window),
        drop_shallow=chosen.cell.drop_shallow,
        drop_deep=chosen.cell.drop_deep,
        layers=chosen.cell.layers(runs[0].model.layers),
        threshold=cut,
        setting=evidence.setting(settings, of_b, cut, above),
        scores=evidence.kept_scores(of_b),
        classes=evidence.classes(rows, chosen),
        figures=figures,
        confounds=confounds,
        traffic=evidence.traffic(rows, chosen, cut, settings),
        contamination=evidence.contamination(of_b, cut, settings) if settings.benign_only else [],
        procedure=evidence.procedure(division, cells, settings),
        data=Data(
            runs=[run.name for run in runs],
            fingerprint=rows.fingerprint,
            unlabelled=int((rows.label == UNLABELLED).sum()),
        ),
        notes=evidence.notes(runs, rows, division, chosen, figures, confounds, settings),
    )


def _cells(runs: Sequence[Run], steps: int, settings: Settings) -> list[ScoreRange]:
    """What there is to choose from: all cells, or the one that is given."""
    if not settings.benign_only and settings.window is None:
        return grid(steps, runs[0].model.layers)
    own = {run.score_range for run in runs}
    if settings.window is not None:
        own = {ScoreRange(settings.window, cell.drop_shallow, cell.drop_deep) for cell in own}
    if len(own) > 1:
        raise CalibrationError(
            "the runs were scored over different windows or layers, and nothing here chooses between them: give runs "
            "that are alike, or the --window"
        )
    (cell,) = own
    if cell.window.end > steps:
        raise CalibrationError(f"--window {cell.window} ends after step {steps}, the last that all runs recorded")
    return [cell]


def _choose(
    runs: Sequence[Run],
    rows: Rows,
    division: Division,
    cells: list[ScoreRange],
    steps: int,
    settings: Settings,
    say: Say,
) -> Chosen:
    units = division.units
    say(f"reading the instability of {len(units.row):,} samples")
    sums = Sums(len(units.row), steps, runs[0].model.layers)
    for which, block in blocks(runs, units.row, steps):
        sums.put(which, block)
    cell, of_fold, choose = cells[0], [cells[0]] * units.n_folds, validation.chooser(units.n_folds, cells[0])
    if len(cells) > 1:
        choosers = np.flatnonzero(units.chooses)
        say(f"searching {len(cells):,} windows and trims on {len(choosers):,} samples")
        search = Search(sums.of(choosers), cells, units.attack[choosers], units.fold[choosers], units.n_folds)
        *of_fold, cell = search.best(np.ones(len(choosers), np.int64))
        by_search = validation.chooser(units.n_folds, search)

        def choose(times: Ints) -> Sequence[ScoreRange]:
            return by_search(times[choosers])

    say(f"scoring {len(rows):,} rows")
    distinct = list(dict.fromkeys(of_fold))
    everywhere = np.arange(len(rows))
    own = (
        runs[0].score_range
        if {run.score_range for run in runs} == {runs[0].score_range} != {cell} and len(cells) > 1
        else None
    )
    asked = [(cell, everywhere), *((of, units.row) for of in [*distinct, *([own] if own else [])])]
    scores, *of_cells = exact_scores(runs, rows, asked)
    found: dict[str, validation.Estimate] = {}
    if units.n_folds > 1:
        say(f"cross-validating, {settings.resamples} resamples")
        found = validation.estimates(
            units,
            [of_cells[distinct.index(of)] for of in of_fold],
            sums,
            choose,
            target=target_of(settings),
            rule=settings.rule,
            resamples=settings.resamples,
            seed=settings.seed,
        )
    return Chosen(cell, of_fold, found, scores, (own, of_cells[-1]) if own else None)
