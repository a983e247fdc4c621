"""Pairs through the engine: how far the attention of the wrapped prompt is from that of the clean one, and the answers.

A clean prompt answers greedily, once for all its pairs, and its attention rows at steps 0..N stay on the device. Each
wrapped prompt answers greedily too, for its own answer and its own signals. The rows that are compared with the clean
ones, on the device (`headrift.aligned_keys`), are by default those of the wrapped prompt with the *clean* answer
replayed after it (ANSWERS[0]): the rows of a step then are the same token's, and what tells them apart is the wrapper.
Where each goes on with its own answer (ANSWERS[1]), once the two differ so do their queries: the distance then is the
wrapper's effect and that of the other words in one. At step 0 both are the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from headrift import signal
from headrift.consistency.pairs import Pair
from headrift.probed_engine import ProbedEngine
from headrift.requests import Finished, ProbeRequest, Recording

ANSWERS = ("clean", "own")
REGIONS = ("system", "prompt", "core", "before", "after")
# Of the kept rows, in bytes: with a large model, fewer clean prompts are under way at a time.
BANK_BYTES, MOST_REFERENCES = 512 << 20, 64

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Side:
    """One prompt of a pair. answer_ids: its greedy answer; T steps of it were recorded. mass: [T, layers, heads, 3],
    attention on the core, the wrapper and the system prompt. instability: its score over steps 1..N, None where there
    is none; focus: Attention Tracker's score at step 0, of all heads."""

    answer_ids: list[int]
    mass: NDArray[np.float32] = field(repr=False)
    instability: float | None
    focus: float


@dataclass(frozen=True, slots=True)
class PairScore:
    """What was found of a pair. distance: [T, layers, heads, 2], L2 and total variation at steps 0..T-1, as far as both
    prompts have answers to compare."""

    pair: Pair
    clean: Side
    wrapped: Side
    distance: NDArray[np.float32] = field(repr=False)


@dataclass(slots=True)
class _Group:
    """Pairs that share the clean prompt's run, under way."""

    pairs: list[Pair]
    reference: int
    clean: Side | None = None
    todo: deque[tuple[int, ProbeRequest]] = field(default_factory=deque)
    wrapped: dict[int, Side] = field(default_factory=dict)
    distances: dict[int, NDArray[np.float32]] = field(default_factory=dict)


def references_for(layers: int, heads: int, steps: int, keys: int) -> int:
    """How many clean prompts' rows to keep at a time: as many as BANK_BYTES hold, 1 at least."""
    return min(max(BANK_BYTES // (layers * heads * (steps + 1) * keys * 4), 1), MOST_REFERENCES)


def keys_needed(pairs: Iterable[Pair], steps: int) -> int:
    """Keys of the longest row of these pairs, at step `steps`."""
    return max(max(len(pair.clean_ids), len(pair.wrapped_ids)) for pair in pairs) + steps


def together(pairs: Iterable[Pair]) -> list[Pair]:
    """The pairs in an order in which those with the same clean prompt, and the same core in it, follow one another."""
    groups: dict[Hashable, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(_clean_run(pair), []).append(pair)
    return [pair for some in groups.values() for pair in some]


def score_pairs(
    engine: ProbedEngine,
    pairs: Iterable[Pair],
    *,
    steps: int,
    answer_tokens: int,
    answers: str = ANSWERS[0],
    on_pairs: Callable[[int], None] | None = None,
) -> Generator[PairScore, None, None]:
    """The scores of the pairs, in order; those that come `together` share the clean prompt's run.

    engine: started with REGIONS, with `row_references` and enough `row_keys` (`keys_needed`). steps: N of 1 or more,
    0..N are compared. answer_tokens: of the longest answer. answers: of ANSWERS. on_pairs: told how many more are done.
    ValueError where the engine will not do; RuntimeError where a number is missing in the end, an error of the engine.
    """
    if engine.regions != REGIONS or not engine.row_references or steps < 1:
        raise ValueError(
            f"pairs are scored by an engine with the regions {REGIONS} and row_references, in 1 step or more"
        )
    if answers not in ANSWERS:
        raise ValueError(f"the rows compared are of the {' or the '.join(ANSWERS)} answers, not of {answers!r}")
    groups = (list(some) for _, some in groupby(pairs, key=_clean_run))
    run = _Run(engine, steps, max(answer_tokens, steps + 1), replay=answers == ANSWERS[0])
    return run.scores(groups, on_pairs or (lambda n: None))


class _Run:
    """Groups under way in an engine: clean first, then wrapped, then what is to be compared by itself."""

    def __init__(self, engine: ProbedEngine, steps: int, answer_tokens: int, *, replay: bool) -> None:
        self._engine, self._steps, self._tokens, self._replay = engine, steps, answer_tokens, replay
        self._free = list(range(engine.row_references))
        self._under_way: deque[_Group] = deque()
        # By tenant: its group, and the place of its pair in it; None for the clean prompt.
        self._running: dict[int, tuple[_Group, int | None]] = {}

    def scores(self, groups: Iterator[list[Pair]], on_pairs: Callable[[int], None]) -> Generator[PairScore, None, None]:
        engine, exhausted = self._engine, False
        try:
            while True:
                while not exhausted and self._free and engine.free_slots:
                    pairs = next(groups, None)
                    if pairs is None:
                        exhausted = True
                        break
                    self._begin(pairs)
                if not self._under_way:
                    return
                self._submit_waiting()
                finished = [done for done in engine.step() if not done.answering]
                for done, recording in zip(finished, engine.drain(finished, want_mass=True), strict=True):
                    self._take(done, recording, on_pairs)
                while self._under_way and self._is_done(self._under_way[0]):
                    group = self._under_way.popleft()
                    self._free.append(group.reference)
                    for i, pair in enumerate(group.pairs):
                        assert group.clean is not None
                        yield PairScore(pair, group.clean, group.wrapped[i], group.distances[i])
        finally:
            if engine.running:
                engine.abort()

    def _begin(self, pairs: list[Pair]) -> None:
        group, pair = _Group(pairs, self._free.pop()), pairs[0]
        self._under_way.append(group)
        request = self._request(pair.clean_ids, _clean_regions(pair), rows_as=group.reference)
        self._running[self._engine.submit(request)] = group, None

    def _submit_waiting(self) -> None:
        for group in self._under_way:
            while group.todo and self._engine.free_slots:
                i, request = group.todo.popleft()
                self._running[self._engine.submit(request)] = group, i

    def _take(self, done: Finished, recording: Recording, on_pairs: Callable[[int], None]) -> None:
        group, i = self._running.pop(done.request_id)
        request = done.request
        if i is None:
            group.clean = self._side(done, recording, wrapped=False)
            against = {} if self._replay else {"rows_against": group.reference}
            for at, pair in enumerate(group.pairs):
                runs = {} if self._replay else {"aligned": _runs(pair)}
                group.todo.append((at, self._request(pair.wrapped_ids, _wrapped_regions(pair), **against, **runs)))
            return
        pair = group.pairs[i]
        if request.answer_ids is None:
            group.wrapped[i] = self._side(done, recording, wrapped=True)
            if self._replay:  # by now the prompt is in the cache
                group.todo.append((i, self._replayed(group, pair)))
        if recording.missing_steps and not request.skip_prefix_cache:  # a cached block of the prompt covered a step
            group.todo.appendleft((i, replace(request, skip_prefix_cache=True)))
        elif request.rows_against is not None:
            group.distances[i] = self._distance(group, pair, recording)
            on_pairs(1)

    def _request(self, ids: list[int], regions: dict[str, tuple[int, int]], **asked: object) -> ProbeRequest:
        return ProbeRequest(ids, regions, self._steps, answer_tokens=self._tokens, **asked)  # type: ignore[arg-type]

    def _replayed(self, group: _Group, pair: Pair) -> ProbeRequest:
        """The wrapped prompt with the clean answer after it."""
        assert group.clean is not None
        return ProbeRequest(
            pair.wrapped_ids,
            _wrapped_regions(pair),
            self._steps,
            answer_ids=group.clean.answer_ids,
            rows_against=group.reference,
            aligned=_runs(pair),
        )

    def _side(self, done: Finished, recording: Recording, *, wrapped: bool) -> Side:
        assert recording.mass is not None
        system, _, core, before, after = np.moveaxis(recording.mass, -1, 0)
        around = before + after
        wrapper = around if wrapped else np.zeros_like(around)
        system_start = done.request.regions["system"][0]
        seen = signal.covered(len(recording.share), self._engine.windows, system_start, len(done.request.prompt_ids))
        instability = np.where(seen, signal.instability(recording.share), np.nan)
        score = signal.score(instability, signal.Window(1, self._steps), n_steps=done.n_steps).value
        focus = signal.focus(signal.focus_heads(system[0], core[0] + around[0]))
        return Side(done.answer_ids, np.stack([core, wrapper, system], -1), score, focus)

    def _distance(self, group: _Group, pair: Pair, recording: Recording) -> NDArray[np.float32]:
        """As far as the clean answer has steps; RuntimeError where a number is missing."""
        assert group.clean is not None
        assert recording.distance is not None
        found = recording.distance[: len(group.clean.mass)]
        if np.isnan(found).any():
            raise RuntimeError(f"pair {pair.id}: the engine gave no distance for some heads; it cannot be trusted")
        return found

    def _is_done(self, group: _Group) -> bool:
        return group.clean is not None and len(group.distances) == len(group.wrapped) == len(group.pairs)


def _clean_run(pair: Pair) -> Hashable:
    return tuple(pair.clean_ids), pair.clean_core, pair.clean_system


def _runs(pair: Pair) -> list[tuple[int, int, int]]:
    return [(run.clean, run.wrapped, run.length) for run in pair.runs if run.length]


def _clean_regions(pair: Pair) -> dict[str, tuple[int, int]]:
    return _regions(pair.clean_system, pair.clean_core, pair.clean_edges)


def _wrapped_regions(pair: Pair) -> dict[str, tuple[int, int]]:
    return _regions(pair.wrapped_system, pair.wrapped_core, pair.wrapper)


def _regions(
    system: tuple[int, int], core: tuple[int, int], around: Iterable[tuple[int, int]]
) -> dict[str, tuple[int, int]]:
    """before, core and after are the user's text."""
    parts = {"before" if span[1] <= core[0] else "after": span for span in around}
    return {"system": system, "core": core, **parts}
