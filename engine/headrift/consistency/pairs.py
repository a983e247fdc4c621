"""Pairs of prompts: a question alone (clean) and in a wrapper of words that should not matter (wrapped).

Both are rendered by the model's chat template with the same system prompt. Their common tokens are aligned by token id,
in at most three runs: the *head* (template and system prompt up to the user's text), the *core* (the question) and the
*tail* (the template after the user's text, up to where the answer begins). The rest of the wrapped prompt is the
*wrapper*. A token at the question's edge that the tokenizer merges with the wrapper is in no run: in the wrapped prompt
it counts as wrapper, and in the clean prompt it has no counterpart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from difflib import SequenceMatcher
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from headrift.consistency.answers import Key
from headrift.prompts import ChatRenderer, PromptError, RenderedPrompt, Span, chat_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# For pairs without a system prompt: short answers can be checked.
SYSTEM_PROMPT = "You answer questions. Give the answer in as few words as possible."
# A shorter common run is chance and not a core: in tokens, and as a fraction of the clean text's.
MIN_CORE_TOKENS, MIN_CORE_PART = 2, 0.25


@dataclass(frozen=True, slots=True)
class PairText:
    id: str
    question: str  # what both prompts ask; pairs may share it, and intervals resample questions as a whole
    clean: str
    wrapped: str
    core: str | None = None  # the text that both have in common; None to find it by tokens
    wrapped_at: int | None = None  # where the core begins in `wrapped`, in characters; None if it occurs only once
    system: str | None = None
    key: Key | None = None
    family: str | None = None
    wrapper: str | None = None
    hints: bool = False  # whether the wrapper names a wrong answer (`key.wrong`)
    source: str = ""  # file and row that the pair came from
    row: int = 0


@dataclass(frozen=True, slots=True)
class RejectedPair:
    id: str
    source: str
    row: int
    reason: str  # a code
    detail: str  # what is wrong and what to do


@dataclass(frozen=True, slots=True)
class CommonRun:
    """Common tokens: [clean, clean + length) of the clean prompt are [wrapped, wrapped + length) of the wrapped one."""

    clean: int
    wrapped: int
    length: int

    @property
    def clean_span(self) -> Span:
        return self.clean, self.clean + self.length

    @property
    def wrapped_span(self) -> Span:
        return self.wrapped, self.wrapped + self.length


@dataclass(frozen=True, slots=True)
class Pair:
    """A pair as token ids. Head, core, tail and wrapper cover the wrapped prompt, each token once."""

    id: str
    question: str
    family: str | None
    wrapper_name: str | None
    clean_ids: list[int] = field(repr=False)  # up to where the answer begins
    wrapped_ids: list[int] = field(repr=False)
    head: CommonRun  # may be empty
    core: CommonRun
    tail: CommonRun
    clean_system: Span  # tokens [start, end) of the system prompt
    wrapped_system: Span
    wrapper: tuple[Span, ...]  # ranges [start, end) in no run, before and after the core: one or two
    key: Key | None = None
    hints: bool = False

    @property
    def runs(self) -> tuple[CommonRun, CommonRun, CommonRun]:
        return self.head, self.core, self.tail

    @property
    def clean_positions(self) -> NDArray[np.int64]:
        """[n] positions of all common tokens in clean_ids, ascending."""
        return np.concatenate([np.arange(*run.clean_span) for run in self.runs])

    @property
    def wrapped_positions(self) -> NDArray[np.int64]:
        """[n] positions of the same tokens in wrapped_ids, ascending."""
        return np.concatenate([np.arange(*run.wrapped_span) for run in self.runs])

    @property
    def clean_edges(self) -> tuple[Span, ...]:
        """Ranges [start, end) of the clean prompt's tokens in no run, before and after the core."""
        return _gaps(self.head.length, self.core.clean_span, self.tail.clean)

    @property
    def first_query(self) -> int:
        """Index of the first common token after one that is not: by causality, those before it attend alike."""
        clean, wrapped = self.clean_positions, self.wrapped_positions
        index = np.arange(len(clean))
        # Before the first token that is not common, the n-th common token is the n-th token of both prompts.
        return int(np.flatnonzero((clean != index) | (wrapped != index))[0])

    @property
    def clean_queries(self) -> list[int]:
        """Positions of the query rows to compare, in clean_ids."""
        return self.clean_positions[self.first_query :].tolist()

    @property
    def wrapped_queries(self) -> list[int]:
        """The same in wrapped_ids."""
        return self.wrapped_positions[self.first_query :].tolist()


def fingerprint(pairs: Iterable[Pair]) -> str:
    return hashlib.sha256(json.dumps([asdict(pair) for pair in pairs]).encode()).hexdigest()


def _gaps(head_end: int, core: Span, tail_start: int) -> tuple[Span, ...]:
    """The ranges between the runs that are not empty."""
    gaps = ((head_end, core[0]), (core[1], tail_start))
    return tuple(span for span in gaps if span[1] > span[0])


class PairRenderer:
    """Renders PairTexts to Pairs with a model's tokenizer and chat template.

    Args:
        system_prompt: for pairs without one.
        max_tokens: the longest prompt; None for no limit.

    Raises:
        TokenizerError: the tokenizer or its chat template cannot be used.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, *, system_prompt: str = SYSTEM_PROMPT, max_tokens: int | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self._renderer = ChatRenderer(tokenizer, max_prompt_tokens=max_tokens)
        self._system_prompt = system_prompt
        # A question has many wrappers, and its clean prompt is rendered once.
        self._rendered = lru_cache(64)(lambda user, system: self._renderer.render(chat_messages(user, system)))

    def render(self, text: PairText) -> Pair:
        """Render and align a pair.

        Raises:
            PromptError: a prompt cannot be rendered (see ChatRenderer), or the two have no common core
                (`no_common_core`) or end (`no_common_end`), are the same (`identical_pair`), or do not contain the
                core's text exactly once (`core_not_found`).
        """
        if text.clean.strip() == text.wrapped.strip():
            raise PromptError("identical_pair", "`clean` and `wrapped` are the same text: add a wrapper")
        system = text.system if text.system is not None else self._system_prompt
        clean, wrapped = self._rendered(text.clean, system), self._rendered(text.wrapped, system)
        clean_core, wrapped_core = clean.regions["user"], wrapped.regions["user"]
        if text.core is not None:
            clean_core = self._core_span(clean, text.clean, text.core, None, "clean")
            wrapped_core = self._core_span(wrapped, text.wrapped, text.core, text.wrapped_at, "wrapped")
        if clean.token_ids == wrapped.token_ids:
            raise PromptError("identical_pair", "`clean` and `wrapped` have the same tokens: add a wrapper")
        core = _longest_run(clean, clean_core, wrapped, wrapped_core)
        head, tail = _head_and_tail(clean, wrapped)
        if not tail.length:
            raise PromptError("no_common_end", "the model's chat template ends the two prompts with different tokens")
        return Pair(
            id=text.id,
            question=text.question,
            family=text.family,
            wrapper_name=text.wrapper,
            clean_ids=clean.token_ids,
            wrapped_ids=wrapped.token_ids,
            head=head,
            core=core,
            tail=tail,
            clean_system=clean.regions["system"],
            wrapped_system=wrapped.regions["system"],
            wrapper=_gaps(head.length, core.wrapped_span, tail.wrapped),
            key=text.key,
            hints=text.hints,
        )

    def render_all(self, texts: Iterable[PairText]) -> Iterator[Pair | RejectedPair]:
        """Render pairs in order, or say why they cannot be used."""
        for text in texts:
            try:
                yield self.render(text)
            except PromptError as error:
                yield RejectedPair(text.id, text.source, text.row, error.reason, str(error))

    def _core_span(self, rendered: RenderedPrompt, user: str, core: str, at: int | None, name: str) -> Span:
        """The tokens that overlap the core's characters in the user's text."""
        if at is None and (times := user.count(core)) != 1:
            detail = f"the core {core[:60]!r} is {times} times in `{name}`; it must occur exactly once, word for word"
            raise PromptError("core_not_found", detail)
        at = user.index(core) if at is None else at
        text = rendered.text or ""
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        # The user's text begins in the first token that overlaps it; a template may have stripped it.
        blanks = len(user) - len(user.lstrip())
        begin = text.index(user.strip(), offsets[rendered.regions["user"][0]][0]) - blanks + at
        inside = [i for i, (start, end) in enumerate(offsets) if start < begin + len(core) and end > begin]
        return inside[0], inside[-1] + 1


def _longest_run(clean: RenderedPrompt, clean_span: Span, wrapped: RenderedPrompt, wrapped_span: Span) -> CommonRun:
    """The longest common run of tokens in these ranges. PromptError if it is too short for a core."""
    clean_ids, wrapped_ids = clean.token_ids[slice(*clean_span)], wrapped.token_ids[slice(*wrapped_span)]
    match = SequenceMatcher(None, clean_ids, wrapped_ids, autojunk=False).find_longest_match()
    if match.size < max(MIN_CORE_TOKENS, MIN_CORE_PART * len(clean_ids)):
        raise PromptError(
            "no_common_core",
            f"`clean` and `wrapped` have no question in common: their longest common run is {match.size} of the "
            f"{len(clean_ids)} tokens of the clean text, below {MIN_CORE_TOKENS} or {MIN_CORE_PART:.0%}; repeat the "
            "question word for word in both",
        )
    return CommonRun(clean_span[0] + match.a, wrapped_span[0] + match.b, match.size)


def _head_and_tail(clean: RenderedPrompt, wrapped: RenderedPrompt) -> tuple[CommonRun, CommonRun]:
    """The common tokens before the user's text, from the first on, and after it, from the last one backwards."""
    (clean_start, clean_end), (wrapped_start, wrapped_end) = clean.regions["user"], wrapped.regions["user"]
    head = _n_equal(clean.token_ids[:clean_start], wrapped.token_ids[:wrapped_start])
    tail = _n_equal(clean.token_ids[clean_end:][::-1], wrapped.token_ids[wrapped_end:][::-1])
    return CommonRun(0, 0, head), CommonRun(len(clean.token_ids) - tail, len(wrapped.token_ids) - tail, tail)


def _n_equal(one: Sequence[int], other: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
