"""`headrift report` on the command line."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from headrift.cli import app
from headrift.report import html, measure
from helpers import report_runs as made


def report(*arguments: object):
    return CliRunner().invoke(app, ["report", *map(str, arguments)], env={"COLUMNS": "80"})


@pytest.fixture
def run(tmp_path) -> Path:
    return made.made_run(tmp_path / "run", 0, 10)


def test_a_report_is_written_and_named(run, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "MOST_EXAMPLES", 1)
    result = report(run, "--out", tmp_path / "r.html", "--resamples", 0)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"The page is {tmp_path / 'r.html'}, its figures are in {tmp_path / 'r-files'}\n"
    assert "reading the rows" in result.stderr
    assert max(map(len, result.stderr.splitlines())) <= 80


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("sub", [], "is a folder or in none"),
        ("nowhere/r.html", [], "is a folder or in none"),
        ("r.pdf", [], "has to end in .html"),
        ("taken.html", [], "contains other files"),
        ("r.html", ["--fail-term", ""], "is empty"),
        ("r.html", ["--fail-term", "re:("], "regular expression"),
        ("r.html", ["--calibration", "none.json"], "cannot be read"),
        ("r.html", ["empty"], "is not a run"),
        ("r.html", ["other"], "differ in the model"),
        ("r.html", ["window"], "different windows"),
        ("r.html", ["run"], "is given twice"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(run, tmp_path, monkeypatch, out, options, message):
    monkeypatch.chdir(tmp_path)
    for name in ("sub", "empty", "taken-files"):
        (tmp_path / name).mkdir()
    (tmp_path / "taken-files" / "thesis.png").write_text("mine")
    made.made_run(tmp_path / "other", 0, 10, model="g")
    made.made_run(tmp_path / "window", 0, 10, window=made.signal.Window(1, 3))
    before = sorted(tmp_path.rglob("*"))
    result = report("run", *options, "--out", out)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert sorted(tmp_path.rglob("*")) == before


def test_a_calibration_for_longer_answers(run, tmp_path):
    other = made.made_run(tmp_path / "other", 20, 80)
    result = CliRunner().invoke(
        app, ["calibrate", str(other), "--out", str(tmp_path / "c.json"), "--resamples", "0", "--window", "2:6"]
    )
    assert result.exit_code == 0, result.output
    run_json = json.loads((run / "run.json").read_text())
    run_json["settings"] |= {"steps": 4, "window": "1:4"}
    (run / "run.json").write_text(json.dumps(run_json))
    result = report(run, "--out", tmp_path / "r.html", "--calibration", tmp_path / "c.json")
    assert result.exit_code == 2
    assert "score the prompts again with --steps 6" in " ".join(result.stderr.split())


def test_a_disk_that_fails(run, tmp_path, monkeypatch):
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(html.Output, "picture", fails)
    result = report(run, "--out", tmp_path / "r.html", "--quiet")
    assert result.exit_code == 1
    assert result.stderr == "Error: no space left on the disk: make room, or choose another disk\n"
    assert not list(tmp_path.glob("*r-files*"))


def test_what_score_writes_is_read(fake_model, tmp_path, monkeypatch):
    """Through the real scoring job, its columns and its run.json; only the numbers are made up."""
    monkeypatch.setattr(measure, "MOST_EXAMPLES", 1)
    rows = [
        {"prompt": f"{word} {n}" + " again" * (n % 3), "label": label}
        for word, label in (("Break", "attack"), ("Tell me about", "benign"))
        for n in range(12)
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    scored = ["score", tmp_path / "in.jsonl", "--model", fake_model, "--out", tmp_path / "run", "--steps", 4]
    scored += ["--system-prompt-file", fake_model / "system.txt"]
    scored += ["--save", "text", "--save", "mass", "--save", "focus", "--quiet"]
    result = CliRunner().invoke(app, [str(argument) for argument in scored])
    assert result.exit_code == 0, result.output
    result = report(tmp_path / "run", "--out", tmp_path / "r.html", "--resamples", 5, "--fail-term", "Paris")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "r.html").read_text()
    numbers = json.loads((tmp_path / "r-files" / "figures.json").read_text())
    run_json = json.loads((tmp_path / "run" / "run.json").read_text())
    assert numbers["comparisons"] == [html.plain(one) for one in run_json["comparisons"]]
    assert numbers["side_by_side"]["success"]["n_attacks"] == 12
    for expected in ("<b>answer</b><span>The", "Tell me about", "version of vllm", "in.jsonl, row"):
        assert expected in page
