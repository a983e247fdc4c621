"""The wrappers that come with headrift, in families, and the questions that they are put around.

wrappers.jsonl, beside this module, holds them: `text` has the place of the question and, in those that hint at a wrong
answer, of that answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from headrift.consistency.answers import LETTERS, Key
from headrift.consistency.pairs import PairText

_QUESTION, _WRONG = "{question}", "{wrong}"


@dataclass(frozen=True, slots=True)
class Wrapper:
    """Words around a question. text: with {question} once, and {wrong} where it hints at a wrong answer."""

    name: str
    family: str
    text: str

    @property
    def hints(self) -> bool:
        """Whether it names the wrong answer."""
        return _WRONG in self.text

    def around(self, question: str, wrong: str) -> tuple[str, int]:
        """The wrapped question, and where the question begins in it."""
        before, after = (part.replace(_WRONG, wrong) for part in self.text.split(_QUESTION))
        return before + question + after, len(before)


@dataclass(frozen=True, slots=True)
class Question:
    """A question with a checkable answer. topic: of what it is one, None if the file does not say."""

    id: str
    text: str
    key: Key
    topic: str | None = None
    system: str | None = None
    source: str = ""
    row: int = 0

    @property
    def asked(self) -> str:
        """The question as it is put to the model: with its choices, a line each."""
        return "\n".join([self.text, *(f"{letter}) {text}" for letter, text in zip(LETTERS, self.key.choices))])


@cache
def library() -> tuple[Wrapper, ...]:
    """All wrappers that come with headrift."""
    lines = Path(__file__).with_name("wrappers.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(Wrapper(**json.loads(line)) for line in lines)


def families(wrappers: Iterable[Wrapper]) -> tuple[str, ...]:
    """The families of these wrappers, each once, in order."""
    return tuple(dict.fromkeys(wrapper.family for wrapper in wrappers))


def wrap(questions: Sequence[Question], wrappers: Sequence[Wrapper] | None = None) -> list[PairText]:
    """Each question with each of these wrappers (None: the library's)."""
    wrappers = library() if wrappers is None else wrappers
    return [_pair(question, wrapper) for question in questions for wrapper in wrappers]


def _pair(question: Question, wrapper: Wrapper) -> PairText:
    wrapped, at = wrapper.around(question.asked, question.key.wrong or "")
    return PairText(
        id=f"{question.id}:{wrapper.name}",
        question=question.id,
        clean=question.asked,
        wrapped=wrapped,
        core=question.asked,
        wrapped_at=at,
        system=question.system,
        key=question.key,
        family=wrapper.family,
        wrapper=wrapper.name,
        hints=wrapper.hints,
        source=question.source,
        row=question.row,
    )
