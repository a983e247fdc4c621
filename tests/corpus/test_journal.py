"""The journal, the lock, which rows a run takes, and what makes two runs different ones."""

import signal
import sqlite3
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrift.corpus.config import Selection, differences, parse_shard, rows_per_shard
from headrift.corpus.job import stopped_by_signals
from headrift.runs.folder import JobError
from headrift.runs.parts import JOURNAL, FinishedShard, FolderLock, Journal

# ---------------------------------------------------------------------------------------------------------- journal


def test_finished_shards_and_their_ids_are_there_when_it_is_opened_again(tmp_path):
    with Journal(tmp_path, {"settings": {"steps": 4}}) as journal:
        assert [journal.take_id(name, row) for row, name in enumerate(["a", "b", "a", "c"])] == [
            True,
            True,
            False,
            True,
        ]
        journal.record(FinishedShard(0, 1, 1, 100, 50), stop=2)
        assert not journal.take_id("c", 4)  # of rows read ahead, not noted yet
    with Journal(tmp_path) as journal:
        assert journal.identity == {"settings": {"steps": 4}}
        assert journal.finished() == [FinishedShard(0, 1, 1, 100, 50)]
        assert journal.finished()[0].rows == 2
        assert [journal.take_id(name, 2) for name in "abc"] == [False, False, True]


def test_a_shard_that_cannot_be_noted_is_not_noted_in_part(tmp_path):
    with Journal(tmp_path, {}) as journal:
        journal.take_id("a", 0)
        journal.record(FinishedShard(0, 1, 0, 10, 0), stop=1)
        journal.take_id("b", 1)
        with pytest.raises(JobError, match="damaged"):
            journal.record(FinishedShard(0, 1, 0, 10, 0), stop=2)  # its number is taken
    with Journal(tmp_path) as journal:
        assert [journal.take_id(name, 0) for name in "ab"] == [False, True]


def test_a_file_that_is_no_journal(tmp_path):
    (tmp_path / JOURNAL).write_text("something else, and long enough not to be empty" * 100)
    with pytest.raises(JobError, match="choose another folder"):
        Journal(tmp_path)


def test_a_journal_of_another_version(tmp_path):
    Journal(tmp_path, {}).__exit__()
    with sqlite3.connect(tmp_path / JOURNAL) as database:
        database.execute("UPDATE job SET format = 99")
    with pytest.raises(JobError, match="another version"):
        Journal(tmp_path)


def test_a_folder_is_one_runs_and_free_again_when_that_is_dead(tmp_path):
    code = "from pathlib import Path; from headrift.runs.parts import FolderLock; "
    code += f"lock = FolderLock(Path({str(tmp_path)!r})); print('held', flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(JobError, match=rf"in use by another run \(process {holder.pid}\)"):
        FolderLock(tmp_path)
    holder.kill()
    holder.wait()
    own = FolderLock(tmp_path)
    own.release()
    own.release()
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------------- selection


def taken(selection: Selection, total: int) -> list[int]:
    return [number for number, taken in enumerate(selection.selected(total)) if taken]


@given(
    st.integers(0, 200),
    st.none() | st.integers(1, 250),
    st.none() | st.integers(1, 250),
    st.integers(1, 7),
    st.integers(0, 5),
)
def test_shards_are_disjoint_complete_and_as_many_as_counted(total, limit, sample, n, seed):
    whole = taken(Selection(sample=sample, seed=seed), total)
    assert len(whole) == (total if sample is None else min(sample, total))
    parts = [taken(Selection(sample=sample, seed=seed, shard=(i + 1, n)), total) for i in range(n)]
    assert sorted(number for part in parts for number in part) == whole
    for i, part in enumerate(parts):
        limited = Selection(limit=limit, sample=sample, seed=seed, shard=(i + 1, n))
        assert taken(limited, total) == part[:limit]
        assert limited.count(total) == len(part[:limit])
        if limited.max_read is not None:
            assert taken(limited, min(total, limited.max_read)) == part[:limit]


def test_a_sample_is_of_the_whole_input_and_hangs_on_its_seed():
    draws = [taken(Selection(sample=100, seed=seed), 10_000) for seed in range(20)]
    assert draws[3] == taken(Selection(sample=100, seed=3), 10_000)
    assert len({tuple(draw) for draw in draws}) == 20
    numbers = [number for draw in draws for number in draw]
    # 2,000 draws from 0..9999 have a mean of 5,000 with a standard error of 65.
    assert abs(sum(numbers) / len(numbers) - 5000) < 400


@pytest.mark.parametrize(("text", "result"), [("1/1", (1, 1)), ("2/8", (2, 8)), (" 8/8 ", (8, 8))])
def test_a_shard_is_read(text, result):
    assert parse_shard(text) == result


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/", "a/b", "1/2/3", "-1/2"])
def test_what_is_no_shard(text):
    with pytest.raises(ValueError, match="i/n with 1 <= i <= n"):
        parse_shard(text)


def test_shards_are_neither_tiny_nor_huge():
    assert [rows_per_shard(n) for n in (1, 10_000, 1_000_000, 3_000_000, 10**9)] == [1000, 1000, 1000, 3000, 10_000]


# ---------------------------------------------------------------------------------------------------------- identity


def identity(**changes) -> dict:
    settings = {"steps": 12, "system_prompt": "s", "system_prompt_sha256": "1", "save": ["text"], "sample": None}
    inputs = [{"name": "a.txt", "bytes": 10, "sha256": "x"}, {"name": "b.txt", "bytes": 10, "sha256": "y"}]
    engine = {"dtype": "float32", "chat_template_sha256": "t"}
    return {"settings": settings, "inputs": inputs, "model": {"fingerprint": "m"}, "engine": engine} | changes


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, []),
        ({"engine": None}, []),
        ({"settings": {**identity()["settings"], "steps": 8}}, ["--steps was 12 and is 8"]),
        # A run that was begun before there was the option goes on.
        ({"settings": {**identity()["settings"], "compile": False}}, []),
        ({"settings": {**identity()["settings"], "compile": True}}, ["--compile was not given and is True"]),
        ({"settings": {**identity()["settings"], "sample": 5}}, ["--sample was not given and is 5"]),
        ({"settings": {**identity()["settings"], "save": []}}, ["--save was ['text'] and is not given"]),
        ({"settings": {**identity()["settings"], "system_prompt_sha256": "2"}}, ["the system prompt is another one"]),
        ({"model": {"fingerprint": "n"}}, ["the model is another one, or its files"]),
        ({"engine": {"dtype": "bfloat16", "chat_template_sha256": "t"}}, ["the engine is another one: its dtype"]),
        ({"inputs": identity()["inputs"][:1]}, ["the input files are others: 1 gone (b.txt)"]),
        ({"inputs": identity()["inputs"][::-1]}, ["the input files are others: in another order"]),
        (
            {"inputs": [identity()["inputs"][0], {"name": "b.txt", "bytes": 11, "sha256": "z"}]},
            ["the input b.txt has changed: 10 bytes then, 11 now"],
        ),
    ],
)
def test_what_differs_is_named(changes, says):
    result = differences(identity(), identity(**changes))
    assert len(result) == len(says)
    assert all(line.startswith(start) for line, start in zip(result, says, strict=True))


# -------------------------------------------------------------------------------------------------------- interrupts


def test_the_first_signal_asks_and_the_second_interrupts():
    notices = []
    before = signal.getsignal(signal.SIGTERM)
    with stopped_by_signals(lambda: notices.append(1)) as stopped:
        assert not stopped()
        signal.raise_signal(signal.SIGTERM)
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert notices == [1]
    assert signal.getsignal(signal.SIGTERM) is before
