"""One question in several renderings: without a system prompt, with one, and with its text in the user's turn.

Some chat templates put in a system prompt of their own where none is given (SmolLM2 and Qwen2.5 do). With such a model
"without" is an empty system message, so that the default is not what everything is compared with.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

from headrift.prompts import ChatRenderer, PromptError, Span, chat_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_GAP = "\n\n"


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt as the model gets it: its token ids, and which of them [start, end) are the question's and the system
    text's (None: it has none)."""

    token_ids: list[int] = field(repr=False)
    question: Span
    system: Span | None = None

    def with_system_ids(self, ids: Sequence[int]) -> Rendered:
        """The same with other tokens, as many, in place of the system text's."""
        assert self.system is not None
        start, end = self.system
        assert len(ids) == end - start
        return Rendered([*self.token_ids[:start], *ids, *self.token_ids[end:]], self.question, self.system)


class Renderer:
    """Renders questions with a model's chat template; TokenizerError where it cannot be used.

    default: the system prompt that the template puts in where none is given, None where it puts in none; baseline: how
    a prompt without a system prompt is rendered, in words. max_tokens: the longest prompt, None for any.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, max_tokens: int | None = None) -> None:
        self._tokenizer, self._max_tokens = tokenizer, max_tokens
        self._chats = ChatRenderer(tokenizer, max_prompt_tokens=max_tokens)
        self._mark = f"headrift{secrets.token_hex(8)}"
        self._before: list[dict[str, str]] = []
        self.default = self._default()
        self.baseline = "no system message"
        if self.default is not None:
            empty = {"role": "system", "content": ""}
            if self.default in self._apply([empty, _user("x")]):
                self.baseline = "the template's own system prompt, which it puts in even for an empty one"
            else:
                self._before = [empty]
                self.baseline = "an empty system message, since the template would put in a system prompt of its own"

    def without(self, question: str) -> Rendered:
        """The question alone. PromptError as ChatRenderer has it."""
        return self._in_user_turn("", question, "")

    def with_system(self, question: str, system: str) -> Rendered:
        """The question under a system prompt. PromptError as ChatRenderer has it."""
        rendered = self._chats.render(chat_messages(question, system))
        return Rendered(rendered.token_ids, rendered.regions["user"], rendered.regions["system"])

    def with_parts(self, question: str, system: str, parts: Sequence[Span]) -> tuple[Rendered, list[Span]]:
        """`with_system`, and which of its tokens these characters [start, end) of the system prompt are in. PromptError
        as there, and where the template has trimmed a part away."""
        rendered = self._chats.render(chat_messages(question, system))
        text, trimmed = rendered.text or "", system.strip()
        offsets = self._offsets(text)[1]
        blanks = len(system) - len(system.lstrip())
        # The text begins within the first token that overlaps it.
        begin = text.index(trimmed, offsets[rendered.regions["system"][0]][0]) - blanks
        spans = [_overlapping(offsets, begin + start, begin + end) for start, end in parts]
        return Rendered(rendered.token_ids, rendered.regions["user"], rendered.regions["system"]), spans

    def before_question(self, question: str, system: str) -> Rendered:
        """No system prompt, but its text in the user's turn, before the question."""
        return self._in_user_turn(system + _GAP, question, "")

    def behind_question(self, question: str, system: str) -> Rendered:
        """No system prompt, but its text in the user's turn, behind the question."""
        return self._in_user_turn("", question, _GAP + system)

    def _in_user_turn(self, before: str, question: str, behind: str) -> Rendered:
        question = question.strip()
        if not question:
            raise PromptError("no_user_message", "the prompt is empty: there is nothing to answer")
        content = before + question + behind
        text = self._apply([*self._before, _user(content)])
        head, *tails = self._apply([*self._before, _user(self._mark)]).split(self._mark)
        if len(tails) != 1 or text != head + content + tails[0]:
            raise PromptError(
                "span_not_found", "the model's chat template changes the user's text: which tokens are the question's?"
            )
        ids, offsets = self._offsets(text)
        if self._max_tokens is not None and len(ids) > self._max_tokens:
            raise PromptError(
                "prompt_too_long", f"the prompt has {len(ids)} tokens and at most {self._max_tokens} fit; shorten it"
            )
        start = len(head) + len(before)
        return Rendered(ids, _overlapping(offsets, start, start + len(question)))

    def _offsets(self, text: str) -> tuple[list[int], list[Span]]:
        """Token ids, and the characters of each."""
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return encoded["input_ids"], encoded["offset_mapping"]

    def _apply(self, messages: list[dict[str, str]]) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError("invalid_text", f"not valid Unicode text: {error}; repair its encoding") from error
        except Exception as error:  # a template is a program: it can raise anything
            raise PromptError("template_rejected", f"the model's chat template rejects it: {error}"[:300]) from error
        return text

    def _default(self) -> str | None:
        alone = self._apply([_user("x")])
        try:
            around = self._apply([{"role": "system", "content": self._mark}, _user("x")]).split(self._mark)
        except PromptError:  # it takes no system message
            return None
        if len(around) != 2 or not (alone.startswith(around[0]) and alone.endswith(around[1])):
            return None
        return alone[len(around[0]) : len(alone) - len(around[1])] or None


@dataclass(frozen=True, slots=True)
class Aligned:
    """Question tokens that two renderings have in common, id by id: [ours, ours + length) are [theirs, ...)."""

    ours: int
    theirs: int
    length: int


def aligned(ours: Rendered, theirs: Rendered) -> Aligned:
    """The longest run of the question's tokens that both have. PromptError where there is none."""
    mine, other = (of.token_ids[slice(*of.question)] for of in (ours, theirs))
    found = SequenceMatcher(None, mine, other, autojunk=False).find_longest_match()
    if not found.size:
        raise PromptError(
            "no_common_tokens", "the question's tokens come out otherwise in each rendering: nothing can be compared"
        )
    return Aligned(ours.question[0] + found.a, theirs.question[0] + found.b, found.size)


def _overlapping(offsets: Sequence[Span], start: int, end: int) -> Span:
    """The tokens whose characters overlap [start, end). PromptError where none do."""
    inside = [i for i, (first, last) in enumerate(offsets) if first < end and last > start and last > first]
    if not inside:
        raise PromptError("span_not_found", "the tokenizer makes no token of a text that is to be compared")
    return inside[0], inside[-1] + 1


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}
