"""Engines on many machines: a Supervisor's work, dealt out shard by shard to actors of a Ray cluster.

The job's process reads the input, prepares the prompts, ships requests, writes the output and keeps the journal, as it
does with one engine, so only the model's folder has to be on every machine. Each actor has a Supervisor of its own, and
its engine in a child process: a poison row is found there. An actor that is lost, even with its machine, loses no row:
its shards go to other actors, and another one is started in its place.

Plain actors, not Ray Data's actor pool: that one gives a lost actor's task to no other, and has no input that the
driver feeds shard by shard.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from headrift.corpus.worker import Engine, Supervisor, numbers_from
from headrift.errors import EngineError
from headrift.runs.folder import model_fingerprint, versions
from headrift.vllm_engine import ENGINES_PER_MACHINE

# Answers that travel in one message.
_BATCH = 64
# Shards that an actor has, so that it need not wait for the next, and shards in flight for each actor: with those that
# are scored and wait for an earlier one.
_PER_ACTOR, _IN_FLIGHT = 2, 3
_MOST_LOST = 20  # actors, with no shard finished in between
_MOST_FAILED_STARTS = 3  # in a row, of actors that are replaced

T = TypeVar("T")


@dataclass(slots=True)
class _State:
    """What an actor reports with its answers."""

    restarts: int
    waited: float
    notices: list[str]  # new ones
    error: str | None = None  # why it gives up


class _Actor:
    """Scores shards, in a process that Ray starts; the engine is in a child of that process, and ends with it."""

    def __init__(self, start: Callable[[], Engine], model: Path, per_machine: int) -> None:
        os.environ[ENGINES_PER_MACHINE] = str(per_machine)
        self._model, self._notices = model, list[str]()
        self._supervisor = Supervisor[Any](start, lambda request: request, self._notices.append)

    def begin(self) -> tuple[str, dict[str, Any], dict[str, Any]]:
        """The machine's name, its engine's `about`, and what its numbers depend on."""
        name = socket.gethostname()
        try:
            described = _provenance(self._model)
        except OSError as error:
            raise EngineError(f"{name} does not have the model where this machine has it: {error}") from error
        about = self._supervisor.begin()
        return name, about, described | {"engine": numbers_from(about)}

    def score(self, requests: list[Any]) -> Iterator[tuple[list[Any], _State]]:
        """Answer requests, in order, with reports on the engine."""
        answers: list[Any] = []
        problem = None
        try:
            for _, answer in self._supervisor.answers(requests):
                answers.append(answer)
                if len(answers) == _BATCH:
                    yield answers, self._state()
                    answers = []
        except EngineError as error:
            problem = str(error)
        yield answers, self._state(problem)

    def _state(self, error: str | None = None) -> _State:
        notices, self._notices[:] = list(self._notices), []
        return _State(self._supervisor.restarts, self._supervisor.waited, notices, error)


@dataclass(slots=True, eq=False)
class _Worker:
    """The driver's end of an actor."""

    actor: Any
    ready: Any  # what `begin` will return, None once it has
    name: str = "a machine that is not known yet"
    shards: int = 0  # that it has to score


@dataclass(slots=True, eq=False)
class _Shard:
    """Rows in flight. Rows and requests are in Ray's object store; only the requests leave this machine."""

    rows: Any
    requests: Any
    answered: int = 0  # rows that were returned with their answers
    worker: _Worker | None = None
    stream: Any = None  # the worker's answers, None while no worker has the shard
    done: bool = False  # whether all answers have arrived


class RayWorkers(Generic[T]):
    """What a Supervisor is to one engine, to one on each worker of a Ray cluster. A context manager.

    Args:
        start, request_of, notice: As Supervisor has them; `start` is called on the workers.
        model: A folder that must be the same on all machines.
        workers: How many, by default one for each GPU or, without any, for each machine; those that find no room wait
            for a machine that joins the cluster.
    """

    def __init__(
        self,
        start: Callable[[], Engine],
        request_of: Callable[[T], Any],
        notice: Callable[[str], None] = lambda text: None,
        *,
        model: Path,
        shard_rows: int,
        workers: int | None = None,
        verbose: bool = False,
    ) -> None:
        self._start_engine, self._request_of, self._notice = start, request_of, notice
        self._model, self._shard_rows, self._n_workers, self._verbose = model, shard_rows, workers, verbose
        self._workers: list[_Worker] = []
        self._shards: deque[_Shard] = deque()  # in flight, in order
        self._states: dict[_Worker, _State] = {}
        self._about: dict[str, Any] | None = None
        self._expected: dict[str, Any] = {}  # what every worker's numbers depend on
        self._lost = self._lost_in_a_row = self._failed_starts = 0
        self._connected = False

    def __enter__(self) -> RayWorkers[T]:
        return self

    def __exit__(self, *exc: object) -> None:
        for worker in self._workers:
            ray.kill(worker.actor)
        if self._connected:
            ray.shutdown()

    @property
    def restarts(self) -> int:
        """Engines that were started after the first of each worker, and workers that replaced lost ones."""
        return self._lost + sum(state.restarts for state in self._states.values())

    @property
    def waited(self) -> float:
        """Seconds in which an engine waited for the requests of its shard, on average."""
        return sum(state.waited for state in self._states.values()) / max(1, len(self._states))

    def begin(self) -> dict[str, Any]:
        """Start the workers; return the `about` of their engines as soon as the first has started.

        EngineError if there is no cluster, or none of them can be started.
        """
        if not ray.is_initialized():
            self._connect()
        number, self._options, self._per_machine = _resources(self._n_workers)
        self._expected = _provenance(self._model)
        for _ in range(number):
            self._start()
        while self._about is None:
            self._wait()
        return self._about

    def _connect(self) -> None:
        try:
            ray.init(address="auto", log_to_driver=self._verbose, logging_level="INFO" if self._verbose else "ERROR")
        except ConnectionError:
            raise EngineError(
                "--engine ray: no Ray cluster runs here: `ray start --head` on this machine begins one, and `ray start "
                "--address=HOST:6379` on the others joins them to it"
            ) from None
        self._connected = True

    def answers(self, rows: Iterable[T]) -> Generator[tuple[T, Any], None, None]:
        """Answer each row as Supervisor.answers does. EngineError if workers are lost again and again, or all are."""
        rows = iter(rows)
        self._shards.clear()
        while True:
            self._hand_out(rows)
            if not self._shards:
                return
            if not self._shards[0].done:
                self._wait()
                continue
            yield from self._answers_in(self._shards[0])
            if self._shards[0].done:
                self._shards.popleft()

    def _hand_out(self, rows: Iterator[T]) -> None:
        """Give every worker as many shards as it may have: lost ones first, then new ones."""
        for shard in self._shards:
            if shard.stream is None and not shard.done and (worker := self._free()):
                self._give(shard, worker)
        while len(self._shards) < _IN_FLIGHT * len(self._workers) and (worker := self._free()):
            batch = list(islice(rows, self._shard_rows))
            if not batch:
                return
            requests = [request for row in batch if (request := self._request_of(row)) is not None]
            self._shards.append(_Shard(ray.put(batch), ray.put(requests), done=not requests))
            if requests:
                self._give(self._shards[-1], worker)

    def _free(self) -> _Worker | None:
        """The worker with the least to do, if any may have one more shard."""
        candidates = [worker for worker in self._workers if worker.ready is None and worker.shards < _PER_ACTOR]
        return min(candidates, key=lambda worker: worker.shards, default=None)

    def _give(self, shard: _Shard, worker: _Worker) -> None:
        shard.worker = worker
        shard.stream = worker.actor.score.options(num_returns="streaming").remote(shard.requests)
        worker.shards += 1

    def _wait(self) -> None:
        """Wait until a worker has started, or a shard is done, or either is lost."""
        running = {
            shard.stream.completed(): shard for shard in self._shards if shard.stream is not None and not shard.done
        }
        starting = {worker.ready: worker for worker in self._workers if worker.ready is not None}
        finished, _ = ray.wait([*running, *starting], num_returns=1, fetch_local=False)
        for ref in finished:
            worker = starting.get(ref) or running[ref].worker
            assert worker is not None
            try:
                value = ray.get(ref)
            except RayTaskError as error:
                if not isinstance(error.cause, EngineError):
                    raise
                self._drop(worker, str(error.cause))
            except RayError as error:
                self._failed_starts += ref in starting
                if ref in starting and self._failed_starts > _MOST_FAILED_STARTS:
                    # The next would not either: headrift is not installed there, for one.
                    self._drop(worker, f"it did not start: {_last_line(error)}")
                else:
                    self._replace(worker, error)
            else:
                if ref in starting:
                    self._accept(worker, *value)
                else:
                    running[ref].done = True
                    worker.shards -= 1
                    self._lost_in_a_row = 0

    def _answers_in(self, shard: _Shard) -> Iterator[tuple[T, Any]]:
        """The answers of a shard that is done, but for those returned before; if some are lost it is no longer done."""
        rows, answers = ray.get(shard.rows), self._arrived(shard)
        for at, row in enumerate(rows):
            answer = None
            if self._request_of(row) is not None and (answer := next(answers, answers)) is answers:
                break
            if at >= shard.answered:
                shard.answered += 1
                yield row, answer
        for _ in answers:  # reads the last report
            pass
        if shard.answered < len(rows):
            shard.stream, shard.done = None, False

    def _arrived(self, shard: _Shard) -> Iterator[Any]:
        """The answers of a shard that can be had, with what the worker reports."""
        for ref in shard.stream or ():
            try:
                answers, state = ray.get(ref)
            except RayTaskError:
                raise
            except RayError:  # they were on a machine that is gone
                return
            assert shard.worker is not None
            for notice in state.notices:
                self._notice(f"{shard.worker.name}: {notice}")
            self._states[shard.worker] = state
            yield from answers
            if state.error is not None:
                self._drop(shard.worker, state.error)

    def _start(self) -> None:
        actor_class = ray.remote(_Actor).options(**self._options)
        actor = actor_class.remote(self._start_engine, self._model, self._per_machine)
        self._workers.append(_Worker(actor, actor.begin.remote()))

    def _accept(self, worker: _Worker, name: str, about: dict[str, Any], described: dict[str, Any]) -> None:
        """Use a worker that has started, if it will score as the others do and with what this machine has."""
        worker.name, worker.ready, self._failed_starts = name, None, 0
        different = [what for what, value in self._expected.items() if described[what] != value]
        if different:
            self._drop(worker, f"its {' and '.join(different)} differ from this machine's or other workers'")
            return
        self._expected, self._about = described, self._about or about

    def _replace(self, worker: _Worker, error: RayError) -> None:
        self._lost += 1
        self._lost_in_a_row += 1
        if self._lost_in_a_row == _MOST_LOST:
            raise EngineError(
                f"{_MOST_LOST} workers were lost and no shard was finished in between: {_last_line(error)}"
            )
        self._remove(worker)
        when = "while it started" if worker.ready is not None else "and its shards go to others"
        self._notice(f"a worker on {worker.name} was lost {when}; another one is started")
        self._start()

    def _drop(self, worker: _Worker, why: str) -> None:
        """Leave out a worker that cannot be used; EngineError if it was the last."""
        if worker not in self._workers:  # lost before it could report that
            return
        self._remove(worker)
        if not self._workers:
            raise EngineError(why)
        self._notice(f"a worker on {worker.name} is left out: {why}")

    def _remove(self, worker: _Worker) -> None:
        ray.kill(worker.actor)
        self._workers.remove(worker)
        for shard in self._shards:
            if shard.worker is worker and not shard.done:
                shard.stream = None


def _last_line(error: RayError) -> str:
    return str(error).strip().rpartition("\n")[2]


def _provenance(model: Path) -> dict[str, Any]:
    """What a machine's numbers depend on, by names for messages: the model's files and the versions."""
    return {"model files": model_fingerprint(model), "versions": versions()}


def _resources(workers: int | None) -> tuple[int, dict[str, Any], int]:
    """The number of workers, Ray's options for each, and how many share a machine at most.

    On CPUs all cores are dealt out; Ray has an actor's OpenMP, and its children's, start as many threads as it has
    cores.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    options = {"max_restarts": 0, "scheduling_strategy": "SPREAD"}
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if gpus:
        most = max(int(node.get("GPU", 0)) for node in nodes)
        return workers or gpus, options | {"num_cpus": 1, "num_gpus": 1}, most
    cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    if not cores:
        raise EngineError("--engine ray: the machines of the Ray cluster offer neither a GPU nor a core")
    number = workers or len(cores)
    each = max(1, min(sum(cores) // number, *cores))
    return number, options | {"num_cpus": each}, min(number, max(cores) // each)
