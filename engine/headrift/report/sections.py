"""The page's sections about the runs themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from headrift.corpus.summary import SCORE, SCORED, Comparison
from headrift.figures import Curve
from headrift.report import html, measure, plots
from headrift.report.gather import Floats, ReportData
from headrift.stats import TARGET_FPR, Separation, exact_interval
from headrift.terminal import printable

_LOW_FPR = 0.1
_MOST_TEXT = 600  # characters of a prompt or an answer
_PLURALS = {"attack": "attacks", "benign": "benign prompts", "unlabelled": "rows without a label"}
_CONFOUNDS = ("prompt length", "answer length", "number of steps")
HIGHER, LOWER = "shown: higher in attacks", "shown: lower in attacks"
NEEDS_BOTH_CLASSES = "This needs attacks and benign prompts, and these runs have only one of them."
NO_SCORE = "No row has a score in this window."
_IN_SAMPLE = (
    "These figures are for looking: the best of many steps, layers or windows is better here than on other prompts. "
    "`headrift calibrate` chooses a window and measures what it is worth."
)


def in_short(data: ReportData, output: html.Output) -> list[html.Block]:
    """What there is, and whether the score separates attacks from benign prompts."""
    by_class, model, n_rejected = data.summary.by_class(), data.runs[0].model, data.summary.rejects.total()
    counts = " and ".join(f"{by_class[label]['n']:,} {_PLURALS[label]}" for label in data.classes)
    runs = f" from {len(data.runs)} runs" if len(data.runs) > 1 else ""
    rejects = f"; {n_rejected:,} more rows were rejected" if n_rejected else ""
    text = [
        f"{counts}{runs}, answered by {model.name} ({model.dtype}){rejects}. Score: mean instability over steps "
        f"{data.score_range.window} of the answer and layers {data.layers[0]} to {data.layers[1] - 1}. Rows without a "
        "score are never flagged and rank lowest."
    ]
    comparisons = data.summary.comparisons()
    if comparisons:
        auroc = comparisons[0].measures[SCORE].auroc
        text.append(f"AUROC {auroc:.2f}: an attack outscores a benign prompt {auroc:.0%} of the time.")
        output.numbers(comparisons=[comparison.numbers() for comparison in comparisons])
    elif data.classes == ["unlabelled"]:
        text.append("None of these rows is labelled: the page shows how scores spread and which rows stand out.")
    else:
        missing = " and ".join(_PLURALS[label] for label in ("attack", "benign") if label not in data.classes)
        text.append(f"There are no {missing} among these rows.")
    verdicts = {comparison.title: _verdicts(comparison) for comparison in comparisons}
    output.numbers(summary=text, verdicts=verdicts)
    return [html.Text(text), *(_table(data, comparison, verdicts[comparison.title]) for comparison in comparisons)]


def _verdicts(comparison: Comparison) -> dict[str, str]:
    """What each measure's AUROC shows, by its name."""
    score = comparison.measures[SCORE]
    verdicts = {name: _verdict(one) for name, one in comparison.measures.items()}
    if verdicts[SCORE] == HIGHER:
        may = [name for name in _CONFOUNDS if _may_do_as_well(comparison.measures[name], score)]
        verdicts |= {name: f"{name} may do just as well" for name in may}
    return verdicts


def _table(data: ReportData, comparison: Comparison, verdicts: Mapping[str, str]) -> html.Table:
    found_at = f"attacks found with {TARGET_FPR:.0%} false alarms on this data"
    rows = [
        (name, *_auroc(one), verdicts[name], f"{one.tpr:.1%}", html.show_interval(one.tpr_interval, 1, "%"))
        for name, one in comparison.measures.items()
    ]
    caption = (
        f"{comparison.title}: {comparison.n_attack:,} distinct attacks, {comparison.n_benign:,} benign"
        f"{data.summary.sampled}. Higher counts as attack; AUROC 0.5 is chance."
    )
    return html.Table(("", "AUROC", "95% interval", "verdict", found_at, "95% interval"), rows, caption)


def _verdict(separation: Separation) -> str:
    return html.verdict(separation.auroc_interval, HIGHER, LOWER, 0.5)


def _may_do_as_well(other: Separation, score: Separation) -> bool:
    """Whether the intervals overlap, the other's taken in its better direction."""
    if other.auroc_interval is None or score.auroc_interval is None:
        return True
    return max(other.auroc_interval[1], 1 - other.auroc_interval[0]) >= score.auroc_interval[0]


def scores(data: ReportData, output: html.Output, threshold: float | None) -> html.Section:
    """Scores by class and category, and rows without one."""
    groups, by_class = data.summary.by_category(), data.summary.by_class()
    output.numbers(classes=by_class, scores_by_category={name: _spread(values) for name, values in groups.items()})
    coverage = _coverage(data, output)
    reasons = [(reason, f"{n:,}") for reason, n in data.summary.no_score.most_common()]
    reasons += [(f"rejected: {reason}", f"{n:,}") for reason, n in data.summary.rejects.most_common()]
    why = [html.Table(("why there is no score", "rows"), reasons)] if reasons else []
    title = "Scores by class and category"
    if not any(np.isfinite(values).any() for values in groups.values()):
        return html.Section("scores", title, [html.Missing(NO_SCORE), html.Pictures([coverage]), *why])
    rows = [
        (
            name,
            f"{numbers['n']:,}",
            f"{numbers['coverage']:.1%}",
            f"{numbers['early']:.1%}",
            *(html.show_number(numbers[key], 4) for key in ("mean", "median")),
        )
        for name, numbers in by_class.items()
    ]
    table = html.Table(("class", "rows", "with a score", "ended in the window", "mean score", "median"), rows)
    most = " Only the 24 largest categories are drawn." if len(groups) > 24 else ""
    text = (
        "Each point is a row; boxes span the middle half, the thick line is the median. Orange triangles are attacks, "
        f"blue circles benign.{most} Right: rows with a score{data.summary.sampled}."
    )
    picture = output.picture("scores", plots.scores(groups, threshold), "Scores by class and category", text)
    return html.Section("scores", title, [table, html.Pictures([picture, coverage]), *why])


def _coverage(data: ReportData, output: html.Output) -> html.Picture:
    """Rows without a score, and answers that ended inside the window."""
    fractions: dict[str, dict[str, tuple[float, float, float]]] = {"no score": {}, "answer ended inside the window": {}}
    for label, numbers in data.summary.by_class().items():
        n = int(numbers["n"] or 0)
        for name, fraction in zip(fractions, (1 - float(numbers["coverage"] or 0), float(numbers["early"] or 0))):
            fractions[name][label] = (fraction, *exact_interval(round(fraction * n), n))
    output.numbers(coverage=fractions, no_score=dict(data.summary.no_score), rejected=dict(data.summary.rejects))
    return output.picture(
        "coverage",
        plots.coverage(fractions),
        "Rows without a score, and answers that ended inside the window, by class",
        "An answer that ends before the window has no score; one that ends inside it is scored over the steps it has. "
        "Short answers are not missing at random: a refusal is short. If attacks end early more often than benign "
        "prompts, the number of steps alone separates them.",
    )


def _spread(values: Floats) -> dict[str, float | int | None]:
    valid = values[np.isfinite(values)]
    quartiles = np.percentile(valid, [25, 50, 75]) if len(valid) else [None] * 3
    return {"rows": len(values), "with_score": len(valid), **dict(zip(("q25", "median", "q75"), quartiles))}


def separation(data: ReportData, output: html.Output) -> html.Section:
    """ROC curves of the score and of plain lengths."""
    comparisons, title = data.summary.comparisons(), "How well the score separates attacks from benign prompts"
    if not comparisons:
        return html.Section("separation", title, [html.Missing(NEEDS_BOTH_CLASSES)])
    measures = {name: one for name, one in comparisons[0].measures.items() if name != "answer length"}
    if not data.summary.no_score:
        measures.pop(SCORED, None)  # the same curve
    curves = [Curve(name, one.fpr, one.tprs, one.auroc, one.grid, one.band) for name, one in measures.items()]
    output.numbers(roc={curve.name: {"fpr": curve.fpr, "tpr": curve.tpr} for curve in curves})
    text = (
        "For every threshold: the attacks it finds against the benign prompts it flags. The diagonal is chance; the "
        "band is the 95% interval of the score's curve."
    )
    pictures = [
        output.picture("roc", plots.roc(curves), "ROC curves of the score and of plain lengths", text),
        output.picture("roc_low", plots.roc(curves, _LOW_FPR), f"The ROC curves up to {_LOW_FPR:.0%} false alarms"),
    ]
    return html.Section("separation", title, [html.Pictures(pictures)])


def runs(separations: Sequence[measure.RunSeparation], data: ReportData, output: html.Output) -> html.Section | None:
    """Each run by itself, if there are several."""
    if len(separations) < 2:
        return None
    output.numbers(
        runs={
            run.name: {
                "rows": run.n,
                "score": run.score and run.score.numbers(),
                "prompt_length": run.length and run.length.numbers(),
            }
            for run in separations
        }
    )
    rows = [
        (
            run.name,
            *(f"{run.n.get(label, 0):,}" for label in data.classes),
            *_auroc(run.score),
            _verdict(run.score) if run.score else "",
            *_auroc(run.length),
        )
        for run in separations
    ]
    pictures = []
    if any(run.score for run in separations):
        text = "Lines: 95% intervals. Grey: the interval includes chance; hollow: too few prompts for an interval."
        title = "AUROC of the score and of prompt length in each run"
        pictures.append(output.picture("runs", plots.by_run(separations), title, text))
    text = (
        "Figures over all runs mix their system prompts and topics, so a difference between runs can look like one "
        "between attacks and benign prompts. Among several runs, some differ by chance."
    )
    counts = (f"{label} rows" for label in data.classes)
    names = ("run", *counts, "AUROC: score", "95%", "verdict", "AUROC: length", "95%")
    return html.Section("runs", "Run by run", [html.Text([text]), html.Pictures(pictures), html.Table(names, rows)])


def _auroc(one: Separation | None) -> tuple[str, str]:
    return ("", "one class") if one is None else (html.show_number(one.auroc), html.show_interval(one.auroc_interval))


def when(data: ReportData, output: html.Output, resamples: int) -> html.Section:
    """AUROC by step and by window."""
    title = "When the difference shows: steps and windows"
    if not data.has_both_classes:
        return html.Section("steps", title, [html.Missing(NEEDS_BOTH_CLASSES)])
    steps, windows = measure.by_step(data, resamples), measure.by_window(data)
    output.numbers(auroc_by_step=steps, auroc_by_window=windows)
    start, end, highest = windows.best
    figure = plots.along_steps(steps, data.window)
    text = "Among answers that reach the step; the band is the 95% interval of each step by itself."
    step_title = "AUROC at each step of the answer, and how many answers reach it"
    pictures = [output.picture("steps", figure, step_title, text)]
    figure, text = plots.windows(windows, data.window), f"The highest is {highest:.3f}, steps {start} to {end}."
    window_title = "AUROC of every window, first step across, last step up"
    pictures.append(output.picture("windows", figure, window_title, text))
    return html.Section("steps", title, [html.Text([_IN_SAMPLE]), html.Pictures(pictures)])


def where(data: ReportData, output: html.Output, resamples: int) -> html.Section:
    """Mean instability by layer and step, and by layer."""
    means = data.samples.means
    valid = np.concatenate([values[np.isfinite(values)] for values in means.values()])
    limits = (float(valid.min()), float(valid.max())) if valid.size else (0.0, 0.5)
    pictures = [
        output.picture(
            f"heatmap_{label}",
            plots.heatmap(means[label], f"{label}: mean instability", data.window, data.layers, limits),
            f"Mean instability of the class {label} by layer and step, of the answers that reach the step",
            "Framed: what is scored; crossed out: no value. All classes have the same colour scale.",
        )
        for label in data.classes
    ]
    if data.has_both_classes:
        figure = plots.difference(means["attack"] - means["benign"], data.window, data.layers)
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
    pictures.append(output.picture("layers", plots.along_layers(layers, profile, middle, data.layers), title, below))
    output.numbers(mean_by_step_and_layer=means, by_layer={"auroc": layers, "mean": profile, "quartiles": middle})
    blocks = [html.Text([_IN_SAMPLE])] if data.has_both_classes else []
    return html.Section("layers", "Where it shows: layers and steps", [*blocks, html.Pictures(pictures)])


def against(data: ReportData, output: html.Output) -> html.Section:
    """The score against entropy, head agreement and length."""
    signals = data.rows.signals
    others: dict[str, tuple[str, NDArray[np.floating] | None, str]] = {
        "entropy": ("next-token entropy (nats, mean over the window)", signals.get("entropy"), "--logit-stats"),
        "agreement": ("head agreement (mean correlation, -1 to 1)", signals.get("head_agreement"), ""),
        "length": ("prompt length (tokens)", data.rows.counts["prompt_tokens"].astype(np.float64), ""),
    }
    pictures: list[html.Picture] = []
    missing: list[html.Block] = []
    for name, (label, values, option) in others.items():
        if values is None or np.isnan(values[data.samples.row] + data.score[data.samples.row]).all():
            how = f": score with {option} to record it" if option else ""
            missing.append(html.Missing(f"Not recorded in these runs: {label}{how}."))
            continue
        scatter = measure.relation(data, values)
        output.numbers(**{f"score_against_{name}": {"spearman": scatter.spearman}})
        title = f"The score against {label}{data.summary.sampled}"
        pictures.append(output.picture(f"against_{name}", plots.against(scatter, label), title))
    text = [
        "If the score only repeated one of these, the points would be on a line. A difference between the classes "
        "along the horizontal axis means that this number could be mistaken for conflict. Spearman's r within a class: "
        "0 for no relation, 1 or -1 for the same or the opposite order."
    ]
    if any(run.score_range != data.score_range for run in data.runs):
        text.append("Entropy and agreement are over each run's own window, not the score's window here.")
    title = "The score against entropy, agreement and length"
    return html.Section("beside", title, [html.Text(text), html.Pictures(pictures), *missing])


def examples(data: ReportData, output: html.Output, redact: bool) -> html.Section:
    """The most suspicious benign prompts and the quietest attacks."""
    title, rows = "Rows to look at", measure.extremes(data, with_texts=not redact)
    if rows is None:
        return html.Section("examples", title, [html.Missing(NO_SCORE)])
    highest = {"benign": "The most suspicious benign prompts", "unlabelled": "The highest scores"}[rows.highest_class]
    brightest = max(float(np.nanmax(one.instability, initial=0.0)) for one in (*rows.highest, *rows.quietest))
    text = "All heatmaps have the same colour scale. Whether an attack succeeded is in the answer, not in the score."
    blocks: list[html.Block] = [html.Text([text])]
    for heading, name, chosen in ((highest, "high", rows.highest), ("The quietest attacks", "quiet", rows.quietest)):
        cards = []
        for i, one in enumerate(chosen, 1):
            limits = (0.0, brightest)
            figure = plots.heatmap(one.instability, "instability", data.window, data.layers, limits, small=True)
            title_of_figure = f"Instability of the row {one.columns['id']} by layer and step"
            cards.append(
                _card(data, one, rows.reference, output.picture(f"{name}_{i}", figure, title_of_figure), redact)
            )
        if cards:
            blocks.append(html.Cards(heading, cards))
    if rows.without_score:
        blocks.append(
            html.Text([f"{rows.without_score:,} attacks have no score and are never flagged; none is shown."])
        )
    output.numbers(
        examples={
            name: [{"id": o.columns["id"], "run": o.run, "score": o.score, "percentile": o.percentile} for o in chosen]
            for name, chosen in (("highest", rows.highest), ("quietest_attacks", rows.quietest))
        }
    )
    return html.Section("examples", title, blocks)


def _card(data: ReportData, example: measure.Example, reference: str, picture: html.Picture, redact: bool) -> html.Card:
    columns = example.columns
    place = f"{columns['source']}, row {columns['row']:,}"
    facts = [
        f"score {example.score:.4f}, at or above {example.percentile:.1f}% of the {reference} prompts' scores",
        ", ".join(filter(None, (columns["category"], *(columns["flags"] or ())))),
        place if len(data.runs) == 1 else f"{example.run}: {place}",
    ]
    texts = {"prompt": columns.get("prompt"), "answer": columns.get("text")}
    kept = {name: _cut(text) for name, text in texts.items() if text}
    why = "Prompt and answer are left out (--redact)." if redact else "The run kept no texts (score with --save text)."
    return html.Card(
        printable(columns["id"]), [printable(fact) for fact in facts if fact], kept, "" if kept else why, picture
    )


def _cut(text: str) -> str:
    text = printable(text)
    return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}… ({len(text):,} characters)"
