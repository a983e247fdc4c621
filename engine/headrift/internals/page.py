"""The results as tables with a verdict column, and as a page of the kind that `headrift report` makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from headrift._version import __version__
from headrift.internals import figures
from headrift.internals.analysis import MEASURES, Analysis
from headrift.internals.attention import KINDS, REGIONS, WHEN
from headrift.internals.cases import CHECK
from headrift.internals.comparing import LAST, NEUTRAL, PLACEMENTS, PLACES, SYSTEM
from headrift.internals.components import COMPONENTS
from headrift.internals.estimates import Estimate, Estimates
from headrift.internals.sentences import ALPHA
from headrift.report import html, plots
from headrift.stats import Bounds
from headrift.terminal import print_table

PAGE = "report.html"
_ALL = "all system prompts"
NOT_JUDGED = "not judged"  # the largest of many, whose interval does not allow for the choosing
_MOST_SENTENCES = 20
_PLACE_LABELS = dict(zip(PLACES, ("the last prompt token", "the question's tokens")))
_KIND_LABELS = dict(zip(KINDS, ("with the system prompt", "with neutral text in its place")))
_MORE, _GROWS = ("shown: more", "shown: less"), ("shown: longer, more", "shown: longer, less")
_CAUTION = (
    "An interval that includes 0 shows no effect, which does not say that there is none. Intervals are over prompts: "
    "they say nothing of other models or other system prompts."
)

Results = Mapping[str, Any]  # see analysis.analyse


@dataclass(frozen=True, slots=True)
class Finding:
    """A result, and what it shows: a row of a table."""

    measure: str
    estimate: Estimate
    verdict: str = ""

    def cells(self) -> tuple[str, ...]:
        """The cells under COLUMNS."""
        estimate = self.estimate
        numbers = html.show_number(estimate.value), _show_interval(estimate.interval)
        return self.measure, *numbers, f"{estimate.prompts:,}", f"{estimate.rows:,}", self.verdict

    def to_json(self) -> dict[str, Any]:
        """The same as plain values, by name."""
        return {"measure": self.measure, **html.plain(self.estimate), "verdict": self.verdict}


COLUMNS = ("", "value", "95% interval", "prompts", "rows", "verdict")


def _show_interval(interval: Bounds | None) -> str:
    return "" if interval is None else html.show_interval(interval)


def with_verdict(measure: str, estimate: Estimate, verdicts: tuple[str, str] = _MORE) -> Finding:
    """A finding whose verdict is whether the interval is above 0 or below."""
    return Finding(measure, estimate, html.verdict(estimate.interval, *verdicts))


def without_interval(measure: str, value: float, estimates: Estimates) -> Finding:
    """A finding that is made of several estimates."""
    return Finding(measure, Estimate(value, None, estimates.prompts, estimates.rows))


def find(results: Results) -> dict[str, list[Finding]]:
    """All findings by question, the short answer first."""
    return {
        "In short": _in_short(results),
        "What changes, and where": _where(results),
        "Which layers' change goes with a changed output": _predicting(results["predicting_kl"]),
        "Do longer system prompts change more?": _length(results["length"]),
        "Which phrases matter?": _phrases(results),
        "Does the position matter?": _position(results["placements"] or {}),
        "Where does the model look?": _attention(results),
    }


def print_findings(findings: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Print findings, as internals.json has them, in tables of 80 columns."""
    console = Console(width=80, force_jupyter=False, color_system=None)
    for question, some in findings.items():
        rows = [(f["measure"], html.show_number(f["value"]), _show_interval(f["interval"]), f["verdict"]) for f in some]
        if rows:
            print_table(console, (question, "value", "95% interval", "verdict"), rows)


def _in_short(results: Results) -> list[Finding]:
    beyond, output = results["beyond_neutral"]["kl"], results["output"]
    findings = [
        Finding("next-token KL (nats) of system prompts", output[SYSTEM]["kl"]),
        Finding("next-token KL (nats) of neutral text of the same length", output[NEUTRAL]["kl"]),
        with_verdict("the difference", beyond[""], ("shown: system prompts more", "shown: system prompts less")),
    ]
    if CHECK in beyond:
        verdicts = ("shown: distrust the rest", "shown: distrust the rest")
        findings.append(with_verdict("check: neutral text against other neutral text", beyond[CHECK], verdicts))
    return findings


def _where(results: Results) -> list[Finding]:
    findings = []
    for place, words in _PLACE_LABELS.items():
        change, control = (results["by_layer"][comparison][f"{place}_l2"] for comparison in (SYSTEM, NEUTRAL))
        for i, component in enumerate(COMPONENTS):
            layer = int(np.nanargmax(change.value[:, i]))
            label = f"largest relative change of {component} at {words}: layer {layer}"
            findings += [Finding(label, change.at(layer, i)), Finding("with neutral text", control.at(layer, i))]
    output = results["output"][SYSTEM]
    findings.append(Finding("fraction of rows with another most likely first token", output["top1_changed"]))
    findings.append(Finding("fraction of the greedy answer's first tokens in common", output["same"]))
    for measure, words in (("kl", "KL"), ("residual_last", "change of residual at the last prompt token")):
        for name, estimate in results["beyond_neutral"][measure].items():
            findings.append(with_verdict(f"{words} beyond neutral text, {name or _ALL}", estimate))
    return findings


def _predicting(results: Results) -> list[Finding]:
    findings = []
    for key, words in (("over_rows", "over all rows"), ("within_system_prompts", "within each system prompt")):
        estimates = results[key][LAST]
        values = np.where(np.isfinite(estimates.value), estimates.value, -2.0)
        layer, component = (int(i) for i in np.unravel_index(int(values.argmax()), values.shape))
        label = f"Spearman {words}: {COMPONENTS[component]} of layer {layer}, the largest of {values.size}"
        findings.append(Finding(label, estimates.at(layer, component), NOT_JUDGED))
        above = float((estimates.low > 0).mean())
        findings.append(without_interval("fraction of them whose interval is above 0", above, estimates))
    return findings


def _length(results: Results) -> list[Finding]:
    findings = []
    groups = {"system": "system prompts", "neutral": "neutral texts", "beyond": "the difference"}
    for measure, words in MEASURES.items():
        for name, group in groups.items():
            for statistic in ("spearman", "pearson"):
                label = f"{words}: {statistic.capitalize()} with length, {group}"
                findings.append(with_verdict(label, results[measure][name][statistic], _GROWS))
        mixed, label = results[measure]["mixed"], f"{words}: mixed model"
        if "reason" in mixed:
            nothing = Estimate(float("nan"), None, mixed["prompts"], mixed["rows"])
            findings.append(Finding(label, nothing, mixed["reason"]))
            continue
        label += "" if mixed["converged"] else " (which did not converge)"
        findings.append(with_verdict(f"{label}, per 100 tokens of neutral text", mixed["per_100_neutral"], _GROWS))
        findings.append(with_verdict(f"{label}, more per 100 tokens of system prompt", mixed["per_100_beyond"]))
    return findings


def _phrases(results: Results) -> list[Finding]:
    findings = []
    for feature, result in results["features"].items():
        label = f"`{feature}`: KL of {result['with']} system prompts with it less that of {result['without']} without"
        if result["difference"] is not None:
            findings.append(with_verdict(label, result["difference"]))
    for feature, result in (results["sentence_features"] or {}).items():
        if result["sentences"]:
            findings.append(with_verdict(f"`{feature}`: KL of its {result['sentences']} sentences", result["effect"]))
    instability = results["instability"]
    if instability is not None:
        findings += [
            Finding("inter-head instability under the whole system prompt", instability["scores"]["whole"]),
            with_verdict("less that with neutral text for a sentence", instability["effect"]),
            with_verdict("less that without a sentence", instability["effect_dropped"]),
        ]
    return findings


def _position(results: Results) -> list[Finding]:
    findings = []
    for placement, estimates in results.items():
        for measure, words in MEASURES.items():
            findings.append(Finding(f"{words}: {placement}", estimates[measure]))
            if placement != PLACEMENTS[0]:
                findings.append(with_verdict("less that as system prompt", estimates[f"{measure}_less"]))
    return findings


def _attention(results: Results) -> list[Finding]:
    regions, entropy = results["attention"], results["attention_entropy"]
    if regions is None:
        return []
    findings = []
    for kind, words in zip(KINDS, ("system prompt", "neutral text")):
        layer = int(np.nanargmax(regions.mass[kind].value[:, 0]))
        findings.append(Finding(f"attention to {words}, largest: layer {layer}", regions.mass[kind].at(layer, 0)))
        findings.append(Finding("per token, in average tokens", regions.per_token[kind].at(layer, 0)))
    findings.append(
        with_verdict("per token, system prompt less neutral text, mean over layers", regions.difference.at())
    )
    for i, when in enumerate(WHEN):
        for unit, estimates in (("nats", entropy.nats), ("relative to ln(keys)", entropy.relative)):
            for kind, words in _KIND_LABELS.items():
                mean = float(np.nanmean(estimates[kind].value[:, i]))
                findings.append(without_interval(f"entropy, {unit}, {when}, {words}", mean, estimates[kind]))
        findings.append(
            with_verdict("the difference", entropy.difference.at(i), ("shown: more even", "shown: less even"))
        )
    return findings


def write_page(folder: Path, analysis: Analysis, about: Mapping[str, Any], rejected: int) -> Path:
    """Write report.html and the folder of its figures, and return the page's path. about: as in internals.json."""
    output = html.Output(folder / PAGE)
    output.begin()
    try:
        findings = find(analysis.results)
        records = {question: [one.to_json() for one in some] for question, some in findings.items()}
        output.numbers(headrift=__version__, summary=records.pop("In short"), findings=records, **analysis.results)
        tables = {question: html.Table(COLUMNS, [one.cells() for one in some]) for question, some in findings.items()}
        notes = [f"Without a system prompt means: {about['baseline']}.", _CAUTION]
        if rejected:
            notes.append(f"{rejected} prompts were rejected, in all or under one system prompt: see `rejects.parquet`.")
        in_short = [tables.pop("In short"), html.Text(notes)]
        with plots.style():
            sections = [
                html.Section(key, question, [*([table] if table.rows else []), *_BLOCKS[key](analysis, output)])
                for key, (question, table) in zip(_BLOCKS, tables.items())
            ]
        page = html.render(
            "internals.html.j2",
            title=Path(about["model"]).name,
            model=f"{analysis.changes.prompts} prompts, {len(analysis.changes.own)} system prompts",
            date=f"{datetime.now(UTC):%Y-%m-%d}, headrift {__version__}",
            in_short=in_short,
            sections=sections,
            files=output.folder.name,
            redact=False,
        )
        output.publish(page)
    finally:
        output.discard()
    return folder / PAGE


def _where_blocks(analysis: Analysis, output: html.Output) -> list[html.Block]:
    results, pictures = analysis.results, []
    for place, where in _PLACE_LABELS.items():
        for measure, words in (("cosine", "Cosine"), ("l2", "Relative L2 change")):
            system, neutral = (results["by_layer"][one][f"{place}_{measure}"] for one in (SYSTEM, NEUTRAL))
            figure = figures.lines(system, COMPONENTS, words, neutral.value, "neutral text")
            title = f"{words} at {where} by layer and component, with the system prompt against without"
            text = "Bands: 95% intervals over prompts. Dashed: neutral text."
            pictures.append(output.picture(f"{place}_{measure}", figure, title, text))
    if (cka := results["cka"].get(f"{SYSTEM} / {LAST}")) is not None:
        title = "Linear CKA over prompts at the last prompt token, by layer and component"
        text = "Mean over system prompts; dashed: prompts in random order."
        figure = figures.lines(cka["cka"], COMPONENTS, "linear CKA over prompts", cka["by_chance"], "by chance")
        pictures.append(output.picture("cka", figure, title, text))
    by_system = results["by_system"]
    figure = figures.by_system(by_system["cosine_at_last_token"][SYSTEM], by_system["systems"])
    title = "Cosine at the last prompt token by system prompt and component"
    pictures.append(output.picture("by_system", figure, title, "The last row is the check: neutral text."))
    beyond = {name or _ALL: estimate for name, estimate in results["beyond_neutral"]["kl"].items()}
    figure = figures.forest(beyond.items(), "KL beyond neutral text of the same length (nats)")
    text = "95% intervals; coloured: it leaves out 0. The last row must not."
    pictures.append(output.picture("beyond", figure, "Effect beyond neutral text by system prompt", text))
    return [html.Pictures(pictures)]


def _predicting_blocks(analysis: Analysis, output: html.Output) -> list[html.Block]:
    pictures = []
    for name, words in (("over_rows", "over all rows"), ("within_system_prompts", "within each system prompt")):
        for place, where in _PLACE_LABELS.items():
            estimates = analysis.results["predicting_kl"][name][place]
            figure = figures.lines(estimates, COMPONENTS, "Spearman, change and next-token KL")
            title = f"Correlation of a layer's change at {where} and the next token's KL, {words}"
            file = f"{'predicting' if name == 'over_rows' else 'within'}_{place}"
            pictures.append(output.picture(file, figure, title, "Bands: 95% intervals over prompts."))
    return [html.Pictures(pictures)]


def _length_blocks(analysis: Analysis, output: html.Output) -> list[html.Block]:
    pictures = []
    for measure, words in MEASURES.items():
        figure = figures.lengths(analysis.changes, measure, "KL (nats)" if measure == "kl" else "relative change")
        text = "A point for each system prompt, mean over prompts."
        pictures.append(output.picture(f"length_{measure}", figure, f"Length and {words}", text))
    return [html.Pictures(pictures)]


def _phrase_blocks(analysis: Analysis, output: html.Output) -> list[html.Block]:
    kl, instability = analysis.results["sentences"], analysis.results["instability"]
    if not kl:
        return [html.Missing("No system prompt of several sentences was taken apart.")]
    text = "System prompts with a feature differ from those without in other things too: sentences are the causal test."
    pictures: list[html.Picture] = []
    tables: list[html.Block] = []
    by_size = sorted(instability["sentences"] if instability else [], key=lambda row: -abs(row["effect"].value))
    for name, ranked, words in (
        ("sentences", kl, "KL beyond neutral text (nats)"),
        ("sentences_instability", by_size, "instability less that with neutral text"),
    ):
        if ranked:
            rows = ranked[:_MOST_SENTENCES]
            title = f"{words[0].upper()}{words[1:]}: the {len(rows)} of {len(ranked)} sentences with the largest effect"
            figure = figures.forest([(row["text"], row["effect"]) for row in rows], words)
            not_corrected = "95% intervals over prompts, not corrected for the number of sentences."
            pictures.append(output.picture(name, figure, title, not_corrected))
            n_shown = sum(row["shown"] for row in ranked)
            caption = f"{title}; {n_shown} are shown at a false discovery rate of {ALPHA:.0%}."
            columns = ("sentence", "system prompt", "features", *COLUMNS[1:], "p, corrected")
            tables.append(html.Table(columns, [_sentence_cells(row) for row in rows], caption))
    return [html.Text([text]), html.Pictures(pictures), *tables]


def _sentence_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    p = "" if row["p_corrected"] is None else f"{row['p_corrected']:.2g}"
    numbers = Finding("", row["effect"], "shown" if row["shown"] else html.NOT_SHOWN).cells()[1:]
    return row["text"], row["system"], ", ".join(row["features"]), *numbers, p


def _position_blocks(analysis: Analysis, output: html.Output) -> list[html.Block]:
    placements = analysis.results["placements"]
    if placements is None:
        return [html.Missing("The system prompts' texts were not put elsewhere.")]
    figure = figures.forest([(name, placements[name]["kl"]) for name in PLACEMENTS], "next-token KL (nats)")
    picture = output.picture("placements", figure, "Effect by position", "95% intervals (Student's) over prompts.")
    text = "Behind the question, a text cannot change the question's own tokens: no token attends to a later one."
    return [html.Pictures([picture]), html.Text([text])]


def _attention_blocks(analysis: Analysis, output: html.Output) -> list[html.Block]:
    regions, entropy = analysis.results["attention"], analysis.results["attention_entropy"]
    if regions is None:
        return [html.Missing("Attention was not measured (`--no-attention`).")]
    pictures = []
    for kind, words in _KIND_LABELS.items():
        name = kind.removeprefix("none_to_")
        figure = figures.lines(regions.mass[kind], REGIONS, "part of the attention")
        text = "Mean over heads and steps. The prompt's last five tokens also count in the template or the question."
        pictures.append(output.picture(f"regions_{name}", figure, f"Attention to regions by layer, {words}", text))
        figure = figures.lines(regions.per_token[kind], REGIONS[:-1], "attention per token / average")
        title = f"Attention per token of the regions by layer, {words}"
        pictures.append(output.picture(f"regions_per_token_{name}", figure, title, "1: what a token gets on average."))
    text = f"Step 0 is the last prompt token; {regions.answers[SYSTEM][-1]:,} answers reach the last step."
    figure = figures.lines(regions.by_step[SYSTEM], REGIONS, "part of the attention", xlabel="step of the answer")
    pictures.append(output.picture("regions_by_step", figure, "Attention to regions by step, system prompt", text))
    figure = figures.heads(regions.by_head[SYSTEM])
    pictures.append(output.picture("regions_by_head", figure, "Attention to the system prompt by layer and head"))
    system, neutral = entropy.relative[SYSTEM], entropy.relative[NEUTRAL].value
    figure = figures.lines(system, WHEN, "entropy / ln(keys seen)", neutral, "neutral text")
    title = "Entropy of attention by layer, at the last prompt token and over the answer's"
    text = "1: the same attention to every key; 0: all to one. Dashed: neutral text in the system prompt's place."
    pictures.append(output.picture("entropy", figure, title, text))
    return [html.Pictures(pictures)]


_BLOCKS: dict[str, Callable[[Analysis, html.Output], Sequence[html.Block]]] = {
    "where": _where_blocks,
    "predicting": _predicting_blocks,
    "length": _length_blocks,
    "phrases": _phrase_blocks,
    "position": _position_blocks,
    "attention": _attention_blocks,
}
