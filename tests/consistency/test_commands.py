"""`headrift train-consistency` and `evaluate-consistency` as a user runs them."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from headrift.cli import app

pytestmark = pytest.mark.usefixtures("tokenizer_once")
QUESTIONS = Path(__file__).parents[2] / "datasets" / "consistency_questions.jsonl"


def headrift(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_train_resume_and_evaluate(tiny_model, tmp_path):
    out = tmp_path / "run"
    options = ["--model", tiny_model, "--out", out, "--limit", 60, "--batch", 2, "--answer-tokens", 4]
    done = headrift(
        "train-consistency", QUESTIONS, *options, "--steps", 2, "--method", "attct=1,act=0.1", "--layers", "0-1"
    )
    assert done.exit_code == 0, done.output
    assert "held out: 12 questions" in done.stderr
    assert "2 steps in" in done.stdout
    assert {path.name for path in out.iterdir()} == {
        "adapter", "checkpoint.pt", "losses.jsonl", "outcome.json", "training.json"
    }  # fmt: skip
    assert json.loads((out / "training.json").read_text())["settings"]["keep"] == 0.03
    again = headrift("train-consistency", QUESTIONS, *options, "--steps", 3, "--method", "attct=1,act=0.1")
    assert again.exit_code == 2
    assert "--resume" in again.stderr
    more = headrift("train-consistency", QUESTIONS, *options, "--steps", 3, "--method", "attct=1,act=0.1", "--resume")
    assert more.exit_code == 0, more.output
    assert len((out / "losses.jsonl").read_text().splitlines()) == 3
    shown = headrift("evaluate-consistency", out, "--questions", 3, "-q")
    assert shown.exit_code == 0, shown.output
    assert "attention distance" in shown.stdout
    assert "perplexity" in shown.stdout
    assert json.loads((out / "evaluation.json").read_text())["questions"] == 3
    first = questions_of(out)
    shown = headrift("evaluate-consistency", out, "--skip", 3, "-q")
    assert shown.exit_code == 0, shown.output
    assert len(questions_of(out)) == 9
    assert not first & questions_of(out)
    refused = headrift("evaluate-consistency", out, "--skip", 12)
    assert refused.exit_code == 2
    assert "leaves none of the 12" in refused.stderr


def questions_of(run: Path) -> set[str]:
    return {json.loads(line)["id"].split(":")[0] for line in (run / "replies.jsonl").read_text().splitlines()}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--method", "attct=much"], "'much' is not a number"),
        (["--method", "sft"], "--method sft"),
        (["--layers", "3-1"], "not a layer or a range"),
        (["--layers", "0-7"], "layers are 0 to 1"),
        (["--lora", "nowhere"], "adapter_config.json"),
        (["--held-out-family", "poetry"], "choose from"),
        (["--column", "clean"], "is not KEY=NAME"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(tiny_model, tmp_path, options, says):
    done = headrift("train-consistency", QUESTIONS, "--model", tiny_model, "--out", tmp_path / "run", *options)
    assert done.exit_code == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_rejected_rows_are_named(tiny_model, tmp_path):
    rows = [{"clean": f"What is {i} plus 2?", "wrapped": f"Hurry! What is {i} plus 2?"} for i in range(10)]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"clean": "same", "wrapped": "same"}, {"a": 1}]))
    done = headrift(
        "train-consistency", pairs, "--model", tiny_model, "--out", tmp_path / "run", "--steps", 1, "--split-seed", 4
    )
    assert done.exit_code == 0, done.output
    assert "left out, the first" in done.stderr
    assert "row 12" in done.stderr
    assert "no_pair" in done.stderr
