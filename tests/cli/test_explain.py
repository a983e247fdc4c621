"""`headrift explain` on runs made with a fake engine."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from typer.testing import CliRunner

from headrift import explain as module
from headrift import signal
from headrift.calibration.artifact import Calibration
from headrift.calibration.calibrate import calibrate
from headrift.calibration.thresholds import CalibrateConfig
from headrift.cli import app
from headrift.explain import Explanation, explain, show
from headrift.runs.detector_input import detector_values
from headrift.runs.reading import open_run
from headrift.signal import ScoreRange, Window
from headrift.signals.detectors import ChosenHeads
from headrift.terminal import printable
from helpers import made_runs


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


def ask(run: Path, row_id: str, *options: str):
    return CliRunner().invoke(app, ["explain", str(run), "--id", row_id, *options], env={"COLUMNS": "80"})


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


def test_a_run_of_step_0_alone(run):
    out = run("--save", "text", "--save", "shares", "--steps", "0")
    done = ask(out, "r2")
    assert done.exit_code == 0, done.output
    words = " ".join(done.stdout.split())
    (row,) = (row for row in parts_of(out) if row["id"] == "r2")
    assert f"prompt: {row['prompt'].strip()}" in words
    assert "no score: no_window (the run recorded step 0" in words
    assert f"signals: focus, all heads {row['focus']:.3f}, prompt length {row['prompt_tokens']}" in words
    assert "mean share of the heads 0." in words
    assert "answer:" not in words
    assert "|" not in done.stdout
    assert "scored: steps" not in words
    assert (out / "explain-r2.png").stat().st_size > 10_000


PLANTED = [(2, 1), (3, 2)]


@pytest.fixture(scope="module")
def patterns(tmp_path_factory):
    """A run of step 0 with a pattern in its attacks; the first row has no shares."""
    folder = tmp_path_factory.mktemp("patterns") / "run"
    made_runs.write_patterns(folder, 1, 80, 120, effect=2.0, at=PLANTED, prompt=["a prompt"] * 200)
    path = folder / "part-00000.parquet"
    table = pq.read_table(path)
    place = table.schema.get_field_index("logit_shares")
    kind = table.schema.field(place).type
    shares = pa.array([None, *table["logit_shares"].to_pylist()[1:]], kind)
    pq.write_table(table.set_column(place, "logit_shares", shares), path)
    return folder


@pytest.fixture(scope="module", params=["readout", "novelty"])
def calibrated(request, patterns, tmp_path_factory):
    """A calibration of the run, and its file."""
    config = CalibrateConfig(target_fpr=0.1, resamples=20, signal=request.param)
    calibration = calibrate([open_run(patterns)], config)
    path = tmp_path_factory.mktemp("calibration") / "c.json"
    calibration.save(path)
    return calibration, path


def test_the_verdict_and_the_heads_add_up(patterns, calibrated):
    calibration, _ = calibrated
    values = detector_values([open_run(patterns)], calibration.detector, 200)
    for number in (1, 40, 150, 199):
        detected = explain(patterns, f"r{number}", calibration).detected
        assert detected.prediction.detector == pytest.approx(values[number])
        assert detected.prediction.flagged == (values[number] >= calibration.threshold)
        total = detected.heads.sum()
        if calibration.detector.kind == "readout":
            assert total + calibration.detector.intercept == pytest.approx(values[number])
        else:
            assert total == pytest.approx(values[number] ** 2)


def test_a_calibrated_row_is_printed_with_its_verdict_first(patterns, calibrated, tmp_path):
    calibration, path = calibrated
    values = detector_values([open_run(patterns)], calibration.detector, 200)
    for number, word in ((np.nanargmax(values), "FLAGGED"), (np.nanargmin(values), "not flagged")):
        picture = tmp_path / f"{number}.png"
        done = ask(patterns, f"r{number}", "--calibration", str(path), "--png", str(picture))
        assert done.exit_code == 0, done.output
        first, second, *_ = done.stdout.splitlines()
        assert first.startswith(f"{word}: value {values[number]:.4f} ")
        assert second == f"detector: {calibration.label}"
        assert max(map(len, done.stdout.replace(str(tmp_path), "").splitlines())) <= 80
        heads = explain(patterns, f"r{number}", calibration).detected.heads
        layer, head = np.unravel_index(heads.argmax(), heads.shape)
        assert f"layer {layer}, head {head} {heads.max():+.3f}" in " ".join(done.stdout.split())
        cells = re.findall(r"[+-][░▒▓█]", done.stdout)
        assert "".join(cells).count("+") == (heads > heads.max(initial=-heads.min()) / 5).sum()
        assert picture.stat().st_size > 10_000


def test_the_heads_that_flag_attacks_are_the_planted_ones(patterns, calibrated):
    calibration, _ = calibrated
    heads = np.mean([explain(patterns, f"r{number}", calibration).detected.heads for number in range(1, 20)], axis=0)
    best = np.unravel_index(np.argsort(heads, axis=None)[-2:], heads.shape)
    assert sorted(zip(*(axis.tolist() for axis in best))) == PLANTED


def test_a_row_without_shares_has_no_value(patterns, calibrated):
    done = ask(patterns, "r0", "--calibration", str(calibrated[1]))
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("not flagged: no value")
    assert "heads for a flag" not in done.stdout


@pytest.mark.parametrize(
    ("about", "says"),
    [
        ({"chat_template_sha256": "other"}, "the chat template"),
        ({"engine": {"dtype": "float32", "layers": 6, "heads": 8}}, "the number of heads"),
        ({"model": {"path": "models/m", "fingerprint": "other"}}, "the model"),
    ],
)
def test_a_calibration_of_something_else_is_refused(patterns, calibrated, tmp_path, about, says):
    other = tmp_path / "other"
    other.mkdir()
    (other / "part-00000.parquet").symlink_to(patterns / "part-00000.parquet")
    (other / "run.json").write_text(json.dumps(json.loads((patterns / "run.json").read_text()) | about))
    done = ask(other, "r1", "--calibration", str(calibrated[1]))
    assert (done.exit_code, done.stdout) == (2, "")
    assert f"the calibration is for something else: {says} differ" in done.stderr


def test_instability_of_a_window_and_a_calibration_of_another(tmp_path):
    instability = made_runs.made_up(3, 40, 80, effect=0.05)
    label, names = made_runs.labels(40, 80), [f"r{number}" for number in range(120)]
    random = np.random.default_rng(3).uniform(0.1, 0.4, 120)
    columns = {"id": names, "score": random, "source": ["in"] * 120, "row": list(range(120)), "flags": [[]] * 120}
    out = made_runs.write_run(tmp_path / "run", instability, label, **columns)
    config = CalibrateConfig(target_fpr=0.1, resamples=0, signal="instability", window=Window(2, 5))
    other = calibrate([open_run(out)], config)
    path = tmp_path / "c.json"
    other.save(path)
    done = ask(out, "r1", "--calibration", str(path))
    assert (done.exit_code, done.stdout) == (2, "")
    assert "--window (calibration: 2:5, given: 1:6)" in done.stderr
    own = Calibration.load(path).model_copy(update={"window": "1:6"})
    own.save(path)
    done = ask(out, "r1", "--calibration", str(path))
    assert done.exit_code == 0, done.output
    value = own.detector.direction * random[1]
    assert f"value {value:.4f} {'>=' if value >= own.threshold else '<'} threshold {own.threshold:.4f}" in done.stdout


def test_what_the_run_did_not_keep_is_named(run, patterns, calibrated, tmp_path):
    calibration, _ = calibrated
    out = run("--steps", "0")
    heads = ChosenHeads(heads=[(0, 0)], n=None)
    update = {"detector": heads, "model": open_run(out).model}
    path = tmp_path / "c.json"
    calibration.model_copy(update=update).save(path)
    done = ask(out, "r1", "--calibration", str(path))
    assert (done.exit_code, done.stdout) == (2, "")
    assert "did not keep, heads' focus: score with --save focus" in done.stderr
