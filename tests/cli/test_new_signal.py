"""One more signal is one entry of the registry: it is in scored parts, calibrations, reports, explanations and docs."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from headrift.cli import app
from headrift.signals import PromptData, Signal, registered, signals

STEPS, LAYERS, HEADS = 4, 6, 3  # the last two are the fake engine's


def gini(share):
    """Gini coefficient over the heads of share [T, layers, heads] -> [T, layers], 0 if all heads are equal."""
    ordered = np.sort(np.asarray(share, np.float64), axis=-1)
    n = ordered.shape[-1]
    weights = 2 * np.arange(1, n + 1) - n - 1
    return (ordered * weights).sum(axis=-1) / (n * ordered.sum(axis=-1))


def by_layer(data: PromptData):
    return None if data.share is None else gini(data.share)


GINI = Signal(
    name="gini",
    label="Gini coefficient",
    unit="0 to 1",
    how="of the shares of a layer's heads, mean over steps and layers",
    value=lambda data: data.score(by_layer(data)),
    steps=lambda data: data.layer_mean(by_layer(data)),
    column=True,
    saves=("shares",),
    direction=1,
)


@pytest.fixture
def gini_is_registered():
    with registered(GINI):
        yield


def call(*words: object) -> str:
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def run(gini_is_registered, fake_model, tmp_path) -> Path:
    """Prompts scored by a fake engine, with the shares."""
    rows = [
        {"id": f"{label}-{n}", "prompt": f"{label} prompt {n}", "label": label}
        for label, of_class in (("attack", 40), ("benign", 120))
        for n in range(of_class)
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["score", tmp_path / "in.jsonl", "--model", fake_model, "--out", tmp_path / "run", "--steps", STEPS]
    call(*command, "--system-prompt-file", fake_model / "system.txt", "--save", "shares", "--quiet")
    return tmp_path / "run"


def scored_rows(run: Path) -> list[dict]:
    return pq.read_table(run / "part-00000.parquet").to_pylist()


def test_scored_parts_have_its_column(run):
    rows = scored_rows(run)
    names = [entry.name for entry in signals(column=True)]
    columns = list(rows[0])
    start = columns.index(names[0])
    assert columns[start : start + len(names)] == names  # side by side, the new one last
    assert names[-1] == "gini"
    row = next(row for row in rows if row["n_steps"] == STEPS)
    share = np.array(row["shares"], np.float64).reshape(STEPS + 1, LAYERS, HEADS)
    expected = gini(share)[1:, 2:5].mean()  # shares are saved as float16: 11 bits
    assert row["gini"] == pytest.approx(expected, rel=1e-2)


def test_a_calibration_compares_it(run, tmp_path):
    printed = call("calibrate", run, "--out", tmp_path / "c.json", "--window", "1:4", "--resamples", 10, "--force")
    confound = json.loads((tmp_path / "c.json").read_text())["confounds"]["gini"]
    assert 0 < confound["value"] < 1
    assert "Gini coefficient" in confound["how"]
    assert "Gini coefficient" in printed


def test_a_report_has_it_in_its_data_and_step_by_step(run, tmp_path):
    call("report", run, "--out", tmp_path / "r.html", "--resamples", 10, "--quiet")
    data = json.loads((tmp_path / "r-files" / "figures.json").read_text())["side_by_side"]
    (result,) = (one for one in data["signals"] if one["name"] == "gini")
    assert result["absent"] is None
    having = [row["id"] for row in scored_rows(run) if row["label"] == "attack" and row["gini"] is not None]
    assert result["auroc"]["n_attack"] == len(having) > 20
    (steps,) = (one for one in data["steps"] if one["name"] == "gini")
    assert steps["steps"] == list(range(STEPS + 1))
    assert "Gini coefficient" in (tmp_path / "r.html").read_text()


def test_an_explanation_shows_it(run):
    row = next(row for row in scored_rows(run) if row["score"] is not None)
    words = " ".join(call("explain", run, "--id", row["id"]).split())
    assert f"Gini coefficient {row['gini']:.3f}" in words


@pytest.mark.usefixtures("gini_is_registered")
def test_the_documentation_lists_it():
    path = Path(__file__).parents[2] / "scripts" / "generate_docs.py"
    spec = importlib.util.spec_from_file_location("generate_docs", path)
    generate_docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate_docs)
    assert "| `gini` | Gini coefficient |" in generate_docs.signal_table()


def test_a_run_without_it_says_what_to_do(fake_model, tmp_path):
    """A run that was scored before the signal was there, and kept no shares."""
    prompts = "\n".join(json.dumps({"prompt": f"prompt {n}", "label": ("attack", "benign")[n % 2]}) for n in range(80))
    (tmp_path / "in.jsonl").write_text(prompts)
    command = ["score", tmp_path / "in.jsonl", "--model", fake_model, "--out", tmp_path / "old", "--steps", STEPS]
    call(*command, "--system-prompt-file", fake_model / "system.txt", "--quiet")
    assert "gini" not in scored_rows(tmp_path / "old")[0]
    with registered(GINI):
        call("report", tmp_path / "old", "--out", tmp_path / "r.html", "--resamples", 0, "--quiet")
    data = json.loads((tmp_path / "r-files" / "figures.json").read_text())["side_by_side"]
    absent = {one["name"]: one["absent"] for one in data["signals"]}
    assert "score with --save shares" in absent["gini"]


def test_a_name_is_taken_once():
    with registered(GINI), pytest.raises(ValueError, match="gini already"), registered(GINI):
        pass
    assert "gini" not in [entry.name for entry in signals()]
