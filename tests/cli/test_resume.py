"""`headrift score` broken off and resumed, and runs of some of the rows. A fake engine, in this process."""

import json
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from headrift.cli import app
from headrift.runs.parts import FolderLock
from headrift.testing import fake_engines
from helpers.fakes import FailAt, must_not_start, raises

N = 23


@pytest.fixture
def work(fake_model, tmp_path, monkeypatch) -> Path:
    """A folder with an input of 23 rows, scored in shards of 5."""
    rows = [{"prompt": f"say {n}", "id": f"id {n}"} for n in range(N)]
    rows[7]["label"] = "evil"
    rows[19]["id"] = "id 3"
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "system.txt").write_text("Be brief.")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("headrift.corpus.config._MIN_SHARD_ROWS", 5)
    return tmp_path


def score(*args: str, model: Path, out: str = "out"):
    options = ["--model", str(model), "--out", out, "--steps", "4", "--system-prompt-file", "system.txt"]
    return CliRunner().invoke(app, ["score", "in.jsonl", *options, *args])


def read(folder: Path, stem: str) -> list[dict]:
    return [row for path in sorted(folder.glob(f"{stem}-*.parquet")) for row in pq.read_table(path).to_pylist()]


def everything(folder: Path) -> tuple[list, list]:
    return [(row["id"], row["score"]) for row in read(folder, "part")], read(folder, "rejects")


def broken_off(model: Path, *args: str, after: int = 20, how=None):
    """A run of which the engine fails at a request, by default with 12 rows answered."""
    with fake_engines(on_submit=FailAt(after, how or raises(RuntimeError("the engine fell over")))):
        return score(*args, model=model)


def test_a_run_goes_on_where_it_broke_off_and_ends_as_an_undisturbed_one(work, fake_model):
    assert score(model=fake_model, out="whole").exit_code == 0
    done = broken_off(fake_model)
    assert done.exit_code == 1
    assert "the engine fell over (10 of 23 rows are in out; rerun with --resume)" in done.stderr
    assert sorted(path.name for path in (work / "out").glob("part-*")) == ["part-00000.parquet", "part-00001.parquet"]
    again = score(model=fake_model)
    assert (again.exit_code, "resume it with --resume" in again.stderr) == (2, True)
    done = score("--resume", model=fake_model)
    assert done.exit_code == 0, done.output
    assert "after 10 of 23 rows" in done.stderr
    assert everything(work / "out") == everything(work / "whole")
    whole, resumed = (json.loads((work / name / "run.json").read_text()) for name in ("whole", "out"))
    for key in ("status", "counts", "settings", "inputs", "model", "comparisons", "shards"):
        assert resumed[key] == whole[key]
    assert [reject["reason"] for reject in read(work / "out", "rejects")] == ["unknown_label", "duplicate_id"]


def test_a_finished_run_is_not_done_again(work, fake_model):
    assert score("--resume", model=fake_model).exit_code == 0  # nothing to resume: a new run
    before = {path.name: path.stat().st_mtime_ns for path in (work / "out").iterdir()}
    with fake_engines(must_not_start):
        done = score("--resume", model=fake_model)
    assert (done.exit_code, "All 23 rows are in out already" in done.stderr) == (0, True)
    assert {path.name: path.stat().st_mtime_ns for path in (work / "out").iterdir()} == before


def test_a_run_that_was_killed_at_its_very_end_is_finished(work, fake_model):
    assert score(model=fake_model).exit_code == 0
    whole = json.loads((work / "out" / "run.json").read_text())
    before = {key: value for key, value in whole.items() if key not in ("counts", "classes", "comparisons")}
    (work / "out" / "run.json").write_text(json.dumps({**before, "status": "running"}))
    (work / "out" / "scores.png").unlink()
    with fake_engines(must_not_start):
        assert score("--resume", model=fake_model).exit_code == 0
    finished = json.loads((work / "out" / "run.json").read_text())
    assert {**finished, "finished": 0, "seconds": 0} == {**whole, "finished": 0, "seconds": 0}
    assert (work / "out" / "scores.png").exists()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--steps", "3"], "--steps was 4 and is 3"),
        (["--window", "2:4"], "--window was 1:4 and is 2:4"),
        (["--save", "text"], "--save was not given and is ['text']"),
        (["--limit", "22"], "--limit was not given and is 22"),
        (["--labels", "attack"], "--labels was not given and is ['attack']"),
        (["--replay"], "--replay was False and is True"),
        (["--column", "category=kind"], "--column was not given"),
    ],
)
def test_another_setting_is_refused_and_named(work, fake_model, args, says):
    broken_off(fake_model)
    done = score("--resume", *args, model=fake_model)
    assert done.exit_code == 2
    assert "the run in out is another one, so its parts would not go together:" in done.stderr
    assert says in done.stderr


def test_what_changes_no_number_may_change(work, fake_model):
    broken_off(fake_model)
    assert score("--resume", "--quiet", model=fake_model).exit_code == 0


def test_another_input_and_another_system_prompt_are_refused(work, fake_model):
    broken_off(fake_model)
    before = (work / "in.jsonl").read_text()
    (work / "in.jsonl").write_text(before.replace("say 22", "say 99"))
    done = score("--resume", model=fake_model)
    assert (done.exit_code, "the input in.jsonl has changed" in done.stderr) == (2, True)
    (work / "in.jsonl").write_text(before)
    (work / "system.txt").write_text("Be long.")
    done = score("--resume", model=fake_model)
    assert (done.exit_code, "the system prompt is another one" in done.stderr) == (2, True)


def test_a_part_that_is_gone_is_noticed(work, fake_model):
    broken_off(fake_model)
    (work / "out" / "part-00001.parquet").unlink()
    done = score("--resume", model=fake_model)
    assert done.exit_code == 2
    assert "part-00001.parquet had" in done.stderr


def test_a_folder_that_another_run_holds_is_refused(work, fake_model):
    (work / "out").mkdir()
    lock = FolderLock(work / "out")
    done = score(model=fake_model)
    lock.release()
    assert done.exit_code == 2
    assert "--out out is in use by another run (process" in done.stderr


def test_what_a_run_leaves_that_was_killed_before_it_began_is_no_hindrance(work, fake_model):
    (work / "out").mkdir()
    (work / "out" / ".lock").write_text("12345\n")
    (work / "out" / ".journal.sqlite.tmp").write_text("half a journal")
    assert score(model=fake_model).exit_code == 0
    assert not list((work / "out").glob(".*"))


@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM])
def test_the_first_interrupt_finishes_the_shard_in_hand(work, fake_model, name):
    done = broken_off(fake_model, after=14, how=lambda: signal.raise_signal(name))
    assert done.exit_code == 130
    assert "Note: finishing the current shard; press again to stop now" in done.stderr
    assert "Interrupted (10 of 23 rows are in out; rerun with --resume)" in done.stderr
    assert json.loads((work / "out" / "run.json").read_text())["status"] == "unfinished"
    assert score("--resume", model=fake_model).exit_code == 0
    assert len(read(work / "out", "part")) == 21


def test_the_second_interrupt_stops_at_once(work, fake_model):
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)

    done = broken_off(fake_model, after=14, how=twice)
    assert done.exit_code == 130
    assert "Interrupted (5 of 23 rows" in done.stderr
    assert not list((work / "out").glob(".*"))


def test_some_of_the_rows(work, fake_model):
    """Two shards of a sample have all of the sample, and each row scores as it does in the whole."""
    assert score(model=fake_model, out="whole").exit_code == 0
    whole = dict(everything(work / "whole")[0])
    assert score("--sample", "9", "--seed", "5", model=fake_model, out="nine").exit_code == 0
    for i in (1, 2):
        done = score("--sample", "9", "--seed", "5", "--shard", f"{i}/2", model=fake_model, out=f"shard{i}")
        assert done.exit_code == 0, done.output
    nine, first, second = (everything(work / name) for name in ("nine", "shard1", "shard2"))
    assert len(nine[0]) + len(nine[1]) == 9
    assert sorted(first[0] + second[0]) == sorted(nine[0])
    assert dict(nine[0]).items() <= whole.items()
    run = json.loads((work / "shard2" / "run.json").read_text())
    assert (run["settings"]["sample"], run["settings"]["seed"], run["settings"]["shard"]) == (9, 5, "2/2")
