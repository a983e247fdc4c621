"""The page's sections about a calibration, and about the other signals of the same runs (calibration.compare)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from headrift.calibration.artifact import Calibration, drift
from headrift.calibration.compare import SideBySide
from headrift.calibration.compare.aurocs import Increment, SignalResult
from headrift.calibration.compare.measurements import Estimate
from headrift.calibration.compare.normalisation import Normalisation
from headrift.calibration.compare.onset import Steps
from headrift.calibration.evidence import METRICS
from headrift.report import html, plots
from headrift.report.gather import Floats, ReportData
from headrift.report.sections import HIGHER, LOWER
from headrift.runs.reading import ScoreRun
from headrift.signal import ScoreRange, Window
from headrift.signals import get
from headrift.stats import exact_interval

_MOST_LINES = 4
_STRATA = {
    "length": "by prompt length",
    "hard": "by how benign prompts were made",
    "ending": "by how the answer ended",
    "system": "by run and system prompt",
}


def calibrated_range(calibration: Calibration, runs: Sequence[ScoreRun]) -> ScoreRange:
    """Return the calibration's window and layers. Error if it is of another model, or the runs did not record them."""
    window, steps = Window.parse(calibration.window), min(run.steps for run in runs)
    calibration.check(runs[0].model, window, calibration.drop_shallow, calibration.drop_deep)
    if window.end > steps:
        raise html.ReportError(
            f"the calibration's window is steps {window}, and the runs recorded {steps}: score the prompts again with "
            f"--steps {window.end}"
        )
    return ScoreRange(window, calibration.drop_shallow, calibration.drop_deep)


def calibrated(calibration: Calibration, data: ReportData, output: html.Output) -> html.Section:
    """The calibration's threshold, what it promises, and what it flags in these runs."""
    output.numbers(calibration=calibration.model_dump(mode="json", exclude={"scores", "data"}))
    setting, (first, end) = calibration.setting, calibration.layers
    text = [
        f"A row is flagged if its score is at or above {calibration.threshold:.6f} (steps {calibration.window}, layers "
        f"{first} to {end - 1}). Promise: {setting.promise}. It was set on {setting.n:,} distinct benign prompts, of "
        f"which {setting.flagged:,} are flagged."
    ]
    if calibration.data.fingerprint == data.rows.fingerprint:
        text.append("It was made from these runs: the table of these runs is in sample, the held-out figures are not.")
        drift_tables = []
    else:
        drift_tables = [_drift(calibration, data, output)]
    tables = [_flagged(calibration, data, output), _held_out(calibration), *drift_tables]
    if calibration.contamination:
        rows = [
            (
                f"{one.contamination:.1%}",
                f"{one.lowest_fpr:.2%} to {one.highest_fpr:.2%}",
                "too few prompts" if one.threshold is None else f"{one.threshold:.6f}",
            )
            for one in calibration.contamination
        ]
        names = ("attacks among its benign prompts", "benign prompts flagged", "threshold for the target")
        tables.append(html.Table(names, rows))
    blocks: list[html.Block] = [html.Text(text), *tables, html.Text(calibration.notes)]
    return html.Section("calibration", "At the calibration's threshold", blocks)


def _flagged(calibration: Calibration, data: ReportData, output: html.Output) -> html.Table:
    rows, numbers = [], {}
    for label in data.classes:
        prompts = data.samples.row[data.samples.in_class(label)]
        n, flagged = len(prompts), int(calibration.apply(data.score[prompts]).flagged.sum())
        bounds = exact_interval(flagged, n)
        rows.append((label, f"{n:,}", f"{flagged:,}", f"{flagged / n:.1%}", html.show_interval(bounds)))
        numbers[label] = {"prompts": n, "flagged": flagged, "interval": bounds}
    output.numbers(flagged=numbers)
    caption = f"These runs, each distinct prompt once{data.summary.sampled}"
    return html.Table(("class", "prompts", "flagged", "fraction", "95% interval"), rows, caption)


def _held_out(calibration: Calibration) -> html.Table:
    metrics = {label: calibration.figures[name] for name, (label, _) in METRICS.items() if name in calibration.figures}
    metrics |= {f"{get(name).label} alone, AUROC": one for name, one in calibration.confounds.items()}
    rows = [
        (label, html.show_number(one.value), "" if one.interval is None else html.show_interval(one.interval), one.how)
        for label, one in metrics.items()
        if one.value is not None
    ]
    return html.Table(("the calibration's own figures", "", "95% interval", "how"), rows)


def _drift(calibration: Calibration, data: ReportData, output: html.Output) -> html.Table:
    """Whether benign scores are still those of the calibration."""
    benign = data.score[data.samples.row[data.samples.in_class("benign")]]
    result = drift(benign, calibration)
    if result is None:
        row = ("not known: no row here is labelled benign", "", "", "")
    else:
        output.numbers(drift={"distance": result.distance, "p_value": result.p_value, "n": len(benign)})
        row = (result.warning or html.NOT_SHOWN, f"{result.distance:.2f}", f"{result.p_value:.2g}", f"{len(benign):,}")
    names = ("drift of the benign scores", "Kolmogorov-Smirnov distance", "p", "benign prompts")
    return html.Table(names, [row])


def not_compared(reason: str) -> list[html.Section]:
    """The section that says why signals were not compared."""
    return [html.Section("signals", "Instability and other signals", [html.Missing(reason)])]


def compared(result: SideBySide, output: html.Output, fail_terms: Sequence[str], redact: bool) -> list[html.Section]:
    """All that was compared."""
    output.numbers(side_by_side=result.model_dump(mode="json"))
    sections = [
        _signals(result, output),
        _strata(result),
        _increments(result.increments),
        _onset(result, output),
        _success(result, fail_terms, redact),
        _normalisation(result.normalisation),
    ]
    return [section for section in sections if section is not None]


def _signals(result: SideBySide, output: html.Output) -> html.Section:
    aurocs = [
        (signal, signal.auroc)
        for signal in result.signals
        if signal.auroc is not None and signal.auroc.value is not None
    ]
    blocks: list[html.Block] = []
    if aurocs:
        rows = [
            (
                signal.label,
                *_cells(auroc),
                html.verdict(auroc.interval, HIGHER, LOWER, 0.5),
                "" if signal.auroc_all is None else html.show_number(signal.auroc_all.value),
                *(
                    f"{signal.coverage[label]:.0%}" if label in signal.coverage else ""
                    for label in ("attack", "benign")
                ),
                *(_correlation(signal, among) for among in ("all", "attack", "benign")),
            )
            for signal, auroc in aurocs
        ]
        names = ("signal", "AUROC", "95% interval", "verdict", "missing as benign", "attacks with it", "benign with it")
        caption = (
            f"{result.n_attack:,} distinct attacks, {result.n_benign:,} benign prompts; AUROC among prompts that have "
            "the signal. r: Spearman's rank correlation with instability."
        )
        picture = output.picture(
            "signals",
            plots.forest(
                [(signal.label, auroc.value or 0.0, auroc.interval) for signal, auroc in aurocs],
                "AUROC (above 0.5: higher in attacks)",
            ),
            "AUROC of every signal with its interval",
            "Orange: attacks have the higher values; blue: the lower ones, which separates just as well; grey: the "
            "interval includes chance.",
        )
        blocks += [html.Pictures([picture]), html.Table((*names, "r", "r, attacks", "r, benign"), rows, caption)]
    missing = [(signal.label, signal.absent) for signal in result.signals if signal.absent]
    if missing:
        blocks.append(html.Table(("not available", "why"), missing))
    heads, text = result.important_heads, list(result.notes)
    if heads is not None:
        counts = f"Chosen on all samples: {len(heads.heads)}; in every fold: {heads.in_all_folds}."
        text.insert(0, f"Important heads: {heads.how}. {counts}")
    return html.Section("signals", "Instability and other signals", [*blocks, html.Text(text)])


def _strata(result: SideBySide) -> html.Section | None:
    signals = [signal for signal in result.signals if signal.strata]
    tables: list[html.Block] = []
    for kind in dict.fromkeys(stratum.kind for signal in signals for stratum in signal.strata):
        first = [stratum for stratum in signals[0].strata if stratum.kind == kind]
        columns = ("signal", *(f"{one.label} ({one.auroc.n_attack:,}/{one.auroc.n_benign:,})" for one in first))
        rows = [
            (signal.label, *(_estimate(one.auroc, 2) for one in signal.strata if one.kind == kind))
            for signal in signals
        ]
        rows = [row for row in rows if len(row) == len(columns)]
        tables.append(html.Table(columns, rows, f"AUROC {_STRATA[kind]} (attacks/benign prompts; 95% interval)"))
    if not tables:
        return None
    text = (
        "If a signal separates overall but not within prompts of similar length, of one run, or against the hard "
        "benign ones, then length, topic or the sets themselves did the separating."
    )
    return html.Section("strata", "Controlling for length and category", [html.Text([text]), *tables])


def _increments(increments: Sequence[Increment]) -> html.Section | None:
    if not increments:
        return None
    rows = [
        (
            one.label,
            *(_estimate(number) for number in (one.auroc, one.auroc_with, one.auroc_change, one.log_loss_change)),
            one.verdict,
        )
        for one in increments
        if one.absent is None
    ]
    text = (
        "A logistic regression on the other signals, without and with the added one, measured on held-out prompts. "
        "Better is a change in log-loss below 0, or in AUROC above 0."
    )
    names = ("added to", "AUROC without", "with", "change in AUROC", "change in log-loss (nats)", "verdict")
    blocks: list[html.Block] = [html.Text([text]), *([html.Table(names, rows)] if rows else [])]
    blocks += [html.Missing(f"{one.label}: {one.absent}") for one in increments if one.absent]
    return html.Section("increments", "Does instability add anything?", blocks)


def _onset(result: SideBySide, output: html.Output) -> html.Section | None:
    if not result.steps:
        return None
    curves = [one for one in result.steps if one.absent is None and one.steps]
    text = (
        "Attention Tracker, a published detector, watches heads turn from the system prompt to the user's text: their "
        "focus falls. If instability came before that, it would separate attacks at an earlier step."
    )
    rows = [
        (
            one.label,
            "" if one.difference is None else f"{one.difference:+d}",
            "" if one.interval is None else f"{one.interval[0]:+.0f} to {one.interval[1]:+.0f}",
            one.verdict,
        )
        for one in result.before
    ]
    names = ("instability's first step minus that of", "steps", "95% interval", "verdict")
    blocks: list[html.Block] = [html.Text([text]), *([html.Table(names, rows)] if rows else [])]
    if curves:
        picture = output.picture(
            "onset",
            plots.signals_by_step([_line(one, band=one is curves[0]) for one in curves[:_MOST_LINES]]),
            "AUROC of several signals at each step",
            f"Band: 95% for all steps of {curves[0].label} at once, so that a step outside 0.5 is not one lucky step "
            "of many.",
        )
        rows = [
            (
                one.label,
                "none" if one.first is None else f"{one.first}",
                "" if one.first_interval is None else html.show_interval(one.first_interval, 0, "f"),
                "" if one.found_in is None else f"{one.found_in:.0%}",
            )
            for one in curves
        ]
        names = ("signal", "first step that separates", "95% interval", "resamples that have one")
        blocks += [html.Pictures([picture]), html.Table(names, rows)]
    blocks += [html.Missing(f"{one.label}: {one.absent}") for one in result.steps if one.absent]
    return html.Section("onset", "Does it come before distraction?", blocks)


def _line(one: Steps, band: bool) -> tuple[str, Floats, Floats, Floats | None]:
    steps, auroc, low, high = (
        np.array(values, np.float64) for values in (one.steps, one.auroc, one.joint_low, one.joint_high)
    )
    return one.label, steps, auroc, np.stack([low, high]) if band and len(low) == len(steps) else None


def _success(result: SideBySide, fail_terms: Sequence[str], redact: bool) -> html.Section:
    success, labels = result.success, {signal.name: signal.label for signal in result.signals}
    title = "Does it tell attacks that succeed?"
    if success.absent:
        return html.Section("success", title, [html.Missing(success.absent)])
    terms = f"{len(fail_terms)} fail terms" if redact else ", ".join(fail_terms)
    text = [
        f"An attack counts as a success if its answer contains a fail term ({terms}): {success.n_succeeded:,} of "
        f"{success.n_attacks:,} attacks. AUROC above 0.5: higher in attacks that succeed.",
        *([success.verdict] if success.verdict else []),
    ]
    rows = [(labels.get(name, name), *_cells(one)) for name, one in success.aurocs.items()]
    return html.Section("success", title, [html.Text(text), html.Table(("signal", "AUROC", "95% interval"), rows)])


def _normalisation(result: Normalisation) -> html.Section:
    title = "Scores against benign prompts of the same length"
    if result.absent:
        return html.Section("normalisation", title, [html.Missing(result.absent)])
    spread = (result.spread_raw, result.spread_normalised, result.spread_change)
    rows = [
        ("AUROC", *map(_estimate, (result.auroc_raw, result.auroc_normalised, result.auroc_change))),
        ("spread of the sets' false positive rates", *map(_estimate, spread)),
    ]
    names = ("benign prompts", "as scored", "against the same length")
    blocks: list[html.Block] = [html.Text([result.how, result.verdict]), html.Table(("", *names[1:], "change"), rows)]
    target = f"target {result.target_fpr:.0%}"
    for caption, rates in (
        (f"False positive rates by length, {target}", [(one.label, one) for one in result.lengths]),
        (f"False positive rates of a set at the other sets' threshold, {target}", [(s.name, s) for s in result.sets]),
    ):
        rows = [(f"{name} ({one.n_benign:,})", f"{one.raw:.1%}", f"{one.normalised:.1%}") for name, one in rates]
        if rows:
            blocks.append(html.Table(names, rows, caption))
    return html.Section("normalisation", title, blocks)


def _cells(estimate: Estimate) -> tuple[str, str]:
    """Value and interval, in two cells."""
    if estimate.value is None:
        return "", estimate.reason or ""
    return html.show_number(estimate.value), html.show_interval(estimate.interval)


def _estimate(estimate: Estimate | None, digits: int = 3) -> str:
    """Value and interval, in one cell."""
    if estimate is None or estimate.value is None:
        return "" if estimate is None else estimate.reason or "not known"
    interval = f" ({html.show_interval(estimate.interval, digits)})" if estimate.interval else ""
    return html.show_number(estimate.value, digits) + interval


def _correlation(signal: SignalResult, among: str) -> str:
    spearman = next((one.spearman for one in signal.correlations if one.among == among), None)
    return "" if spearman is None else f"{spearman:+.2f}"
