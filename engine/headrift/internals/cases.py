"""The prompts to compare: a question alone, under a system prompt, and under neutral text of as many tokens.

Everything here happens before the model is loaded. Some chat templates add a system prompt of their own if none is
given (SmolLM2 and Qwen2.5 do). With such a model "without a system prompt" is an empty system message, so that the
model's default is not what everything is compared with.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from headrift.corpus import sources
from headrift.corpus.readers import Reader
from headrift.corpus.rows import BadRow
from headrift.corpus.sources import InputError
from headrift.prompts import ChatRenderer, PromptError, Span, chat_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# The name of a system prompt of neutral text, which every run has: beyond the neutral control it must show no effect.
CHECK = "(neutral text)"
_CHECK_TEXT = (
    "The tides follow the moon. Its pull lifts the sea a little, so that most coasts see high water twice a day."
)
_STRIDE = 7  # sentences between the neutral texts of a prompt's system prompts
_GAP = "\n\n"
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True, slots=True)
class Rendering:
    """A prompt as the model gets it. Spans are of tokens, [start, end)."""

    token_ids: list[int] = field(repr=False)
    question: Span
    system: Span = (0, 0)  # empty without a system prompt

    @property
    def system_tokens(self) -> int:
        """The length of the system prompt."""
        return self.system[1] - self.system[0]

    def with_tokens(self, span: Span, ids: Sequence[int]) -> Rendering:
        """Replace the tokens of a span by as many others."""
        start, end = span
        assert len(ids) == end - start
        return replace(self, token_ids=[*self.token_ids[:start], *ids, *self.token_ids[end:]])


class Renderer:
    """Renders questions with a model's chat template. TokenizerError if it cannot be used."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, max_tokens: int | None = None) -> None:
        self._tokenizer, self._max_tokens = tokenizer, max_tokens
        self._chats = ChatRenderer(tokenizer, max_prompt_tokens=max_tokens)
        self._mark = f"headrift{secrets.token_hex(8)}"
        self._no_system: str | None = None  # the system message of a prompt without a system prompt
        self.default = self._find_default()  # the system prompt that the template adds if none is given
        self.baseline = "no system message"  # how a prompt without a system prompt is rendered
        if self.default is not None and self.default in self._apply("x", ""):
            self.baseline = "the template's own system prompt, which it adds even for an empty one"
        elif self.default is not None:
            self._no_system = ""
            self.baseline = "an empty system message, since the template would add a system prompt of its own"

    def alone(self, question: str) -> Rendering:
        """Render the question without a system prompt. PromptError as from ChatRenderer, here and below."""
        return self.in_user_turn(question)

    def with_system(self, question: str, system: str) -> Rendering:
        """Render the question under a system prompt."""
        return self.with_parts(question, system, ())[0]

    def with_parts(self, question: str, system: str, parts: Sequence[Span]) -> tuple[Rendering, list[Span]]:
        """Render the question under a system prompt, and find the tokens of its parts, characters [start, end)."""
        chat = self._chats.render(chat_messages(question, system))
        rendering = Rendering(chat.token_ids, chat.regions["user"], chat.regions["system"])
        if not parts:
            return rendering, []
        text, offsets = chat.text or "", self._tokenize(chat.text or "")[1]
        blanks = len(system) - len(system.lstrip())
        # The text begins within the first token that overlaps it.
        begin = text.index(system.strip(), offsets[chat.regions["system"][0]][0]) - blanks
        return rendering, [_overlapping(offsets, begin + start, begin + end) for start, end in parts]

    def in_user_turn(self, question: str, before: str = "", after: str = "") -> Rendering:
        """Render a text, such as a system prompt's, in the user's turn around the question."""
        before, after = before + _GAP if before else "", _GAP + after if after else ""
        question = question.strip()
        if not question:
            raise PromptError("no_user_message", "the prompt is empty: there is nothing to answer")
        content = before + question + after
        text = self._apply(content, self._no_system)
        head, *tails = self._apply(self._mark, self._no_system).split(self._mark)
        if len(tails) != 1 or text != head + content + tails[0]:
            raise PromptError("span_not_found", "the model's chat template changes the user's text")
        ids, offsets = self._tokenize(text)
        if self._max_tokens is not None and len(ids) > self._max_tokens:
            detail = f"the prompt has {len(ids)} tokens and at most {self._max_tokens} fit; shorten it"
            raise PromptError("prompt_too_long", detail)
        start = len(head) + len(before)
        return Rendering(ids, _overlapping(offsets, start, start + len(question)))

    def _tokenize(self, text: str) -> tuple[list[int], list[Span]]:
        """Token ids, and the characters of each."""
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return encoded["input_ids"], encoded["offset_mapping"]

    def _apply(self, content: str, system: str | None) -> str:
        """Render a user message without tokenizing it."""
        messages = chat_messages(content, system)
        try:
            text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError("invalid_text", f"not valid Unicode text: {error}; repair its encoding") from error
        except Exception as error:  # a template is a program: it can raise anything
            raise PromptError("template_rejected", f"the model's chat template rejects it: {error}"[:300]) from error
        return text

    def _find_default(self) -> str | None:
        alone = self._apply("x", None)
        try:
            around = self._apply("x", self._mark).split(self._mark)
        except PromptError:  # it takes no system message
            return None
        if len(around) != 2 or not (alone.startswith(around[0]) and alone.endswith(around[1])):
            return None
        return alone[len(around[0]) : len(alone) - len(around[1])] or None


def _overlapping(offsets: Sequence[Span], start: int, end: int) -> Span:
    """The tokens whose characters overlap [start, end). PromptError if none do."""
    inside = [i for i, (first, last) in enumerate(offsets) if first < end and last > start and last > first]
    if not inside:
        raise PromptError("span_not_found", "the tokenizer makes no token of a text that is to be compared")
    return inside[0], inside[-1] + 1


class Alignment(NamedTuple):
    """Tokens of the question that two renderings share: [base, base + length) of one, [other, ...) of the other."""

    base: int
    other: int
    length: int


def align(base: Rendering, other: Rendering) -> Alignment:
    """Find the longest run of the question's tokens that both renderings have. PromptError if there is none."""
    base_ids, other_ids = (rendering.token_ids[slice(*rendering.question)] for rendering in (base, other))
    match = SequenceMatcher(None, base_ids, other_ids, autojunk=False).find_longest_match()
    if not match.size:
        raise PromptError("no_common_tokens", "the question has other tokens in each rendering: nothing to compare")
    return Alignment(base.question[0] + match.a, other.question[0] + match.b, match.size)


class NeutralText:
    """Excerpts of exactly n tokens of a text without instructions (safety_heads/neutral.txt: tea, tides, ...)."""

    def __init__(self, tokenizer: Any) -> None:
        text = (files("headrift.safety_heads") / "neutral.txt").read_text(encoding="utf-8")
        parts = split_sentences(text)
        texts = (*parts, *(f" {part}" for part in parts), "end.")
        ids: list[list[int]] = [tokenizer(one, add_special_tokens=False)["input_ids"] for one in texts]
        self._first, self._inner, self._stop = ids[: len(parts)], ids[len(parts) : -1], ids[-1][-1]
        self.starts = len(parts)  # how many different excerpts there are of a length

    def excerpt(self, n_tokens: int, start: int, inner: bool = False) -> list[int]:
        """Return the token ids of an excerpt, which ends with a full stop.

        Args:
            start: The sentence to begin with; after the last one the text starts again.
            inner: The excerpt continues a text, so it begins with a blank.
        """
        ids = list((self._inner if inner else self._first)[start % self.starts])
        while len(ids) < n_tokens:
            start += 1
            ids += self._inner[start % self.starts]
        return [*ids[: n_tokens - 1], self._stop]


def split_sentences(text: str) -> list[str]:
    """Split a text into sentences, without the blanks between them; a line break ends one too."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [part for line in lines for part in _SENTENCE_END.split(line)]


@dataclass(frozen=True, slots=True)
class Reject:
    """An input row, or a question under one system prompt, that cannot be compared; a row of rejects.parquet."""

    source: str
    row: int
    id: str
    system: str | None
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, and its rendering without a system prompt."""

    number: int
    id: str
    category: str
    text: str = field(repr=False)
    source: str
    row: int
    base: Rendering = field(repr=False)

    def record(self, system: str) -> dict[str, Any]:
        """The columns that all records of this question under a system prompt have."""
        return {"system": system, "prompt": self.number, "id": self.id}

    def reject(self, system: str, error: PromptError) -> Reject:
        """The reject of this question under a system prompt."""
        return Reject(self.source, self.row, self.id, system, error.reason, str(error))


class SystemPrompt(NamedTuple):
    """A system prompt, named after its file."""

    name: str
    text: str


class Case(NamedTuple):
    """A question under a system prompt, and under neutral text of as many tokens, both aligned with it alone."""

    question: Question
    system: Rendering
    neutral: Rendering
    system_alignment: Alignment
    neutral_alignment: Alignment


def read_system_prompts(folder: Path) -> list[SystemPrompt]:
    """Read a folder's .txt files, one system prompt each, sorted by name. InputError if one cannot be used."""
    if not folder.is_dir():
        raise InputError(f"--system-prompts {folder} is not a folder: name one with a .txt file for each system prompt")
    prompts = []
    for path in sorted(folder.glob("*.txt")):
        try:
            text = path.read_text(encoding="utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 text: convert it to UTF-8") from error
        if not text:
            raise InputError(f"{path} is empty: write a system prompt into it, or remove it")
        prompts.append(SystemPrompt(path.stem, text))
    if not prompts:
        raise InputError(f"--system-prompts {folder} has no .txt file: write each system prompt into its own")
    return prompts


def read_questions(
    inputs: Sequence[str], renderer: Renderer, limit: int | None = None
) -> tuple[list[Question], list[Reject]]:
    """Read the first `limit` usable prompts, and the rows before that are not usable. InputError as from Reader."""
    questions: list[Question] = []
    rejects: list[Reject] = []
    ids: set[str] = set()

    def take_id(name: str) -> bool:
        new = name not in ids
        ids.add(name)
        return new

    for row in Reader(sources.find(inputs)).rows(take_id=take_id):
        if limit is not None and len(questions) == limit:
            break
        try:
            if isinstance(row, BadRow):
                raise PromptError(row.reason, row.detail)
            text = row.prompt.prompt
            if text is None:
                raise PromptError("no_prompt", "the row has no `prompt`: only single user messages are compared")
            base = renderer.alone(text)
        except PromptError as error:
            rejects.append(Reject(row.source, row.row, row.id, None, error.reason, str(error)))
            continue
        questions.append(Question(len(questions), row.id, row.category or "", text, row.source, row.row, base))
    return questions, rejects


def make_cases(
    questions: Sequence[Question], system: SystemPrompt | None, number: int, renderer: Renderer, neutral: NeutralText
) -> Iterator[Case | Reject]:
    """Render each question under a system prompt, None for CHECK. Its number decides which neutral texts it gets."""
    name, text = (CHECK, _CHECK_TEXT) if system is None else system
    for question in questions:
        try:
            rendering = renderer.with_system(question.text, text)
            n, start = rendering.system_tokens, question.number + _STRIDE * number
            control = rendering.with_tokens(rendering.system, neutral.excerpt(n, start))
            if system is None:
                other = neutral.excerpt(n, start + neutral.starts // 2)
                rendering = rendering.with_tokens(rendering.system, other)
            yield Case(question, rendering, control, *(align(question.base, one) for one in (rendering, control)))
        except PromptError as error:
            yield question.reject(name, error)
