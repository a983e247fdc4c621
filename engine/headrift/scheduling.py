"""The queue of prompts in front of the engine, and the cache of results for prompts that come again."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence

import numpy as np

from headrift.prepare import Prepared
from headrift.results import ScoreResult

# System prompts remembered as prefilled; a log with more than these in turn prefills some again.
_PRIMED = 1024
# What a remembered result takes beside its arrays, and for each token of its answer, in bytes.
_RESULT_BYTES, _TOKEN_BYTES = 1500, 40


class PromptQueue:
    """A queue of prompts, those with the same system prompt one after another, so that one prefill serves them all.

    group: False for plain order; prime: False to prefill nothing ahead; primed: prefixes that are prefilled already.
    """

    def __init__(self, *, group: bool = True, prime: bool = True, primed: set[bytes] | None = None) -> None:
        self._group, self._prime = group, prime
        self._primed = set() if primed is None else primed
        self._by_prefix: dict[bytes, deque[Prepared]] = {}
        self._current: bytes | None = None
        self._turn = 0  # prompts left before another system prompt's turn
        self._n = 0

    def __len__(self) -> int:
        return self._n

    def add(self, prepared: Prepared) -> None:
        self._by_prefix.setdefault(prepared.prefix if self._group else b"", deque()).append(prepared)
        self._n += 1

    def pop(self) -> Prepared:
        """Take the next prompt: of the system prompt whose turn it is, else of the one that has the oldest prompt."""
        if self._current not in self._by_prefix or not self._turn:
            self._current = min(self._by_prefix, key=lambda prefix: self._by_prefix[prefix][0].index)
            self._turn = self._n
        assert self._current is not None
        queue = self._by_prefix[self._current]
        prepared = queue.popleft()
        if not queue:
            del self._by_prefix[self._current]
        self._n -= 1
        self._turn -= 1
        return prepared

    def to_prime(self, prepared: Prepared) -> int:
        """How many tokens to prefill before a prompt is submitted, 0 for none: those that it and the queued ones with
        its system prompt begin with."""
        if not self._prime or prepared.prefix in self._primed:
            return 0
        queue = self._by_prefix.get(prepared.prefix if self._group else b"")
        if not queue or queue[0].prefix != prepared.prefix:
            return 0
        if len(self._primed) >= _PRIMED:
            self._primed.clear()
        self._primed.add(prepared.prefix)
        alike = (other.request.prompt_ids for other in queue if other.prefix == prepared.prefix)
        return min(_common_prefix(prepared.request.prompt_ids, ids) for ids in alike)


class ResultCache:
    """Results by their prompts' keys, the least recently used dropped when they take more than `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._results: OrderedDict[bytes, ScoreResult] = OrderedDict()
        self._bytes = 0

    def get(self, key: bytes) -> ScoreResult | None:
        result = self._results.get(key)
        if result is not None:
            self._results.move_to_end(key)
        return self._results.get(key)

    def add(self, key: bytes, result: ScoreResult) -> None:
        if key in self._results:
            return
        self._results[key] = result
        self._bytes += _size(result)
        while self._bytes > self.max_bytes:
            self._bytes -= _size(self._results.popitem(last=False)[1])


def _common_prefix(ids: Sequence[int], others: Sequence[int]) -> int:
    """The number of tokens that both begin with."""
    n = min(len(ids), len(others))
    differences = np.flatnonzero(np.asarray(ids[:n]) != np.asarray(others[:n]))
    return int(differences[0]) if len(differences) else n


def _size(result: ScoreResult) -> int:
    names = ("instability", "shares", "focus_heads", "logit_stats", "mass", "attention_entropy")
    arrays = (getattr(result, name) for name in names)
    n_bytes = sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))
    return n_bytes + _RESULT_BYTES + _TOKEN_BYTES * len(result.answer_ids)
