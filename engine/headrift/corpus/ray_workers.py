"""Engines on many machines: a Supervisor's work, dealt out shard by shard to actors of a Ray cluster.

The job's process reads the input, ships rows, writes the output and keeps the journal, as it does with one engine, so
that only the model's folder has to be on every machine. Each actor has a Supervisor of its own, and its engine in a
child process: a row that kills an engine is found there. An actor that is lost (with its machine, even) takes no row
along: its shards go to other actors, and another one is started in its place.

Plain actors, and not the actor pool of Ray Data: that one gives a lost actor's task to no other, but starts the actor
again. Where its machine does not come back there is no room for it before another actor has run out of work, and all
later shards pile up behind the lost one. Nor has Ray Data an input that the driver feeds as it goes, shard by shard.
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

from headrift.corpus.child import Engine
from headrift.corpus.supervisor import Supervisor
from headrift.engine_setup import ENGINES_PER_MACHINE
from headrift.errors import EngineError
from headrift.runs.provenance import model_fingerprint, versions

# Answers that travel in one message.
_BATCH = 64
# Shards that an actor holds, so that it need not wait for the next, and shards in all for each actor: those that are
# scored and wait for an earlier one are among them.
_PER_ACTOR, _UNDER_WAY = 2, 3
_MOST_LOST = 20  # actors, with no shard finished in between
_MOST_FAILED_STARTS = 3  # in a row, of actors that are replaced

R = TypeVar("R")


@dataclass(slots=True)
class _State:
    """What an actor has to say beside its answers. notices: since it last said so; error: why it gives up."""

    restarts: int
    waited: float
    notices: list[str]
    error: str | None = None


class _Actor(Generic[R]):
    """Scores shards, in a process that Ray starts; the engine is in a child of that process, and ends with it."""

    def __init__(self, make: Callable[[], Engine], wanted: Callable[[R], bool], model: Path, per_machine: int) -> None:
        os.environ[ENGINES_PER_MACHINE] = str(per_machine)
        self._model, self._notices = model, list[str]()
        self._supervisor = Supervisor(make, wanted, self._notices.append)

    def begin(self) -> tuple[str, dict[str, Any], dict[str, Any]]:
        """The machine's name, what an engine says of itself, and what its numbers come from."""
        name = socket.gethostname()
        try:
            machine = _machine(self._model)
        except OSError as error:
            raise EngineError(f"{name} does not have the model where this machine has it: {error}") from error
        about = self._supervisor.begin()
        # How much it wants to hold at once depends on the machine's cores, and changes no number.
        return name, about, machine | {"engine": {what: of for what, of in about.items() if what != "in_flight"}}

    def score(self, rows: list[R]) -> Iterator[tuple[list[Any], _State]]:
        """The rows' answers, in order, and how the engine fares."""
        answers: list[Any] = []
        try:
            for _, answer in self._supervisor.answers(rows):
                answers.append(answer)
                if len(answers) == _BATCH:
                    yield answers, self._state()
                    answers = []
        except EngineError as error:
            yield answers, self._state(str(error))
        else:
            yield answers, self._state()

    def _state(self, error: str | None = None) -> _State:
        notices, self._notices[:] = list(self._notices), []
        return _State(self._supervisor.restarts, self._supervisor.waited, notices, error)


@dataclass(slots=True, eq=False)
class _Worker:
    """The driver's end of an actor. ready: what `begin` will say, None once it has. shards: that it has to score."""

    actor: Any
    ready: Any
    name: str = "a machine that is not known yet"
    shards: int = 0


@dataclass(slots=True, eq=False)
class _Shard:
    """Rows under way, in Ray's object store. answered: how many answers were handed on; stream: of answers, from the
    worker, None while no worker has the shard; done: whether all are there."""

    rows: Any
    answered: int = 0
    worker: _Worker | None = None
    stream: Any = None
    done: bool = False


class RayWorkers(Generic[R]):
    """What a Supervisor is to one engine, to one on each worker of a Ray cluster. A context manager.

    make, wanted, notice: as Supervisor has them; make is called on the workers. model: a folder that must be on all
    machines, the same. shard_rows: rows that go to a worker at once. workers: how many, by default one for each GPU
    or, without any, for each machine; those that find no room wait for a machine that joins the cluster.

    restarts: engines started after the first of each worker, and workers started for lost ones. waited: seconds in
    which an engine waited for the rows of its shard, on average.
    """

    def __init__(
        self,
        make: Callable[[], Engine],
        wanted: Callable[[R], bool],
        notice: Callable[[str], None] = lambda text: None,
        *,
        model: Path,
        shard_rows: int,
        workers: int | None = None,
        verbose: bool = False,
    ) -> None:
        self._make, self._wanted, self._notice = make, wanted, notice
        self._model, self._shard_rows, self._asked, self._verbose = model, shard_rows, workers, verbose
        self._workers: list[_Worker] = []
        self._shards: deque[_Shard] = deque()  # under way, in order
        self._states: dict[_Worker, _State] = {}
        self._about: dict[str, Any] | None = None
        self._expected: dict[str, Any] = {}  # of every worker, by what a user calls it
        self._lost = self._lost_in_a_row = self._failed_starts = 0
        self._connected = False

    def __enter__(self) -> RayWorkers[R]:
        return self

    def __exit__(self, *exc: object) -> None:
        for worker in self._workers:
            ray.kill(worker.actor)
        if self._connected:
            ray.shutdown()

    @property
    def restarts(self) -> int:
        """Engines and workers that were started for others."""
        return self._lost + sum(state.restarts for state in self._states.values())

    @property
    def waited(self) -> float:
        """Seconds in which an engine waited for rows, on average."""
        return sum(state.waited for state in self._states.values()) / max(1, len(self._states))

    def begin(self) -> dict[str, Any]:
        """Start the workers; what there is to know of their engines, once the first is there.

        EngineError where there is no cluster, or none of them can be started.
        """
        if not ray.is_initialized():
            self._connect()
        number, self._options, self._per_machine = _room(self._asked)
        self._expected = _machine(self._model)
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

    def answers(self, rows: Iterable[R]) -> Generator[tuple[R, Any], None, None]:
        """Each row with its answer, in order: as Supervisor.answers.

        EngineError where workers are lost and lost, or none is left.
        """
        rows = iter(rows)
        self._shards.clear()
        while True:
            self._hand_out(rows)
            if not self._shards:
                return
            if not self._shards[0].done:
                self._wait()
                continue
            yield from self._answers_of(self._shards[0])
            if self._shards[0].done:
                self._shards.popleft()

    def _hand_out(self, rows: Iterator[R]) -> None:
        """Give every worker all that it may hold: shards that were lost first, then new ones."""
        for shard in self._shards:
            if shard.stream is None and (worker := self._free()):
                self._give(shard, worker)
        while len(self._shards) < _UNDER_WAY * len(self._workers) and (worker := self._free()):
            batch = list(islice(rows, self._shard_rows))
            if not batch:
                return
            self._shards.append(_Shard(ray.put(batch)))
            self._give(self._shards[-1], worker)

    def _free(self) -> _Worker | None:
        """The worker with the least to do, if any may hold one more shard."""
        able = [worker for worker in self._workers if worker.ready is None and worker.shards < _PER_ACTOR]
        return min(able, key=lambda worker: worker.shards, default=None)

    def _give(self, shard: _Shard, worker: _Worker) -> None:
        shard.worker = worker
        shard.stream = worker.actor.score.options(num_returns="streaming").remote(shard.rows)
        worker.shards += 1

    def _wait(self) -> None:
        """Wait until a worker is there, or a shard is done, or either is lost."""
        running = {
            shard.stream.completed(): shard for shard in self._shards if shard.stream is not None and not shard.done
        }
        starting = {worker.ready: worker for worker in self._workers if worker.ready is not None}
        found, _ = ray.wait([*running, *starting], num_returns=1, fetch_local=False)
        for ref in found:
            worker = starting.get(ref) or running[ref].worker
            assert worker is not None
            try:
                said = ray.get(ref)
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
                    self._welcome(worker, *said)
                else:
                    running[ref].done = True
                    worker.shards -= 1
                    self._lost_in_a_row = 0

    def _answers_of(self, shard: _Shard) -> Iterator[tuple[R, Any]]:
        """The answers of a shard that is done, from the first that was not handed on; where they are not all to be had,
        it is no longer done."""
        worker, rows, at = shard.worker, ray.get(shard.rows), 0
        assert worker is not None
        for ref in shard.stream:
            try:
                answers, state = ray.get(ref)
            except RayTaskError:
                raise
            except RayError:  # they lay on a machine that is gone
                break
            for notice in state.notices:
                self._notice(f"{worker.name}: {notice}")
            self._states[worker] = state
            for row, answer in zip(rows[at : at + len(answers)], answers):
                at += 1
                if at > shard.answered:
                    shard.answered += 1
                    yield row, answer
            if state.error is not None:
                self._drop(worker, state.error)
        if shard.answered < len(rows):
            shard.stream, shard.done = None, False

    def _start(self) -> None:
        actor = ray.remote(_Actor).options(**self._options).remote(
            self._make, self._wanted, self._model, self._per_machine
        )  # fmt: skip
        self._workers.append(_Worker(actor, actor.begin.remote()))

    def _welcome(self, worker: _Worker, name: str, about: dict[str, Any], described: dict[str, Any]) -> None:
        """A worker is ready: it has to score as the first one does, and with what this machine has."""
        worker.name, worker.ready, self._failed_starts = name, None, 0
        different = [what for what, value in self._expected.items() if described[what] != value]
        if different:
            self._drop(worker, f"its {' and '.join(different)} differ from this machine's or other workers'")
            return
        self._expected, self._about = described, self._about or about

    def _replace(self, worker: _Worker, error: RayError) -> None:
        """A worker is lost: another one is started."""
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
        """A worker is of no use; EngineError where it was the last."""
        if worker not in self._workers:  # lost before it could say so
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
    """Of a message with a traceback in it, what it is about."""
    return str(error).strip().rpartition("\n")[2]


def _machine(model: Path) -> dict[str, Any]:
    """What a machine's numbers come from, by what a user calls it: the model's files and the versions."""
    return {"model files": model_fingerprint(model), "versions": versions()}


def _room(asked: int | None) -> tuple[int, dict[str, Any], int]:
    """How many workers there are to be, Ray's options for each, and how many share a machine at most.

    On CPUs all cores are dealt out; Ray has an actor's OpenMP, and its children's, start as many threads as it has
    cores.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    options = {"max_restarts": 0, "scheduling_strategy": "SPREAD"}
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if gpus:
        most = max(int(node.get("GPU", 0)) for node in nodes)
        return asked or gpus, options | {"num_cpus": 1, "num_gpus": 1}, most
    cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    if not cores:
        raise EngineError("--engine ray: the machines of the Ray cluster offer neither a GPU nor a core")
    number = asked or len(cores)
    each = max(1, min(sum(cores) // number, *cores))
    return number, options | {"num_cpus": each}, min(number, max(cores) // each)
