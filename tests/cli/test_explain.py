"""`headrift explain` on runs made with a fake engine."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from typer.testing import CliRunner

from headrift import explain as module
from headrift import signal
from headrift.cli import app
from headrift.explain import Explanation, explain, show
from headrift.signal import ScoreRange, Window
from headrift.terminal import printable


@pytest.fixture
def run(fake_model, tmp_path):
    """A run of a few rows, with the given options."""
    rows = [{"id": f"r{n}", "prompt": "again " * n, "label": "attack", "category": "c"} for n in range(1, 8)]
    rows += [
        {"id": "a/b \x1b[31m", "prompt": "red \x1b[31m \u202eturned"},
        {"id": "bad", "prompt": "x", "label": "evil"},
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def score(*options: str) -> Path:
        out = tmp_path / "out"
        command = ["score", str(tmp_path / "in.jsonl"), "--model", str(fake_model), "--out", str(out), "--steps", "4"]
        command += ["--system-prompt-file", str(fake_model / "system.txt")]
        done = CliRunner().invoke(app, [*command, *options])
        assert done.exit_code == 0, done.output
        return out

    return score


def parts_of(run: Path) -> list[dict]:
    return pq.read_table(run / "part-00000.parquet").to_pylist()


def ask(run: Path, row_id: str):
    return CliRunner().invoke(app, ["explain", str(run), "--id", row_id], env={"COLUMNS": "80"})


def test_what_is_printed(run):
    out = run("--save", "text", "--save", "shares")
    row = next(row for row in parts_of(out) if row["score"] is not None)
    done = ask(out, row["id"])
    assert done.exit_code == 0, done.output
    # a path is as long as it is
    assert max(map(len, done.stdout.replace(str(out.parent), "").splitlines())) <= 80
    words = " ".join(done.stdout.split())
    for expected in (
        f"score {row['score']:.4f}: higher than or equal to",
        f"prompt: {row['prompt'].strip()}",
        f"answer: {row['text'].strip()}",
        f"{row['id']}, attack, c",
        "instability 0.",
        "mean share of the heads 0.",
        "scored: steps 1:4 and layers 2 to 4 (marked |)",
    ):
        assert expected in words, done.stdout
    assert len(re.findall(r"^ +\d+ [| ] ", done.stdout, re.MULTILINE)) == 6  # layers
    assert (out / f"explain-{row['id']}.png").stat().st_size > 10_000


def test_numbers_agree_with_the_part(run):
    out = run("--save", "shares")
    rows = [row for row in parts_of(out) if row["score"] is not None]
    scores = [row["score"] for row in rows]
    for row in rows:
        explanation = explain(out, row["id"])
        assert explanation.percentile == pytest.approx(100 * np.mean(np.array(scores) <= row["score"]))
        assert explanation.scored.mean() == pytest.approx(row["score"], abs=1e-6)
        assert signal.instability(np.array(row["shares"]).reshape(-1, 6, 3)) == pytest.approx(
            explanation.instability, abs=1e-3
        )
        assert explanation.share.shape == explanation.instability.shape


def test_top_names_places_and_parts_of_the_score():
    cells = np.array([[0.1, 0.3, np.nan], [0.1, 0.5, np.nan]])
    assert module._top(cells, 0, 7) == "8 (0.400, 80%), 7 (0.100, 20%)"
    assert module._top(cells, 1, 1) == "2 (0.300, 60%), 1 (0.200, 40%)"


def test_a_run_without_texts_says_so(run):
    out = run()
    done = ask(out, "r1")
    assert "prompt and answer were not kept: score with --save text to keep them" in done.stdout
    assert "score with --save shares to see them too" in done.stdout


def test_a_redacted_run_says_so(run):
    done = ask(run("--redact"), "r1")
    assert done.exit_code == 0
    assert "prompt and answer were not kept: the run left texts out (--redact)" in done.stdout


def test_a_row_without_a_score(run):
    out = run("--save", "text")
    row = next(row for row in parts_of(out) if row["score"] is None)
    done = ask(out, row["id"])
    assert done.exit_code == 0
    assert "no score: answer_ended_before_window (the answer has steps 0 to 0, the window is 1:4)" in " ".join(
        done.stdout.split()
    )


def test_a_prompt_cannot_drive_the_terminal(run):
    out = run("--save", "text")
    done = ask(out, "a/b \x1b[31m")
    assert done.exit_code == 0, done.output
    assert "\x1b" not in done.stdout
    assert r"red \x1b[31m \u202eturned" in done.stdout
    assert (out / "explain-a_b___31m.png").is_file()
    assert printable("a\tb\nc é 漢 \x9b\u2028") == "a\tb\nc é 漢 \\x9b\\u2028"


@pytest.mark.parametrize(
    ("row_id", "says"),
    [
        ("bad", "the row 'bad' was rejected, unknown_label: the label 'evil'"),
        ("r99", "has the id 'r99'; ids there look like 'r1'"),
    ],
)
def test_rows_that_are_not_there(run, row_id, says):
    done = ask(run(), row_id)
    assert (done.exit_code, done.stdout) == (2, "")
    assert says in done.stderr


def test_folders_that_are_no_runs(tmp_path):
    done = ask(tmp_path, "x")
    assert (done.exit_code, "is not a run" in done.stderr) == (2, True)
    (tmp_path / "run.json").write_text("{")
    assert "run.json cannot be read" in ask(tmp_path, "x").stderr
    (tmp_path / "run.json").write_text('{"settings": {}}')
    assert "run.json cannot be read" in ask(tmp_path, "x").stderr


def test_parts_that_are_missing_or_damaged(run):
    out = run()
    (out / "part-00000.parquet").write_text("nothing")
    assert "cannot be read" in ask(out, "r1").stderr
    (out / "part-00000.parquet").unlink()
    assert "has no parts" in ask(out, "r1").stderr


def test_many_layers_and_steps_fit_the_terminal():
    n_steps, n_layers = 65, 96
    values = np.random.default_rng(0).random((n_steps, n_layers)) / 2
    row = {"id": "x", "source": "s", "row": 1, "label": None, "category": None, "flags": [], "score": 0.2}
    explanation = Explanation(row, values, values, ScoreRange(Window(1, 64)), 50.0, 10, False)
    console = Console(width=80, record=True, file=io.StringIO())
    show(console, explanation)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) < 55
