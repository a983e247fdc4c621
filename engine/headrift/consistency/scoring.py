"""Pairs through the engine: the distance of the wrapped prompt's attention from the clean one's, and the answers.

A clean prompt answers greedily, once for all its pairs, and its attention rows at steps 0..N stay on the device. Each
wrapped prompt answers greedily too, for its own answer and its own signals. Which rows are compared with the clean ones
on the device (`vllm_plugin.instruments.attention_rows`) depends on ANSWERS:

- "clean" (default): those of the wrapped prompt with the *clean* answer replayed after it. Both rows of a step are then
  of the same token, and the wrapper alone makes the distance.
- "own": those of the wrapped prompt's own answer. Once the answers differ, so do the queries, and the distance contains
  the effect of the other words too. At step 0 both are the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from headrift import signal
from headrift.consistency.pairs import Pair
from headrift.probed_engine import ProbedEngine
from headrift.prompts import Span
from headrift.requests import Finished, ProbeRequest, Recording

ANSWERS = ("clean", "own")
REGIONS = ("system", "prompt", "core", "before", "after")
# Bytes of the kept rows: with a large model, fewer clean prompts are in flight at a time.
ROW_BYTES, MOST_REFERENCES = 512 << 20, 64

Key = tuple["_Group", int | None]  # the index of a pair in its group; None for the clean prompt


@dataclass(frozen=True, slots=True)
class Side:
    """One prompt of a pair, of whose answer T steps were recorded."""

    answer_ids: list[int]
    mass: NDArray[np.float32] = field(repr=False)  # [T, layers, heads, 3], on core, wrapper and system prompt
    instability: float | None  # its score over steps 1..N
    focus: float  # Attention Tracker's score at step 0, of all heads


@dataclass(frozen=True, slots=True)
class PairScore:
    """A scored pair. distance: [T, layers, heads, 2], L2 and total variation at steps 0..T-1, as far as the compared
    answers go."""

    pair: Pair
    clean: Side
    wrapped: Side
    distance: NDArray[np.float32] = field(repr=False)


@dataclass(slots=True, eq=False)
class _Group:
    """Pairs in flight that share a clean prompt's run."""

    pairs: list[Pair]
    reference: int
    clean: Side | None = None
    todo: deque[tuple[int, ProbeRequest]] = field(default_factory=deque)
    wrapped: dict[int, Side] = field(default_factory=dict)
    distances: dict[int, NDArray[np.float32]] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        return self.clean is not None and len(self.distances) == len(self.wrapped) == len(self.pairs)


def references_for(layers: int, heads: int, steps: int, keys: int) -> int:
    """Number of clean prompts whose rows are kept at a time: as many as ROW_BYTES allow, at least 1."""
    return min(max(ROW_BYTES // (layers * heads * (steps + 1) * keys * 4), 1), MOST_REFERENCES)


def keys_needed(pairs: Iterable[Pair], steps: int) -> int:
    """Keys of the longest row of these pairs, at step `steps`."""
    return max(max(len(pair.clean_ids), len(pair.wrapped_ids)) for pair in pairs) + steps


def group_by_clean_prompt(pairs: Iterable[Pair]) -> list[Pair]:
    """Order pairs so that those with the same clean prompt, and the same core in it, are neighbours."""
    groups: dict[Hashable, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(_clean_run(pair), []).append(pair)
    return [pair for group in groups.values() for pair in group]


def score_pairs(
    engine: ProbedEngine,
    pairs: Iterable[Pair],
    *,
    steps: int,
    answer_tokens: int,
    answers: str = ANSWERS[0],
    on_pairs: Callable[[int], None] | None = None,
) -> Generator[PairScore, None, None]:
    """Score pairs; neighbours with the same clean prompt (`group_by_clean_prompt`) share its run.

    Args:
        engine: started with REGIONS, `row_references` and enough `row_keys` (`keys_needed`).
        steps: N of 1 or more; steps 0..N are compared.
        answer_tokens: longest answer.
        answers: one of ANSWERS.
        on_pairs: called with the number of pairs whose distance is done.

    Yields:
        The pairs' scores, in order.

    Raises:
        ValueError: the engine cannot be used.
        RuntimeError: the engine left out a number.
    """
    if engine.regions != REGIONS or not engine.options["row_references"] or steps < 1:
        raise ValueError(f"scoring pairs needs an engine with the regions {REGIONS} and row_references, and steps >= 1")
    if answers not in ANSWERS:
        raise ValueError(f"answers={answers!r}: use one of {', '.join(ANSWERS)}")
    groups = (list(group) for _, group in groupby(pairs, key=_clean_run))
    run = _PairRun(engine, groups, steps, max(answer_tokens, steps + 1), replay=answers == ANSWERS[0])
    return run.scores(on_pairs or (lambda n: None))


class _PairRun:
    """Groups in flight: the clean prompt first, then the wrapped ones, then replayed answers."""

    def __init__(
        self, engine: ProbedEngine, groups: Iterator[list[Pair]], steps: int, answer_tokens: int, *, replay: bool
    ) -> None:
        self._engine, self._groups, self._replay = engine, groups, replay
        self._steps, self._tokens = steps, answer_tokens
        self._free = list(range(engine.options["row_references"]))
        self._in_flight: deque[_Group] = deque()

    def scores(self, on_pairs: Callable[[int], None]) -> Generator[PairScore, None, None]:
        with closing(self._engine.run(self._requests(), want_mass=True)) as results:
            for (group, i), done, recording in results:
                assert recording is not None
                self._take(group, i, done, recording)
                on_pairs(int(done.request.rows_against is not None))
                while self._in_flight and self._in_flight[0].is_done:
                    finished = self._in_flight.popleft()
                    self._free.append(finished.reference)
                    assert finished.clean is not None
                    for at, pair in enumerate(finished.pairs):
                        yield PairScore(pair, finished.clean, finished.wrapped[at], finished.distances[at])

    def _requests(self) -> Iterator[tuple[Key, ProbeRequest] | None]:
        """Clean prompts while rows can be kept, else the groups' further requests as they become known."""
        exhausted = False
        while True:
            if self._free and not exhausted:
                pairs = next(self._groups, None)
                exhausted = pairs is None
                if pairs is not None:
                    group = _Group(pairs, self._free.pop())
                    self._in_flight.append(group)
                    regions = _regions(pairs[0].clean_system, pairs[0].core.clean_span, pairs[0].clean_edges)
                    yield (group, None), self._answering(pairs[0].clean_ids, regions, rows_as=group.reference)
                continue
            ready = next((group for group in self._in_flight if group.todo), None)
            if ready is not None:
                i, request = ready.todo.popleft()
                yield (ready, i), request
            elif exhausted and all(len(group.distances) == len(group.pairs) for group in self._in_flight):
                return
            else:
                yield None

    def _take(self, group: _Group, i: int | None, done: Finished, recording: Recording) -> None:
        """Keep a result, and queue the requests that follow from it."""
        if i is None:
            group.clean = self._side(done, recording, is_wrapped=False)
            for at, pair in enumerate(group.pairs):
                compared = {} if self._replay else _against(group, pair)
                group.todo.append((at, self._answering(pair.wrapped_ids, _wrapped_regions(pair), **compared)))
            return
        pair = group.pairs[i]
        if done.request.answer_ids is None:
            group.wrapped[i] = self._side(done, recording, is_wrapped=True)
            if self._replay:  # the prompt is in the cache by now
                assert group.clean is not None
                how = {"answer_ids": group.clean.answer_ids, **_against(group, pair)}
                regions = _wrapped_regions(pair)
                group.todo.append((i, ProbeRequest(pair.wrapped_ids, regions, self._steps, **how)))  # type: ignore[arg-type]
        if done.request.rows_against is not None:
            assert group.clean is not None
            distance = recording.distance[: len(group.clean.mass)]
            if np.isnan(distance).any():
                raise RuntimeError(f"pair {pair.id}: the engine left out distances; do not trust its numbers")
            group.distances[i] = distance

    def _answering(self, ids: list[int], regions: dict[str, Span], **fields: object) -> ProbeRequest:
        return ProbeRequest(ids, regions, self._steps, answer_tokens=self._tokens, **fields)  # type: ignore[arg-type]

    def _side(self, done: Finished, recording: Recording, *, is_wrapped: bool) -> Side:
        assert recording.mass is not None
        system, _, core, before, after = np.moveaxis(recording.mass, -1, 0)
        around = before + after
        wrapper = around if is_wrapped else np.zeros_like(around)
        system_start = done.request.regions["system"][0]
        covered = signal.covered(len(recording.share), self._engine.windows, system_start, len(done.request.prompt_ids))
        instability = np.where(covered, signal.instability(recording.share), np.nan)
        score = signal.score(instability, signal.Window(1, self._steps), n_steps=done.n_steps).value
        focus = signal.focus(signal.focus_heads(system[0], core[0] + around[0]))
        return Side(done.answer_ids, np.stack([core, wrapper, system], -1), score, focus)


def _clean_run(pair: Pair) -> Hashable:
    return tuple(pair.clean_ids), pair.core.clean_span, pair.clean_system


def _against(group: _Group, pair: Pair) -> dict[str, object]:
    runs = [(run.clean, run.wrapped, run.length) for run in pair.runs if run.length]
    return {"rows_against": group.reference, "aligned": runs}


def _wrapped_regions(pair: Pair) -> dict[str, Span]:
    return _regions(pair.wrapped_system, pair.core.wrapped_span, pair.wrapper)


def _regions(system: Span, core: Span, around: Iterable[Span]) -> dict[str, Span]:
    """The system prompt and the parts of the user's text: before, core and after."""
    parts = {"before" if span[1] <= core[0] else "after": span for span in around}
    return {"system": system, "core": core, **parts}
