"""Runs in, a calibration out: samples and parts, the search, the exact scores, the threshold, the evidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from textwrap import wrap
from typing import TYPE_CHECKING

import numpy as np

from headrift._version import __version__
from headrift.calibration import evidence
from headrift.calibration.artifact import Calibration, CalibrationData, Metric, ReferenceScores
from headrift.calibration.choosing import Choosing, Say
from headrift.calibration.evidence import Choice
from headrift.calibration.splits import divide
from headrift.calibration.thresholds import CalibrateConfig, CalibrationError, allowed, threshold
from headrift.runs.detector_input import detector_values, read_selected
from headrift.runs.reading import UNLABELLED, Grouping, Rows, ScoreRun, check_alike, read_rows
from headrift.signals import get
from headrift.signals.detectors import NotEnoughError, Readout
from headrift.stats import Floats
from headrift.terminal import print_table

if TYPE_CHECKING:
    from rich.console import Console

_MOST_SYSTEM_PROMPTS = 1_000


def calibrate(
    runs: Sequence[ScoreRun],
    config: CalibrateConfig,
    say: Say = lambda text: None,
    *,
    normal: ScoreRun | None = None,
    readout: Calibration | None = None,
) -> Calibration:
    """Choose the signal, learn its detector, set the threshold, and measure how well it does.

    Args:
        runs: finished runs of one model.
        config: the options.
        say: is given each stage's name.
        normal: a run of one's own traffic, benign or unlabelled: it standardises a readout's features and sets the
            threshold, and `runs` say how well the readout tells attacks.
        readout: a calibration whose readout is used; nothing is learned.

    Raises:
        CalibrationError: The runs do not allow it, or not these options.
        RunError: The runs cannot be read, or are not of one model.
    """
    check_alike([*runs, *([normal] if normal is not None and normal.name not in {run.name for run in runs} else [])])
    say("reading the rows")
    rows = read_rows(runs, config.grouping)
    choosing = Choosing(runs, rows, config, say, _readout_of(readout, runs[0]), own_normal=normal is not None)
    choice, samples, division = choosing.choose(), choosing.samples, choosing.division
    part_b, traffic_rows, traffic_scores, metrics = choice.scores[division.part_b], rows, choice.scores, choice.metrics
    setting = config
    if normal is not None:  # of which some may be attacks, and of which the runs' rates say nothing
        setting, metrics = replace(config, benign_only=True), {}
        choice, part_b, traffic_rows, traffic_scores = _against_normal(choice, normal, setting)
    cut = threshold(part_b, np.ones(len(part_b), np.int64), setting.target, setting.rule)
    above = allowed(len(part_b), setting.target, setting.rule)
    if cut is None or above is None:
        window = choice.score_range.window
        steps = f"in steps {window}: choose an earlier --window, or" if not window.empty else "at step 0:"
        kind = "prompt" if setting.benign_only else "benign prompt"
        raise CalibrationError(f"no {kind} has a value {steps} check the runs")
    figures = evidence.figures(choice, samples, config.resamples)
    confounds = {} if config.benign_only else evidence.confounds(rows, samples, config.resamples)
    calibration = Calibration(
        headrift=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        benign_only=config.benign_only,
        model=runs[0].model,
        window=str(choice.score_range.window),
        drop_shallow=choice.score_range.drop_shallow,
        drop_deep=choice.score_range.drop_deep,
        layers=choice.score_range.layers(runs[0].model.layers),
        threshold=cut,
        setting=evidence.threshold_setting(setting, part_b, cut, above),
        scores=ReferenceScores.from_scores(part_b),
        classes=evidence.class_coverage(rows, choice),
        figures=figures,
        confounds=confounds,
        traffic=evidence.traffic(traffic_rows, metrics, traffic_scores, cut, setting),
        contamination=evidence.contamination(part_b, cut, setting) if setting.benign_only else [],
        procedure=evidence.procedure(samples, choosing.n_candidates, choice, config, traffic_rows.grouped)
        | {
            "normal": None if normal is None else normal.name,
            "readout": None if readout is None else readout.sha256,
        },
        data=CalibrationData(
            runs=[run.name for run in runs],
            fingerprint=rows.fingerprint,
            unlabelled=int((rows.label == UNLABELLED).sum()),
            system_prompts=_system_prompts(runs if normal is None else [normal]),
            groups="near" if traffic_rows.grouped.by is Grouping.NEAR else "own",
            replay=runs[0].replay,
            steps=min(run.steps for run in runs),
        ),
        notes=[
            *choosing.notes,
            *evidence.notes(runs, rows, division, choice, figures, choosing.comparison, config),
        ],
        detector=choice.detector,
        comparison=choosing.comparison,
        sources=rows.sources if choosing.left_out else [],
        left_out=choosing.left_out,
    )
    return calibration.model_copy(update={"verdict": evidence.verdict(calibration)})


def _system_prompts(runs: Sequence[ScoreRun]) -> list[str] | None:
    """Hashes of the runs' system prompts; None if they are too many to be a few known ones."""
    hashes: set[str] = set()
    for run in runs:
        for batch in run.batches(["system_hash"]):
            hashes.update(batch.column("system_hash").drop_null().unique().to_pylist())
            if len(hashes) > _MOST_SYSTEM_PROMPTS:
                return None
    return sorted(hashes)


def _readout_of(calibration: Calibration | None, run: ScoreRun) -> Readout | None:
    """A calibration's readout, if it is for the run's model."""
    if calibration is None:
        return None
    if not isinstance(calibration.detector, Readout):
        raise CalibrationError("--readout names a calibration without a readout: make one with --signal readout")
    differences = [*calibration.model.differences(run.model), *calibration.other_mode(run.replay)]
    if differences:
        raise CalibrationError(f"--readout is of something else: {', '.join(differences)} differ from {run.name}'s")
    if calibration.detector.windowed and calibration.window != str(run.score_range.window):
        raise CalibrationError(
            f"--readout reads the window {calibration.window}, and {run.name} has {run.score_range.window}: score with "
            "that --window, or learn it anew"
        )
    return calibration.detector


def _against_normal(choice: Choice, normal: ScoreRun, config: CalibrateConfig) -> tuple[Choice, Floats, Rows, Floats]:
    """The detector against one's own traffic: the choice, part B's values, and the traffic's rows and values."""
    assert isinstance(choice.detector, Readout)
    if choice.detector.windowed and normal.score_range.window != choice.score_range.window:
        raise CalibrationError(
            f"--normal {normal.name} has the window {normal.score_range.window}, and the readout reads "
            f"{choice.score_range.window}: score it with that --window, or use --steps 0"
        )
    rows = read_rows([normal], config.grouping)
    division = divide(rows, config, 2)
    moments_of = np.sort(division.samples.row[division.samples.chooses])
    try:
        detector = choice.detector.with_normal(read_selected([normal], moments_of, {"logit_shares"}))
    except NotEnoughError as error:
        raise CalibrationError(f"--normal {normal.name}: {error}") from None
    values = detector_values([normal], detector, len(rows))
    return replace(choice, detector=detector), values[division.part_b], rows, values


def print_calibration(console: Console, calibration: Calibration) -> None:
    """Print what was chosen, what it is worth, and what to be careful about, in 80 columns."""

    def line(text: str = "", indent: int = 11) -> None:
        for part in wrap(text, min(console.width, 100), subsequent_indent=" " * indent) or [""]:
            console.print(part, markup=False, highlight=False)

    first, end = calibration.layers
    if calibration.verdict is not None:
        for text in calibration.verdict.lines:
            line(text, 2)
        print_comparison(console, calibration)
        missing: dict[str, list[str]] = {}
        for one in calibration.comparison:
            if one.absent is not None:
                missing.setdefault(one.absent, []).append(one.label)
        for reason, absent_labels in missing.items():
            line(f"not compared: {', '.join(absent_labels)} ({reason})", 2)
        line()
    line(f"signal     {calibration.label}")
    window = f"steps {calibration.window}, layers {first} to {end - 1} of {calibration.model.layers}"
    line(f"window     {window if calibration.ranged else 'none: step 0, the last prompt token, alone'}")
    line(f"threshold  {calibration.threshold:.6f}: a prompt with a value at or above it is flagged")
    line(f"alerts     {_alerts(calibration)}")
    coverage = [
        (name, f"{one.rows:,}", f"{one.distinct:,}", f"{one.with_score:.1%}", f"{one.ended_early:.1%}")
        for name, one in calibration.classes.items()
    ]
    print_table(console, ("", "rows", "distinct", "with score", "stop early"), coverage)
    labels = {name: label for name, (label, _) in evidence.METRICS.items() if name not in evidence.FALSE_POSITIVES}
    for title, names, metrics in (
        ("held out", labels, calibration.figures),
        ("confounds, AUROC", {name: get(name).label for name in calibration.confounds}, calibration.confounds),
    ):
        present = [(label, metrics[name]) for name, label in names.items() if name in metrics]
        rows = [(label, f"{one.value:.3f}", _range(one)) for label, one in present if one.value is not None]
        if rows:
            print_table(console, (title, "", "95% interval"), rows)
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


def _alerts(calibration: Calibration) -> str:
    """How many alerts to expect, and how many at most are promised."""
    setting, daily = calibration.setting, calibration.traffic.daily_prompts
    rows = "rows" if calibration.benign_only else "benign rows"
    expected = calibration.figures.get("fpr_traffic") if daily is None else calibration.traffic.alerts_a_day
    sure = "on average over calibrations" if setting.confidence is None else f"with {setting.confidence:.0%} confidence"
    most = f"{setting.target_fpr:.1%}" if daily is None else f"{setting.target_fpr * daily:,.0f}"
    promise = f"at most {most} promised {sure}, set on {setting.n:,} prompts"
    attacks = calibration.procedure["contamination"]
    if attacks is not None:
        promise += f", if at most {attacks:.3g} of the prompts are attacks"
    if expected is None or expected.interval is None:
        return promise if daily is None else f"{promise}, if all {daily:,} of a day are benign"
    low, high = expected.interval
    if daily is None:
        return f"expect {low:.1%} to {high:.1%} of {rows} flagged; {promise}"
    return f"expect {low:,.0f} to {high:,.0f} a day, if all {daily:,} prompts are benign; {promise}"


def print_comparison(console: Console, calibration: Calibration) -> None:
    """The chosen signal and the others on the same held-out prompts."""
    by_source = bool(calibration.left_out)
    rows = []
    for one in calibration.comparison:
        if one.absent is not None:
            continue
        cells = [
            ("", "") if metric is None or metric.value is None else (f"{metric.value:.3f}", _range(metric, between))
            for metric, between in ((one.left_out if by_source else one.auroc, "-"), (one.difference, " to "))
        ]
        lower = ", attacks lower" if one.direction == -1 else ""
        rows.append((f"{one.label}{lower}", *cells[0], *cells[1]))
    if rows:
        title = "AUROC, sources left out" if by_source else "AUROC, held out"
        print_table(console, (title, "", "95% interval", "diff.", "95% interval"), rows)


def _range(metric: Metric, between: str = "-") -> str:
    return "" if metric.interval is None else between.join(f"{bound:.3f}" for bound in metric.interval)
