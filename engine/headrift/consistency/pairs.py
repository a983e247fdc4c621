"""Pairs of prompts: a question as it is (clean) and with words around it that should not matter (wrapped).

Both go through the model's chat template under the same system prompt. The tokens that they have in common are lined up
by token id, in at most three runs: the *head* (template and system prompt up to the user's text), the *core* (the
question) and the *tail* (the template after the user's text, which the answer follows on). What else the wrapped prompt
holds is the *wrapper*. A token at an edge of the question that comes out otherwise beside the wrapper is in no run: in
the wrapped prompt it counts as wrapper, in the clean one it has no counterpart.
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

# The system prompt of pairs that bring none: answers that can be checked are short ones.
SYSTEM_PROMPT = "You answer questions. Give the answer in as few words as possible."
# A common run that is shorter than this is no core but chance: tokens, and part of the clean text's.
MIN_CORE_TOKENS, MIN_CORE_PART = 2, 0.25


@dataclass(frozen=True, slots=True)
class PairText:
    """A pair as texts. id: of the pair; question: of what both ask, which several pairs can have in common (intervals
    draw questions whole). core: the part of both texts that they have in common, None where it is to be found by
    tokens. wrapped_at: where in `wrapped` the core begins, in characters; None where it stands there only once.
    hints: whether the wrapper names a wrong answer (`key.wrong`). source, row: where the pair came from."""

    id: str
    question: str
    clean: str
    wrapped: str
    core: str | None = None
    wrapped_at: int | None = None
    system: str | None = None
    key: Key | None = None
    family: str | None = None
    wrapper: str | None = None
    hints: bool = False
    source: str = ""
    row: int = 0


@dataclass(frozen=True, slots=True)
class RejectedPair:
    """A pair that cannot be used: `reason` is a code, `detail` says what is wrong and what to do."""

    id: str
    source: str
    row: int
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens that both prompts have: clean [clean, clean + length) are wrapped [wrapped, wrapped + length)."""

    clean: int
    wrapped: int
    length: int


@dataclass(frozen=True, slots=True)
class Pair:
    """A pair as the model gets it.

    clean_ids, wrapped_ids: token ids of the two prompts, C and W of them, up to where the answer begins.
    head, core, tail: the runs of tokens in common, in this order and apart; head may be empty, core and tail are not.
    clean_system, wrapped_system: the system prompt's tokens [start, end).
    wrapper: ranges [start, end) of the wrapped prompt's tokens that are in no run: before and after the core, one or
    two. Head, core, tail and wrapper cover the wrapped prompt, each token once.
    key: how to tell whether an answer is right, None where that is not known. The rest as in PairText.
    """

    id: str
    question: str
    family: str | None
    wrapper_name: str | None
    clean_ids: list[int] = field(repr=False)
    wrapped_ids: list[int] = field(repr=False)
    head: Run
    core: Run
    tail: Run
    clean_system: Span
    wrapped_system: Span
    wrapper: tuple[Span, ...]
    key: Key | None = None
    hints: bool = False

    @property
    def runs(self) -> tuple[Run, Run, Run]:
        """The tokens in common: head, core, tail."""
        return self.head, self.core, self.tail

    @property
    def clean_positions(self) -> NDArray[np.int64]:
        """[n] places in clean_ids of all tokens in common, ascending: clean_ids[clean_positions[i]] is
        wrapped_ids[wrapped_positions[i]]."""
        return _positions((run.clean, run.length) for run in self.runs)

    @property
    def wrapped_positions(self) -> NDArray[np.int64]:
        """[n] places in wrapped_ids of the same tokens, ascending."""
        return _positions((run.wrapped, run.length) for run in self.runs)

    @property
    def clean_core(self) -> Span:
        """The core's tokens [start, end) in clean_ids."""
        return self.core.clean, self.core.clean + self.core.length

    @property
    def wrapped_core(self) -> Span:
        """The core's tokens [start, end) in wrapped_ids."""
        return self.core.wrapped, self.core.wrapped + self.core.length

    @property
    def clean_edges(self) -> tuple[Span, ...]:
        """Ranges [start, end) of the clean prompt's tokens that are in no run: before and after the core, if any."""
        return _apart(self.head.length, self.clean_core, self.tail.clean)

    @property
    def first_query(self) -> int:
        """The first of the n tokens in common that stands behind a token that the prompts do not have in common. All
        before it attend alike in both, by causality: i >= first_query are the query rows worth comparing."""
        clean, wrapped = self.clean_positions, self.wrapped_positions
        place = np.arange(len(clean))
        # Before the first token not in common, the n-th token in common is the n-th token of both.
        return int(np.flatnonzero((clean != place) | (wrapped != place))[0])

    @property
    def clean_queries(self) -> list[int]:
        """Places in clean_ids of the query rows worth comparing."""
        return self.clean_positions[self.first_query :].tolist()

    @property
    def wrapped_queries(self) -> list[int]:
        """Places in wrapped_ids of the same."""
        return self.wrapped_positions[self.first_query :].tolist()


def fingerprint(pairs: Iterable[Pair]) -> str:
    """What tells these pairs from others: all that they hold."""
    return hashlib.sha256(json.dumps([asdict(pair) for pair in pairs]).encode()).hexdigest()


def _apart(head_end: int, core: Span, tail_start: int) -> tuple[Span, ...]:
    """What lies between the runs."""
    around = ((head_end, core[0]), (core[1], tail_start))
    return tuple(span for span in around if span[1] > span[0])


def _positions(runs: Iterable[tuple[int, int]]) -> NDArray[np.int64]:
    return np.concatenate([np.arange(start, start + length) for start, length in runs])


class PairRenderer:
    """Makes Pairs of PairTexts with a model's tokenizer and chat template; TokenizerError where they cannot be used.

    system_prompt: of pairs that bring none. max_tokens: the longest prompt, None for any.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        system_prompt: str = SYSTEM_PROMPT,
        max_tokens: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self._renderer = ChatRenderer(tokenizer, max_prompt_tokens=max_tokens)
        self._system_prompt = system_prompt
        # A question comes in many wrappers: its clean prompt is rendered once.
        self._rendered = lru_cache(maxsize=64)(self._render_one)

    def render(self, text: PairText) -> Pair:
        """PromptError where a prompt cannot be rendered (see ChatRenderer), or where the two have no core in common
        (`no_common_core`) or no end (`no_common_end`), are the same (`identical_pair`), or hold the core's text not
        once (`core_not_found`)."""
        if text.clean.strip() == text.wrapped.strip():
            raise PromptError("identical_pair", "`clean` and `wrapped` are the same text: there is no wrapper")
        system = text.system if text.system is not None else self._system_prompt
        clean, wrapped = self._rendered(text.clean, system), self._rendered(text.wrapped, system)
        clean_core, wrapped_core = clean.regions["user"], wrapped.regions["user"]
        if text.core is not None:
            clean_core = self._tokens_of(clean, text.clean, text.core, None, "clean")
            wrapped_core = self._tokens_of(wrapped, text.wrapped, text.core, text.wrapped_at, "wrapped")
        if clean.token_ids == wrapped.token_ids:
            raise PromptError("identical_pair", "`clean` and `wrapped` are the same to the model: there is no wrapper")
        core = _longest_run(clean, clean_core, wrapped, wrapped_core)
        head, tail = _head(clean, wrapped), _tail(clean, wrapped)
        if not tail.length:
            raise PromptError(
                "no_common_end",
                "the model's chat template ends the two prompts with other tokens: nothing is alike there",
            )
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
            wrapper=_apart(head.length, (core.wrapped, core.wrapped + core.length), tail.wrapped),
            key=text.key,
            hints=text.hints,
        )

    def render_all(self, texts: Iterable[PairText]) -> Iterator[Pair | RejectedPair]:
        """Each pair, or why it cannot be used, in order."""
        for text in texts:
            try:
                yield self.render(text)
            except PromptError as error:
                yield RejectedPair(text.id, text.source, text.row, error.reason, str(error))

    def _render_one(self, user: str, system: str) -> RenderedPrompt:
        return self._renderer.render(chat_messages(user, system))

    def _tokens_of(self, rendered: RenderedPrompt, user: str, core: str, at: int | None, name: str) -> Span:
        """The tokens that overlap the core's characters within the user's text."""
        if at is None:
            times = user.count(core)
            if times != 1:
                raise PromptError(
                    "core_not_found",
                    f"the core {core[:60]!r} stands {times} times in `{name}`; it must be there exactly once, word for "
                    "word",
                )
            at = user.index(core)
        text = rendered.text or ""
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        # The user's text begins within the first token that overlaps it; a template may have trimmed its blanks.
        blanks = len(user) - len(user.lstrip())
        begin = text.index(user.strip(), offsets[rendered.regions["user"][0]][0]) - blanks + at
        inside = [i for i, (start, end) in enumerate(offsets) if start < begin + len(core) and end > begin]
        return inside[0], inside[-1] + 1


def _longest_run(clean: RenderedPrompt, clean_in: Span, wrapped: RenderedPrompt, wrapped_in: Span) -> Run:
    """The longest run of tokens that both have within these ranges. PromptError where it is too short to be a core."""
    ours, theirs = clean.token_ids[slice(*clean_in)], wrapped.token_ids[slice(*wrapped_in)]
    found = SequenceMatcher(None, ours, theirs, autojunk=False).find_longest_match()
    if found.size < max(MIN_CORE_TOKENS, MIN_CORE_PART * len(ours)):
        raise PromptError(
            "no_common_core",
            f"`clean` and `wrapped` have no question in common: their longest common run is {found.size} of the "
            f"{len(ours)} tokens of the clean text, and at least {MIN_CORE_TOKENS} and {MIN_CORE_PART:.0%} are needed; "
            "repeat the question word for word in both",
        )
    return Run(clean_in[0] + found.a, wrapped_in[0] + found.b, found.size)


def _head(clean: RenderedPrompt, wrapped: RenderedPrompt) -> Run:
    """The tokens before the user's text, as far as they are the same."""
    ends = clean.regions["user"][0], wrapped.regions["user"][0]
    return Run(0, 0, _n_alike(clean.token_ids[: ends[0]], wrapped.token_ids[: ends[1]]))


def _tail(clean: RenderedPrompt, wrapped: RenderedPrompt) -> Run:
    """The tokens behind the user's text, as far as they are the same, from the last one back."""
    starts = clean.regions["user"][1], wrapped.regions["user"][1]
    n = _n_alike(clean.token_ids[starts[0] :][::-1], wrapped.token_ids[starts[1] :][::-1])
    return Run(len(clean.token_ids) - n, len(wrapped.token_ids) - n, n)


def _n_alike(ours: Sequence[int], theirs: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
