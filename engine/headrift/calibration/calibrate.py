"""Runs in, a calibration out: samples and parts, the search, the exact scores, the threshold, the evidence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from textwrap import wrap
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from headrift._version import __version__
from headrift.calibration import evidence
from headrift.calibration.artifact import Calibration, CalibrationData, Metric, ReferenceScores
from headrift.calibration.evidence import Choice
from headrift.calibration.search import Search, SumTable, grid
from headrift.calibration.splits import Division, divide
from headrift.calibration.thresholds import CalibrateConfig, CalibrationError, allowed, threshold
from headrift.runs.reading import UNLABELLED, Rows, ScoreRun, check_alike, exact_scores, read_instability, read_rows
from headrift.signal import ScoreRange
from headrift.signals import get
from headrift.stats import Ints
from headrift.terminal import print_table

if TYPE_CHECKING:
    from rich.console import Console

Say: TypeAlias = Callable[[str], None]


def calibrate(runs: Sequence[ScoreRun], config: CalibrateConfig, say: Say = lambda text: None) -> Calibration:
    """Choose window and layers, set the threshold, and measure how well it does; `say` is given each stage's name.

    Raises:
        CalibrationError: The runs do not allow it, or not these options.
        RunError: The runs cannot be read, or are not of one model.
    """
    check_alike(runs)
    steps, n_layers = min(run.steps for run in runs), runs[0].model.layers
    candidates = _candidates(runs, steps, config)
    say("reading the rows")
    rows = read_rows(runs)
    division = divide(rows, config, len(candidates))
    choice = _choose(runs, rows, division, candidates, steps, config, say)
    part_b, score_range, samples = choice.scores[division.part_b], choice.score_range, division.samples
    cut = threshold(part_b, np.ones(len(part_b), np.int64), config.target, config.rule)
    above = allowed(len(part_b), config.target, config.rule)
    if cut is None or above is None:
        raise CalibrationError(
            f"no benign prompt has a score in steps {score_range.window}: choose an earlier --window, or check the runs"
        )
    figures = evidence.figures(choice, samples, config.resamples)
    confounds = {} if config.benign_only else evidence.confounds(rows, samples, config.resamples)
    return Calibration(
        headrift=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        benign_only=config.benign_only,
        model=runs[0].model,
        window=str(score_range.window),
        drop_shallow=score_range.drop_shallow,
        drop_deep=score_range.drop_deep,
        layers=score_range.layers(n_layers),
        threshold=cut,
        setting=evidence.threshold_setting(config, part_b, cut, above),
        scores=ReferenceScores.from_scores(part_b),
        classes=evidence.class_coverage(rows, choice),
        figures=figures,
        confounds=confounds,
        traffic=evidence.traffic(rows, choice, cut, config),
        contamination=evidence.contamination(part_b, cut, config) if config.benign_only else [],
        procedure=evidence.procedure(samples, len(candidates), config),
        data=CalibrationData(
            runs=[run.name for run in runs],
            fingerprint=rows.fingerprint,
            unlabelled=int((rows.label == UNLABELLED).sum()),
        ),
        notes=evidence.notes(runs, rows, division, choice, figures, confounds, config),
    )


def _candidates(runs: Sequence[ScoreRun], steps: int, config: CalibrateConfig) -> list[ScoreRange]:
    """All ranges there are to choose from, or the one that is given."""
    if not config.benign_only and config.window is None:
        return grid(steps, runs[0].model.layers)
    own = {run.score_range for run in runs}
    if config.window is not None:
        own = {ScoreRange(config.window, one.drop_shallow, one.drop_deep) for one in own}
    if len(own) > 1:
        raise CalibrationError(
            "the runs were scored over different windows or layers, and nothing here chooses between them: give runs "
            "that are alike, or the --window"
        )
    (only,) = own
    if only.window.end > steps:
        raise CalibrationError(f"--window {only.window} ends after step {steps}, the last that all runs recorded")
    return [only]


def _choose(
    runs: Sequence[ScoreRun],
    rows: Rows,
    division: Division,
    candidates: list[ScoreRange],
    steps: int,
    config: CalibrateConfig,
    say: Say,
) -> Choice:
    """Search window and layers (unless there is one candidate), score all rows, cross-validate."""
    samples, n_folds = division.samples, division.samples.n_folds
    say(f"reading the instability of {len(samples.row):,} samples")
    sums = SumTable(len(samples.row), steps, runs[0].model.layers)
    for which, block in read_instability(runs, samples.row, steps):
        sums.put(which, block)
    searches = len(candidates) > 1
    if searches:
        choosers = np.flatnonzero(samples.chooses)
        say(f"searching {len(candidates):,} windows and trims on {len(choosers):,} samples")
        attack, fold = samples.attack[choosers], samples.fold[choosers]
        search = Search(sums.select(choosers), candidates, attack, fold, n_folds)

    def best(times: Ints) -> list[ScoreRange]:
        """The range chosen without each fold, and the one on all samples, if samples count this many times."""
        return search.best(times[choosers]) if searches else candidates * (n_folds + 1)

    *by_fold, chosen = best(np.ones(len(samples.row), np.int64))
    own = {run.score_range for run in runs}
    unsearched = list(own) if searches and len(own) == 1 and own != {chosen} else []
    say(f"scoring {len(rows):,} rows")
    distinct = list(dict.fromkeys(by_fold))
    requests = [(chosen, np.arange(len(rows))), *((one, samples.row) for one in [*distinct, *unsearched])]
    scores, *sample_scores = exact_scores(runs, rows, requests)
    metrics: dict[str, Metric] = {}
    if n_folds > 1:
        say(f"cross-validating, {config.resamples} resamples")
        exact = [sample_scores[distinct.index(one)] for one in by_fold]
        metrics = evidence.cross_validate(samples, exact, sums, lambda times: best(times)[:n_folds], config)
    if unsearched:
        return Choice(chosen, metrics, scores, unsearched[0], sample_scores[-1])
    return Choice(chosen, metrics, scores)


def print_calibration(console: Console, calibration: Calibration) -> None:
    """Print what was chosen, what it is worth, and what to be careful about, in 80 columns."""

    def line(text: str = "") -> None:
        for part in wrap(text, min(console.width, 100), subsequent_indent=" " * 11) or [""]:
            console.print(part, markup=False, highlight=False)

    setting, (first, end) = calibration.setting, calibration.layers
    line(f"window     steps {calibration.window}, layers {first} to {end - 1} of {calibration.model.layers}")
    line(f"threshold  {calibration.threshold:.6f}: a score at or above it is flagged")
    line(f"promise    {setting.promise} ({setting.n:,}, {setting.flagged:,} of them flagged)")
    coverage = [
        (name, f"{one.rows:,}", f"{one.distinct:,}", f"{one.with_score:.1%}", f"{one.ended_early:.1%}")
        for name, one in calibration.classes.items()
    ]
    print_table(console, ("", "rows", "distinct", "with score", "stop early"), coverage)
    labels = {name: label for name, (label, _) in evidence.METRICS.items()}
    rates = {name: labels.pop(name) for name in evidence.AT_THRESHOLD}
    for title, names, metrics in (
        ("held out", labels, calibration.figures),
        ("held out, at a threshold", rates, calibration.figures),
        ("confounds, AUROC", {name: get(name).label for name in calibration.confounds}, calibration.confounds),
    ):
        present = [(label, metrics[name]) for name, label in names.items() if name in metrics]
        rows = [(label, f"{one.value:.3f}", _range(one)) for label, one in present if one.value is not None]
        if rows:
            print_table(console, (title, "", "95% interval"), rows)
    traffic = calibration.traffic
    line()
    line(f"{traffic.flagged:,} of {traffic.rows:,} benign rows here are flagged, repeats counted as they came")
    if traffic.alerts_a_day is not None and traffic.alerts_a_day.value is not None:
        bounds = traffic.alerts_a_day.interval
        interval = f" ({bounds[0]:,.0f} to {bounds[1]:,.0f})" if bounds else ""
        line(f"{traffic.alerts_a_day.value:,.0f} alerts a day{interval}, if all {traffic.daily_prompts:,} are benign")
    if calibration.contamination:
        cases = [
            (
                f"{one.contamination:.1%}",
                f"{one.lowest_fpr:.2%}-{one.highest_fpr:.2%}",
                "too few prompts" if one.threshold is None else f"{one.threshold:.6f}",
            )
            for one in calibration.contamination
        ]
        print_table(console, ("attacks among them", "benign flagged", "threshold for the target"), cases)
    line()
    for note in calibration.notes:
        line(f"note       {note}")


def _range(metric: Metric) -> str:
    return "" if metric.interval is None else f"{metric.interval[0]:.3f}-{metric.interval[1]:.3f}"
