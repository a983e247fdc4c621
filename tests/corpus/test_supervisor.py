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

from headrift.corpus import supervisor
from headrift.corpus.child import Child, EngineDied
from headrift.corpus.job import ScoreJob
from headrift.corpus.rows import Row
from headrift.corpus.settings import Settings
from headrift.corpus.supervisor import Killer, Supervisor
from headrift.errors import EngineError
from headrift.scorer import Prompt


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
    deadly: Callable[[int, int], bool], wanted=lambda row: True, **options
) -> tuple[Supervisor, list[Engine]]:
    lives: list[Engine] = []

    def start() -> Engine:
        lives.append(Engine(len(lives), deadly, **options))
        return lives[-1]

    return Supervisor(start, wanted), lives


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(supervisor, "_FIRST_PAUSE", 0.0)


def test_an_engine_that_lives_answers_everything():
    kept, lives = supervised(lambda row, life: False)
    with kept:
        assert list(kept.answers(range(100))) == [(n, n * n) for n in range(100)]
    assert (len(lives), kept.restarts, lives[0].closed, kept.waited) == (1, 0, True, 1.0)


def test_rows_that_need_no_engine_keep_their_places_and_start_none():
    kept, lives = supervised(lambda row, life: False, wanted=lambda row: row % 3 == 0)
    with kept:
        assert list(kept.answers([1, 2])) == [(1, None), (2, None)]
        assert lives == []
        assert list(kept.answers(range(50))) == [(n, n * n if n % 3 == 0 else None) for n in range(50)]
        assert list(kept.answers([])) == []


@pytest.mark.parametrize("killers", [{0}, {99}, {41}, {7, 8}, {16, 17, 18, 60}, {3, 50, 97}])
def test_rows_that_kill_are_found_and_all_others_answered(killers):
    kept, lives = supervised(lambda row, life: row in killers)
    with kept:
        found = list(kept.answers(range(100)))
    assert [row for row, _ in found] == list(range(100))
    assert {row for row, answer in found if isinstance(answer, Killer)} == killers
    assert all(answer == row * row for row, answer in found if row not in killers)
    assert all(engine.closed for engine in lives)
    assert kept.waited == len(lives)
    # 8 are suspects: 3 halvings, and one trial more of the last one, for each killer.
    assert len(lives) <= 1 + 5 * len(killers)


@pytest.mark.parametrize("life", [0, 1, 2, 3])
def test_a_row_that_kills_now_and_then_is_answered(life):
    kept, _ = supervised(lambda row, at: row == 41 and at <= life)
    with kept:
        found = list(kept.answers(range(100)))
    assert found == [(n, n * n) for n in range(100)]


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
        Supervisor(start, lambda row: True, notices.append) as kept,
        pytest.raises(EngineError, match="did not start 5 times in a row: no memory"),
    ):
        list(kept.answers(range(100)))
    assert [notice.partition(" (")[0] for notice in notices] == ["the engine died"] + [
        "the engine did not start: no memory"
    ] * 5


def test_what_was_asked_for_and_cannot_be_is_said_at_once():
    def start() -> Engine:
        raise EngineError("no such model")

    with Supervisor(start, lambda row: True) as kept, pytest.raises(EngineError, match="no such model"):
        kept.begin()


# ------------------------------------------------------------------------------------------------------ the process


@pytest.fixture
def child(straw, tmp_path) -> Iterator[Child]:
    with_pause = Child(partial(straw.StrawEngine, tmp_path, 0.01))
    yield with_pause
    with_pause.close()


def rows(n: int) -> list[Row]:
    return [Row("in.txt", i, f"in:{i}", None, None, Prompt(prompt=f"prompt {i}")) for i in range(n)]


def test_a_child_answers_streams_of_rows_one_after_another(child, straw, tmp_path):
    assert child.about["layers"] == straw.LAYERS
    here = straw.StrawEngine(tmp_path)
    for n in (70, 0, 1, 33):
        for theirs, ours in zip(child.score(iter(rows(n))), here.score(rows(n)), strict=True):
            assert type(theirs) is type(ours)
            if isinstance(ours, dict):
                assert (theirs["id"], theirs["score"]) == (ours["id"], ours["score"])


def test_rows_are_taken_as_they_are_needed(child):
    taken = 0

    def endless():
        nonlocal taken
        for row in itertools.cycle(rows(7)):
            taken += 1
            yield row

    answers = child.score(endless())
    assert len(list(itertools.islice(answers, 100))) == 100
    assert taken <= 100 + child.about["in_flight"] + 2 * 32  # what may be in flight, and a message at either end


def test_whatever_an_engine_has_to_hold_it_gets(child, monkeypatch):
    """It holds 20 rows before it answers one; less than that may be under way of itself."""
    monkeypatch.setattr("headrift.corpus.child._MOST_BYTES", 1)
    monkeypatch.setattr("headrift.corpus.child._BATCH", 1)
    child.about["in_flight"] = 2
    assert len(list(child.score(iter(rows(50))))) == 50


def test_how_it_died_is_said(straw, tmp_path):
    def killed() -> None:
        child = Child(partial(straw.StrawEngine, tmp_path))
        os.kill(child.pid, signal.SIGKILL)
        list(child.score(rows(5)))

    with pytest.raises(EngineDied, match="ended by SIGKILL: the machine may have run out of memory"):
        killed()
    with pytest.raises(EngineDied, match="ended with exit code 9"):
        Child(straw.DyingEngine)
    with pytest.raises(EngineError, match="there is no straw left"):
        Child(straw.BrokenEngine)


def test_a_slow_engine_that_takes_steps_is_waited_for(straw, tmp_path):
    """Its 25 steps take longer than the patience with it."""
    child = Child(partial(straw.SlowEngine, tmp_path, 25, 0.2, moves=True), patience=4.0)
    assert len(list(child.score(rows(3)))) == 3
    child.close()
    assert child.steps_run > 0


def test_an_engine_that_is_alive_and_takes_no_step_is_given_up(straw, tmp_path):
    """Its thread that gives the signs runs on all the while."""
    child = Child(partial(straw.SlowEngine, tmp_path, 1, 600.0, moves=False), patience=0.5)
    with pytest.raises(EngineDied, match=r"it did nothing for 0\.5 s"):
        list(child.score(rows(3)))
    child.close()
    assert not is_alive(child.pid)


def test_a_process_that_reads_nothing_any_more_is_given_up(straw, tmp_path):
    """More is sent to it than the socket holds."""
    child = Child(partial(straw.StrawEngine, tmp_path), patience=0.5)
    child.about["in_flight"] = 10**6
    os.kill(child.pid, signal.SIGSTOP)
    many = (replace(row, prompt=Prompt(prompt="x" * 10**6)) for row in rows(100))
    with pytest.raises(EngineDied, match=r"it did nothing for 0\.5 s"):
        list(child.score(many))
    child.close()
    assert not is_alive(child.pid)


def test_a_process_that_stops_in_the_middle_of_an_answer_is_given_up(straw, tmp_path):
    child = Child(partial(straw.WordyEngine, tmp_path), patience=0.5)
    answers = child.score(rows(100))
    next(answers)
    time.sleep(0.5)  # it writes until the socket is full
    os.kill(child.pid, signal.SIGSTOP)
    with pytest.raises(EngineDied, match=r"it did nothing for 0\.5 s"):
        list(answers)
    child.close()


@pytest.mark.parametrize("how", [pytest.param("HANG", marks=pytest.mark.nightly), "STOP"])
def test_a_row_on_which_the_engine_hangs_is_rejected_and_the_others_scored(how, straw, straw_model, tmp_path):
    lines = [f"prompt {n}" for n in range(12)]
    lines[7] = f"{how} here"
    (tmp_path / "in.txt").write_text("\n".join(lines))
    engine = partial(Child, partial(straw.StrawEngine, tmp_path), patience=1.0)
    settings = Settings((str(tmp_path / "in.txt"),), straw_model, tmp_path / "out", system_prompt="Be brief.", steps=4)
    with ScoreJob(settings, engine=engine) as job:
        job.start()
        assert job.run()
    (rejected,) = [
        row for row in pq.read_table(tmp_path / "out" / "rejects-00000.parquet").to_pylist()
        if row["reason"] != "prompt_too_long"
    ]  # fmt: skip
    assert (rejected["row"], rejected["reason"]) == (8, "engine_died")
    assert "(it did nothing for 1 s)" in rejected["detail"]
    counts = json.loads((tmp_path / "out" / "run.json").read_text())["counts"]
    assert counts["rows"] == 12
    assert counts["scored"] + sum(counts["rejected"].values()) == 12


def test_a_child_does_not_outlive_its_parent(straw, tmp_path):
    """Nor do the processes that the child started itself."""
    code = (
        "import time, straw, pathlib\nfrom functools import partial\nfrom headrift.corpus.child import Child\n"
        f"child = Child(partial(straw.Parent, pathlib.Path({str(tmp_path)!r})))\nprint(child.pid, flush=True)\n"
        "time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
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
