"""Answers for every row, whatever becomes of the engine: it is started again when it dies, and a row that kills it is
found and turned down.

Rows that an engine held when it died are suspects. They go through new engines half by half, what kills one again
halved again, until one row is left that kills an engine by itself, twice. All others are answered on the way.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Generic, TypeVar

from headrift.corpus.child import Engine, EngineDied
from headrift.errors import EngineError

# To find one row among those in flight takes no more deaths than the first; as many as the second without one answer
# between them mean that the engine, and no row, is at fault.
_DEATHS_OF_A_SEARCH, _MOST_DEATHS = 16, 40
_MOST_FAILED_STARTS = 5
_TRIALS_OF_A_ROW = 2
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds before another start, where the last ones came to nothing

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Killer:
    """The answer for a row that kills every engine: how the last one died."""

    how: str


class Supervisor(Generic[R]):
    """Keeps an engine alive. A context manager. start: makes an engine. wanted: rows for which there is something to
    score; the others are answered with None, in their places, without an engine.

    restarts: engines started after the first. waited: seconds in which engines waited for rows.
    """

    def __init__(
        self,
        start: Callable[[], Engine],
        wanted: Callable[[R], bool],
        notice: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._start, self._wanted, self._notice = start, wanted, notice
        self._engine: Engine | None = None
        self._about: dict[str, Any] | None = None
        self._deaths = 0  # since the last answer
        self._starts = 0
        self._waited_before = 0.0  # by engines that died
        self._taken: deque[R] = deque()  # rows taken and not answered yet, in order, the unwanted too

    def __enter__(self) -> Supervisor[R]:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._engine is not None:
            self._engine.close()

    @property
    def restarts(self) -> int:
        """Engines that were started after the first one."""
        return max(0, self._starts - 1)

    @property
    def waited(self) -> float:
        """Seconds in which engines waited for rows."""
        return self._waited_before + (self._engine.waited if self._engine is not None else 0.0)

    def begin(self) -> dict[str, Any]:
        """Start the first engine, unless it is there; what there is to know of it. EngineError where it cannot be."""
        return self._running().about

    def answers(self, rows: Iterable[R]) -> Generator[tuple[R, Any], None, None]:
        """Each row with its answer, in order: the engine's, None where it is not wanted, or a Killer.

        EngineError where engines die and die, and no row is at fault.
        """
        rows = iter(rows)
        while True:
            try:
                yield from self._through(rows)
                return
            except EngineDied as error:
                died = error
            yield from self._part(list(self._taken), died)

    def _part(self, suspects: list[R], died: EngineDied) -> Generator[tuple[R, Any], None, None]:
        """Answers for rows that an engine held when it died: halves, halves of halves, one row."""
        spans = _halves(suspects)
        trials = 0  # of the next row, alone
        while spans:
            span = spans.pop()
            if trials == _TRIALS_OF_A_ROW:
                yield span[0], Killer(str(died))
                trials = 0
                continue
            answered = 0
            try:
                for pair in self._through(iter(span)):
                    answered += 1
                    yield pair
            except EngineDied as error:
                died = error
            left = span[answered:]
            trials = trials + 1 if len(span) == len(left) == 1 else 0
            spans += _halves(left)

    def _through(self, rows: Iterator[R]) -> Generator[tuple[R, Any], None, None]:
        """Take rows through the engine; EngineDied where it dies, and `_taken` has what it left unanswered."""
        self._taken.clear()
        wanted = self._wanted_of(rows)
        first = next(wanted, None)
        if first is not None:  # no engine is started for nothing
            try:
                for answer in self._running().score(chain([first], wanted)):
                    yield from self._unwanted()
                    self._deaths = 0
                    yield self._taken.popleft(), answer
            except EngineDied as died:
                self._bury(died)
                raise
        yield from self._unwanted()

    def _wanted_of(self, rows: Iterator[R]) -> Iterator[R]:
        for row in rows:
            self._taken.append(row)
            if self._wanted(row):
                yield row

    def _unwanted(self) -> Iterator[tuple[R, Any]]:
        while self._taken and not self._wanted(self._taken[0]):
            yield self._taken.popleft(), None

    def _running(self) -> Engine:
        """The engine, started if it is not there: again and again, with longer and longer pauses."""
        for failed in range(_MOST_FAILED_STARTS):
            if self._engine is not None:
                return self._engine
            in_vain = failed + max(0, self._deaths - _DEATHS_OF_A_SEARCH)
            time.sleep(min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**in_vain) if in_vain else 0)
            try:
                self._engine = self._start()
                self._starts += 1
            except (EngineDied, EngineError) as error:
                if self._about is None and isinstance(error, EngineError):
                    raise  # this is what the user asked for
                problem = error
                self._notice(f"the engine did not start: {error}")
                continue
            if self._about is None:
                self._about = self._engine.about
            elif self._about != self._engine.about:
                raise EngineError("the engine is another one after it was started again: is the model being changed?")
        if self._engine is None:
            raise EngineError(f"the engine did not start {_MOST_FAILED_STARTS} times in a row: {problem}")
        return self._engine

    def _bury(self, died: EngineDied) -> None:
        assert self._engine is not None
        self._waited_before += self._engine.waited
        self._engine.close()
        self._engine = None
        self._deaths += 1
        if self._deaths >= _MOST_DEATHS:
            raise EngineError(f"the engine died {self._deaths} times and scored nothing in between: {died}")
        self._notice(f"the engine died ({died}) and is started again")


def _halves(rows: list[R]) -> list[list[R]]:
    """The rows in up to two parts, the second part first."""
    middle = (len(rows) + 1) // 2
    return [part for part in (rows[middle:], rows[:middle]) if part]
