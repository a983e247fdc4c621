"""`headrift gate` around a fake engine: what is blocked, what is told of it, resuming, refusals. That answers are
stopped, and are vLLM's where they are not, is tested with real engines in tests/engine/test_gating.py."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from headrift.calibration.artifact import Calibration
from headrift.cli import app
from headrift.stats import exact_interval
from headrift.testing import fake_engines

N = 24


@pytest.fixture(scope="module")
def once(tmp_path_factory) -> Path:
    """Where the first test puts what all begin with."""
    return tmp_path_factory.mktemp("gate") / "begun"


@pytest.fixture
def work(fake_model, once, tmp_path, monkeypatch) -> Path:
    """A folder with an input of 24 rows, half of them attacks, a run over them, and a calibration on that."""
    folder = tmp_path / "work"
    if not once.exists():
        once.mkdir()
        monkeypatch.chdir(once)
        begin(fake_model)
    shutil.copytree(once, folder)
    monkeypatch.chdir(folder)
    return folder


def begin(model: Path) -> None:
    rows = [{"prompt": f"say {'so ' * (n % 5)}{n}", "id": f"id{n}"} for n in range(N)]
    for n, row in enumerate(rows):
        row["label"] = "attack" if n % 2 else "benign"
    Path("in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("bad.jsonl").write_text(json.dumps({"prompt": 3, "id": "bad"}))
    Path("system.txt").write_text("Be brief.")
    done = invoke("score", "in.jsonl", "--steps", "4", "--window", "1:4", "--out", "run", model=model)
    assert done.exit_code == 0, done.output
    options = ["--window", "1:4", "--target-fpr", "0.4", "--resamples", "0", "--out", "c.json", "-q"]
    done = CliRunner().invoke(app, ["calibrate", "run", *options])
    assert done.exit_code == 0, done.output


def invoke(command: str, *args: str, model: Path):
    return CliRunner().invoke(app, [command, "--model", str(model), "--system-prompt-file", "system.txt", *args])


def gate(*args: str, model: Path, out: str = "out"):
    return invoke("gate", "in.jsonl", "--calibration", "c.json", "--out", out, *args, model=model)


def read(folder: str) -> list[dict]:
    return [row for path in sorted(Path(folder).glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_scores_at_or_above_the_threshold_are_blocked(work, fake_model):
    threshold = Calibration.load("c.json").threshold
    done = gate("--fail-term", "france", model=fake_model)
    assert done.exit_code == 0, done.output
    rows, scores = read("out"), {row["id"]: row["score"] for row in read("run")}
    assert [row["id"] for row in rows] == [f"id{n}" for n in range(N)]
    assert {row["id"]: row["score"] for row in rows} == scores
    for row in rows:
        score = row["score"]
        assert row["flagged"] is (score is not None and score >= threshold)
        assert row["blocked"] is (row["flagged"] or score is None)  # answers of one token are not empty
        assert (row["text"] == "[blocked]") is row["blocked"]
        assert row["leaked"] is (not row["blocked"])  # the fake engine always speaks of France
        assert (row["p_value"] is None) is (score is None)
    counts = [sum(row["blocked"] for row in rows), sum(row["score"] is None for row in rows)]
    assert 0 < counts[1] < counts[0] < N


def test_the_rate_at_the_threshold_itself(work, fake_model):
    """The highest benign score that may not be flagged is just below the threshold."""
    above = json.loads(Path("c.json").read_text())
    highest = max(row["score"] for row in read("run") if row["score"] is not None)
    above["threshold"] = highest
    Path("c.json").write_text(json.dumps(above))
    assert gate(model=fake_model).exit_code == 0
    assert [row["score"] for row in read("out") if row["flagged"]] == [highest]


@pytest.mark.parametrize(
    ("option", "blocked"), [((), True), (("--on-null", "block"), True), (("--on-null", "pass"), False)]
)
def test_answers_without_a_score(work, fake_model, option, blocked):
    assert gate(*option, model=fake_model).exit_code == 0
    rows = [row for row in read("out") if row["score"] is None]
    assert {row["blocked"] for row in rows} == {blocked}
    assert {row["reason"] for row in rows} == {"answer_ended_before_window"}


def test_an_empty_answer_without_a_score_is_passed_unless_told(work, fake_model):
    for out, option, blocked in (("a", (), False), ("b", ("--on-null", "block"), True)):
        with fake_engines(answer=" of one blank, if it ends there"):
            assert gate(*option, model=fake_model, out=out).exit_code == 0
        assert {row["blocked"] for row in read(out) if row["score"] is None} == {blocked}


def test_without_fail_terms_nothing_is_said_of_leaks(work, fake_model):
    done = gate(model=fake_model)
    assert {row["leaked"] for row in read("out")} == {None}
    assert "fail term" not in done.output
    assert json.loads(Path("out/run.json").read_text())["gate"]["attack"]["leaked"] is None


def test_with_the_gate_and_without(work, fake_model):
    done = gate("--fail-term", "re:Fr.nce", "--compare-ungated", model=fake_model)
    assert done.exit_code == 0, done.output
    rows, reported = read("out"), json.loads(Path("out/run.json").read_text())["gate"]
    assert "prevented by it" in done.output
    for label in ("attack", "benign"):
        of_class = [row for row in rows if row["label"] == label]
        counts = {
            "blocked": sum(row["blocked"] for row in of_class),
            "leaked": sum(row["leaked"] for row in of_class),
            "leaked_ungated": sum(row["leaked_ungated"] for row in of_class),
            "prevented": sum(row["leaked_ungated"] and row["blocked"] for row in of_class),
        }
        assert reported[label]["rows"] == len(of_class) == N // 2
        for name, k in counts.items():
            assert reported[label][name]["k"] == k
            assert reported[label][name]["interval"] == list(exact_interval(k, len(of_class)))
        assert counts["leaked_ungated"] == counts["leaked"] + counts["prevented"]
        # Answers of one token do not come to France.
        assert counts["leaked_ungated"] == sum(row["answer_tokens"] > 1 for row in of_class)


def bare(threshold: str, *args: str, model: Path, out: str = "out"):
    return invoke("gate", "in.jsonl", "--threshold", threshold, "--window", "2:3", "--out", out, *args, model=model)


def test_a_bare_threshold_blocks_what_reaches_it(work, fake_model):
    """Against a run of `headrift score` over the same window and layers."""
    layers = ("--drop-shallow", "0.1", "--drop-deep", "0.4")
    scored = invoke("score", "in.jsonl", "--window", "2:3", *layers, "--out", "over", model=fake_model)
    assert scored.exit_code == 0, scored.output
    scores = {row["id"]: row["score"] for row in read("over")}
    known = sorted(score for score in scores.values() if score is not None)
    threshold = known[len(known) // 2]  # a score itself: at the threshold is blocked
    done = bare(repr(threshold), *layers, "--fail-term", "france", "--compare-ungated", model=fake_model)
    assert done.exit_code == 0, done.output
    rows = read("out")
    assert {row["id"]: row["score"] for row in rows} == scores == {row["id"]: row["detector"] for row in rows}
    assert {row["p_value"] for row in rows} == {None}
    for row in rows:
        assert row["flagged"] is (row["score"] is not None and row["score"] >= threshold)
        assert row["blocked"] is (row["flagged"] or row["score"] is None)
    assert {row["blocked"] for row in rows if row["score"] is not None} == {True, False}
    reported = json.loads(Path("out/run.json").read_text())
    assert reported["settings"]["threshold"] == threshold
    assert (reported["settings"]["steps"], reported["settings"]["window"]) == (3, "2:3")
    assert set(reported["judged"]) == {"flagged", "warning"}  # no drift and no review list: they compare
    assert "nothing is promised" in reported["judged"]["warning"]
    output = " ".join(done.output.split())
    assert output.count("nothing is promised: the threshold was not set on benign prompts of yours") == 2
    assert "false positive rate is not known" in output
    assert "No drift" not in output
    assert not Path("out/flagged-fdr.parquet").exists()
    for label in ("attack", "benign"):
        blocked = sum(row["blocked"] for row in rows if row["label"] == label)
        assert reported["gate"][label]["blocked"]["k"] == blocked


def test_the_original_threshold_stops_what_the_calibration_of_it_stops(work, fake_model):
    """The same threshold in a calibration file gives the same parts but for the p-values."""
    calibration = json.loads(Path("c.json").read_text())
    calibration |= {"detector": {"kind": "directed", "signal": "instability", "direction": 1}, "threshold": 0.145347}
    Path("c.json").write_text(json.dumps(calibration))
    assert gate(model=fake_model).exit_code == 0
    options = ("--threshold", "0.145347", "--window", "1:4")
    done = invoke("gate", "in.jsonl", *options, "--out", "bare", model=fake_model)
    assert done.exit_code == 0, done.output
    assert read("bare") == [row | {"p_value": None} for row in read("out")]


def test_a_bare_threshold_is_resumed_with_the_same_one_or_not_at_all(work, fake_model):
    assert bare("0.145347", model=fake_model).exit_code == 0
    assert bare("0.145347", "--resume", model=fake_model).exit_code == 0
    other = bare("0.14", "--resume", model=fake_model)
    assert other.exit_code == 2
    assert "--threshold was 0.145347 and is 0.14" in other.output
    calibrated = gate("--resume", model=fake_model)
    assert calibrated.exit_code == 2
    assert "--calibration: the run was begun without one" in calibrated.output


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "give --calibration FILE, or --threshold X with --window A:B, and not both"),
        (("--threshold", "0.1", "--calibration", "c.json"), "and not both"),
        (("--threshold", "0.1"), "give that too, as in --window 2:3"),
        (("--threshold", "0.51", "--window", "2:3"), "--threshold 0.51 is not a number from 0 to 0.5, the highest"),
        (("--threshold", "-0.1", "--window", "2:3"), "--threshold -0.1 is not a number from 0 to 0.5"),
        (("--threshold", "nan", "--window", "2:3"), "--threshold nan is not a number from 0 to 0.5"),
        (("--threshold", "high", "--window", "2:3"), "Invalid value for '--threshold'"),
        (("--threshold", "0.1", "--window", "none"), "--window none has no step to judge by"),
        (("--threshold", "0.1", "--window", "3:2"), "a window a:b needs 1 <= a <= b"),
        (("--threshold", "0.1", "--window", "2:3", "--drop-deep", "1.5"), "1.5"),
        (("--threshold", "0.1", "--window", "2:3", "--calibration-anyway"), "goes with --calibration"),
        (("--threshold", "0.1", "--window", "2:3", "--max-new-tokens", "3"), "than the steps that decide, 3: give"),
        (("--calibration", "c.json", "--window", "2:3"), "--window 2:3: the --calibration is for --window 1:4"),
    ],
)
def test_what_blocks_is_one_thing_and_all_of_it(work, fake_model, options, says):
    done = invoke("gate", "in.jsonl", "--out", "out", *options, model=fake_model)
    assert done.exit_code == 2
    assert says in " ".join(done.output.replace("│", " ").split())
    assert not any(Path("out").glob("*")) if Path("out").exists() else True


def test_rejects_are_never_answered(work, fake_model):
    done = invoke("gate", "bad.jsonl", "in.jsonl", "--calibration", "c.json", "--out", "out", model=fake_model)
    assert done.exit_code == 0, done.output
    assert "bad" not in {row["id"] for row in read("out")}
    rejects = pq.read_table("out/rejects-00000.parquet").to_pylist()
    assert [(row["id"], row["reason"]) for row in rejects] == [("bad", "wrong_type")]


def test_redact_writes_no_answer(work, fake_model):
    assert gate("--redact", "--fail-term", "france", model=fake_model).exit_code == 0
    rows = read("out")
    assert "text" not in rows[0]
    assert any(row["leaked"] for row in rows)


def test_a_gate_is_resumed_as_it_was_begun_or_not_at_all(work, fake_model):
    assert gate("--fail-term", "france", model=fake_model).exit_code == 0
    whole = read("out")
    again = gate("--fail-term", "france", "--resume", model=fake_model)
    assert again.exit_code == 0, again.output
    assert read("out") == whole
    other = gate("--fail-term", "rome", "--max-new-tokens", "99", "--resume", model=fake_model)
    assert other.exit_code == 2
    assert "--fail-term was ['france'] and is ['rome']" in other.output
    assert "--max-new-tokens was 160 and is 99" in other.output
    score = invoke("score", "in.jsonl", "--calibration", "c.json", "--out", "out", "--resume", model=fake_model)
    assert score.exit_code == 2
    assert "headrift gate" in score.output
    assert gate("--resume", model=fake_model, out="run").exit_code == 2


@pytest.mark.parametrize("command", [["calibrate", "out", "--out", "d.json"], ["report", "out", "--out", "r.html"]])
def test_a_gates_folder_is_no_run_to_calibrate_on(work, fake_model, command):
    assert gate(model=fake_model).exit_code == 0
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert "out was made by `headrift gate`" in done.output


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--max-new-tokens", "4"], "--max-new-tokens 4 is no more than the steps that decide, 4: give at least 5"),
        (["--compare-ungated"], "name what gives them away with --fail-term"),
        (["--fail-term", "re:("], "--fail-term re:(: not a regular expression"),
        (["--fail-term", " "], "--fail-term ' ' is empty"),
        (["--max-new-tokens", "100000"], "--max-new-tokens 100000 exceeds the model's context"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(work, fake_model, options, says):
    done = gate(*options, model=fake_model)
    assert done.exit_code == 2
    assert says in " ".join(done.output.split())
    assert not any(Path("out").glob("*")) if Path("out").exists() else True
