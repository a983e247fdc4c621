"""scripts/first_run.py, which `make run` starts: on a fake engine, and with the demonstration model."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from headrift.calibration.artifact import Calibration
from helpers.scripts import ROOT, load

first_run = load("scripts/first_run")


def rows_of(run: Path) -> list[dict]:
    return [row for path in sorted(run.glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]


def check(text: str, out: Path) -> None:
    """What was printed is what the files have."""
    first, second = rows_of(out / "first-half"), rows_of(out / "second-half")
    ids = [{row["id"] for row in half} for half in (first, second)]
    assert (len(first), len(second), len(ids[0] | ids[1])) == (105, 104, 209)
    words = " ".join(text.split())
    calibration = Calibration.load(out / "calibration.json")
    assert calibration.setting.target_fpr == first_run.TARGET_FPR
    for line in calibration.verdict.lines:
        assert line in words
    assert re.search(r"words \(TF-IDF\) +0\.\d+", text)
    assert ("Not usable, so what follows" in text) == (calibration.verdict.usable == "no")
    flagged = json.loads((out / "second-half/run.json").read_text())["judged"]["flagged"]
    for label, what in (("attack", "attacks found"), ("benign", "benign prompts flagged")):
        of_class = {row["group"]: row["flagged"] for row in second if row["label"] == label}
        assert flagged[label]["prompts_flagged"] == sum(of_class.values())
        assert f"{what} {sum(of_class.values())} of {len(of_class)} " in words
    top = sorted(second, key=lambda row: -row["detector"])[:5]
    shown = [line for line in text.splitlines() if re.search(r": value .*, p \d", line)]
    assert [line.split()[0] for line in shown] == [row["id"] for row in top]
    for row, line in zip(top, shown, strict=True):
        assert f"{row['label']}, {row['category']}: value {row['detector']:.3f}, p {row['p_value']:.3f}" in line
        assert line.endswith("not flagged") != row["flagged"]
        assert " ".join(row["prompt"].split())[:60] in words
    assert f"The report is {out / 'report.html'}" in text
    assert "<!doctype html>" in (out / "report.html").read_text()[:100]


def test_what_is_printed_is_what_was_measured(fake_model, tmp_path, capsys):
    first_run.main(["--model", str(fake_model), "--out", str(tmp_path / "out"), "--steps", "0"])
    check(capsys.readouterr().out, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--set", "nonsense"], "invalid choice: 'nonsense'"),
        (["--model", "nowhere", "--out", "new"], "nowhere"),
        (["--out", "."], "is not empty: choose another folder"),
    ],
)
def test_what_cannot_be_done_is_said_and_ends_with_2(options, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as end:
        first_run.main(options)
    assert end.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.nightly
def test_with_the_demonstration_model(demo_model, tmp_path, monkeypatch):
    """As `make run` starts it."""
    command = [sys.executable, str(ROOT / "scripts/first_run.py"), "--model", str(demo_model), "--out", "out"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    monkeypatch.chdir(tmp_path)
    check(done.stdout, Path("out"))
