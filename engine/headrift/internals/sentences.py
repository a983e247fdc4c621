"""What each sentence of a system prompt does: it is dropped, and the next token is looked at.

Dropping any text changes something. So the sentence is held against neutral text of as many tokens in its place:

    effect = KL(whole || dropped) - KL(whole with neutral text for the sentence || dropped)     nats, next token

Above 0, the sentence moves the answer's first token more than any words would. The neutral text is another one for
every prompt, so that its own differences are part of the spread over prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from headrift.internals.cases import Question, Reject, SystemPrompt
from headrift.internals.components import Model, Row
from headrift.internals.measures import kl
from headrift.internals.neutral import Neutral, sentences
from headrift.internals.renderings import Rendered, Renderer
from headrift.prompts import PromptError, Span

# Neutral texts of a prompt's sentences begin so many sentences apart.
_STRIDE = 3


@dataclass(frozen=True, slots=True)
class Drop:
    """A sentence of a system prompt, dropped for one question: its number, and three prompts: the whole one, without
    the sentence, and with neutral text in its place."""

    sentence: int
    text: str = field(repr=False)
    tokens: int
    question: Question
    whole: Rendered
    dropped: Rendered
    neutral: Rendered

    def about(self, system: str) -> dict[str, Any]:
        """What a record of it says first, whatever was measured (see ABOUT). system: the system prompt's name."""
        return {
            "system": system,
            "sentence": self.sentence,
            "text": self.text,
            "sentence_tokens": self.tokens,
            "prompt": self.question.number,
            "id": self.question.id,
        }


def spans(text: str) -> list[Span]:
    """Where the sentences of a text are: characters [start, end) of each."""
    found, at = [], 0
    for sentence in sentences(text):
        start = text.index(sentence, at)
        at = start + len(sentence)
        found.append((start, at))
    return found


def without(text: str, part: Span) -> str:
    """The text without this part of it, and without the blank that is then too much."""
    return (text[: part[0]].rstrip() + (" " if part[0] else "") + text[part[1] :].lstrip()).strip()


def make_drops(
    questions: Sequence[Question], system: SystemPrompt, renderer: Renderer, neutral: Neutral
) -> list[Drop | Reject]:
    """Each sentence dropped for each question, or why not; nothing for a system prompt of one sentence."""
    parts = spans(system.text)
    found: list[Drop | Reject] = []
    for question in questions if len(parts) > 1 else ():
        try:
            whole, places = renderer.with_parts(question.text, system.text, parts)
            dropped = [renderer.with_system(question.text, without(system.text, part)) for part in parts]
        except PromptError as error:
            found.append(Reject(question.source, question.row, question.id, system.name, error.reason, str(error)))
            continue
        for number, ((start, end), part, left) in enumerate(zip(places, parts, dropped)):
            words = neutral.excerpt(end - start, question.number + _STRIDE * number, inner=number > 0)
            ids = [*whole.token_ids[:start], *words, *whole.token_ids[end:]]
            text, replaced = system.text[slice(*part)], replace(whole, token_ids=ids)
            found.append(Drop(number, text, end - start, question, whole, left, replaced))
    return found


def measure(
    model: Model, name: str, drops: Sequence[Drop], on_rows: Callable[[int], None] | None = None
) -> list[dict[str, Any]]:
    """A record (see SCHEMA) of each drop. A sentence's rows run together: what they begin with runs once."""
    whole_ones = wholes(drops)
    said = dict(zip(whole_ones, model.read([_row(whole) for whole in whole_ones.values()], on_rows)))
    found = []
    for number in dict.fromkeys(drop.sentence for drop in drops):
        of = [drop for drop in drops if drop.sentence == number]
        dropped, neutral = (
            [reading.log_probs for reading in model.read(rows, on_rows)]
            for rows in ([_row(drop.dropped) for drop in of], [_row(drop.neutral) for drop in of])
        )
        for drop, without_it, with_neutral in zip(of, dropped, neutral):
            whole = said[drop.question.number].log_probs
            own, control = (float(kl(ours, without_it)[0]) for ours in (whole, with_neutral))
            found.append(
                {
                    **drop.about(name),
                    "kl": own,
                    "kl_neutral": control,
                    "effect": own - control,
                    "top1_changed": bool(whole[0].argmax() != without_it[0].argmax()),
                }
            )
    return found


def wholes(drops: Sequence[Drop]) -> dict[int, Rendered]:
    """By question's number, the prompt with the whole system prompt."""
    return {drop.question.number: drop.whole for drop in drops}


def n_rows(drops: Sequence[Drop]) -> int:
    """How many rows run to measure them: each twice, and the whole ones."""
    return 2 * len(drops) + len(wholes(drops))


def _row(rendered: Rendered) -> Row:
    return Row(rendered.token_ids, said=(len(rendered.token_ids) - 1,))


ABOUT = (
    ("system", pa.string()),
    ("sentence", pa.int16()),
    ("text", pa.string()),
    ("sentence_tokens", pa.int32()),
    ("prompt", pa.int32()),
    ("id", pa.string()),
)
SCHEMA = pa.schema(
    [
        *ABOUT,
        ("kl", pa.float64()),
        ("kl_neutral", pa.float64()),
        ("effect", pa.float64()),
        ("top1_changed", pa.bool_()),
    ]
)
