"""scripts/gpu_check.py: its clock, what it skips, keeps and reports. Stages here are processes that sleep or fail."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.scripts import load

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/gpu_check.py"
gpu_check = load("scripts/gpu_check")

ABOUT = {"device": "a GPU", "code": "0123"}


def stage(name, program, limit=20.0, least=0.1):
    """A stage that runs a Python program, which gets the path of its results as its argument."""
    return gpu_check.Stage(name, limit, least, lambda run: [["-c", program, str(run.results)]])


def writes(results, then=""):
    return f"import json, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(json.dumps({results!r})); {then}"


@pytest.fixture
def check(tmp_path):
    """Run stages; returns whether all passed, and the report."""
    out = tmp_path / "out.json"

    def check(*stages, budget=60.0, resume=False, about=ABOUT):
        passed = gpu_check.check(stages, about, out, budget=budget, dry_run=False, resume=out if resume else None)
        return passed, json.loads(out.read_text())

    check.out = out
    return check


def test_stages_that_pass(check):
    passed, report = check(stage("kernels", writes({"a": 1})), stage("engine", writes({"b": 2})))
    assert passed
    assert {name: s["status"] for name, s in report["stages"].items()} == {"kernels": "passed", "engine": "passed"}
    assert report["stages"]["kernels"]["results"] == {"a": 1}
    assert (report["device"], report["code"], report["dry_run"]) == ("a GPU", "0123", False)
    assert not report["passed"], "the whole check has passed only when each of its stages has"


def test_a_stage_that_fails_does_not_stop_the_next_and_keeps_the_end_of_its_output(check):
    passed, report = check(stage("kernels", "print('a kernel is wrong'); raise SystemExit(1)"), stage("engine", ""))
    assert not passed
    assert report["stages"]["kernels"]["status"] == "failed"
    assert report["stages"]["kernels"]["output"] == ["a kernel is wrong"]
    assert [path.name for path in check.out.parent.glob("*.log")] == ["out-kernels.log"], "of those that passed, none"
    assert report["stages"]["engine"]["status"] == "passed"


def test_a_stage_past_its_limit_is_killed_with_its_children_and_keeps_what_it_wrote(check, tmp_path):
    alive = tmp_path / "alive"
    child = f"import pathlib, time; time.sleep(1.5); pathlib.Path({str(alive)!r}).touch()"
    program = writes({"part": 1}, f"import subprocess, time; subprocess.Popen([sys.executable, '-c', {child!r}]); ")
    begin = time.monotonic()
    passed, report = check(stage("kernels", program + "time.sleep(60)", limit=1.0))
    assert time.monotonic() - begin < 10
    assert not passed
    assert (report["stages"]["kernels"]["status"], report["stages"]["kernels"]["results"]) == ("timeout", {"part": 1})
    time.sleep(2)
    assert not alive.exists(), "a process that the stage had started lives on"


def test_a_stage_that_no_longer_fits_the_budget_is_skipped_and_a_shorter_one_is_not(check, capsys):
    slow = stage("kernels", "import time; time.sleep(1.2)")
    passed, report = check(slow, stage("engine", "", least=9.5), stage("profile", ""), budget=10.0)
    assert not passed
    assert {name: s["status"] for name, s in report["stages"].items()} == {
        "kernels": "passed", "engine": "skipped", "profile": "passed",
    }  # fmt: skip
    assert "of 10 seconds are left, and it takes 10 at least" in report["stages"]["engine"]["reason"]
    assert "skipped" in capsys.readouterr().out


def test_a_stage_gets_no_more_than_the_budget_has_left(check):
    passed, report = check(stage("kernels", "import time; time.sleep(60)", limit=50), budget=1.5)
    assert not passed
    assert report["stages"]["kernels"]["status"] == "timeout"
    assert report["stages"]["kernels"]["limit"] <= 1.5


def test_a_stage_that_left_a_required_case_out_is_incomplete(check, capsys):
    results = {"left_out": ["decode 64 x 1024", "decode 64 x 4096"], "required_left_out": ["decode 64 x 1024"]}
    passed, report = check(stage("overhead", writes(results)))
    assert not passed
    assert report["stages"]["overhead"]["status"] == "incomplete"
    assert "out of time for: decode 64 x 1024; left out, optional: decode 64 x 4096" in capsys.readouterr().out


def test_optional_cases_without_time_and_cases_without_memory_are_reported_and_no_failure(check, capsys):
    too_large = {"decode 256 x 1024": "needs 37.6 GB"}
    results = {"left_out": ["decode 64 x 4096"], "required_left_out": [], "too_large": too_large}
    passed, report = check(stage("overhead", writes(results)))
    assert passed
    assert report["stages"]["overhead"]["results"]["too_large"] == too_large
    printed = capsys.readouterr().out
    assert "left out, optional: decode 64 x 4096" in printed
    assert "too large for this GPU: decode 256 x 1024 needs 37.6 GB" in printed


def test_a_command_that_fails_fails_its_stage_and_the_next_one_still_runs(check, tmp_path):
    marker = tmp_path / "second"
    programs = ("raise SystemExit(3)", f"import pathlib; pathlib.Path({str(marker)!r}).touch()")
    both = gpu_check.Stage("engine", 20, 0.1, lambda run: [["-c", program] for program in programs])
    passed, report = check(both)
    assert not passed
    assert (report["stages"]["engine"]["status"], report["stages"]["engine"]["exit_status"]) == ("failed", 3)
    assert marker.exists()


@pytest.mark.parametrize("dry_run", [False, True])
def test_the_engine_stage_begins_with_memory_profiling(dry_run, tmp_path):
    first, second = gpu_check.engine_tests(gpu_check.StageRun(tmp_path, 60, dry_run))
    assert first[first.index("-k") + 1] == "profiling"
    assert "-n" not in first, "other processes disturb memory profiling"
    assert second[second.index("-k") + 1] == "not profiling"


def test_results_are_written_before_the_next_stage_begins(check):
    program = f"import pathlib; print(pathlib.Path({str(check.out)!r}).read_text()); raise SystemExit(1)"
    _, report = check(stage("kernels", writes({"a": 1})), stage("engine", program))
    seen = json.loads("\n".join(report["stages"]["engine"]["output"]))
    assert seen["stages"]["kernels"]["results"] == {"a": 1}


def test_resuming_keeps_what_passed_and_gives_the_rest_what_it_had(check, tmp_path):
    marker = tmp_path / "runs"
    once = stage("kernels", f"import pathlib; pathlib.Path({str(marker)!r}).open('a').write('x')")
    check(once, stage("overhead", writes({"cases": [1], "required_left_out": ["b"]})))
    more = "import json, pathlib, sys; p = pathlib.Path(sys.argv[1]); had = json.loads(p.read_text())['cases']; "
    more += "p.write_text(json.dumps({'cases': [*had, 2], 'required_left_out': []}))"
    passed, report = check(once, stage("overhead", more), resume=True)
    assert passed
    assert marker.read_text() == "x"
    assert report["stages"]["overhead"]["results"]["cases"] == [1, 2]
    assert report["stages"]["overhead"]["status"] == "passed"


@pytest.mark.parametrize("changed", ["device", "code"])
def test_results_of_another_device_or_of_other_code_are_not_kept(check, changed, tmp_path):
    marker = tmp_path / "runs"
    each = stage("kernels", f"import pathlib; pathlib.Path({str(marker)!r}).open('a').write('x')")
    check(each)
    check(each, resume=True, about={**ABOUT, changed: "another"})
    assert marker.read_text() == "xx"


def test_a_skipped_stage_keeps_what_an_earlier_run_had(check):
    check(stage("overhead", writes({"cases": [1], "required_left_out": ["b"]})))
    passed, report = check(stage("overhead", "", least=30.0), budget=1.0, resume=True)
    assert not passed
    assert (report["stages"]["overhead"]["status"], report["stages"]["overhead"]["results"]["cases"]) == (
        "incomplete", [1],
    )  # fmt: skip


def test_tests_that_were_all_skipped_prove_nothing():
    assert gpu_check.verdict(0, {"tests": {"passed": 0, "failed": [], "skipped": 9}}) == "failed"
    assert gpu_check.verdict(0, {"tests": {"passed": 1, "failed": [], "skipped": 9}}) == "passed"


def test_the_stages_fit_the_budget_and_their_order_is_by_value():
    assert sum(s.limit for s in gpu_check.STAGES) <= 540
    assert [s.name for s in gpu_check.STAGES] == [
        "kernels", "kernel_times", "engine", "overhead", "step0_replay", "profile",
    ]  # fmt: skip


def test_the_code_state_changes_with_a_source_file(tmp_path):
    for part in gpu_check.SOURCES:
        path = tmp_path / part
        file = path if path.suffix else path / "module.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x = 1\n")
    before = gpu_check.code_state(tmp_path)
    assert gpu_check.code_state(tmp_path) == before
    (tmp_path / "kernels/module.py").write_text("x = 2\n")
    assert gpu_check.code_state(tmp_path) != before


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_the_dry_run_runs_every_stage(tmp_path):
    out = tmp_path / "gpu-check.json"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, "-P", str(SCRIPT), "--dry-run", "--out", str(out)],
        env=environment, capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:]
    report = json.loads(out.read_text())
    assert report["passed"]
    assert report["dry_run"]
    stages = {name: stage["results"] for name, stage in report["stages"].items()}
    assert list(stages) == [s.name for s in gpu_check.STAGES]
    assert stages["kernels"]["tests"]["passed"] > 3
    assert stages["engine"]["tests"]["passed"] > 8
    for row in stages["kernel_times"]["rows"]:
        assert not row["errors"]
        assert "flash_attention" in row["missing"], "a peer that is not there has a reason"
    assert {"decode 2 x 40", "streaming 2 x 40"} < set(stages["overhead"]["cases"])
    for case in stages["overhead"]["cases"].values():
        runs = case["arms"]["probing"]["runs"] if "arms" in case else [case]
        assert all(run["values"] > 0 and run["bad_values"] == 0 for run in runs)
    assert stages["step0_replay"]["cases"]["replay, measured"]["prompts_per_second"] > 0
    assert stages["profile"]["cases"]["probed decode steps"]["kernels"]
