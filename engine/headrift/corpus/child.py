"""An engine in a process of its own: `Child` is the parent's end, `main` what the process runs.

Both ends are joined by one socket. The child reads it in a thread of its own, so that neither end ever waits for the
other to read, and so that a parent that is gone (killed, even) is noticed at once: the child then ends itself and all
the processes it started. The child leads a process group: Ctrl-C in a terminal reaches the parent only.

Another thread of the child's says now and then that the engine has taken steps, where it has: an engine that hangs is
as good as dead.
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
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any, Protocol

from headrift.errors import EngineError

# Rows that travel in one message, and bytes of rows that the child may hold unanswered, whatever their number.
_BATCH = 32
_MOST_BYTES = 128 << 20
_SECONDS_TO_END = 20
# How long an engine that has rows may do nothing: more than the longest step, of a large model on a slow CPU.
PATIENCE = 900.0
_SECONDS_BETWEEN_SIGNS = 1.0  # and less where less patience is had


class Engine(Protocol):
    """What scores rows. about: what there is to know of it, `in_flight` (rows it wants to hold at once) at least."""

    about: dict[str, Any]

    @property
    def waited(self) -> float:
        """Seconds that it has waited for rows so far."""
        ...

    @property
    def steps_run(self) -> int:
        """A count that rises, between answers too, as long as it gets anything done."""
        ...

    def score(self, rows: Iterable[Any]) -> Iterator[Any]:
        """An answer for each row, in order; rows are taken as they are needed."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class EngineDied(RuntimeError):
    """The engine's process ended without being asked to, or does nothing any more. The message says how."""


class Child:
    """An Engine in a child process, made there by `start`, which must pickle. about, waited, steps_run: the engine's,
    as far as they are known here. verbose: the child shows where errors arose. patience: seconds for which an engine
    that has rows may take no step and give no answer; it may start for as long as it likes.

    EngineError with what `start` said where it failed; EngineDied, there or later, where the process ended, or where
    patience did. It must be closed then.
    """

    def __init__(self, start: Callable[[], Engine], *, verbose: bool = False, patience: float = PATIENCE) -> None:
        self.waited, self.steps_run, self._patience = 0.0, 0, patience
        self._connection, far = multiprocessing.Pipe()
        _limit_blocking(self._connection, patience)
        between = min(_SECONDS_BETWEEN_SIGNS, patience / 10)
        options = f"verbose={verbose}, seconds_between_signs={between}"
        code = f"from headrift.corpus.child import main; main({far.fileno()}, {options})"
        command = [sys.executable, "-P", "-c", code]
        self._process = subprocess.Popen(
            command, pass_fds=[far.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
        )
        far.close()
        try:
            self._send(start)
            self.about: dict[str, Any] = self._receive("ready", patience=None)[1]
            self._waiting = True  # for rows, and not in the middle of some
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def score(self, rows: Iterable[Any]) -> Iterator[Any]:
        """As Engine.score. Where it is left before the end, the child must be closed."""
        rows, most, more, hungry = iter(rows), self.about["in_flight"], True, False
        sent = answered = under_way = 0
        self._waiting = False
        sizes: deque[tuple[int, int]] = deque()  # of messages under way: rows sent up to and with its last, its bytes
        while more or answered < sent:
            while more and (hungry or (sent - answered < most and under_way < _MOST_BYTES)):
                batch, hungry = list(islice(rows, _BATCH)), False
                if batch:
                    sent, n_bytes = sent + len(batch), self._send(batch)
                    under_way += n_bytes
                    sizes.append((sent, n_bytes))
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
            while sizes and sizes[0][0] <= answered:
                under_way -= sizes.popleft()[1]
        while self._receive("hungry", "steps", "end", patience=self._patience)[0] != "end":
            pass
        self._waiting = True

    def close(self) -> None:
        """End the process: by itself where it is waiting for rows, else at once."""
        if self._waiting:
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

    def _receive(self, *wanted: str, patience: float | None) -> tuple[str, Any]:
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
        assert kind in wanted, (kind, wanted)
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
    """Have sending and receiving fail with BlockingIOError where the other end stops for so long, all its threads."""
    limit = struct.pack("ll", *divmod(int(seconds * 1e6), 10**6))
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def main(handle: int, *, verbose: bool, seconds_between_signs: float) -> None:
    """The child: make the engine that the parent sends, then answer streams of rows until told to close."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(handle)
    incoming: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(connection, incoming), daemon=True).start()
    try:
        engine = incoming.get()()
    except Exception as error:  # a model's files can break vLLM, transformers and torch in any way
        if verbose:
            traceback.print_exc()
        _say(connection, "refused", str(error) or type(error).__name__)
        return
    outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
    writer = threading.Thread(target=_write, args=(connection, outgoing), daemon=True)
    writer.start()
    outgoing.put(("ready", engine.about))
    threading.Thread(target=_give_signs, args=(engine, seconds_between_signs, outgoing), daemon=True).start()
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
    """Answer one stream of rows, which ends with None."""

    def rows() -> Iterator[Any]:
        batch = first
        while batch is not None:
            yield from batch
            if incoming.empty():  # however much is under way: what is needed to go on may be in the next message
                outgoing.put(("hungry", None))
            batch = incoming.get()

    waiting: list[Any] = []
    for answer in engine.score(rows()):
        waiting.append(answer)
        if len(waiting) >= _BATCH or outgoing.empty():
            outgoing.put(("answers", (engine.waited, waiting)))
            waiting = []
    if waiting:
        outgoing.put(("answers", (engine.waited, waiting)))
    outgoing.put(("end", None))


def _read(connection: Connection, incoming: queue.SimpleQueue[Any]) -> None:
    try:
        while True:
            incoming.put(pickle.loads(connection.recv_bytes()))
    except (EOFError, OSError):  # the parent is gone
        _kill_group(os.getpgid(0))
    except Exception as error:  # what was sent cannot be read: say so where the next message is looked for
        incoming.put(_Unreadable(error))


class _Unreadable:
    def __init__(self, error: Exception) -> None:
        self._error = error

    def __call__(self) -> Engine:
        raise self._error


def _give_signs(engine: Engine, seconds: float, outgoing: queue.SimpleQueue[Any]) -> None:
    said = 0
    while True:
        time.sleep(seconds)
        steps = engine.steps_run
        if steps != said:
            outgoing.put(("steps", steps))
            said = steps


def _write(connection: Connection, outgoing: queue.SimpleQueue[Any]) -> None:
    while (message := outgoing.get()) is not None:
        _say(connection, *message)


def _say(connection: Connection, kind: str, content: Any) -> None:
    with contextlib.suppress(OSError):  # the parent is gone, and the reading thread sees to that
        connection.send_bytes(pickle.dumps((kind, content), pickle.HIGHEST_PROTOCOL))
