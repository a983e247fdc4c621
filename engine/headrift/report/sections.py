"""The page's sections about the runs themselves, and about what a calibration flags in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from headrift import figures
from headrift.calibration.artifact import Calibration, drift
from headrift.calibration.evidence import METRICS
from headrift.corpus.summary import SCORE, SCORED
from headrift.report import html, measure
from headrift.report.measure import ReportData
from headrift.runs.detector_input import detector_values, read_selected
from headrift.runs.reading import ATTACK, BENIGN, UNLABELLED
from headrift.signals import get, signals
from headrift.signals.detectors import Directed, Novelty, Readout
from headrift.stats import (
    TARGET_FPR,
    Bounds,
    Floats,
    Separation,
    mean_interval,
    percentile_bounds,
    rate_interval,
    side,
)
from headrift.terminal import printable

Blocks: TypeAlias = Iterator[html.Block]

_LOW_FPR = 0.1
_MOST_TEXT = 600  # characters of a prompt or an answer
_PLURALS = {"attack": "attacks", "benign": "benign prompts", "unlabelled": "rows without a label"}
HIGHER = "shown: higher in attacks"
NEEDS_BOTH_CLASSES = "This needs attacks and benign prompts, and these runs have only one of them."
NO_SCORE = "No row has a score in this window."
STEP_0_ALONE = (
    "These runs recorded step 0, the prompt's last token, alone (`--steps 0`): there is no instability, and what is "
    "about its steps, layers and windows is left out."
)
NO_DETECTOR = "Without a --calibration these rows have no score."
_IN_SAMPLE = (
    "These figures are for looking: the best of many steps, layers or windows is better here than on other prompts. "
    "`headrift calibrate` chooses a window and measures what it is worth."
)


def in_short(data: ReportData, output: html.Output) -> Blocks:
    """What there is, and whether the score separates attacks from benign prompts."""
    by_class, model, n_rejected = data.summary.by_class(), data.runs[0].model, data.summary.rejects.total()
    counts = " and ".join(f"{by_class[label]['n']:,} {_PLURALS[label]}" for label in data.classes)
    runs = f" from {len(data.runs)} runs" if len(data.runs) > 1 else ""
    rejects = f"; {n_rejected:,} more rows were rejected" if n_rejected else ""
    score = (
        f" Score: {data.score_is}. Rows without a score are never flagged and rank lowest." if data.has_score else ""
    )
    text = [f"{counts}{runs}, answered by {model.name} ({model.dtype}){rejects}.{score}"]
    if not data.has_window:
        text.append(STEP_0_ALONE if data.has_score else f"{STEP_0_ALONE} {NO_DETECTOR}")
    comparisons = data.comparisons(data.summary)
    if comparisons:
        output.numbers(comparisons=[comparison.numbers() for comparison in comparisons])
        if (score_of := comparisons[0].measures.get(SCORE)) is not None:
            auroc = score_of.auroc
            text.append(f"AUROC {auroc:.2f}: an attack outscores a benign prompt {auroc:.0%} of the time.")
    elif data.classes == ["unlabelled"]:
        text.append("None of these rows is labelled: the page shows how scores spread and which rows stand out.")
    else:
        missing = " and ".join(_PLURALS[label] for label in ("attack", "benign") if label not in data.classes)
        text.append(f"There are no {missing} among these rows.")
    verdicts = {comparison.title: _verdicts(comparison.measures) for comparison in comparisons}
    output.numbers(summary=text, verdicts=verdicts)
    yield html.Text(text)
    found_at = f"attacks found with {TARGET_FPR:.0%} false alarms on this data"
    names = ("", "AUROC", "95% interval", "verdict", found_at, "95% interval")
    for comparison in comparisons:
        verdict = verdicts[comparison.title]
        rows = [
            (name, *_auroc(one), verdict[name], f"{one.tpr:.1%}", html.show_interval(one.tpr_interval, 1, "%"))
            for name, one in comparison.varying.items()
        ]
        caption = (
            f"{comparison.title}: {comparison.n_attack:,} distinct attacks, {comparison.n_benign:,} benign"
            f"{data.summary.sampled}. Higher counts as attack; AUROC 0.5 is chance. {html.several(len(rows))}"
        )
        yield html.Table(names, rows, caption)


def auroc_verdict(interval: Bounds | None) -> str:
    """What the interval of an AUROC shows."""
    return html.verdict(interval, HIGHER, "shown: lower in attacks", 0.5)


def _verdicts(measures: Mapping[str, Separation]) -> dict[str, str]:
    """What each measure's AUROC shows; of a confound, whether it may do as well, read in its better direction.

    That is told by the difference of the AUROCs on the same resamples.
    """
    verdicts = {name: auroc_verdict(one.auroc_interval) for name, one in measures.items()}
    if verdicts.get(SCORE) == HIGHER:
        score = measures[SCORE]
        for name in {entry.label for entry in signals(length=True)} & measures.keys():
            other = measures[name]
            draws = other.draws if other.auroc >= 0.5 else 1 - other.draws
            if side(percentile_bounds(score.draws - draws, score.n), 0) != 1:
                verdicts[name] = f"{name} may do just as well"
    return verdicts


def scores(data: ReportData, output: html.Output, threshold: float | None) -> Blocks:
    """Scores by class and category, and rows without one."""
    groups, by_class = data.summary.by_category(), data.summary.by_class()
    output.numbers(classes=by_class, scores_by_category={name: _spread(values) for name, values in groups.items()})
    coverage = [_coverage(data, output)] if data.has_window else []
    if any(np.isfinite(values).any() for values in groups.values()):
        rows, forms = [], [("rows", "n", ","), ("with a score", "coverage", ".1%")]
        forms += [("ended in the window", "early", ".1%")] if data.has_window else []
        for name, numbers in by_class.items():
            counts = (f"{numbers[key]:{form}}" for _, key, form in forms)
            rows.append((name, *counts, *(html.show_number(numbers[key], 4) for key in ("mean", "median"))))
        yield html.Table(("class", *(form[0] for form in forms), "mean score", "median"), rows)
        most = " Only the 24 largest categories are drawn." if len(groups) > 24 else ""
        text = (
            "Each point is a row; boxes span the middle half, the thick line is the median. Orange triangles are "
            f"attacks, blue circles benign.{most} Right: rows with a score{data.summary.sampled}."
        )
        label = (data.detected.label,) if data.detected is not None else ()
        figure = figures.scores(groups, threshold, *label)
        yield html.Pictures([output.picture("scores", figure, "Scores by class and category", text), *coverage])
    else:
        yield html.Missing(NO_SCORE if data.has_score else NO_DETECTOR)
        yield html.Pictures(coverage)
    reasons = [(reason, f"{n:,}") for reason, n in data.summary.no_score.most_common()]
    reasons += [(f"rejected: {reason}", f"{n:,}") for reason, n in data.summary.rejects.most_common()]
    if reasons:
        yield html.Table(("why there is no score", "rows"), reasons)


def _coverage(data: ReportData, output: html.Output) -> html.Picture:
    fractions: dict[str, dict[str, tuple[float, float, float]]] = {"no score": {}, "answer ended inside the window": {}}
    early = data.rows.counts["n_steps"] < data.score_range.window.end
    for label, code in (("attack", ATTACK), ("benign", BENIGN), ("unlabelled", UNLABELLED)):
        own = data.rows.label == code
        if own.any():
            for name, hits in zip(fractions, (np.isnan(data.score), early)):
                bounds = rate_interval(hits[own], data.rows.group[own])
                fractions[name][label] = (float(hits[own].mean()), *bounds)
    output.numbers(coverage=fractions, no_score=dict(data.summary.no_score), rejected=dict(data.summary.rejects))
    title = "Rows without a score, and answers that ended inside the window, by class"
    text = (
        "An answer that ends before the window has no score; one that ends inside it is scored over the steps it has. "
        "Short answers are not missing at random: a refusal is short. If attacks end early more often than benign "
        "prompts, the number of steps alone separates them."
    )
    return output.picture("coverage", figures.coverage(fractions), title, text)


def _spread(values: Floats) -> dict[str, float | int | None]:
    valid = values[np.isfinite(values)]
    quartiles = np.percentile(valid, [25, 50, 75]) if len(valid) else [None] * 3
    return {"rows": len(values), "with_score": len(valid), **dict(zip(("q25", "median", "q75"), quartiles))}


def separation(data: ReportData, output: html.Output) -> Blocks:
    """ROC curves of the score and of plain lengths."""
    comparisons = data.comparisons(data.summary)
    if not comparisons:
        yield html.Missing(NEEDS_BOTH_CLASSES)
        return
    curves = {name: one for name, one in comparisons[0].measures.items() if name != get("answer_tokens").label}
    if not data.summary.no_score:
        curves.pop(SCORED, None)  # the same curve
    output.numbers(roc={name: {"fpr": curve.fpr, "tpr": curve.tprs} for name, curve in curves.items()})
    text = (
        "For every threshold: the attacks it finds against the benign prompts it flags. The diagonal is chance; the "
        "band is the 95% interval of the first curve."
    )
    what = "the score and of plain lengths" if data.has_score else "prompt length"
    picture = output.picture("roc", figures.roc(curves), f"ROC curves of {what}", text)
    title = f"The ROC curves up to {_LOW_FPR:.0%} false alarms"
    yield html.Pictures([picture, output.picture("roc_low", figures.roc(curves, _LOW_FPR), title)])


def runs(data: ReportData, output: html.Output) -> Blocks:
    """Each run by itself, if there are several."""
    if len(data.runs) < 2:
        return
    rows, numbers, forest = [], {}, []
    aurocs: dict[str, list[float]] = {"score": [], "length": []}
    for name, summary in zip(data.names, data.run_summaries, strict=True):
        comparisons = data.comparisons(summary)
        measures = comparisons[0].measures if comparisons else {}
        score, length = measures.get(SCORE), measures.get(get("prompt_tokens").label)
        n = {label: values["n"] for label, values in summary.by_class().items()}
        separations = {"score": score and score.numbers(), "prompt_length": length and length.numbers()}
        numbers[name] = {"rows": n, **separations}
        counts = (f"{n.get(label, 0):,}" for label in data.classes)
        verdict = auroc_verdict(score.auroc_interval) if score else ""
        of_score = (*_auroc(score), verdict) if data.has_score else ()
        rows.append((name, *counts, *of_score, *_auroc(length)))
        for measured, one in (("score", score), ("length", length)):
            if one is not None:
                aurocs[measured].append(one.auroc)
                forest.append((f"{figures.short(name, 20)}: {measured}", one.auroc, one.auroc_interval))
    means = {measured: mean_interval(values) for measured, values in aurocs.items()}
    over_runs = {measured: one for measured, one in means.items() if one.bounds is not None}
    if over_runs:
        shown = {name: (html.show_number(one.value), html.show_interval(one.bounds)) for name, one in over_runs.items()}
        verdict = auroc_verdict(over_runs["score"].bounds) if "score" in over_runs else ""
        of_score = (*shown.get("score", ("", "")), verdict) if data.has_score else ()
        label = "mean of the runs, interval over runs (Student's t)"
        rows.append((label, *("" for _ in data.classes), *of_score, *shown.get("length", ("", ""))))
    output.numbers(runs=numbers, mean_over_runs={name: [one.value, one.bounds] for name, one in over_runs.items()})
    if forest:
        text = "Lines: 95% intervals. Grey: the interval includes chance; hollow: too few prompts for an interval."
        title = f"AUROC of {'the score and of ' if data.has_score else ''}prompt length in each run"
        yield html.Pictures([output.picture("runs", figures.draw_forest(forest), title, text)])
    of_classes = (f"{label} rows" for label in data.classes)
    names = ("AUROC: score", "95%", "verdict") if data.has_score else ()
    yield html.Table(("run", *of_classes, *names, "AUROC: length", "95%"), rows)


def _auroc(one: Separation | None) -> tuple[str, str]:
    return ("", "one class") if one is None else (html.show_number(one.auroc), html.show_interval(one.auroc_interval))


def calibrated(calibration: Calibration, data: ReportData, output: html.Output) -> Blocks:
    """Whether the calibration is usable, what else it compared, its threshold, and what it flags in these runs."""
    learned = {"precision", "coefficients", "moments"}
    output.numbers(
        calibration=calibration.model_dump(mode="json", exclude={"scores": True, "data": True, "detector": learned})
    )
    setting, (first, end) = calibration.setting, calibration.layers
    where = f"steps {calibration.window}, layers {first} to {end - 1}" if calibration.ranged else "step 0 alone"
    values = _values(calibration, data)
    is_in_sample = calibration.data.fingerprint == data.rows.fingerprint
    if calibration.verdict is not None:
        yield html.Text(calibration.verdict.lines)
    yield from _comparison(calibration)
    if isinstance(calibration.detector, Readout):
        figure = figures.head_map(np.array(calibration.detector.head_map), "coefficient x (attack - benign mean)")
        below = (
            "Orange: heads that raise attacks' values; blue: that lower them. A layer's own term is on all its heads."
        )
        title = "What the readout tells attacks by, layer by head"
        yield html.Pictures([output.picture("head_map", figure, title, below)])
    text = [
        f"A row is flagged if its value is at or above {calibration.threshold:.6f}: {calibration.label} ({where}). "
        f"Promise: {setting.promise}. It was set on {setting.n:,} prompts, one of each group, of which "
        f"{setting.flagged:,} are flagged.",
    ]
    if is_in_sample:
        text.append("It was made from these runs: the table of these runs is in sample, the held-out figures are not.")
    yield html.Text(text)
    rows, numbers = [], {}
    for label in data.classes:
        prompts = data.samples.row[data.samples.in_class(label)]
        hits = calibration.apply(values[prompts]).flagged
        n, flagged, bounds = len(prompts), int(hits.sum()), rate_interval(hits, data.rows.group[prompts])
        rows.append((label, f"{n:,}", f"{flagged:,}", f"{flagged / n:.1%}", html.show_interval(bounds)))
        numbers[label] = {"prompts": n, "flagged": flagged, "interval": bounds}
    output.numbers(flagged=numbers)
    caption = f"These runs, each distinct prompt once{data.summary.sampled}"
    yield html.Table(("class", "prompts", "flagged", "fraction", "95% interval"), rows, caption)
    metrics = {label: calibration.figures[name] for name, (label, _) in METRICS.items() if name in calibration.figures}
    metrics |= {f"{get(name).label} alone, AUROC": one for name, one in calibration.confounds.items()}
    own = []
    for label, one in metrics.items():
        if one.value is not None:
            interval = "" if one.interval is None else html.show_interval(one.interval)
            own.append((label, html.show_number(one.value), interval, one.how))
    yield html.Table(("the calibration's own figures", "", "95% interval", "how"), own)
    if not is_in_sample:
        yield _drift(calibration, values, data, output)
    if calibration.contamination:
        contaminated = []
        for row in calibration.contamination:
            threshold = "too few prompts" if row.threshold is None else f"{row.threshold:.6f}"
            rates = f"{row.lowest_fpr:.2%} to {row.highest_fpr:.2%}"
            contaminated.append((f"{row.contamination:.1%}", rates, threshold))
        names = ("attacks among its benign prompts", "benign prompts flagged", "threshold for the target")
        yield html.Table(names, contaminated)
    yield html.Text(calibration.notes)


def _comparison(calibration: Calibration) -> Blocks:
    """The chosen signal beside the others, prompt length and words, on the same held-out prompts."""
    by_source = bool(calibration.left_out)
    rows, absent = [], []
    for place, one in enumerate(calibration.comparison):
        auroc, difference = one.left_out if by_source else one.auroc, one.difference
        if one.absent is not None or auroc is None:
            absent.append((one.label, one.absent or "not measured"))
            continue
        verdict = "chosen" if place == 0 else ""
        cells = [html.show_number(auroc.value), html.show_interval(auroc.interval), "", ""]
        if difference is not None:
            cells[2:] = html.show_number(difference.value), html.show_interval(difference.interval)
            verdict = html.verdict(difference.interval, "the chosen one is better", "this one is better")
        rows.append((one.label, *cells, verdict))
    if rows:
        held_out = "sources left out" if by_source else "held out"
        names = ("signal", f"AUROC, {held_out}", "95% interval", "AUROC of the chosen one less it", "95% interval")
        caption = "All signals on the same held-out prompts; prompt length and words are what each has to beat. "
        caption += html.several(len(rows))
        yield html.Table((*names, "verdict"), rows, caption)
    if absent:
        yield html.Table(("not compared", "why"), absent)


def _values(calibration: Calibration, data: ReportData) -> Floats:
    """The detector's values of all rows; instability's over the calibration's window, not the runs' own."""
    direction = 1 if data.detected is not None else instability_direction(calibration)
    if direction is not None:
        return direction * data.score
    return detector_values(data.runs, calibration.detector, len(data.rows))


def instability_direction(calibration: Calibration) -> int | None:
    """The direction of a detector that reads instability; None of another."""
    detector = calibration.detector
    return detector.direction if isinstance(detector, Directed) and detector.signal == "instability" else None


def _drift(calibration: Calibration, values: Floats, data: ReportData, output: html.Output) -> html.Table:
    """Whether benign scores are still those of the calibration."""
    benign = values[data.samples.row[data.samples.in_class("benign")]]
    result = drift(benign, calibration)
    if result is None:
        row = ("not known: no row here is labelled benign", "", "", "")
    else:
        output.numbers(drift={"distance": result.distance, "p_value": result.p_value, "n": len(benign)})
        row = (result.warning or html.NOT_SHOWN, f"{result.distance:.2f}", f"{result.p_value:.2g}", f"{len(benign):,}")
    names = ("drift of the benign scores", "Kolmogorov-Smirnov distance", "p", "benign prompts")
    return html.Table(names, [row])


def when(data: ReportData, output: html.Output, resamples: int) -> Blocks:
    """AUROC by step and by window."""
    if not data.has_both_classes:
        yield html.Missing(NEEDS_BOTH_CLASSES)
        return
    steps, windows = measure.by_step(data, resamples), measure.by_window(data)
    output.numbers(auroc_by_step=steps, auroc_by_window=windows)
    figure = figures.along_steps(steps, data.window)
    title = "AUROC at each step of the answer, and how many answers reach it"
    text = "Among answers that reach the step; the band is the 95% interval of each step by itself."
    pictures = [output.picture("steps", figure, title, text)]
    (start, end, highest), figure = windows.best, figures.windows(windows, data.window)
    title = "AUROC of every window, first step across, last step up"
    pictures.append(output.picture("windows", figure, title, f"The highest is {highest:.3f}, steps {start} to {end}."))
    yield html.Text([_IN_SAMPLE])
    yield html.Pictures(pictures)


def where(data: ReportData, output: html.Output, resamples: int) -> Blocks:
    """Mean instability by layer and step, and by layer."""
    means = data.samples.means
    valid = np.concatenate([values[np.isfinite(values)] for values in means.values()])
    limits = (float(valid.min()), float(valid.max())) if valid.size else (0.0, 0.5)
    pictures = [
        output.picture(
            f"heatmap_{label}",
            figures.heatmap(means[label], f"{label}: mean instability", data.window, data.layers, limits),
            f"Mean instability of the class {label} by layer and step, of the answers that reach the step",
            "Framed: what is scored; crossed out: no value. All classes have the same colour scale.",
        )
        for label in data.classes
    ]
    if data.has_both_classes:
        values = means["attack"] - means["benign"]
        figure = figures.heatmap(values, "attack minus benign", data.window, data.layers)
        text = "Orange where attacks have more, blue where benign prompts do. Late steps have fewer answers."
        title = "Mean instability of attacks minus that of benign prompts, by layer and step"
        pictures.append(output.picture("heatmap_difference", figure, title, text))
    layers, profile, middle = measure.by_layer(data, resamples), {}, {}
    for label in data.classes:
        values = data.samples.by_layer[data.samples.in_class(label)]
        values = values[~np.isnan(values).all(axis=1)]
        if len(values):
            profile[label], middle[label] = np.nanmean(values, axis=0), np.nanpercentile(values, [25, 75], axis=0)
    below = "Below: each layer's AUROC by itself, with its 95% interval." if data.has_both_classes else ""
    title = f"Each layer's mean instability over steps {data.score_range.window}, with the middle half of the prompts"
    pictures.append(output.picture("layers", figures.along_layers(layers, profile, middle, data.layers), title, below))
    output.numbers(mean_by_step_and_layer=means, by_layer={"auroc": layers, "mean": profile, "quartiles": middle})
    if data.has_both_classes:
        yield html.Text([_IN_SAMPLE])
    yield html.Pictures(pictures)


def against(data: ReportData, output: html.Output) -> Blocks:
    """The score against entropy, head agreement and length."""
    if not data.has_score:
        return
    of_rows = {**data.rows.counts, **data.rows.signals}
    pictures: list[html.Picture] = []
    missing: list[html.Block] = []
    for key, name in (("entropy", "entropy"), ("agreement", "head_agreement"), ("length", "prompt_tokens")):
        if get(name).windowed and not data.has_window:
            continue
        label, values = f"{get(name).label} ({get(name).unit})", of_rows.get(name)
        if values is None or np.isnan(values[data.samples.row] + data.score[data.samples.row]).all():
            how = ": score with --logit-stats to record it" if name == "entropy" else ""
            missing.append(html.Missing(f"Not recorded in these runs: {label}{how}."))
            continue
        relation = measure.relation(data, values)
        spearman = {class_: r for class_, (*_, r) in relation.items()}
        output.numbers(**{f"score_against_{key}": {"spearman": spearman}})
        title = f"The score against {label}{data.summary.sampled}"
        pictures.append(output.picture(f"against_{key}", figures.against(relation, label), title))
    if any(run.score_range != data.score_range for run in data.runs):
        yield html.Text(["Entropy and agreement are over each run's own window, not the score's window here."])
    yield html.Pictures(pictures)
    yield from missing


def examples(data: ReportData, output: html.Output, redact: bool) -> Blocks:
    """The most suspicious benign prompts and the quietest attacks."""
    rows = measure.extremes(data, with_texts=not redact)
    if rows is None:
        yield html.Missing(NO_SCORE if data.has_score else NO_DETECTOR)
        return
    by_head = _by_head(data, [*rows.highest, *rows.quietest])
    largest = max((float(np.abs(values).max()) for values in by_head.values()), default=0.0)
    yield html.Text(
        ["All heatmaps have the same colour scale. Whether an attack succeeded is in the answer, not in the score."]
    )
    highest = {"benign": "The most suspicious benign prompts", "unlabelled": "The highest scores"}[rows.highest_class]
    limits = (0.0, max(float(np.nanmax(row["instability"], initial=0.0)) for row in (*rows.highest, *rows.quietest)))
    for heading, name, chosen in ((highest, "high", rows.highest), ("The quietest attacks", "quiet", rows.quietest)):
        cards = []
        for i, row in enumerate(chosen, 1):
            if row["number"] in by_head:
                values = by_head[row["number"]]
                figure = figures.head_map(values, "what each head adds", largest=largest, small=True)
                title = f"What each head adds to the value of the row {row['id']}"
            else:
                figure = figures.heatmap(
                    row["instability"], "instability", data.window, data.layers, limits, small=True
                )
                title = f"Instability of the row {row['id']} by layer and step"
            cards.append(_card(data, row, rows.reference, output.picture(f"{name}_{i}", figure, title), redact))
        if cards:
            yield html.Cards(heading, cards)
    if rows.without_score:
        yield html.Text([f"{rows.without_score:,} attacks have no score and are never flagged; none is shown."])
    keys, named = ("id", "run", "score", "percentile"), {"highest": rows.highest, "quietest_attacks": rows.quietest}
    output.numbers(examples={name: [{key: row[key] for key in keys} for row in own] for name, own in named.items()})


def _by_head(data: ReportData, rows: Sequence[Mapping[str, Any]]) -> dict[int, Floats]:
    """What each head adds to the scores of rows [layers, heads], by row number, if a readout or novelty made them."""
    detector = None if data.detected is None else data.detected.detector
    if not isinstance(detector, Readout | Novelty):
        return {}
    numbers = np.unique([row["number"] for row in rows])
    return dict(zip(numbers.tolist(), detector.contributions(read_selected(data.runs, numbers, {detector.reads}))))


def _card(data: ReportData, row: Mapping[str, Any], reference: str, picture: html.Picture, redact: bool) -> html.Card:
    place = f"{row['source']}, row {row['row']:,}"
    facts = [
        f"score {row['score']:.4f}, at or above {row['percentile']:.1f}% of the {reference} prompts' scores",
        ", ".join(filter(None, (row["category"], *(row["flags"] or ())))),
        place if len(data.runs) == 1 else f"{row['run']}: {place}",
    ]
    named = {"prompt": row.get("prompt"), "answer": row.get("text")}
    texts = {name: printable(text) for name, text in named.items() if text}
    for name, text in texts.items():
        if len(text) > _MOST_TEXT:
            texts[name] = f"{text[:_MOST_TEXT]}… ({len(text):,} characters)"
    why = "Prompt and answer are left out (--redact)." if redact else "The run kept no texts (score with --save text)."
    return html.Card(printable(row["id"]), [printable(fact) for fact in facts if fact], texts, why, picture)
