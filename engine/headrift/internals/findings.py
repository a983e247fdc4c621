"""Findings in sentences, made from the numbers with their intervals and never stronger than these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from headrift.internals.analysis import Analysis
from headrift.internals.attention import KINDS
from headrift.internals.cases import CHECK
from headrift.internals.comparing import LAST, NEUTRAL, PLACES, SYSTEM
from headrift.internals.components import ATTENTION, COMPONENTS, MLP, RESIDUAL
from headrift.internals.entropies import WHEN
from headrift.internals.estimates import Figure, Figures
from headrift.internals.phrases import ALPHA
from headrift.internals.placements import PLACEMENTS
from headrift.internals.tables import MEASURES

_WORDS = {RESIDUAL: "residual stream", ATTENTION: "attention output", MLP: "MLP output"}
_PLACES = {"last": "the last prompt token", "question": "the question's tokens"}
_MOST = 5  # sentences and features that are named


def in_words(figure: Figure, digits: int = 3) -> str:
    """A number with its interval."""
    value = f"{figure.value:.{digits}f}"
    if figure.interval is None:
        return f"{value} (too few prompts for an interval)"
    return f"{value} (95% interval {figure.interval[0]:.{digits}f} to {figure.interval[1]:.{digits}f})"


def verdict(figure: Figure, above: str, below: str) -> str:
    """What an interval allows to be said of a difference or a correlation."""
    if figure.interval is None:
        return "too few prompts to say"
    if not figure.shown:
        return "no effect shown"
    return above if figure.value > 0 else below


def findings(of: Analysis) -> dict[str, list[str]]:
    """Statements by question."""
    return {
        "What changes, and where": _where(of),
        "Which layers' change goes with a changed output": _predicting(of),
        "Do longer system prompts change more?": _length(of),
        "Which phrases matter?": _phrases(of),
        "Does the position matter?": _position(of),
        "Where does the model look?": _regions(of),
    }


def summary(of: Analysis) -> list[str]:
    """The first sentences of a report."""
    kl, control, beyond = of.output[SYSTEM]["kl"], of.output[NEUTRAL]["kl"], of.beyond["kl"][""]
    check = of.beyond["kl"].get(CHECK)
    found = [
        f"{of.compared.prompts} prompts under {len(of.compared.own)} system prompts ({kl.rows} rows). A system prompt "
        f"moves the next token by a KL of {in_words(kl)} nats; neutral text of the same length by {in_words(control)}. "
        f"The difference, {in_words(beyond)}: "
        f"{verdict(beyond, 'system prompts move it more', 'system prompts move it less')}.",
    ]
    if check is not None:
        said = "as it should be, no effect" if check.interval and not check.shown else "which asks for caution"
        if check.interval is None:
            said = "too few prompts to say"
        found.append(
            f"The check, neutral text in the place of a system prompt against other neutral text: {in_words(check)}, "
            f"{said}."
        )
    return found


def _where(of: Analysis) -> list[str]:
    found = []
    for place in PLACES:
        figures = of.by_layer[SYSTEM, f"{place}_l2"]
        control = of.by_layer[NEUTRAL, f"{place}_l2"]
        for i, component in enumerate(COMPONENTS):
            layer = int(np.nanargmax(figures.value[:, i]))
            found.append(
                f"At {_PLACES[place]} the {_WORDS[component]} changes most, relative to its length, behind layer "
                f"{layer}: {in_words(figures.at(layer, i))}; with neutral text {in_words(control.at(layer, i))} "
                f"({figures.rows:,} rows)."
            )
    changed, same = of.output[SYSTEM]["top1_changed"], of.output[SYSTEM]["same"]
    found.append(
        f"Of {changed.rows} rows a part of {in_words(changed)} has another most likely first token. Of the greedy "
        f"answers' first tokens, a part of {in_words(same)} is as without a system prompt."
    )
    return found


def _predicting(of: Analysis) -> list[str]:
    found = []
    for words, figures in (("over all rows", of.predicting[LAST]), ("within each system prompt", of.within[LAST])):
        layer, component = _largest(figures)
        figure = figures.at(layer, component)
        found.append(
            f"At the last prompt token, {words} ({figure.rows} rows), the change that goes most with the next token's "
            f"KL is that of the {_WORDS[COMPONENTS[component]]} of layer {layer}: Spearman {in_words(figure, 2)}, "
            f"{verdict(figure, 'more change goes with more KL', 'more change goes with less KL')}. It is the largest "
            f"of {figures.value.size}, which its interval does not allow for."
        )
    n_shown = int((of.within[LAST].low > 0).sum())
    found.append(
        f"Within system prompts the interval is above 0 for {n_shown} of {of.within[LAST].value.size} layers and "
        "components."
    )
    return found


def _length(of: Analysis) -> list[str]:
    found = []
    for measure, words in MEASURES.items():
        about = of.length[measure]
        system, neutral, beyond = (about[name]["spearman"] for name in ("system", "neutral", "beyond"))
        if np.isnan(system.value):
            found.append(f"{_capital(words)}: system prompts of one length cannot be compared by length.")
            continue
        found.append(
            f"{_capital(words)}: with the tokens of the system prompt it goes at Spearman {in_words(system, 2)} "
            f"({verdict(system, 'longer, more', 'longer, less')}), with those of the neutral texts at "
            f"{in_words(neutral, 2)} ({verdict(neutral, 'longer, more', 'longer, less')}). What system prompts "
            f"do beyond neutral text: {in_words(beyond, 2)}, "
            f"{verdict(beyond, 'it grows with length', 'it shrinks with length')} ({system.rows} rows)."
        )
        mixed = about["mixed"]
        if "reason" in mixed:
            found.append(f"No mixed model of it: {mixed['reason']}.")
            continue
        slope, more = mixed["per_100_neutral"], mixed["per_100_beyond"]
        caution = "" if mixed["converged"] else " The fit did not converge: do not rely on it."
        found.append(
            f"Mixed model of it (prompt as random effect, {mixed['rows']} rows): per 100 tokens {in_words(slope)} for "
            f"neutral text, and {in_words(more)} more for system prompts: "
            f"{verdict(more, 'their length counts for more', 'their length counts for less')}.{caution}"
        )
    found.append("The intervals are over prompts. They say nothing of other system prompts, of which there are few.")
    return found


def _phrases(of: Analysis) -> list[str]:
    found = []
    for feature, about in of.features.items():
        if about["difference"] is None:
            found.append(f"`{feature}`: {about['with']} of the system prompts have it, so it cannot be compared.")
            continue
        found.append(
            f"`{feature}`: the {about['with']} system prompts that have it move the next token by "
            f"{in_words(about['difference'])} nats more, beyond neutral text, than the {about['without']} others: "
            f"{verdict(about['difference'], 'more', 'less')}. They differ in other things too."
        )
    if of.sentences is None or of.sentence_features is None:
        return [*found, "No sentences were dropped, so nothing is known of causes."]
    n = len(of.sentences)
    shown = [row for row in of.sentences if row["shown"]]
    found.append(
        f"Of {n} sentences dropped in turn ({of.sentence_rows} rows), {len(shown)} have an effect that is shown after "
        f"correction for their number (false discovery rate {ALPHA:.0%})."
    )
    found += [_of_sentence(row) for row in shown[:_MOST]]
    for feature, about in of.sentence_features.items():
        if not about["sentences"]:
            continue
        figure = about["effect"]
        found.append(
            f"Sentences with `{feature}` ({about['sentences']} of them, {figure.rows} rows): {in_words(figure)} nats "
            f"beyond neutral text in their place, {verdict(figure, 'they move it more', 'they move it less')}."
        )
    return [*found, *_instability(of)]


def _instability(of: Analysis) -> list[str]:
    if of.instability is None:
        return ["What sentences do to the inter-head instability was not measured."]
    rows, scores = of.instability["sentences"], of.instability["scores"]
    effect, dropped = of.instability["effect"], of.instability["effect_dropped"]
    shown = sorted((row for row in rows if row["shown"]), key=lambda row: -abs(row["effect"].value))
    words = "the heads disagree more with them", "the heads disagree less with them"
    found = [
        f"Inter-head instability along the same answer, {len(rows)} sentences ({effect.rows} rows, {effect.prompts} "
        f"prompts): {in_words(scores['whole'], 4)} under the whole system prompt. Less that with neutral text in a "
        f"sentence's place, mean over sentences, {in_words(effect, 4)}: {verdict(effect, *words)}; less that with the "
        f"sentence dropped, {in_words(dropped, 4)}: {verdict(dropped, *words)}. {len(shown)} sentences have an effect "
        "against neutral text that is shown after correction for their number."
    ]
    return found + [
        f'{row["system"]}, sentence {row["sentence"] + 1}, "{row["text"]}": {in_words(row["effect"], 4)} on the '
        f"instability, against neutral text in its place (p {row['p_corrected']:.2g}, corrected)."
        for row in shown[:_MOST]
    ]


def _of_sentence(row: Mapping[str, Any]) -> str:
    return (
        f'{row["system"]}, sentence {row["sentence"] + 1}, "{row["text"]}": {in_words(row["effect"])} nats beyond '
        f"neutral text in its place (p {row['p_corrected']:.2g}, corrected)."
    )


def _position(of: Analysis) -> list[str]:
    if of.placements is None:
        return ["The system texts were not put elsewhere."]
    found = []
    for where in PLACEMENTS:
        about = of.placements[where]
        text = f"As {where}" if where == PLACEMENTS[0] else f"In the user's turn, {where}"
        text += f": KL {in_words(about['kl'])} nats ({about['kl'].rows} rows, {about['kl'].prompts} prompts)"
        if "kl_less" in about:
            less = about["kl_less"]
            text += f"; less that as system prompt {in_words(less)}: {verdict(less, 'more change', 'less change')}"
        found.append(f"{text}.")
    return found


def _regions(of: Analysis) -> list[str]:
    if of.regions is None:
        return ["Attention was not measured."]
    found = []
    for kind, words in ((SYSTEM, "the system prompt"), (NEUTRAL, "neutral text in its place")):
        mass, per_token = of.regions.mass[kind], of.regions.per_token[kind]
        layer = int(np.nanargmax(mass.value[:, 0]))
        found.append(
            f"Attention to {words} is highest in layer {layer}, a part of {in_words(mass.at(layer, 0))} (mean over "
            f"heads and steps, {mass.rows:,} rows); a token of it gets {in_words(per_token.at(layer, 0), 2)} times "
            "what a token gets on average there."
        )
    difference = of.regions.difference.at()
    found.append(
        f"A token of a system prompt gets {in_words(difference, 3)} averages more than one of neutral text, mean over "
        f"layers ({difference.rows:,} rows): {verdict(difference, 'more attention', 'less attention')}."
    )
    return [*found, _entropy(of)]


def _entropy(of: Analysis) -> str:
    about = of.entropies
    assert about is not None
    said = []
    for i, when in enumerate(WHEN):
        relative, nats = (
            [float(np.nanmean(figures[kind].value[:, i])) for kind in KINDS] for figures in (about.relative, about.nats)
        )
        difference = about.difference.at(i)
        said.append(
            f"at the {when} {relative[0]:.3f} ({nats[0]:.2f} nats) with the system prompt and {relative[1]:.3f} "
            f"({nats[1]:.2f} nats) with neutral text, a difference of {in_words(difference)}: "
            f"{verdict(difference, 'attention is more even', 'attention is less even')}"
        )
    return (
        "Entropy of attention over the logarithm of the keys seen (1: the same to every key), mean over layers and "
        f"heads: {'; '.join(said)} ({about.rows:,} rows)."
    )


def _largest(figures: Figures) -> Sequence[int]:
    at = np.unravel_index(
        int(np.nanargmax(np.where(np.isfinite(figures.value), figures.value, -2.0))), figures.value.shape
    )
    return [int(i) for i in at]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
