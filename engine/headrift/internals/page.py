"""What was found as a page, of the kind that `headrift report` makes, with figures beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from headrift._version import __version__
from headrift.internals import figures
from headrift.internals.analysis import Analysis, numbers
from headrift.internals.attention import KINDS, REGIONS
from headrift.internals.comparing import NEUTRAL, PLACES, SYSTEM
from headrift.internals.entropies import WHEN, Entropies
from headrift.internals.estimates import Figure
from headrift.internals.findings import findings, in_words, summary
from headrift.internals.placements import PLACEMENTS
from headrift.internals.tables import MEASURES
from headrift.report import plots
from headrift.report.html import Block, Missing, Output, Picture, Pictures, Section, Table, Text, render

PAGE = "report.html"
_MOST_SENTENCES = 20
_AT = {"last": "the last prompt token", "question": "the question's tokens"}


def write_page(folder: Path, of: Analysis, about: Mapping[str, Any], rejected: int) -> Path:
    """Write `report.html` and the folder of its figures into a folder; the page's path. about: see job. OSError where
    the disk fails."""
    out = folder / PAGE
    output = Output(out)
    output.begin()
    try:
        with plots.style():
            said = findings(of)
            output.numbers(headrift=__version__, summary=summary(of), findings=said, **numbers(of))
            sections = _sections(of, said, output)
        page = render(
            "internals.html.j2",
            title=Path(about["model"]).name,
            model=f"{of.compared.prompts} prompts, {len(of.compared.own)} system prompts",
            date=f"{datetime.now(UTC):%Y-%m-%d}, headrift {__version__}",
            in_short=[Text([*summary(of), *_notes(about, rejected)])],
            sections=sections,
            files=output.folder.name,
            redact=False,
        )
        output.publish(page)
    finally:
        output.discard()
    return out


def _notes(about: Mapping[str, Any], rejected: int) -> list[str]:
    notes = [f"Without a system prompt means: {about['baseline']}."]
    if rejected:
        notes.append(f"{rejected} prompts, or prompts under one system prompt, were rejected: see `rejects.parquet`.")
    return notes


def _sections(of: Analysis, said: Mapping[str, Sequence[str]], output: Output) -> list[Section]:
    where, predicting, length, phrases, position, looking = said.items()
    return [
        Section("where", where[0], [Text(where[1]), *_where(of, output)]),
        Section("predicting", predicting[0], [Text(predicting[1]), *_predicting(of, output)]),
        Section("length", length[0], [Text(length[1]), *_length(of, output)]),
        Section("phrases", phrases[0], [Text(phrases[1]), *_phrases(of, output)]),
        Section("position", position[0], [Text(position[1]), *_position(of, output)]),
        Section("attention", looking[0], [Text(looking[1]), *_regions(of, output)]),
    ]


def _where(of: Analysis, output: Output) -> list[Block]:
    pictures: list[Picture] = []
    for place in PLACES:
        for measure, words in (("cosine", "cosine"), ("l2", "relative L2 change")):
            system, neutral = (of.by_layer[which, f"{place}_{measure}"] for which in (SYSTEM, NEUTRAL))
            pictures.append(
                output.picture(
                    f"{place}_{measure}",
                    figures.by_layer(system, neutral, f"{words} at {_AT[place]}"),
                    f"{words} by layer and component",
                    f"With the system prompt against without, at {_AT[place]}: mean over {system.rows:,} rows; bands: "
                    "95% intervals over prompts. Dashed: neutral text of the same length instead.",
                )
            )
    if (SYSTEM, "last") in of.cka:
        pictures.append(
            output.picture(
                "cka",
                figures.cka(*of.cka[SYSTEM, "last"]),
                "CKA by layer and component",
                f"Do the prompts lie to each other as they did? Linear CKA over {of.compared.prompts} prompts at the "
                "last prompt token, mean over system prompts; dotted: prompts in random order.",
            )
        )
    systems = of.compared.systems
    pictures.append(
        output.picture(
            "by_system",
            figures.by_system(of.by_system[SYSTEM], systems),
            "Cosine by system prompt and component",
            "At the last prompt token, with against without. The last row is the check: neutral text.",
        )
    )
    beyond = [(name or "all system prompts", figure) for name, figure in of.beyond["kl"].items()]
    pictures.append(
        output.picture(
            "beyond",
            figures.forest(beyond, "KL beyond neutral text of the same length (nats)"),
            "Effect beyond the neutral control by system prompt",
            f"95% intervals over {of.compared.prompts} prompts; filled: it leaves out 0. The last row must not.",
        )
    )
    rows = [
        (
            name or "all system prompts",
            str(beyond_rows.rows),
            in_words(beyond_rows),
            in_words(of.beyond["residual_last"][name]),
        )
        for name, beyond_rows in of.beyond["kl"].items()
    ]
    columns = ("system prompt", "rows", "KL beyond neutral text", "residual stream, last token, beyond neutral text")
    return [Pictures(pictures), Table(columns, rows)]


def _predicting(of: Analysis, output: Output) -> list[Block]:
    pictures = [
        output.picture(
            f"{name}_{place}",
            figures.correlations(by[place], "Spearman, change and next-token KL"),
            "Correlation of a layer's change and the output's",
            f"Relative L2 change at {_AT[place]} and the next token's KL, {words}, {by[place].rows:,} rows; bands: 95% "
            "intervals over prompts.",
        )
        for name, by, words in (
            ("predicting", of.predicting, "over all rows"),
            ("within", of.within, "within each system prompt (mean)"),
        )
        for place in PLACES
    ]
    return [Pictures(pictures)]


def _length(of: Analysis, output: Output) -> list[Block]:
    pictures = [
        output.picture(
            f"length_{measure}",
            figures.lengths(of.compared, measure, "KL (nats)" if measure == "kl" else "relative change"),
            "Effect over length",
            f"{words}: a point a system prompt, mean over {of.compared.prompts} prompts.",
        )
        for measure, words in MEASURES.items()
    ]
    rows = [
        (words, name, str(about.rows), in_words(of.length[measure][name]["pearson"], 2), in_words(about, 2))
        for measure, words in MEASURES.items()
        for name in ("system", "neutral", "beyond")
        for about in (of.length[measure][name]["spearman"],)
    ]
    return [Pictures(pictures), Table(("effect", "of", "rows", "Pearson", "Spearman"), rows)]


def _phrases(of: Analysis, output: Output) -> list[Block]:
    if of.sentences is None or not of.sentences:
        return [Missing("No system prompt of several sentences was taken apart.")]
    most = of.sentences[:_MOST_SENTENCES]
    picture = output.picture(
        "sentences",
        figures.forest([(row["text"], row["effect"]) for row in most], "KL beyond neutral text (nats)"),
        "Effect of sentences",
        f"The {len(most)} sentences with the largest effect of {len(of.sentences)}; 95% intervals over prompts, not "
        "corrected for their number.",
    )
    rows = [
        (
            row["text"],
            row["system"],
            ", ".join(row["features"]) or "-",
            str(row["effect"].rows),
            in_words(row["effect"]),
            "-" if row["p_corrected"] is None else f"{row['p_corrected']:.3g}",
        )
        for row in most
    ]
    pictures = [picture] if of.instability is None else [picture, _instability(of.instability, output)]
    return [Pictures(pictures), Table(("sentence", "of", "features", "rows", "effect (nats)", "p, corrected"), rows)]


def _instability(about: Mapping[str, Any], output: Output) -> Picture:
    rows = sorted(about["sentences"], key=lambda row: -abs(row["effect"].value))[:_MOST_SENTENCES]
    return output.picture(
        "sentences_instability",
        figures.forest([(row["text"], row["effect"]) for row in rows], "instability, less with neutral text"),
        "Effect of sentences on the inter-head instability",
        f"The {len(rows)} sentences with the largest effect, up or down, of {len(about['sentences'])}, along the same "
        f"answer; 95% intervals over {about['effect'].prompts} prompts, not corrected for their number.",
    )


def _position(of: Analysis, output: Output) -> list[Block]:
    if of.placements is None:
        return [Missing("The system texts were not put elsewhere.")]
    placements = of.placements
    picture = output.picture(
        "placements",
        figures.forest([(where, placements[where]["kl"]) for where in PLACEMENTS], "next-token KL (nats)"),
        "Effect by position",
        "Against the question alone; 95% intervals (Student's) over prompts.",
    )
    rows = []
    for where in PLACEMENTS:
        for measure, words in MEASURES.items():
            about: dict[str, Figure] = placements[where]
            less = about.get(f"{measure}_less")
            cells = (str(about[measure].rows), in_words(about[measure]), "-" if less is None else in_words(less))
            rows.append((where, words, *cells))
    note = Text(
        ["Behind the question, a system text cannot change the question's own tokens: no token sees a later one."]
    )
    return [note, Pictures([picture]), Table(("position", "effect", "rows", "mean", "less as system prompt"), rows)]


def _regions(of: Analysis, output: Output) -> list[Block]:
    if of.regions is None:
        return [Missing("Attention was not measured (`--no-attention`).")]
    pictures: list[Picture] = []
    for kind, words in zip(KINDS, ("with the system prompt", "with neutral text in its place")):
        mass, per_token = of.regions.mass[kind].value, of.regions.per_token[kind].value
        rows = of.regions.mass[kind].rows
        name = "system" if kind == SYSTEM else "neutral"
        pictures += [
            output.picture(
                f"regions_{name}",
                figures.lines({region: mass[:, i] for i, region in enumerate(REGIONS)}, "part of the attention"),
                "Attention to regions by layer",
                f"Mean over heads, steps and {rows:,} rows, {words}. The last five tokens of the prompt also count in "
                "the template or the question.",
            ),
            output.picture(
                f"regions_per_token_{name}",
                figures.lines(
                    {region: per_token[:, i] for i, region in enumerate(REGIONS[:-1])}, "attention per token / average"
                ),
                "Attention per token of regions by layer",
                f"The same over the tokens of a region, {words}; 1: what a token gets on average.",
            ),
        ]
    steps = of.regions.by_step[SYSTEM]
    pictures += [
        output.picture(
            "regions_by_step",
            figures.lines(
                {region: steps[:, i] for i, region in enumerate(REGIONS)}, "part of the attention", "step of the answer"
            ),
            "Attention to regions by step",
            "Mean over layers and heads, with the system prompt; step 0 is the last prompt token. Later steps rest on "
            f"answers that go on so long: {of.regions.answers[SYSTEM][-1]:,} at the last.",
        ),
        output.picture(
            "regions_by_head",
            figures.heads(of.regions.by_head[SYSTEM]),
            "Attention to the system prompt by layer and head",
            "Part of each head's attention that goes to the system prompt, mean over steps and rows.",
        ),
        _entropy(of.entropies, output),
    ]
    return [Pictures(pictures)]


def _entropy(of: Entropies | None, output: Output) -> Picture:
    assert of is not None
    system, neutral = (of.relative[kind] for kind in KINDS)
    return output.picture(
        "entropy",
        figures.by_layer(system, neutral, "entropy / ln(keys seen)", WHEN, "best"),
        "Entropy of attention by layer",
        f"Mean over heads and {system.rows:,} rows, at the last prompt token and over the answer's; bands: 95% "
        "intervals over prompts. 1: the same attention to every key; 0: all to one. Dashed: neutral text in the system "
        "prompt's place.",
    )
