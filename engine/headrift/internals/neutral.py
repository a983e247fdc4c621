"""Neutral text of exactly so many tokens: what a system prompt is held against, since any text moves a model.

The text is the one that comes with headrift (safety_heads/neutral.txt): plain prose on tea, tides and the like, with no
instruction in it. Excerpts are made of token ids, so that their length is exact whatever the tokenizer.
"""

from __future__ import annotations

import re
from importlib.resources import files
from typing import Any

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def sentences(text: str) -> list[str]:
    """The sentences of a text, without the blanks between them; line breaks end one too."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [part for line in lines for part in _SENTENCE_END.split(line)]


class Neutral:
    """Excerpts of the neutral text by a model's tokenizer. starts: how many different ones there are of a length."""

    def __init__(self, tokenizer: Any) -> None:
        text = (files("headrift.safety_heads") / "neutral.txt").read_text(encoding="utf-8")
        parts = sentences(text)
        self._first, self._inner = ([_ids(tokenizer, blank + part) for part in parts] for blank in ("", " "))
        self._stop = _ids(tokenizer, "end.")[-1]
        self.starts = len(parts)

    def excerpt(self, n_tokens: int, start: int, inner: bool = False) -> list[int]:
        """`n_tokens` token ids from the beginning of sentence `start` on, round and round, the last a full stop.
        inner: they follow on a text, with a blank between."""
        at = start % self.starts
        ids = list((self._inner if inner else self._first)[at])
        while len(ids) < n_tokens:
            at = (at + 1) % self.starts
            ids += self._inner[at]
        return [*ids[: n_tokens - 1], self._stop]


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
