"""The page's sections on the runs themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrift.corpus.summary import SCORED
from headrift.explain import printable
from headrift.figures import Curve
from headrift.report import plots
from headrift.report.extremes import Example, extremes
from headrift.report.gather import Floats, Gathered
from headrift.report.measure import OfRun, by_layer, by_step, grid, relation
from headrift.report.output import Block, Card, Cards, Missing, Output, Picture, Pictures, Section, Table, Text
from headrift.report.words import interval, percents
from headrift.stats import TARGET_FPR, exact_interval

_LOW_FPR = 0.1
_MOST_TEXT = 600  # characters of a prompt or an answer
NO_BOTH = "Attacks and benign prompts are both needed for this, and these runs have only one of them."
NO_SCORE = "No row has a score in this window."
_IN_SAMPLE = (
    "These are looks at the data, not results: the best of many steps, layers or windows is better here than it will "
    "be on other prompts. To choose a window and know what it is worth, use `headrift calibrate`."
)


def distributions(of: Gathered, output: Output, threshold: float | None) -> Section:
    """Scores by class and category."""
    groups = of.summary.by_category()
    output.numbers(classes=of.summary.by_class(), scores_by_category={name: _spread(v) for name, v in groups.items()})
    covered, reasons = _coverage(of, output)
    if not any(np.isfinite(values).any() for values in groups.values()):
        blocks = [Missing(NO_SCORE), Pictures([covered]), *reasons]
        return Section("scores", "Scores", blocks)
    more = " Shown are at most 24 categories, those with most rows." if len(groups) > 24 else ""
    picture = output.picture(
        "scores",
        plots.scores(groups, threshold),
        "Scores of the rows by class and category, as points with boxes",
        "Each point is a row; boxes span the middle half, the thick line is the median. Orange triangles are attacks, "
        f"blue circles benign.{more} Right: how many rows have a score{of.summary.sampled}.",
    )
    rows = [
        (
            name,
            f"{numbers['n']:,}",
            f"{numbers['coverage']:.1%}",
            f"{numbers['early']:.1%}",
            *("" if numbers[key] is None else f"{numbers[key]:.4f}" for key in ("mean", "median")),
        )
        for name, numbers in of.summary.by_class().items()
    ]
    table = Table(("class", "rows", "with a score", "ended in the window", "mean score", "median"), rows)
    return Section("scores", "Scores by class and category", [table, Pictures([picture, covered]), *reasons])


def separation(of: Gathered, output: Output) -> Section:
    """ROC curves, and AUROC and true positive rate of the score beside plain lengths."""
    comparisons = of.summary.comparisons()
    title = "How well the score separates attacks from benign prompts"
    if not comparisons:
        return Section("separation", title, [Missing(NO_BOTH)])
    output.numbers(comparisons=[comparison.numbers() for comparison in comparisons])
    first = {name: found for name, found in comparisons[0].measures.items() if name != "answer length"}
    if not of.summary.no_score:
        first.pop(SCORED, None)  # the same curve
    curves = [Curve(name, at.fpr, at.tprs, at.auroc, at.grid, at.band) for name, at in first.items()]
    output.numbers(roc={curve.name: {"fpr": curve.fpr, "tpr": curve.tpr} for curve in curves})
    pictures = [
        output.picture(
            "roc",
            plots.roc(curves),
            "ROC curves of the score and of plain lengths",
            "For every threshold: how many attacks are found, against how many benign prompts are flagged. The "
            "diagonal is chance; the band is the 95% interval of the score's curve.",
        ),
        output.picture(
            "roc_low",
            plots.roc(curves, _LOW_FPR),
            "The same ROC curves where few benign prompts are flagged",
            f"The same, where at most {_LOW_FPR:.0%} of the benign prompts are flagged: what one can live with.",
        ),
    ]
    blocks: list[Block] = [Pictures(pictures)]
    for comparison in comparisons:
        rows = [
            (name, f"{at.auroc:.3f}", interval(at.auroc_interval, 3), f"{at.tpr:.1%}", percents(at.tpr_interval))
            for name, at in comparison.measures.items()
        ]
        caption = (
            f"{comparison.title}: {comparison.n_attack:,} distinct attacks, {comparison.n_benign:,} benign. Higher "
            f"counts as attack{of.summary.sampled}."
        )
        names = ("", "AUROC", "95% interval", f"attacks found at {TARGET_FPR:.0%} FPR", "95% interval")
        blocks.append(Table(names, rows, caption))
    return Section("separation", title, blocks)


def runs(found: Sequence[OfRun], of: Gathered, output: Output) -> Section | None:
    """Each run by itself, where there are several."""
    if len(found) < 2:
        return None
    blocks: list[Block] = [
        Text(
            [
                "Figures over all runs mix their system prompts and topics: a difference in level between runs shows "
                "in them as well as one between attacks and benign prompts. Here each run is by itself."
            ]
        )
    ]
    rows = []
    for run in found:
        measured = [(at.auroc, at.auroc_interval) if at else None for at in (run.score, run.length)]
        cells = [
            cell for at in measured for cell in ((f"{at[0]:.3f}", interval(at[1], 3)) if at else ("", "one class"))
        ]
        rows.append((run.name, *(f"{run.n.get(label, 0):,}" for label in of.classes), *cells))
    output.numbers(
        runs={
            run.name: {
                "rows": run.n,
                "score": run.score and run.score.numbers(),
                "prompt_length": run.length and run.length.numbers(),
            }
            for run in found
        }
    )
    if any(run.score for run in found):
        picture = output.picture(
            "runs",
            plots.by_run(found),
            "AUROC of the score and of prompt length in each run",
            "AUROC with 95% interval in each run, of the score and of prompt length. Grey: the interval includes "
            "chance; hollow: too few prompts for an interval.",
        )
        blocks.append(Pictures([picture]))
    names = ("run", *(f"{label} rows" for label in of.classes), "AUROC: score", "95%", "AUROC: length", "95%")
    return Section("runs", "Run by run", [*blocks, Table(names, rows)])


def _coverage(of: Gathered, output: Output) -> tuple[Picture, list[Block]]:
    """Rows without a score, and answers that ended early."""
    counted: dict[str, dict[str, tuple[float, float, float]]] = {"no score": {}, "answer ended inside the window": {}}
    for label, numbers in of.summary.by_class().items():
        n = int(numbers["n"] or 0)
        for name, fraction in zip(counted, (1 - float(numbers["coverage"] or 0), float(numbers["early"] or 0))):
            counted[name][label] = (fraction, *exact_interval(round(fraction * n), n))
    output.numbers(coverage=counted, no_score=dict(of.summary.no_score), rejected=dict(of.summary.rejects))
    picture = output.picture(
        "coverage",
        plots.coverage(counted),
        "Rows without a score, and answers that ended inside the window, by class",
        "An answer that ends before the window has no score; one that ends inside it is scored over the steps it has. "
        "Short answers are not missing at random: a refusal is short. Where attacks end early more often than benign "
        "prompts, the number of steps alone separates them, and a figure over scored rows only flatters the score.",
    )
    reasons = [(reason, f"{n:,}") for reason, n in of.summary.no_score.most_common()]
    reasons += [(f"rejected: {reason}", f"{n:,}") for reason, n in of.summary.rejects.most_common()]
    return picture, [Table(("why there is no score", "rows"), reasons)] if reasons else []


def when(of: Gathered, output: Output, resamples: int) -> Section:
    """AUROC by step and by window."""
    title = "When the difference shows: steps and windows"
    if not of.both:
        return Section("steps", title, [Missing(NO_BOTH)])
    steps, windows = by_step(of, resamples), grid(of)
    output.numbers(auroc_by_step=steps, auroc_by_window=windows)
    window = (of.cell.window.start, of.cell.window.end)
    start, end, highest = windows.best
    pictures = [
        output.picture(
            "steps",
            plots.along_steps(steps, window),
            "AUROC at each step of the answer, and how many answers reach it",
            "AUROC of the instability at a single step, among answers that reach it; the band is the 95% interval for "
            "each step alone. Below: how many answers are left.",
        ),
        output.picture(
            "windows",
            plots.windows(windows, window),
            "AUROC of every window, first step across, last step up",
            f"AUROC of the mean over every window. The highest here is {highest:.3f} for steps {start} to {end}.",
        ),
    ]
    return Section("steps", title, [Text([_IN_SAMPLE]), Pictures(pictures)])


def where(of: Gathered, output: Output, resamples: int) -> Section:
    """Mean instability by layer and step, and by layer."""
    place: dict[str, Any] = {"window": (of.cell.window.start, of.cell.window.end), "layers": of.layers}
    means = of.samples.means
    there = [values[np.isfinite(values)] for values in means.values()]
    limits = (
        min((at.min() for at in there if at.size), default=0.0),
        max((at.max() for at in there if at.size), default=0.5),
    )
    pictures = [
        output.picture(
            f"heatmap_{label}",
            plots.heatmap(means[label], f"{label}: mean instability", limits=limits, **place),
            f"Mean instability of the class {label}, by layer and step",
            f"Mean instability of the class {label}, of the answers that reach the step. Framed: what is scored; "
            "crossed out: nothing there. The classes have the same colours.",
        )
        for label in of.classes
    ]
    if of.both:
        difference = means["attack"] - means["benign"]
        pictures.append(
            output.picture(
                "heatmap_difference",
                plots.difference(difference, **place),
                "Mean instability of attacks minus that of benign prompts, by layer and step",
                "Attacks minus benign prompts: orange where attacks have more, blue where benign prompts do, white for "
                "none. Late steps rest on fewer answers.",
            )
        )
    layers, profile, middle = by_layer(of, resamples), {}, {}
    for label in of.classes:
        values = of.samples.by_layer[of.samples.mine(label)]
        values = values[~np.isnan(values).all(axis=1)]
        if len(values):
            profile[label], middle[label] = np.nanmean(values, axis=0), np.nanpercentile(values, [25, 75], axis=0)
    pictures.append(
        output.picture(
            "layers",
            plots.along_layers(layers, profile, middle, of.layers),
            "Instability by layer for each class, and AUROC by layer",
            f"Each layer's mean over steps {of.cell.window}, with the middle half of the prompts"
            + ("; below, how well that layer alone separates, with its 95% interval." if of.both else "."),
        )
    )
    output.numbers(mean_by_step_and_layer=means, by_layer={"auroc": layers, "mean": profile, "quartiles": middle})
    blocks = [Text([_IN_SAMPLE])] if of.both else []
    return Section("layers", "Where it shows: layers and steps", [*blocks, Pictures(pictures)])


def beside(of: Gathered, output: Output) -> Section:
    """The score against entropy, head agreement and length."""
    signals, counts = of.rows.signals, of.rows.counts
    wanted: dict[str, tuple[str, NDArray[np.floating] | None, str]] = {
        "entropy": ("next-token entropy (nats, mean over the window)", signals.get("entropy"), "--logit-stats"),
        "agreement": ("head agreement (mean correlation, -1 to 1)", signals.get("head_agreement"), ""),
        "length": ("prompt length (tokens)", counts["prompt_tokens"].astype(np.float64), ""),
    }
    pictures: list[Picture] = []
    blocks: list[Block] = []
    for name, (label, values, option) in wanted.items():
        if values is None or (~np.isnan(values[of.samples.row]) & ~np.isnan(of.score[of.samples.row])).sum() == 0:
            how = f": score with {option} to have it" if option else ""
            blocks.append(Missing(f"Not recorded in these runs: {label}{how}."))
            continue
        found = relation(of, values)
        output.numbers(**{f"score_against_{name}": {"spearman": found.spearman}})
        pictures.append(
            output.picture(
                f"against_{name}",
                plots.against(found, label),
                f"The score against {label}",
                f"The score against {label}{of.summary.sampled}.",
            )
        )
    said = [
        "If the score only repeated one of these, the points would lie on a line. A difference between the classes "
        "along the lower axis means that number could pass for conflict. Spearman's r within a class: 0 for no "
        "relation, 1 or -1 for the same or the opposite order."
    ]
    if any(run.score_range != of.cell for run in of.runs):
        said.append("Entropy and agreement are over each run's own window, which is another one than the score's here.")
    return Section(
        "beside", "The score beside entropy, agreement and length", [Text(said), Pictures(pictures), *blocks]
    )


def examples(of: Gathered, output: Output, redact: bool) -> Section:
    """The most suspicious benign prompts and the quietest attacks."""
    title = "Rows to look at"
    found = extremes(of, texts=not redact)
    if found is None:
        return Section("examples", title, [Missing(NO_SCORE)])
    recorded = [example.instability for example in (*found.suspicious, *found.quiet)]
    limits = (0.0, max(float(np.nanmax(values, initial=0.0)) for values in recorded))
    blocks: list[Block] = [
        Text(
            [
                "The heatmaps have the same colours, so they can be compared; framed: what is scored. Whether the "
                "model did what an attack wanted says its answer, not its score."
            ]
        )
    ]
    names = {"benign": "The most suspicious benign prompts", "unlabelled": "The highest scores"}
    for heading, chosen in ((names[found.highest], found.suspicious), ("The quietest attacks", found.quiet)):
        kind = "quiet" if chosen is found.quiet else "high"
        cards = [
            _card(of, output, example, f"{kind}_{i}", found.reference, limits, redact)
            for i, example in enumerate(chosen, 1)
        ]
        if cards:
            blocks.append(Cards(heading, cards))
    if found.without_score:
        blocks.append(
            Text([f"{found.without_score:,} attacks have no score at all, so they are never flagged; none is shown."])
        )
    output.numbers(
        examples={
            name: [{"id": at.id, "run": at.run, "score": at.score, "percentile": at.percentile} for at in chosen]
            for name, chosen in (("highest", found.suspicious), ("quietest_attacks", found.quiet))
        }
    )
    return Section("examples", title, blocks)


def _card(
    of: Gathered,
    output: Output,
    example: Example,
    name: str,
    reference: str,
    limits: tuple[float, float],
    redact: bool,
) -> Card:
    window = (of.cell.window.start, of.cell.window.end)
    picture = output.picture(
        name,
        plots.heatmap(example.instability, "instability", window=window, layers=of.layers, limits=limits, small=True),
        f"Instability of the row {example.id} by layer and step",
        "",
    )
    where = f"{example.source}, row {example.row:,}"
    facts = [
        f"score {example.score:.4f}, at or above {example.percentile:.1f}% of the {reference} prompts' scores",
        ", ".join(filter(None, (example.category, *example.flags))),
        where if len(of.runs) == 1 else f"{example.run}: {where}",
    ]
    texts = {name: _cut(text) for name, text in (("prompt", example.prompt), ("answer", example.answer)) if text}
    why = "Prompt and answer are left out (--redact)." if redact else "The run kept no texts (score with --save text)."
    return Card(
        printable(example.id), [printable(fact) for fact in facts if fact], texts, "" if texts else why, picture
    )


def _cut(text: str) -> str:
    text = printable(text)
    return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}… ({len(text):,} characters)"


def _spread(scores: Floats) -> dict[str, float | int | None]:
    there = scores[np.isfinite(scores)]
    quartiles = np.percentile(there, [25, 50, 75]) if len(there) else [None] * 3
    return {"rows": len(scores), "with_score": len(there), **dict(zip(("q25", "median", "q75"), quartiles))}
