"""The results as tables with a verdict column, and as a page of the kind that `headrift report` makes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.console import Console

from headrift._version import __version__
from headrift.figures import draw_forest, one_panel, short, style
from headrift.internals.analysis import MEASURES, Changes
from headrift.internals.attention import KINDS, REGIONS, WHEN
from headrift.internals.cases import CHECK
from headrift.internals.comparing import COMPONENTS, LAST, NEUTRAL, PLACEMENTS, PLACES, SYSTEM
from headrift.internals.estimates import MIN_SYSTEMS, Estimate, Estimates, corrected
from headrift.internals.sentences import ALPHA
from headrift.report import html
from headrift.stats import Bounds, Floats
from headrift.terminal import print_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "report.html"
COLUMNS = ("", "value", "95% interval", "prompts", "system prompts", "rows", "verdict")
IN_SHORT = "In short"
NOT_JUDGED = "not judged: chosen as the largest"  # its interval does not allow for the choosing
_ALL = "all system prompts"
_MOST_SENTENCES = 20
_PLACE_LABELS = dict(zip(PLACES, ("the last prompt token", "the question's tokens")))
_KIND_LABELS = dict(zip(KINDS, ("with the system prompt", "with neutral text in its place")))
_WITHIN_LABELS = {
    "across_system_prompts": "across system prompts",
    "within_system_prompts": "within each system prompt",
}
_MORE, _GROWS = ("shown: more", "shown: less"), ("shown: longer, more", "shown: longer, less")
_CAUTION = (
    "Numbers with a count of system prompts are about system prompts in general: one value per system prompt, an "
    "interval over system prompts and (but for correlations) prompts, and no verdict with fewer than "
    f"{MIN_SYSTEMS} system prompts. The others are about one given system prompt or sentence: their intervals are over "
    "prompts. Verdicts allow for the "
    f"number of tests in their table (Benjamini and Hochberg, {ALPHA:.0%}); intervals do not. 'Not shown' does not "
    "say that there is no effect. Nothing is said of other models."
)
_BANDS = "Bands: 95% intervals over system prompts and prompts."
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#595959")  # Okabe and Ito's
_LAYER = "layer (0: nearest the input)"

Results = Mapping[str, Any]  # see analysis.analyse


class Finding(NamedTuple):
    """A result, and what it shows: a row of a table.

    `claims`: what an effect above 0, and one below, would show; `judge` makes a verdict of them.
    """

    measure: str
    estimate: Estimate
    verdict: str = ""
    claims: tuple[str, str] | None = None
    p_corrected: float | None = None

    def cells(self) -> tuple[str, ...]:
        """The cells under COLUMNS."""
        one = self.estimate
        systems = "" if one.systems is None else f"{one.systems:,}"
        counts = f"{one.prompts:,}", systems, f"{one.rows:,}"
        return self.measure, *_numbers(one.value, one.interval), *counts, self.verdict

    def to_json(self) -> dict[str, Any]:
        """The same as plain values, by name."""
        numbers = html.plain(self.estimate) | {"p": html.plain(self.p_corrected)}
        numbers["p_corrected"] = numbers.pop("p")
        return {"measure": self.measure, **numbers, "verdict": self.verdict}


def _numbers(value: float | None, interval: Bounds | None) -> tuple[str, str]:
    """The cells of a value and its interval."""
    return html.show_number(value), "" if interval is None else html.show_interval(interval)


def judge(findings: Iterable[Finding]) -> list[Finding]:
    """Give verdicts to the findings of a table that have claims, corrected for how many can be judged."""
    results = list(findings)
    tests = [i for i, one in enumerate(results) if one.claims and one.estimate.not_judged is None]
    p_values = dict(zip(tests, corrected([results[i].estimate.p for i in tests])))
    for i, one in enumerate(results):
        if one.claims is None:
            continue
        p = p_values.get(i)
        if p is None:
            verdict = one.estimate.not_judged or ""
        else:
            verdict = one.claims[one.estimate.value < 0] if p < ALPHA else html.NOT_SHOWN
        results[i] = one._replace(verdict=verdict, p_corrected=None if p is None else float(p))
    return results


def without_interval(measure: str, value: float, estimates: Estimates) -> Finding:
    """A finding that is made of several estimates."""
    return Finding(measure, Estimate(value, None, math.nan, estimates.prompts, estimates.systems, estimates.rows))


def find(results: Results) -> dict[str, list[Finding]]:
    """All findings by question, the short answer first."""
    return {IN_SHORT: judge(_in_short(results))} | {
        question: judge(findings(results)) for question, findings, _ in _SECTIONS.values()
    }


def print_findings(findings: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Print findings, as internals.json has them, in tables of 80 columns."""
    console = Console(width=80, force_jupyter=False, color_system=None)
    for question, some in findings.items():
        rows = [(one["measure"], *_numbers(one["value"], one["interval"]), one["verdict"]) for one in some]
        if rows:
            print_table(console, (question, "value", "95% interval", "verdict"), rows)


def write_page(folder: Path, model: str, changes: Changes, results: Results, baseline: str, rejected: int) -> None:
    """Write report.html and the folder of its figures. baseline: how prompts without a system prompt were rendered."""
    output = html.Output(folder / PAGE)
    output.begin()
    try:
        findings = find(results)
        records = {question: [one.to_json() for one in some] for question, some in findings.items()}
        output.numbers(headrift=__version__, summary=records.pop(IN_SHORT), findings=records, **results)
        tables = {question: html.Table(COLUMNS, [one.cells() for one in some]) for question, some in findings.items()}
        notes = [f"Without a system prompt means: {baseline}.", _CAUTION]
        if rejected:
            notes.append(f"{rejected} prompts were rejected, in all or under one system prompt: see `rejects.parquet`.")
        sections = []
        with style():
            for key, (question, _, draw) in _SECTIONS.items():
                blocks: list[html.Block] = [tables[question]] if tables[question].rows else []
                pictures = [output.picture(*one) for one in draw(results, changes)]
                if not pictures:
                    blocks.append(html.Missing(_NO_PICTURES[key]))
                else:
                    blocks += [html.Text([_NOTES[key]])] if key in _NOTES else []
                    blocks += [html.Pictures(pictures), *(_sentence_tables(results) if key == "phrases" else ())]
                sections.append(html.Section(key, question, blocks))
        page = html.render(
            "internals.html.j2",
            title=model,
            model=f"{results['prompts']} prompts, {len(changes.own)} system prompts",
            date=f"{datetime.now(UTC):%Y-%m-%d}, headrift {__version__}",
            in_short=[tables[IN_SHORT], html.Text(notes)],
            sections=sections,
            files=output.folder.name,
            redact=False,
        )
        output.publish(page)
    finally:
        output.discard()


# Findings


def _in_short(results: Results) -> Iterator[Finding]:
    beyond, output = results["beyond_neutral"]["kl"], results["output"]
    yield Finding("next-token KL (nats) of system prompts", output[SYSTEM]["kl"])
    yield Finding("next-token KL (nats) of neutral text of the same length", output[NEUTRAL]["kl"])
    claims = "shown: system prompts more", "shown: system prompts less"
    yield Finding("the difference", beyond[""], claims=claims)
    if CHECK in beyond:
        claims = ("shown: distrust the rest",) * 2
        yield Finding("check: neutral text against other neutral text", beyond[CHECK], claims=claims)


def _where(results: Results) -> Iterator[Finding]:
    for place, words in _PLACE_LABELS.items():
        change, control = (results["by_layer"][comparison][f"{place}_l2"] for comparison in (SYSTEM, NEUTRAL))
        for i, component in enumerate(COMPONENTS):
            layer = int(np.nanargmax(change.value[:, i]))
            label = f"largest relative change of {component} at {words}: layer {layer}"
            yield Finding(label, change.at(layer, i))
            yield Finding("with neutral text", control.at(layer, i))
    output = results["output"][SYSTEM]
    yield Finding("fraction of rows with another most likely first token", output["top1_changed"])
    yield Finding("fraction of the greedy answer's first tokens in common", output["same"])
    for measure, words in (("kl", "KL"), ("residual_last", "change of residual at the last prompt token")):
        for name, estimate in results["beyond_neutral"][measure].items():
            yield Finding(f"{words} beyond neutral text, {name or _ALL}", estimate, claims=_MORE)


def _predicting(results: Results) -> Iterator[Finding]:
    for key, words in _WITHIN_LABELS.items():
        estimates = results["predicting_kl"][key][LAST]
        values = np.where(np.isfinite(estimates.value), estimates.value, -2.0)
        layer, component = (int(i) for i in np.unravel_index(int(values.argmax()), values.shape))
        label = f"Spearman {words}: {COMPONENTS[component]} of layer {layer}, the largest of {values.size}"
        yield Finding(label, estimates.at(layer, component), NOT_JUDGED)


def _length(results: Results) -> Iterator[Finding]:
    groups = {"system": "system prompts", "neutral": "neutral texts", "beyond": "the difference"}
    statistics = {
        "spearman": "Spearman with length",
        "pearson": "Pearson with length",
        "per_100_tokens": "per 100 tokens",
    }
    for measure, words in MEASURES.items():
        for name, group in groups.items():
            for statistic, of_length in statistics.items():
                estimate = results["length"][measure][name][statistic]
                yield Finding(f"{words}: {of_length}, {group}", estimate, claims=_GROWS)


def _phrases(results: Results) -> Iterator[Finding]:
    for feature, result in results["features"].items():
        label = f"`{feature}`: KL of {result['with']} system prompts with it less that of {result['without']} without"
        if result["difference"] is not None:
            yield Finding(label, result["difference"], claims=_MORE)
    for feature, result in (results["sentence_features"] or {}).items():
        if result["sentences"]:
            yield Finding(f"`{feature}`: KL of its {result['sentences']} sentences", result["effect"], claims=_MORE)
    instability = results["instability"]
    if instability is not None:
        yield Finding("inter-head instability under the whole system prompt", instability["scores"]["whole"])
        yield Finding("less that with neutral text for a sentence", instability["effect"], claims=_MORE)
        yield Finding("less that without a sentence", instability["effect_dropped"], claims=_MORE)


def _position(results: Results) -> Iterator[Finding]:
    for placement, estimates in (results["placements"] or {}).items():
        for measure, words in MEASURES.items():
            yield Finding(f"{words}: {placement}", estimates[measure])
            if placement != PLACEMENTS[0]:
                yield Finding("less that as system prompt", estimates[f"{measure}_less"], claims=_MORE)


def _attention(results: Results) -> Iterator[Finding]:
    regions, entropy = results["attention"], results["attention_entropy"]
    if regions is None:
        return
    for kind, words in zip(KINDS, ("system prompt", "neutral text")):
        layer = int(np.nanargmax(regions["mass"][kind].value[:, 0]))
        yield Finding(f"attention to {words}, largest: layer {layer}", regions["mass"][kind].at(layer, 0))
        yield Finding("per token, in average tokens", regions["per_token"][kind].at(layer, 0))
    label = "per token, system prompt less neutral text, mean over layers"
    yield Finding(label, regions["difference"].at(), claims=_MORE)
    for i, when in enumerate(WHEN):
        for unit, estimates in (("nats", entropy["nats"]), ("relative to ln(keys)", entropy["relative"])):
            for kind, words in _KIND_LABELS.items():
                mean = float(np.nanmean(estimates[kind].value[:, i]))
                yield without_interval(f"entropy, {unit}, {when}, {words}", mean, estimates[kind])
        claims = "shown: more even", "shown: less even"
        yield Finding("the difference", entropy["difference"].at(i), claims=claims)


# Pictures: the file's name, the figure, its title, and the rest of its caption.

Pictures = Iterator[tuple[str, "Figure", str, str]]


def _where_pictures(results: Results, changes: Changes) -> Pictures:
    for place, where in _PLACE_LABELS.items():
        for measure, words in (("cosine", "Cosine"), ("l2", "Relative L2 change")):
            system, neutral = (results["by_layer"][one][f"{place}_{measure}"] for one in (SYSTEM, NEUTRAL))
            figure = _lines(system, COMPONENTS, words, ("neutral text", neutral.value))
            title = f"{words} at {where} by layer and component, with the system prompt against without"
            yield f"{place}_{measure}", figure, title, f"{_BANDS} Dashed: neutral text."
    if (cka := results["cka"].get(f"{SYSTEM} / {LAST}")) is not None:
        title = "Linear CKA over prompts at the last prompt token, by layer and component"
        figure = _lines(cka["cka"], COMPONENTS, "linear CKA over prompts", ("by chance", cka["by_chance"]))
        yield "cka", figure, title, "Mean over system prompts; dashed: prompts in random order."
    figure = _by_system(results["by_system"]["cosine_at_last_token"][SYSTEM].value, changes.systems)
    title = "Cosine at the last prompt token by system prompt and component"
    yield "by_system", figure, title, "The last row is the check: neutral text."
    beyond = ((name or _ALL, estimate) for name, estimate in results["beyond_neutral"]["kl"].items())
    figure = _forest(beyond, "KL beyond neutral text of the same length (nats)")
    text = (
        "95% intervals over prompts, and in the first row over system prompts too, not corrected for their number; "
        "coloured: it leaves out 0. The last row is the check. Verdicts are in the table."
    )
    yield "beyond", figure, "Effect beyond neutral text by system prompt", text


def _predicting_pictures(results: Results, changes: Changes) -> Pictures:
    for name, words in _WITHIN_LABELS.items():
        for place, where in _PLACE_LABELS.items():
            figure = _lines(results["predicting_kl"][name][place], COMPONENTS, "Spearman, change and next-token KL")
            title = f"Correlation of a layer's change at {where} and the next token's KL, {words}"
            is_within = name == "within_system_prompts"
            file = f"{'within' if is_within else 'across'}_{place}"
            bands = _BANDS if is_within else "Bands: 95% intervals over system prompts."
            yield file, figure, title, f"{bands} They do not allow for the number of layers."


def _length_pictures(results: Results, changes: Changes) -> Pictures:
    tokens = np.nanmean(changes.numbers[SYSTEM, "system_tokens"][:, changes.own], axis=0)
    kinds = (("system prompt", SYSTEM, _COLOURS[0], "o"), ("neutral text", NEUTRAL, _COLOURS[1], "s"))
    for measure, words in MEASURES.items():
        figure, axes = one_panel(3.8)
        for name, comparison, colour, marker in kinds:
            means = np.nanmean(changes.effect(measure, comparison)[:, changes.own], axis=0)
            axes.scatter(tokens, means, color=colour, marker=marker, s=26, label=name)
        unit = "KL (nats)" if measure == "kl" else "relative change"
        axes.set(xscale="log", xlabel="tokens of the system prompt", ylabel=f"{unit}, mean over prompts")
        axes.legend(fontsize="small", loc="upper left")
        yield f"length_{measure}", figure, f"Length and {words}", "A point for each system prompt, mean over prompts."


def _rankings(results: Results) -> dict[str, tuple[str, list[Results]]]:
    """By the name of their picture, the effect in words and the sentences with the largest first."""
    kl, instability = results["sentences"] or [], results["instability"]
    by_size = sorted(instability["sentences"] if kl and instability else [], key=lambda row: -abs(row["effect"].value))
    rankings = {
        "sentences": ("KL beyond neutral text (nats)", kl),
        "sentences_instability": ("instability less that with neutral text", by_size),
    }
    return {name: (words, ranked) for name, (words, ranked) in rankings.items() if ranked}


def _title(words: str, ranked: Sequence[Results]) -> str:
    n = min(len(ranked), _MOST_SENTENCES)
    return f"{words[0].upper()}{words[1:]}: the {n} of {len(ranked)} sentences with the largest effect"


def _phrase_pictures(results: Results, changes: Changes) -> Pictures:
    text = "95% intervals over prompts, not corrected for the number of sentences; verdicts are in the table."
    for name, (words, ranked) in _rankings(results).items():
        rows = ((row["text"], row["effect"]) for row in ranked[:_MOST_SENTENCES])
        yield name, _forest(rows, words), _title(words, ranked), text


def _sentence_tables(results: Results) -> Iterator[html.Table]:
    for words, ranked in _rankings(results).values():
        rows = []
        for row in ranked[:_MOST_SENTENCES]:
            numbers = Finding("", row["effect"], "shown" if row["shown"] else html.NOT_SHOWN).cells()[1:]
            p = html.show_number(row["p_corrected"], 2)
            rows.append((row["text"], row["system"], ", ".join(row["features"]), *numbers, p))
        n_shown = sum(row["shown"] for row in ranked)
        caption = (
            f"{_title(words, ranked)}; {n_shown} are shown at a false discovery rate of {ALPHA:.0%}. A verdict is on "
            "this one sentence in its system prompt, over prompts."
        )
        yield html.Table(("sentence", "system prompt", "features", *COLUMNS[1:], "p, corrected"), rows, caption)


def _position_pictures(results: Results, changes: Changes) -> Pictures:
    if placements := results["placements"]:
        figure = _forest(((name, placements[name]["kl"]) for name in PLACEMENTS), "next-token KL (nats)")
        yield "placements", figure, "Effect by position", "95% intervals over system prompts and prompts."


def _attention_pictures(results: Results, changes: Changes) -> Pictures:
    regions, entropy = results["attention"], results["attention_entropy"]
    if regions is None:
        return
    for kind, words in _KIND_LABELS.items():
        name = kind.removeprefix("none_to_")
        figure = _lines(regions["mass"][kind], REGIONS, "part of the attention")
        text = "Mean over heads and steps. The prompt's last five tokens also count in the template or the question."
        yield f"regions_{name}", figure, f"Attention to regions by layer, {words}", text
        figure = _lines(regions["per_token"][kind], REGIONS[:-1], "attention per token / average")
        title = f"Attention per token of the regions by layer, {words}"
        yield f"regions_per_token_{name}", figure, title, "1: what a token gets on average."
    text = f"Step 0 is the last prompt token; {regions['answers'][SYSTEM][-1]:,} answers reach the last step."
    figure = _lines(regions["by_step"][SYSTEM], REGIONS, "part of the attention", xlabel="step of the answer")
    yield "regions_by_step", figure, "Attention to regions by step, system prompt", text
    mass = regions["by_head"][SYSTEM]
    figure, axes = _heatmap(mass, 1.4 + 0.11 * len(mass), "part of the attention", vmin=0)
    axes.set(xlabel="head", ylabel=_LAYER)
    axes.locator_params(integer=True)
    yield "regions_by_head", figure, "Attention to the system prompt by layer and head", ""
    system, neutral = entropy["relative"][SYSTEM], entropy["relative"][NEUTRAL].value
    figure = _lines(system, WHEN, "entropy / ln(keys seen)", ("neutral text", neutral))
    title = "Entropy of attention by layer, at the last prompt token and over the answer's"
    text = "1: the same attention to every key; 0: all to one. Dashed: neutral text in the system prompt's place."
    yield "entropy", figure, title, text


def _lines(
    values: Estimates | Floats, names: Sequence[str], ylabel: str, *dashed: tuple[str, Floats], xlabel: str = _LAYER
) -> Figure:
    """A line for each name over layers or steps [n, names], with its interval, and dashed ones of a name."""
    figure, axes = one_panel(3.6)
    value = values.value if isinstance(values, Estimates) else values
    for i, (name, colour) in enumerate(zip(names, _COLOURS)):
        axes.plot(value[:, i], color=colour, label=name)
        if isinstance(values, Estimates):
            low, high = values.low[:, i], values.high[:, i]
            axes.fill_between(np.arange(len(value)), low, high, color=colour, alpha=0.2, linewidth=0)
        for _, other in dashed:
            axes.plot(other[:, i], color=colour, linestyle="--", linewidth=1)
    for name, _ in dashed:
        axes.plot([], [], color="#333333", linestyle="--", linewidth=1, label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend(fontsize="small", loc="best")
    return figure


def _by_system(values: Floats, systems: Sequence[str]) -> Figure:
    """Cosine [systems, components] as a heatmap with its numbers."""
    figure, axes = _heatmap(values, 1.2 + 0.3 * len(systems), "cosine, mean over layers and prompts")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for i, j in np.ndindex(*values.shape):
        colour = "black" if values[i, j] > middle else "white"
        axes.text(j, i, f"{values[i, j]:.2f}", color=colour, ha="center", va="center", fontsize="small")
    axes.set_xticks(range(len(COMPONENTS)), COMPONENTS)
    axes.set_yticks(range(len(systems)), [short(name) for name in systems], parse_math=False)
    return figure


def _heatmap(values: Floats, height: float, label: str, **colours: Any) -> tuple[Figure, Any]:
    figure, axes = one_panel(height, least=2.6)
    image = axes.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest", **colours)
    figure.colorbar(image, ax=axes, label=label)
    return figure, axes


def _forest(rows: Iterable[tuple[str, Estimate]], xlabel: str) -> Figure:
    """Estimates with their intervals, one below the other; coloured if the interval leaves out 0."""
    return draw_forest([(name, one.value, one.interval) for name, one in rows], xlabel, 0.0, (_COLOURS[0],) * 2)


# By anchor: the question, its findings and its pictures.
_SECTIONS = {
    "where": ("What changes, and where", _where, _where_pictures),
    "predicting": ("Which layers' change goes with a changed output", _predicting, _predicting_pictures),
    "length": ("Do longer system prompts change more?", _length, _length_pictures),
    "phrases": ("Which phrases matter?", _phrases, _phrase_pictures),
    "position": ("Does the position matter?", _position, _position_pictures),
    "attention": ("Where does the model look?", _attention, _attention_pictures),
}
_NOTES = {
    "phrases": "System prompts with a feature differ in other things too: dropped sentences are the causal test.",
    "position": "Behind the question, a text cannot change the question's own tokens: no token attends to a later one.",
}
_NO_PICTURES = {
    "phrases": "No system prompt of several sentences was taken apart.",
    "position": "The system prompts' texts were not put elsewhere.",
    "attention": "Attention was not measured (`--no-attention`).",
}
