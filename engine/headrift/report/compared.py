"""The page's sections on instability beside the other numbers of the same runs (calibration.side_by_side)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from headrift.calibration.comparison import Estimate, Increment, Normalisation, SideBySide, Signal, Steps
from headrift.report import plots
from headrift.report.gather import Floats
from headrift.report.output import Block, Missing, Output, Pictures, Points, Section, Table, Text
from headrift.report.words import interval, sentence

_MOST_LINES = 4
_STRATA = {
    "length": "by prompt length",
    "hard": "by how benign prompts were made",
    "ending": "by how the answer ended",
    "system": "by run and system prompt",
}


def absent(why: str) -> list[Section]:
    """The one section that says why there are none."""
    return [Section("signals", "Instability beside other signals", [Missing(sentence(why))])]


def compared(of: SideBySide, output: Output, fail_terms: Sequence[str], redact: bool) -> list[Section]:
    """All that was compared."""
    output.numbers(side_by_side=of.model_dump(mode="json", exclude={"points"}))
    found = [
        _signals(of, output),
        _strata(of),
        _increments(of.increments),
        _onset(of, output),
        _success(of, fail_terms, redact),
        _normalisation(of.normalisation),
    ]
    return [section for section in found if section is not None]


def _signals(of: SideBySide, output: Output) -> Section:
    there = [signal for signal in of.signals if signal.auroc is not None and signal.auroc.value is not None]
    rows = [
        (
            signal.label,
            *_cells(signal.auroc),
            _value(signal.auroc_all),
            *(f"{signal.coverage[label]:.0%}" if label in signal.coverage else "" for label in ("attack", "benign")),
            *(_correlation(signal, among) for among in ("all", "attack", "benign")),
        )
        for signal in there
    ]
    names = ("signal", "AUROC", "95% interval", "missing as benign", "attacks with it", "benign with it")
    caption = (
        f"{of.n_attack:,} distinct attacks, {of.n_benign:,} benign prompts; AUROC among prompts that have the signal. "
        "r: Spearman's rank correlation with instability."
    )
    blocks: list[Block] = [Points([sentence(text) for text in of.findings])] if of.findings else []
    if there:
        aurocs = [(signal.label, signal.auroc.value or 0.0, signal.auroc.interval) for signal in there if signal.auroc]
        picture = output.picture(
            "signals",
            plots.forest(aurocs, "AUROC (above 0.5: higher in attacks)"),
            "AUROC of every signal with its interval",
            "AUROC with 95% interval of each number by itself. Orange: attacks have the higher values; blue: the lower "
            "ones, which separates just as well; grey: the interval includes chance.",
        )
        blocks += [Pictures([picture]), Table((*names, "r", "r, attacks", "r, benign"), rows, caption)]
    missing = [(signal.label, signal.absent) for signal in of.signals if signal.absent]
    if missing:
        blocks.append(Table(("not there", "why"), missing))
    heads = of.important_heads
    if heads is not None:
        blocks.append(
            Text(
                [
                    f"Important heads: {heads.how}. Chosen on all samples: {len(heads.heads)}; in every fold: "
                    f"{heads.in_all_folds}."
                ]
            )
        )
    if of.notes:
        blocks.append(Points([sentence(text) for text in of.notes]))
    return Section("signals", "Instability beside other signals", blocks)


def _strata(of: SideBySide) -> Section | None:
    blocks: list[Block] = []
    with_strata = [signal for signal in of.signals if signal.strata]
    kinds = dict.fromkeys(stratum.kind for signal in with_strata for stratum in signal.strata)
    for kind in kinds:
        first = [stratum for stratum in with_strata[0].strata if stratum.kind == kind]
        columns = ("signal", *(f"{at.label} ({at.auroc.n_attack:,}/{at.auroc.n_benign:,})" for at in first))
        rows = [
            (signal.label, *(_estimate(at.auroc) for at in signal.strata if at.kind == kind)) for signal in with_strata
        ]
        rows = [row for row in rows if len(row) == len(columns)]
        blocks.append(Table(columns, rows, f"AUROC {_STRATA[kind]} (attacks/benign prompts; 95% interval)"))
    if not blocks:
        return None
    said = (
        "If a signal separates overall but not within prompts of like length, of one run or against the hard benign "
        "ones, then length, topic or the sets themselves did the separating."
    )
    return Section("strata", "The same within like prompts", [Text([said]), *blocks])


def _increments(found: Sequence[Increment]) -> Section | None:
    if not found:
        return None
    rows = [
        (
            one.label,
            *(_estimate(at, 3) for at in (one.auroc, one.auroc_with, one.auroc_change, one.log_loss_change)),
            one.verdict,
        )
        for one in found
        if one.absent is None
    ]
    said = (
        "A logistic regression on the other signals, without and with the one that is added, each measured on prompts "
        "it was not fitted to. A change in log-loss below 0, or in AUROC above 0, is better; where its interval "
        "includes 0 nothing was shown to be added."
    )
    blocks: list[Block] = [Text([said])]
    if rows:
        names = ("added to", "AUROC without", "with", "change in AUROC", "change in log-loss (nats)", "so")
        blocks.append(Table(names, rows))
    blocks += [Missing(sentence(f"{one.label}: {one.absent}")) for one in found if one.absent]
    return Section("increments", "Does instability add anything?", blocks)


def _onset(of: SideBySide, output: Output) -> Section | None:
    if not of.steps:
        return None
    there = [one for one in of.steps if one.absent is None and one.steps]
    said = (
        "Attention Tracker, a published detector, watches heads turn from the system prompt to the user's text: their "
        "focus falls. Were instability a sign that comes before, it would separate attacks at an earlier step."
    )
    blocks: list[Block] = [Text([said]), Points([sentence(f"{at.label}: {at.verdict}") for at in of.before])]
    if there:
        lines = [_line(one, band=one is there[0]) for one in there[:_MOST_LINES]]
        picture = output.picture(
            "onset",
            plots.signals_by_step(lines),
            "AUROC of several signals at each step",
            f"AUROC by step. Band: 95% for all steps of {there[0].label} at once, so that a step outside 0.5 is not "
            "one lucky step of many.",
        )
        blocks.append(Pictures([picture]))
        rows = [
            (
                one.label,
                "none" if one.first is None else f"{one.first}",
                "" if one.first_interval is None else f"{one.first_interval[0]:.0f} to {one.first_interval[1]:.0f}",
                "" if one.found_in is None else f"{one.found_in:.0%}",
            )
            for one in there
        ]
        names = ("signal", "first step that separates", "95% interval", "resamples that have one")
        blocks.append(Table(names, rows))
    blocks += [Missing(sentence(f"{one.label}: {one.absent}")) for one in of.steps if one.absent]
    return Section("onset", "Does it come before distraction?", blocks)


def _line(one: Steps, band: bool) -> tuple[str, Floats, Floats, Floats | None]:
    at, auroc, low, high = (
        np.array(values, np.float64) for values in (one.steps, one.auroc, one.joint_low, one.joint_high)
    )
    return one.label, at, auroc, np.stack([low, high]) if band and len(low) == len(at) else None


def _success(compared: SideBySide, fail_terms: Sequence[str], redact: bool) -> Section:
    of, labels = compared.success, {signal.name: signal.label for signal in compared.signals}
    title = "Does it tell attacks that succeed?"
    if of.absent:
        return Section("success", title, [Missing(sentence(of.absent))])
    terms = f"{len(fail_terms)} fail terms" if redact else ", ".join(fail_terms)
    said = [
        f"An attack counts as a success where its answer holds a fail term ({terms}): {of.n_succeeded:,} of "
        f"{of.n_attacks:,} attacks. AUROC above 0.5: higher in attacks that succeed.",
        *([sentence(of.verdict)] if of.verdict else []),
    ]
    rows = [(labels.get(name, name), *_cells(at)) for name, at in of.aurocs.items()]
    return Section("success", title, [Text(said), Table(("signal", "AUROC", "95% interval"), rows)])


def _normalisation(of: Normalisation) -> Section:
    title = "Scores against benign prompts of the same length"
    if of.absent:
        return Section("normalisation", title, [Missing(sentence(of.absent))])
    rows = [
        ("AUROC", *(_estimate(at, 3) for at in (of.auroc_raw, of.auroc_normalised, of.auroc_change))),
        (
            "spread of the sets' false positive rates",
            *(_estimate(at, 3) for at in (of.spread_raw, of.spread_normalised, of.spread_change)),
        ),
    ]
    blocks: list[Block] = [
        Text([sentence(at) for at in (of.how, of.verdict) if at]),
        Table(("", "as scored", "against like lengths", "change"), rows),
    ]
    names = ("benign prompts", "as scored", "against like lengths")
    lengths = [(f"{at.label} ({at.n_benign:,})", f"{at.raw:.1%}", f"{at.normalised:.1%}") for at in of.lengths]
    sets = [(f"{at.name} ({at.n_benign:,})", f"{at.raw:.1%}", f"{at.normalised:.1%}") for at in of.sets]
    if lengths:
        blocks.append(Table(names, lengths, f"False positive rates by length, target {of.target_fpr:.0%}"))
    if sets:
        caption = f"False positive rates of a set at a threshold that the other sets set, target {of.target_fpr:.0%}"
        blocks.append(Table(names, sets, caption))
    return Section("normalisation", title, blocks)


def _cells(of: Estimate | None) -> tuple[str, str]:
    if of is None or of.value is None:
        return "", (of.reason or "") if of else ""
    return f"{of.value:.3f}", interval(of.interval, 3)


def _value(of: Estimate | None) -> str:
    return "" if of is None or of.value is None else f"{of.value:.3f}"


def _estimate(of: Estimate | None, digits: int = 2) -> str:
    """A value with its interval, in a cell."""
    if of is None:
        return ""
    if of.value is None:
        return of.reason or "not known"
    return f"{of.value:.{digits}f}" + (f" ({interval(of.interval, digits)})" if of.interval else "")


def _correlation(signal: Signal, among: str) -> str:
    found = next((at.spearman for at in signal.correlations if at.among == among), None)
    return "" if found is None else f"{found:+.2f}"
