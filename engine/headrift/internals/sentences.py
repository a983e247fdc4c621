"""What the sentences of a system prompt do: each is dropped in turn, and replaced by neutral text of as many tokens.

Dropping any text changes something, so a sentence is compared with the neutral text in its place. On the next token:

    effect = KL(whole || dropped) - KL(whole with neutral text for the sentence || dropped)     nats

Above 0, the sentence changes the next token more than other words would. On inter-head instability, the score of
`headrift score` (the question is answered once, under the whole system prompt, and this answer is replayed):

    effect = score(whole) - score(whole with neutral text for the sentence)
    effect_dropped = score(whole) - score(dropped)

Above 0, the heads disagree more with the sentence. Neutral text differs from prompt to prompt, so that what it does is
part of the spread over prompts.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow as pa

from headrift.internals.attention import score
from headrift.internals.cases import NeutralText, Question, Reject, Renderer, Rendering, SystemPrompt, split_sentences
from headrift.internals.comparing import ForwardRow, Record, StateReader
from headrift.internals.estimates import cell_means, column, corrected, kl, over_prompts, over_systems
from headrift.prepare import Prompt
from headrift.prompts import PromptError, Span
from headrift.runs.folder import OnRows, columns, ignore_rows
from headrift.scorer import Scorer

ALPHA = 0.05  # false discovery rate at which a sentence's effect is shown
# Scores need neutral text of its own for every prompt, so they are measured for the first few prompts only.
MOST_SCORED_PROMPTS = 4
_STRIDE = 3  # sentences between the neutral texts of a prompt's sentences

Rules = Mapping[str, re.Pattern[str]]

_COLUMNS = columns("system string, sentence int16, text string, sentence_tokens int32, prompt int32, id string")
KL_SCHEMA = pa.schema(_COLUMNS + columns("kl double, kl_neutral double, effect double, top1_changed bool"))
INSTABILITY_SCHEMA = pa.schema(
    _COLUMNS + columns("whole double, dropped double, neutral double, effect double, effect_dropped double")
)


@dataclass(frozen=True, slots=True)
class DroppedSentence:
    """A sentence of a system prompt for one question: the prompt with it, without it, and with neutral text for it."""

    sentence: int
    text: str = field(repr=False)
    tokens: int
    question: Question
    whole: Rendering
    dropped: Rendering
    neutral: Rendering

    def record(self, system: str) -> Record:
        """The columns of every record of it. system: the system prompt's name."""
        about = {"sentence": self.sentence, "text": self.text, "sentence_tokens": self.tokens}
        return self.question.record(system) | about


def sentence_spans(text: str) -> list[Span]:
    """Characters [start, end) of each sentence of a text."""
    spans, end = [], 0
    for sentence in split_sentences(text):
        start = text.index(sentence, end)
        end = start + len(sentence)
        spans.append((start, end))
    return spans


def without(text: str, part: Span) -> str:
    """Return the text without this part, and without the blank that is then too much."""
    return (text[: part[0]].rstrip() + (" " if part[0] else "") + text[part[1] :].lstrip()).strip()


def drop_sentences(
    questions: Sequence[Question], system: SystemPrompt, renderer: Renderer, neutral: NeutralText
) -> Iterator[DroppedSentence | Reject]:
    """Drop each sentence for each question; nothing for a system prompt of one sentence."""
    parts = sentence_spans(system.text)
    for question in questions if len(parts) > 1 else ():
        try:
            whole, spans = renderer.with_parts(question.text, system.text, parts)
            dropped = [renderer.with_system(question.text, without(system.text, part)) for part in parts]
        except PromptError as error:
            yield question.reject(system.name, error)
            continue
        for number, (span, part, shorter) in enumerate(zip(spans, parts, dropped)):
            n = span[1] - span[0]
            words = neutral.excerpt(n, question.number + _STRIDE * number, inner=number > 0)
            replaced = whole.with_tokens(span, words)
            yield DroppedSentence(number, system.text[slice(*part)], n, question, whole, shorter, replaced)


def whole_prompts(drops: Sequence[DroppedSentence]) -> dict[int, Rendering]:
    """The prompts with the whole system prompt, by the question's number."""
    return {drop.question.number: drop.whole for drop in drops}


def count_rows(drops: Sequence[DroppedSentence]) -> int:
    """How many rows are run to measure them: two each, and the whole ones."""
    return 2 * len(drops) + len(whole_prompts(drops))


def measure_kl(
    reader: StateReader, name: str, drops: Sequence[DroppedSentence], on_rows: OnRows = ignore_rows
) -> list[Record]:
    """A record (see KL_SCHEMA) of each. Rows of one sentence run together, so that what they start with runs once."""

    def read(renderings: Sequence[Rendering]) -> list[Any]:
        rows = [ForwardRow(one.token_ids, predict_at=(len(one.token_ids) - 1,)) for one in renderings]
        return [reading.log_probs for reading in reader.read(rows, on_rows)]

    wholes = whole_prompts(drops)
    whole_log_probs = dict(zip(wholes, read(list(wholes.values()))))
    records = []
    for number in dict.fromkeys(drop.sentence for drop in drops):
        same = [drop for drop in drops if drop.sentence == number]
        dropped, neutral = read([drop.dropped for drop in same]), read([drop.neutral for drop in same])
        for drop, without_it, with_neutral in zip(same, dropped, neutral):
            whole = whole_log_probs[drop.question.number]
            own, control = (float(kl(before, without_it)[0]) for before in (whole, with_neutral))
            numbers = {"kl": own, "kl_neutral": control, "effect": own - control}
            changed = bool(whole[0].argmax() != without_it[0].argmax())
            records.append({**drop.record(name), **numbers, "top1_changed": changed})
    return records


def scored_drops(drops: Sequence[DroppedSentence]) -> list[DroppedSentence]:
    """Those whose instability is measured: of the first MOST_SCORED_PROMPTS prompts."""
    numbers = sorted(whole_prompts(drops))[:MOST_SCORED_PROMPTS]
    return [drop for drop in drops if drop.question.number in numbers]


def measure_instability(
    scorer: Scorer, name: str, drops: Sequence[DroppedSentence], on_rows: OnRows = ignore_rows
) -> list[Record]:
    """A record (see INSTABILITY_SCHEMA) of each; none if the engine rejected one of its prompts.

    A score is null if the answer ended before its first step.
    """
    wholes = whole_prompts(drops)
    results = dict(zip(wholes, score(scorer, [_prompt(one) for one in wholes.values()], on_rows)))
    answered = [(drop, whole) for drop in drops if (whole := results[drop.question.number]) is not None]
    prompts = [_prompt(one, whole.answer_ids) for drop, whole in answered for one in (drop.dropped, drop.neutral)]
    replayed = list(score(scorer, prompts, on_rows, replay=True))
    records = []
    for (drop, whole), dropped, neutral in zip(answered, replayed[::2], replayed[1::2]):
        if dropped is not None and neutral is not None:
            scores = {"whole": whole.score, "dropped": dropped.score, "neutral": neutral.score}
            effects = {
                key: None if whole.score is None or other.score is None else whole.score - other.score
                for key, other in (("effect", neutral), ("effect_dropped", dropped))
            }
            records.append(drop.record(name) | scores | effects)
    return records


def _prompt(rendering: Rendering, answer_ids: Sequence[int] | None = None) -> Prompt:
    regions = {"system": rendering.system, "user": rendering.question}
    return Prompt(token_ids=rendering.token_ids, regions=regions, response_ids=answer_ids)


# Features of sentences


class RulesError(ValueError):
    """A file of features cannot be used. The message says why and what to do."""


def read_rules(extra: Path | None = None) -> Rules:
    """Read the features that headrift has, and those of another file in the same format. RulesError if it is bad."""
    own = (files("headrift.internals") / "features.toml").read_text(encoding="utf-8")
    rules = _parse_rules(own, "features.toml")
    if extra is None:
        return rules
    try:
        return rules | _parse_rules(extra.read_text(encoding="utf-8"), str(extra))
    except OSError as error:
        raise RulesError(f"--features {extra} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RulesError(f"--features {extra} is not UTF-8 text: convert it to UTF-8") from error


def _parse_rules(text: str, name: str) -> dict[str, re.Pattern[str]]:
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RulesError(f"--features {name} is not a TOML file: {error}") from error
    rules = {}
    for feature, rule in tables.items():
        patterns = rule.get("patterns") if isinstance(rule, dict) else None
        if not isinstance(patterns, list) or not patterns or not all(isinstance(one, str) for one in patterns):
            raise RulesError(
                f"--features {name}: [{feature}] needs `patterns`, a list of regular expressions, as in "
                "patterns = ['\\bplease\\b']"
            )
        try:
            rules[feature] = re.compile("|".join(f"(?:{one})" for one in patterns), re.IGNORECASE)
        except re.error as error:
            raise RulesError(f"--features {name}: a pattern of [{feature}] is not valid: {error}") from error
    return rules


def find_features(text: str, rules: Rules) -> list[str]:
    """Return the features that a text has."""
    return [name for name, pattern in rules.items() if pattern.search(text)]


def rank_sentences(
    table: pa.Table, rules: Rules, means: Sequence[str] = ("kl", "top1_changed")
) -> list[dict[str, Any]]:
    """The sentences by their mean `effect`, the largest first, each with the means of these columns too.

    The effect has Student's interval over prompts, `p_corrected` allows for the number of sentences (Benjamini and
    Hochberg), and the effect is `shown` if that is below ALPHA: of this sentence, not of sentences like it.
    """
    number, names, texts = (column(table, name) for name in ("sentence", "system", "text"))
    values = {name: column(table, name).astype(float) for name in ("effect", *means)}
    rows: list[dict[str, Any]] = []
    for system, sentence in dict.fromkeys(zip(names.tolist(), number.tolist())):
        own = (names == system) & (number == sentence)
        text = str(texts[own][0])
        row = {"system": system, "sentence": sentence, "text": text, "features": find_features(text, rules)}
        row["effect"] = over_prompts(values["effect"][own]).at()
        rows.append(row | {name: float(values[name][own].mean()) for name in means})
    for row, p in zip(rows, corrected([row["effect"].p for row in rows])):
        row |= {"p_corrected": float(p), "shown": bool(p < ALPHA)}
    return sorted(rows, key=lambda row: -row["effect"].value)


def effect_of_features(table: pa.Table, rules: Rules) -> dict[str, dict[str, Any]]:
    """By feature the mean effect of the sentences that have it, from one value per system prompt, and of the others."""
    texts = column(table, "text")
    has = {feature: [feature in find_features(text, rules) for text in texts] for feature in rules}
    has["none of them"] = [not any(flags) for flags in zip(*has.values())]
    features = {}
    for feature, flags in has.items():
        some = table.filter(pa.array(flags))
        sentences = len(set(zip(column(some, "system"), column(some, "sentence"))))
        effect = over_systems(cell_means(table, "effect", flags), rows=some.num_rows).at()
        features[feature] = {"sentences": sentences, "effect": effect}
    return features
