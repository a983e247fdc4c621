"""What is compared with what: prompts and system prompts read, rendered and lined up, before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from headrift.corpus import sources
from headrift.corpus.readers import Reader
from headrift.corpus.rows import BadRow
from headrift.corpus.sources import InputError
from headrift.internals.neutral import Neutral
from headrift.internals.renderings import Aligned, Rendered, Renderer, aligned
from headrift.prompts import PromptError

# A system prompt of neutral text, in every run: against the neutral control it must show no effect.
CHECK = "(neutral text)"
_CHECK_TEXT = (
    "The tides follow the moon. Its pull lifts the sea a little, so that most coasts see high water twice a day."
)
# Neutral texts of a prompt's system prompts begin so many sentences apart.
_STRIDE = 7


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt: its number, its id and category as the file has them, its text, and it alone in the chat template."""

    number: int
    id: str
    category: str
    text: str = field(repr=False)
    source: str = ""
    row: int = 0
    base: Rendered = field(default_factory=lambda: Rendered([], (0, 0)), repr=False)


@dataclass(frozen=True, slots=True)
class SystemPrompt:
    """A system prompt by its file's name."""

    name: str
    text: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Case:
    """A question under a system prompt, and under neutral text of as many tokens. in_system, in_neutral: the question's
    tokens in common with the question alone (`ours`)."""

    question: Question
    system: Rendered
    neutral: Rendered
    in_system: Aligned
    in_neutral: Aligned

    @property
    def system_tokens(self) -> int:
        assert self.system.system is not None
        return self.system.system[1] - self.system.system[0]


@dataclass(frozen=True, slots=True)
class Reject:
    """A prompt, or a prompt under one system prompt, that nothing is said of: a code, and what to do."""

    source: str
    row: int
    id: str
    system: str | None
    reason: str
    detail: str


def read_system_prompts(folder: Path) -> list[SystemPrompt]:
    """The texts of a folder's .txt files, one each, by name. InputError where there is none or one is no text."""
    if not folder.is_dir():
        raise InputError(f"--system-prompts {folder} is no folder: name one with a .txt file for each system prompt")
    found = []
    for path in sorted(folder.glob("*.txt")):
        try:
            text = path.read_text(encoding="utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 text: convert it to UTF-8") from error
        if not text:
            raise InputError(f"{path} is empty: write a system prompt into it, or remove it")
        found.append(SystemPrompt(path.stem, text))
    if not found:
        raise InputError(f"--system-prompts {folder} has no .txt file: put each system prompt into one of its own")
    return found


def read_questions(
    inputs: Sequence[str], renderer: Renderer, limit: int | None = None
) -> tuple[list[Question], list[Reject]]:
    """The first `limit` prompts that can be used, and the rows before that cannot. InputError as Reader has it."""
    found: list[Question] = []
    rejected: list[Reject] = []
    ids: set[str] = set()

    def take_id(name: str) -> bool:
        new = name not in ids
        ids.add(name)
        return new

    for row in Reader(sources.find(inputs)).rows(take_id=take_id):
        if limit is not None and len(found) == limit:
            break
        if isinstance(row, BadRow):
            rejected.append(Reject(row.source, row.row, row.id, None, row.reason, row.detail))
            continue
        try:
            text = row.prompt.prompt
            if text is None:
                raise PromptError("no_prompt", "the row has no `prompt`: only single user messages are compared here")
            base = renderer.without(text)
        except PromptError as error:
            rejected.append(Reject(row.source, row.row, row.id, None, error.reason, str(error)))
            continue
        found.append(Question(len(found), row.id, row.category or "", text, row.source, row.row, base))
    return found, rejected


def make_cases(
    questions: Sequence[Question], system: SystemPrompt | None, number: int, renderer: Renderer, neutral: Neutral
) -> Iterator[Case | Reject]:
    """Each question under a system prompt, or why not. system: None for CHECK. number: the system prompt's own."""
    for question in questions:
        try:
            text = _CHECK_TEXT if system is None else system.text
            rendered = renderer.with_system(question.text, text)
            assert rendered.system is not None
            n_tokens = rendered.system[1] - rendered.system[0]
            start = question.number + _STRIDE * number
            control = rendered.with_system_ids(neutral.excerpt(n_tokens, start))
            if system is None:
                rendered = rendered.with_system_ids(neutral.excerpt(n_tokens, start + neutral.starts // 2))
            in_system, in_neutral = (aligned(question.base, other) for other in (rendered, control))
        except PromptError as error:
            name = CHECK if system is None else system.name
            yield Reject(question.source, question.row, question.id, name, error.reason, str(error))
            continue
        yield Case(question, rendered, control, in_system, in_neutral)
