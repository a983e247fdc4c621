"""Every row gets one answer, in order, whatever engines do; and what a child process does when either end goes."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from headrift.corpus import worker
from headrift.corpus.config import ScoreConfig
from headrift.corpus.job import ScoreJob
from headrift.corpus.worker import EngineDied, EngineProcess, PoisonRow, Supervisor
from headrift.errors import EngineError
from headrift.prepare import Prepared
from headrift.requests import ProbeRequest


class Engine:
    """Answers numbers with their squares, `at_once` in flight; `deadly`: which it dies of, in which of its lives."""

    def __init__(self, life: int, deadly: Callable[[int, int], bool], at_once: int = 8) -> None:
        self.about = {"in_flight": at_once}
        self.waited, self.steps_run = 1.0, 0
        self._life, self._deadly, self._at_once = life, deadly, at_once
        self.closed = False

    def score(self, rows: Iterable[int]) -> Iterator[int]:
        rows = iter(rows)
        while held := list(itertools.islice(rows, self._at_once)):
            if any(self._deadly(row, self._life) for row in held):
                raise EngineDied(f"of one of {len(held)}")
            yield from (row * row for row in held)

    def close(self) -> None:
        self.closed = True


def supervised(
    deadly: Callable[[int, int], bool], request_of=lambda row: row, **options
) -> tuple[Supervisor, list[Engine]]:
    lives: list[Engine] = []

    def start() -> Engine:
        lives.append(Engine(len(lives), deadly, **options))
        return lives[-1]

    return Supervisor(start, request_of), lives


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(worker, "_FIRST_PAUSE", 0.0)


def test_an_engine_that_lives_answers_everything():
    kept, lives = supervised(lambda row, life: False)
    with kept:
        assert list(kept.answers(range(100))) == [(n, n * n) for n in range(100)]
    assert (len(lives), kept.restarts, lives[0].closed, kept.waited) == (1, 0, True, 1.0)


def test_rows_that_need_no_engine_keep_their_places_and_start_none():
    kept, lives = supervised(lambda row, life: False, request_of=lambda row: row if row % 3 == 0 else None)
    with kept:
        assert list(kept.answers([1, 2])) == [(1, None), (2, None)]
        assert lives == []
        assert list(kept.answers(range(50))) == [(n, n * n if n % 3 == 0 else None) for n in range(50)]
        assert list(kept.answers([])) == []


@pytest.mark.parametrize("poison", [{0}, {99}, {41}, {7, 8}, {16, 17, 18, 60}, {3, 50, 97}])
def test_rows_that_kill_are_found_and_all_others_answered(poison):
    kept, lives = supervised(lambda row, life: row in poison)
    with kept:
        answers = list(kept.answers(range(100)))
    assert [row for row, _ in answers] == list(range(100))
    assert {row for row, answer in answers if isinstance(answer, PoisonRow)} == poison
    assert all(answer == row * row for row, answer in answers if row not in poison)
    assert all(engine.closed for engine in lives)
    assert kept.waited == len(lives)
    # 8 are suspects: 3 halvings, and one trial more of the last one, for each killer.
    assert len(lives) <= 1 + 5 * len(poison)


@pytest.mark.parametrize("life", [0, 1, 2, 3])
def test_a_row_that_kills_now_and_then_is_answered(life):
    kept, _ = supervised(lambda row, at: row == 41 and at <= life)
    with kept:
        answers = list(kept.answers(range(100)))
    assert answers == [(n, n * n) for n in range(100)]


def test_an_engine_that_dies_of_everything_is_given_up():
    kept, lives = supervised(lambda row, life: life > 0 or row == 50)
    with kept, pytest.raises(EngineError, match=r"the engine died 40 times and scored nothing in between: of one of"):
        list(kept.answers(range(100)))
    assert len(lives) == 40


def test_an_engine_that_does_not_start_again_is_given_up():
    notices = []
    starts = itertools.count()

    def start() -> Engine:
        if next(starts) > 0:
            raise EngineDied("no memory")
        return Engine(0, lambda row, life: row == 20)

    with (
        Supervisor(start, lambda row: row, notices.append) as kept,
        pytest.raises(EngineError, match="did not start 5 times in a row: no memory"),
    ):
        list(kept.answers(range(100)))
    assert [notice.partition(" (")[0] for notice in notices] == ["the engine died"] + [
        "the engine did not start: no memory"
    ] * 5


def test_what_was_asked_for_and_cannot_be_is_said_at_once():
    def start() -> Engine:
        raise EngineError("no such model")

    with Supervisor(start, lambda row: row) as kept, pytest.raises(EngineError, match="no such model"):
        kept.begin()


# ------------------------------------------------------------------------------------------------------ the process


@pytest.fixture
def child(faulty, fake_model, tmp_path) -> Iterator[EngineProcess]:
    with_pause = EngineProcess(partial(faulty.FaultyEngine, tmp_path, fake_model, 0.01))
    yield with_pause
    with_pause.close()


def requests(n: int) -> list[Prepared]:
    texts = [list(f"prompt {i}".encode()) for i in range(n)]
    made = [ProbeRequest(ids, {"system": (0, 3), "user": (0, len(ids))}, 4) for ids in texts]
    return [Prepared(i, f"in:{i}", request, (), b"", b"") for i, request in enumerate(made)]


def test_a_child_answers_streams_of_rows_one_after_another(child, faulty, fake_model, tmp_path):
    assert child.about["layers"] == faulty.LAYERS
    here = faulty.FaultyEngine(tmp_path, fake_model)
    for n in (70, 0, 1, 33):
        for theirs, ours in zip(child.score(iter(requests(n))), here.score(requests(n)), strict=True):
            assert (theirs.id, theirs.score) == (ours.id, ours.score)


def test_rows_are_taken_as_they_are_needed(child):
    taken = 0

    def endless():
        nonlocal taken
        for row in itertools.cycle(requests(7)):
            taken += 1
            yield row

    answers = child.score(endless())
    assert len(list(itertools.islice(answers, 100))) == 100
    assert taken <= 100 + child.about["in_flight"] + 2 * 32  # what may be in flight, and a message at either end


def test_whatever_an_engine_has_to_hold_it_gets(child, monkeypatch):
    """It holds 20 rows before it answers one; less than that may be under way of itself."""
    monkeypatch.setattr("headrift.corpus.worker._MOST_BYTES", 1)
    monkeypatch.setattr("headrift.corpus.worker._BATCH", 1)
    child.about["in_flight"] = 2
    assert len(list(child.score(iter(requests(50))))) == 50


def test_how_it_died_is_said(faulty, fake_model, tmp_path):
    def killed() -> None:
        child = EngineProcess(partial(faulty.FaultyEngine, tmp_path, fake_model))
        os.kill(child.pid, signal.SIGKILL)
        list(child.score(requests(5)))

    with pytest.raises(EngineDied, match="ended by SIGKILL: the machine may have run out of memory"):
        killed()
    with pytest.raises(EngineDied, match="ended with exit code 9"):
        EngineProcess(faulty.DyingEngine)
    with pytest.raises(EngineError, match="there is no such engine"):
        EngineProcess(faulty.BrokenEngine)


def test_a_slow_engine_that_takes_steps_is_waited_for(faulty, fake_model, tmp_path):
    """Its 25 steps take longer than the patience with it."""
    child = EngineProcess(partial(faulty.SlowEngine, tmp_path, fake_model, 25, 0.2, moves=True), patience=4.0)
    assert len(list(child.score(requests(3)))) == 3
    child.close()
    assert child.steps_run > 0


def test_an_engine_that_is_alive_and_takes_no_step_is_given_up(faulty, fake_model, tmp_path):
    """Its thread that gives the signs runs on all the while."""
    child = EngineProcess(partial(faulty.SlowEngine, tmp_path, fake_model, 1, 600.0, moves=False), patience=0.5)
    with pytest.raises(EngineDied, match=r"it did nothing for 0\.5 s"):
        list(child.score(requests(3)))
    child.close()
    assert not is_alive(child.pid)


def test_a_process_that_reads_nothing_any_more_is_given_up(faulty, fake_model, tmp_path):
    """More is sent to it than the socket holds."""
    child = EngineProcess(partial(faulty.FaultyEngine, tmp_path, fake_model), patience=0.5)
    child.about["in_flight"] = 10**6
    os.kill(child.pid, signal.SIGSTOP)
    many = (replace(one, request=replace(one.request, prompt_ids=[7] * 10**6)) for one in requests(100))
    with pytest.raises(EngineDied, match=r"it did nothing for 0\.5 s"):
        list(child.score(many))
    child.close()
    assert not is_alive(child.pid)


def test_a_process_that_stops_in_the_middle_of_an_answer_is_given_up(faulty, fake_model, tmp_path):
    child = EngineProcess(partial(faulty.WordyEngine, tmp_path, fake_model), patience=0.5)
    answers = child.score(requests(100))
    next(answers)
    time.sleep(0.5)  # it writes until the socket is full
    os.kill(child.pid, signal.SIGSTOP)
    with pytest.raises(EngineDied, match=r"it did nothing for 0\.5 s"):
        list(answers)
    child.close()


@pytest.mark.parametrize("how", [pytest.param("HANG", marks=pytest.mark.nightly), "STOP"])
def test_a_row_on_which_the_engine_hangs_is_rejected_and_the_others_scored(how, faulty, fake_model, tmp_path):
    lines = [f"prompt {n}" for n in range(12)]
    lines[7] = f"{how} here"
    (tmp_path / "in.txt").write_text("\n".join(lines))
    engine = partial(EngineProcess, partial(faulty.FaultyEngine, tmp_path, fake_model), patience=1.0)
    settings = ScoreConfig(
        (str(tmp_path / "in.txt"),), fake_model, tmp_path / "out", system_prompt="Be brief.", steps=4
    )
    with ScoreJob(settings, engine=engine) as job:
        job.start()
        assert job.run()
    (rejected,) = pq.read_table(tmp_path / "out" / "rejects-00000.parquet").to_pylist()
    assert (rejected["row"], rejected["reason"]) == (8, "engine_died")
    assert "(it did nothing for 1 s)" in rejected["detail"]
    counts = json.loads((tmp_path / "out" / "run.json").read_text())["counts"]
    assert counts["rows"] == 12
    assert counts["scored"] == 11


def test_a_child_does_not_outlive_its_parent(faulty, fake_model, tmp_path):
    """Nor do the processes that the child started itself."""
    code = (
        "import sys, time, faulty\nfrom functools import partial\nfrom pathlib import Path\n"
        "from headrift.corpus.worker import EngineProcess\n"
        "child = EngineProcess(partial(faulty.Parent, *map(Path, sys.argv[1:])))\nprint(child.pid, flush=True)\n"
        "time.sleep(600)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), str(fake_model)], stdout=subprocess.PIPE, text=True
    )
    pid = int(parent.stdout.readline())
    grandchild = int((tmp_path / "grandchild.pid").read_text())
    assert is_alive(pid)
    assert is_alive(grandchild)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while (is_alive(pid) or is_alive(grandchild)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(pid)
    assert not is_alive(grandchild)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_long_run_of_rows_without_a_request_does_not_pile_up():
    read = 0

    def rows() -> Iterator[int]:
        nonlocal read
        while read < 20_000:
            yield read
            read += 1

    kept, _ = supervised(lambda row, life: False, request_of=lambda row: row if row % 5_000 == 10 else None)
    with kept:
        for row, answer in kept.answers(rows()):
            assert read - row <= 2 * worker._MOST_SKIPPED
            assert answer == (row * row if row % 5_000 == 10 else None)
    assert read == 20_000
