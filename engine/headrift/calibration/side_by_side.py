"""Instability beside the other numbers that a run holds: what each separates, and what instability adds to them.

`comparison` says what the result is; `samples` and `signals` read the runs; `strata`, `increments`, `onset`, `success`
and `normalisation` each answer one question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from headrift.calibration import samples as sampling
from headrift.calibration import signals as reading
from headrift.calibration.comparison import Points, SideBySide
from headrift.calibration.findings import findings
from headrift.calibration.increments import increments
from headrift.calibration.normalisation import normalisation
from headrift.calibration.onset import onset
from headrift.calibration.resampling import Draws
from headrift.calibration.runs import UNLABELLED, Rows, Run, check_alike, read_rows
from headrift.calibration.samples import FOLDS, Samples
from headrift.calibration.settings import CalibrationError
from headrift.calibration.signals import SIGNALS, Signals
from headrift.calibration.strata import compare, strata
from headrift.calibration.success import success
from headrift.fail_terms import FailTerms
from headrift.signal import ScoreRange

__all__ = ["SideBySide", "side_by_side"]

_DRAWN = 500  # samples of a class


def side_by_side(
    runs: Sequence[Run],
    cell: ScoreRange,
    *,
    resamples: int,
    seed: int,
    fail_terms: FailTerms | None,
    important_heads: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> SideBySide:
    """Compare the signals of runs of one model over a window and layers.

    resamples: of whole groups, for the intervals; 0 for none. fail_terms: what tells a successful attack, None where
    it is not known. say: told of each stage. CalibrationError where the runs cannot be compared: different models, a
    window past the recorded steps, a class that is missing, no row with a score.
    """
    check_alike(runs)
    steps = min(run.steps for run in runs)
    if cell.window.end > steps:
        raise CalibrationError(f"the window {cell.window} ends after step {steps}, the last that all runs recorded")
    say("reading the rows")
    rows = read_rows(runs)
    samples = sampling.take(runs, rows, seed)
    signals = reading.read(runs, samples, cell, fail_terms=fail_terms, important_heads=important_heads, say=say)
    if "instability" not in signals.values:
        raise CalibrationError(f"no row has a score in steps {cell.window}: choose an earlier window")
    draws = Draws(samples.attack, samples.group, resamples, seed)
    say(f"comparing {len(signals.values)} signals, {resamples} resamples")
    among = strata(samples, cell)
    compared = [compare(name, signals, samples, among, draws) for name in SIGNALS]
    say("what instability adds to the others")
    added = increments(signals, samples, draws, seed)
    say("step by step")
    by_step, before = onset(signals, samples, draws, seed)
    succeeded = success(signals, samples, draws, asked=fail_terms is not None)
    say("normalising by length")
    by_length = normalisation(signals.values["instability"], samples, draws)
    return SideBySide(
        window=str(cell.window),
        layers=cell.layers(runs[0].model.layers),
        n_attack=int(samples.attack.sum()),
        n_benign=int((~samples.attack).sum()),
        folds=samples.n_folds,
        resamples=resamples,
        seed=seed,
        signals=compared,
        important_heads=signals.important,
        increments=added,
        steps=by_step,
        before=before,
        success=succeeded,
        normalisation=by_length,
        points=_points(signals, samples, seed),
        findings=findings(compared, added, before, succeeded, by_length),
        notes=_notes(rows, samples, signals),
    )


def _points(signals: Signals, samples: Samples, seed: int) -> Points:
    random = np.random.default_rng(seed)
    of_class = [np.flatnonzero(samples.attack == label) for label in (True, False)]
    kept = np.sort(np.concatenate([random.permutation(mine)[:_DRAWN] for mine in of_class]))
    return Points(
        attack=samples.attack[kept].tolist(),
        hard=samples.hard[kept].tolist(),
        values={
            name: [None if np.isnan(value) else float(value) for value in values[kept]]
            for name, values in signals.values.items()
        },
    )


def _notes(rows: Rows, samples: Samples, signals: Signals) -> list[str]:
    """What a reader must know, a sentence each."""
    found = []
    for name, drawn, n in zip(
        ("attacks", "benign prompts"), (samples.attack.sum(), (~samples.attack).sum()), samples.n_distinct
    ):
        if drawn < n:
            found.append(f"{drawn:,} of {n:,} distinct {name} were compared, drawn at random")
    unlabelled = int((rows.label == UNLABELLED).sum())
    if unlabelled:
        found.append(f"{unlabelled:,} rows without a label were left out")
    if samples.n_folds < FOLDS:
        found.append(f"too few distinct prompts for {FOLDS} folds: {samples.n_folds}")
    if others := int((samples.set < 0).sum()):
        found.append(
            f"{others:,} samples are of other system prompts than the {len(samples.sets)} most common ones: left out "
            "where prompts of the same system prompt are compared"
        )
    if len(samples.sets) > 1:
        found.append(
            f"{len(samples.sets)} sets (runs and system prompts) are taken together: a signal whose level differs "
            "between sets separates worse in all than within each; the stratum of the same set says how well within"
        )
    if signals.important is not None:
        found.append(
            "intervals say how sure the measuring is: important heads are not chosen, nor regressions fitted, anew in "
            "resamples"
        )
    return found
