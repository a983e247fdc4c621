"""Keeps an engine alive in a process of its own, and answers every request whatever becomes of it.

`EngineProcess` is the parent's end of a socket and `main` runs at the other. A thread of the child reads it, so neither
end waits for the other to read, and the child notices at once that its parent is gone: it then ends itself and all the
processes it started. It leads a process group: Ctrl-C in a terminal reaches the parent only. Another thread reports
that the engine runs steps: an engine that hangs is as good as dead.

`Supervisor` starts an engine that died again. The requests it held go through new engines in halves, halves of what
kills one again, until one is left that kills an engine by itself, twice: a poison row. All others are answered.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from multiprocessing.connection import Connection
from typing import Any, Generic, Protocol, TypeVar

from headrift.errors import EngineError

# Requests that travel in one message, and bytes of requests that the child may hold, whatever their number.
_BATCH, _MOST_BYTES = 32, 128 << 20
_SECONDS_TO_END = 20
# Seconds in which an engine that has requests may do nothing: more than a large model's longest step on a slow CPU.
PATIENCE = 900.0
_SECONDS_BETWEEN_REPORTS = 1.0  # and less if there is less patience

# Finding a poison row among those in flight takes at most this many deaths without an answer between them; as many as
# the second number mean that the engine, and no row, is at fault.
_DEATHS_OF_A_SEARCH, _MOST_DEATHS = 16, 40
_MOST_FAILED_STARTS = 5
_TRIALS_OF_A_ROW = 2
_MOST_SKIPPED = 1000  # rows without a request that may pile up behind an engine's answers
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds before another start if the last ones failed

# Of what an engine says of itself: how it is fed, which may differ from start to start and changes no number.
FEEDING = ("in_flight", "prepare_workers", "tokenizer")

T = TypeVar("T")


class Engine(Protocol):
    """Scores requests.

    Attributes:
        about: What there is to know of the engine, `in_flight` (requests that it wants to hold at once) at least.
        waited: Seconds that it has waited for requests so far.
        steps_run: A count that rises, between answers too, as long as it gets anything done.
    """

    about: dict[str, Any]

    @property
    def waited(self) -> float: ...

    @property
    def steps_run(self) -> int: ...

    def score(self, requests: Iterable[Any]) -> Iterator[Any]:
        """Answer each request, in order; requests are taken as they are needed."""
        ...

    def close(self) -> None: ...


class EngineDied(RuntimeError):
    """The engine's process ended unexpectedly, or does nothing any more. The message says how."""


class EngineProcess:
    """An Engine in a child process. `about`, `waited` and `steps_run` are the engine's, as last reported.

    Args:
        start: Makes the engine in the child, which may take its time; must pickle.
        patience: Seconds in which an engine that has requests may run no step and give no answer.

    Raises:
        EngineError: `start` failed.
        EngineDied: Here or later, if the process ended or `patience` ran out. It must be closed then.
    """

    def __init__(self, start: Callable[[], Engine], *, verbose: bool = False, patience: float = PATIENCE) -> None:
        self.waited, self.steps_run, self._patience = 0.0, 0, patience
        self._connection, far = multiprocessing.Pipe()
        _limit_blocking(self._connection, patience)
        between = min(_SECONDS_BETWEEN_REPORTS, patience / 10)
        options = f"verbose={verbose}, seconds_between_reports={between}"
        code = f"from headrift.corpus.worker import main; main({far.fileno()}, {options})"
        command = [sys.executable, "-P", "-c", code]
        self._process = subprocess.Popen(
            command, pass_fds=[far.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
        )
        far.close()
        try:
            self._send(start)
            self.about: dict[str, Any] = self._receive("ready", patience=None)[1]
            self._idle = True  # not in the middle of a stream
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def score(self, requests: Iterable[Any]) -> Iterator[Any]:
        """As Engine.score. If it is left before the end, this must be closed."""
        requests, most, more, hungry = iter(requests), self.about["in_flight"], True, False
        sent = answered = n_bytes = 0
        self._idle = False
        messages: deque[tuple[int, int]] = deque()  # in flight: requests sent up to and with its last, its bytes
        while more or answered < sent:
            while more and (hungry or (sent - answered < most and n_bytes < _MOST_BYTES)):
                batch, hungry = list(islice(requests, _BATCH)), False
                if batch:
                    size = self._send(batch)
                    sent, n_bytes = sent + len(batch), n_bytes + size
                    messages.append((sent, size))
                if len(batch) < _BATCH:
                    more = False
                    self._send(None)
                elif self._connection.poll():
                    break
            if answered == sent:
                continue
            kind, content = self._receive("answers", "hungry", "steps", patience=self._patience)
            hungry = kind == "hungry"
            if kind == "answers":
                self.waited, answers = content
                for answer in answers:
                    answered += 1
                    yield answer
            while messages and messages[0][0] <= answered:
                n_bytes -= messages.popleft()[1]
        while self._receive("hungry", "steps", "end", patience=self._patience)[0] != "end":
            pass
        self._idle = True

    def close(self) -> None:
        """End the process: by itself if it is idle, else at once."""
        if self._idle:
            with contextlib.suppress(EngineDied, subprocess.TimeoutExpired):
                self._send("close")
                self._process.wait(_SECONDS_TO_END)
        self.kill()

    def kill(self) -> None:
        """End the process, and those it started, at once."""
        _kill_group(self._process.pid)
        self._process.wait()
        self._connection.close()

    def _send(self, message: Any) -> int:
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        try:
            self._connection.send_bytes(data)
        except OSError as error:
            raise self._died(error) from None
        return len(data)

    def _receive(self, *expected: str, patience: float | None) -> tuple[str, Any]:
        try:
            if not self._connection.poll(patience):
                raise BlockingIOError
            kind, content = pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise self._died(error) from None
        if kind == "steps":
            self.steps_run = content
        if kind == "failed":
            raise EngineDied(content)
        if kind == "refused":
            raise EngineError(content)
        assert kind in expected, (kind, expected)
        return kind, content

    def _died(self, error: OSError | EOFError) -> EngineDied:
        if isinstance(error, BlockingIOError):
            return EngineDied(f"it did nothing for {self._patience:g} s")
        try:
            code = self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            return EngineDied("it closed its connection")
        if code >= 0:
            return EngineDied(f"it ended with exit code {code}")
        hint = ": the machine may have run out of memory" if code == -signal.SIGKILL else ""
        return EngineDied(f"it was ended by {signal.Signals(-code).name}{hint}")


def _limit_blocking(connection: Connection, seconds: float) -> None:
    """Make sending and receiving fail with BlockingIOError if all the other end's threads stop for this long."""
    limit = struct.pack("ll", *divmod(int(seconds * 1e6), 10**6))
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def main(handle: int, *, verbose: bool, seconds_between_reports: float) -> None:
    """In the child: make the engine that the parent sends, then answer streams of requests until closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(handle)
    incoming: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(connection, incoming), daemon=True).start()
    try:
        engine = incoming.get()()
    except Exception as error:  # a model's files can break vLLM, transformers and torch in any way
        if verbose:
            traceback.print_exc()
        _send(connection, "refused", str(error) or type(error).__name__)
        return
    outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
    writer = threading.Thread(target=_write, args=(connection, outgoing), daemon=True)
    writer.start()
    outgoing.put(("ready", engine.about))
    threading.Thread(target=_report_steps, args=(engine, seconds_between_reports, outgoing), daemon=True).start()
    try:
        while not isinstance(first := incoming.get(), str):
            _answer(engine, first, incoming, outgoing)
        engine.close()
    except Exception as error:
        if verbose:
            traceback.print_exc()
        outgoing.put(("failed", f"{type(error).__name__}: {error}"))
    outgoing.put(None)
    writer.join()


def _answer(
    engine: Engine, first: list[Any] | None, incoming: queue.SimpleQueue[Any], outgoing: queue.SimpleQueue[Any]
) -> None:
    """Answer one stream of requests, which ends with None."""

    def requests() -> Iterator[Any]:
        batch = first
        while batch is not None:
            yield from batch
            if incoming.empty():  # however many are in flight: what the engine waits for may be in the next message
                outgoing.put(("hungry", None))
            batch = incoming.get()

    answers: list[Any] = []
    for answer in engine.score(requests()):
        answers.append(answer)
        if len(answers) >= _BATCH or outgoing.empty():
            outgoing.put(("answers", (engine.waited, answers)))
            answers = []
    if answers:
        outgoing.put(("answers", (engine.waited, answers)))
    outgoing.put(("end", None))


def _read(connection: Connection, incoming: queue.SimpleQueue[Any]) -> None:
    try:
        while True:
            incoming.put(pickle.loads(connection.recv_bytes()))
    except (EOFError, OSError):  # the parent is gone
        _kill_group(os.getpgid(0))
    except Exception as error:  # a message cannot be read: raise that when the next message is taken
        incoming.put(partial(_raise, error))


def _raise(error: Exception) -> Engine:
    raise error


def _report_steps(engine: Engine, seconds: float, outgoing: queue.SimpleQueue[Any]) -> None:
    reported = 0
    while True:
        time.sleep(seconds)
        steps = engine.steps_run
        if steps != reported:
            outgoing.put(("steps", steps))
            reported = steps


def _write(connection: Connection, outgoing: queue.SimpleQueue[Any]) -> None:
    while (message := outgoing.get()) is not None:
        _send(connection, *message)


def _send(connection: Connection, kind: str, content: Any) -> None:
    with contextlib.suppress(OSError):  # the parent is gone, and the reading thread sees to that
        connection.send_bytes(pickle.dumps((kind, content), pickle.HIGHEST_PROTOCOL))


@dataclass(frozen=True, slots=True)
class PoisonRow:
    """The answer to a row that kills every engine: how the last one died."""

    how: str


class Supervisor(Generic[T]):
    """Keeps an engine alive. A context manager.

    Args:
        start: Makes an engine.
        request_of: The request of a row; None for a row without one, which is answered with None in its place.
        notice: Called with what the user should know.
    """

    def __init__(
        self,
        start: Callable[[], Engine],
        request_of: Callable[[T], Any],
        notice: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._start, self._request_of, self._notice = start, request_of, notice
        self._engine: Engine | None = None
        self._about: dict[str, Any] | None = None
        self._deaths = 0  # since the last answer
        self._starts = 0
        self._waited_before = 0.0  # by engines that died
        self._unanswered: deque[T] = deque()  # rows that were taken, in order, with those without a request
        self._exhausted = False

    def __enter__(self) -> Supervisor[T]:
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
        """Seconds in which engines waited for requests."""
        return self._waited_before + (self._engine.waited if self._engine is not None else 0.0)

    def begin(self) -> dict[str, Any]:
        """Start the first engine if there is none, and return its `about`; EngineError if it cannot be started."""
        return self._running().about

    def answers(self, rows: Iterable[T]) -> Generator[tuple[T, Any], None, None]:
        """Answer each row, in order: with the engine's answer, with None without a request, or with a PoisonRow.

        EngineError if engines die again and again, and no row is at fault.
        """
        rows = iter(rows)
        while True:
            try:
                yield from self._through_engine(rows)
                return
            except EngineDied as error:
                died = error
            yield from self._search(list(self._unanswered), died)

    def _search(self, suspects: list[T], died: EngineDied) -> Generator[tuple[T, Any], None, None]:
        """Answer rows that an engine held when it died: in halves, halves of halves, one by one."""
        spans = _halves(suspects)
        trials = 0  # of the next row, alone
        while spans:
            span = spans.pop()
            if trials == _TRIALS_OF_A_ROW:
                yield span[0], PoisonRow(str(died))
                trials = 0
                continue
            answered = 0
            try:
                for pair in self._through_engine(iter(span)):
                    answered += 1
                    yield pair
            except EngineDied as error:
                died = error
            left = span[answered:]
            trials = trials + 1 if len(span) == len(left) == 1 else 0
            spans += _halves(left)

    def _through_engine(self, rows: Iterator[T]) -> Generator[tuple[T, Any], None, None]:
        """Answer rows by the engine; EngineDied if it dies, and `_unanswered` has what it left."""
        self._exhausted = False
        while not self._exhausted:
            self._unanswered.clear()
            requests = self._requests(rows)
            first = next(requests, None)
            if first is not None:  # no engine is started for nothing
                try:
                    for answer in self._running().score(chain([first], requests)):
                        yield from self._without_request()
                        self._deaths = 0
                        yield self._unanswered.popleft(), answer
                except EngineDied as died:
                    self._discard_engine(died)
                    raise
            yield from self._without_request()

    def _requests(self, rows: Iterator[T]) -> Iterator[Any]:
        skipped = 0
        for row in rows:
            self._unanswered.append(row)
            if (request := self._request_of(row)) is not None:
                skipped = 0
                yield request
            elif (skipped := skipped + 1) == _MOST_SKIPPED:
                return
        self._exhausted = True

    def _without_request(self) -> Iterator[tuple[T, Any]]:
        while self._unanswered and self._request_of(self._unanswered[0]) is None:
            yield self._unanswered.popleft(), None

    def _running(self) -> Engine:
        """Return the engine, started if there is none: again and again, with longer and longer pauses."""
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
                    raise  # the user's options are at fault
                problem = error
                self._notice(f"the engine did not start: {error}")
                continue
            about = numbers_from(self._engine.about)
            if self._about not in (None, about):
                raise EngineError("the engine is another one after a restart: is the model being changed?")
            self._about = about
        if self._engine is None:
            raise EngineError(f"the engine did not start {_MOST_FAILED_STARTS} times in a row: {problem}")
        return self._engine

    def _discard_engine(self, died: EngineDied) -> None:
        assert self._engine is not None
        self._waited_before += self._engine.waited
        self._engine.close()
        self._engine = None
        self._deaths += 1
        if self._deaths >= _MOST_DEATHS:
            raise EngineError(f"the engine died {self._deaths} times and scored nothing in between: {died}")
        self._notice(f"the engine died ({died}) and is started again")


def numbers_from(about: dict[str, Any]) -> dict[str, Any]:
    """What of an engine's `about` its numbers depend on, the same in every engine of a run."""
    return {name: value for name, value in about.items() if name not in FEEDING}


def _halves(rows: list[T]) -> list[list[T]]:
    """The rows in up to two parts, the second part first."""
    middle = (len(rows) + 1) // 2
    return [part for part in (rows[middle:], rows[:middle]) if part]
