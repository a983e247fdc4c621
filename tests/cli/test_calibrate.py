"""`headrift calibrate` on folders with made-up instability, and on what `headrift score` writes."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from headrift import Calibration
from headrift.cli import app
from headrift.near_duplicates import minhash


def ask(*arguments: object):
    return CliRunner().invoke(app, ["calibrate", *map(str, arguments)], env={"COLUMNS": "80"})


@pytest.fixture
def run(made, tmp_path) -> Path:
    values = made.made_up(0, 60, 160, effect=0.02)
    return made.write_run(tmp_path / "run", values, made.labels(60, 160))


def test_a_calibration_is_written_and_shown(run, tmp_path):
    out = tmp_path / "c.json"
    done = ask(run, "--out", out, "--resamples", 10, "--daily-prompts", 1000)
    assert done.exit_code == 0, done.output
    calibration = Calibration.load(out)
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 80  # the last names the file
    words = " ".join(done.stdout.split())
    assert words.count("promised") == words.count("alerts") == 1
    for expected in (
        "usable: instability, attacks higher, held-out AUROC",
        f"steps {calibration.window}, layers {calibration.layers[0]} to {calibration.layers[1] - 1} of 8",
        f"{calibration.threshold:.6f}: a prompt with a value at or above it is flagged",
        "a day, if all 1,000 prompts are benign; at most 50 promised with 95% confidence, "
        f"set on {calibration.setting.n}",
        f"AUROC, no score lowest {calibration.figures['auroc'].value:.3f}",
        f"AUROC, in sample (naive) {calibration.figures['auroc_in_sample'].value:.3f}",
        f"attacks flagged {calibration.figures['tpr'].value:.3f}",
        "prompt length",
        "attack 60 60 100.0% 0.0%",
        "alerts expect ",
    ):
        assert expected in words
    assert json.loads(out.read_text())["data"]["runs"] == [str(run)]


def test_without_attacks(made, tmp_path):
    log = made.write_run(tmp_path / "log", made.made_up(0, 0, 200), [None] * 200)
    done = ask(log, "--out", tmp_path / "c.json", "--benign-only", "--contamination", 0.02, "--resamples", 5)
    assert done.exit_code == 0, done.output
    words = " ".join(done.stdout.split())
    assert "if at most 0.02 of the prompts are attacks" in words
    assert "attacks among them" in words
    assert "benign rows" not in words
    assert "of rows flagged" in words
    assert "2.0% " in words
    assert Calibration.load(tmp_path / "c.json").benign_only


def test_groups_are_the_rows_own_or_near_duplicates(made, tmp_path):
    """Of each group one prompt sets the threshold; what the groups are is said."""
    values = made.made_up(0, 40, 1_200, effect=0.02)
    label, prompts = made.labels(40, 1_200), [f"{number:016x}" for number in range(1_240)]
    texts = [f"Prompt number {number} of a log, about {number * number} things and one more" for number in range(40)]
    # 300 templates of 4 prompts each, that differ in their last word.
    texts += [
        " ".join([f"template{number // 4}w{word}" for word in range(9)] + [f"end{number}"]) for number in range(1_200)
    ]
    sketches = [minhash(text).tobytes() for text in texts]
    columns = {"prompt_hash": prompts, "minhash": sketches}
    run = made.write_run(tmp_path / "run", values, label, **columns)
    for options, n, by, says in (
        (["--group", "own"], 1_200, "own", None),
        (["--group", "near"], 300, "near", "1,240 prompts are in 3"),
        ([], 300, "near", "groups of near duplicates, the largest of 4 (--group near)"),
    ):
        given = ["--resamples", 0, "--window", "1:6", "--signal", "instability"]
        done = ask(run, "--out", tmp_path / "c.json", *given, *options)
        assert done.exit_code == 0, done.output
        calibration = Calibration.load(tmp_path / "c.json")
        assert (calibration.setting.n, calibration.data.groups) == (n, by)
        assert (says in " ".join(done.stdout.split())) if says else ("near duplicates" not in done.stdout)
    own = [number if number < 40 else 2_000 + number % 150 for number in range(1_240)]
    keyed = made.write_run(tmp_path / "keyed", values, label, group=own, **columns)
    done = ask(keyed, "--out", tmp_path / "c.json", *given)
    assert Calibration.load(tmp_path / "c.json").setting.n == 150
    assert "1,240 prompts are in 190 groups, by the rows' own `group`" in " ".join(done.stdout.split())
    # Nothing of the prompts was kept.
    redacted = made.write_run(tmp_path / "redacted", values, label, prompt_hash=prompts)
    done = ask(redacted, "--out", tmp_path / "c.json", *given)
    assert done.exit_code == 0, done.output
    assert "near duplicates were not looked for" in " ".join(done.stdout.split())
    done = ask(redacted, "--out", tmp_path / "c.json", *given, "--group", "near")
    assert done.exit_code == 2
    assert "--column group=NAME" in done.stderr


def test_too_few_groups_are_refused_with_the_number_needed(made, tmp_path):
    values = made.made_up(0, 40, 200, effect=0.02)
    group = [number if number < 40 else 1_000 + number % 20 for number in range(240)]
    prompts = [f"{number:016x}" for number in range(240)]
    run = made.write_run(tmp_path / "run", values, made.labels(40, 200), group=group, prompt_hash=prompts)
    done = ask(run, "--out", tmp_path / "c.json")
    assert done.exit_code == 2
    assert "needs at least 59 groups of benign prompts to set the threshold" in done.stderr
    assert "there are 20" in done.stderr


def test_conformal_at_a_lower_rate(run, tmp_path):
    done = ask(run, "--out", tmp_path / "c.json", "--rule", "conformal", "--target-fpr", 0.02, "--resamples", 0, "-q")
    assert (done.exit_code, done.output) == (0, "")
    assert Calibration.load(tmp_path / "c.json").setting.rule == "conformal"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target-fpr", "5"], "--target-fpr 5.0 is not a rate between 0 and 1"),
        (["--target-fpr", "0.01"], "at least 299 distinct benign prompts"),
        (["--window", "3"], "a window is two step numbers"),
        (["--window", "2:40"], "--window 2:40 ends after step 6"),
        (["--import-csv", "."], "and not both"),
        (["--out", "nowhere/c.json"], "name a file in an existing folder"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(run, tmp_path, options, message):
    done = ask(run, "--out", tmp_path / "c.json", *options)
    assert done.exit_code == 2
    assert message in done.stderr
    assert not (tmp_path / "c.json").exists()


def test_no_run_at_all(tmp_path):
    done = ask("--out", tmp_path / "c.json")
    assert done.exit_code == 2
    assert "give folders that `headrift score` wrote" in done.stderr


def test_a_disk_that_fails(run, tmp_path, monkeypatch):
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Calibration, "save", fails)
    done = ask(run, "--out", tmp_path / "c.json", "--resamples", 0)
    assert done.exit_code == 1
    assert "no space left on the disk" in done.stderr


def test_the_originals_folders(made, tmp_path):
    for at, matrix in enumerate(made.made_up(0, 15, 75, effect=0.05)):
        kind, word = ("attacks", "say") if at < 15 else ("benign", "explain")
        folder = tmp_path / "outputs" / kind / f"{word}_{at}__20250908-072434"
        folder.mkdir(parents=True)
        np.savetxt(folder / "inter_head_std.csv", matrix.T, delimiter=",")
    done = ask("--import-csv", tmp_path / "outputs", "--out", tmp_path / "c.json", "--resamples", 0)
    assert done.exit_code == 0, done.output
    calibration = Calibration.load(tmp_path / "c.json")
    assert calibration.model.fingerprint is None
    assert calibration.figures["auroc"].value > 0.9
    assert "prompt_tokens" not in calibration.confounds
    words = next(one for one in calibration.comparison if one.name == "words")
    assert words.auroc.value > 0.9  # of the folders' names, which here tell all


def test_what_score_writes_is_read(fake_model, tmp_path):
    """Through the real scoring job, its columns and its run.json; only the numbers are made up."""
    rows = [
        {"prompt": f"{word} {n}" + " again" * (n % 3), "label": label}
        for word, label, many in (("Break", "attack", 15), ("Tell me about", "benign", 80))
        for n in range(many)
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    scored = ["score", tmp_path / "in.jsonl", "--model", fake_model, "--out", tmp_path / "run", "--steps", 4, "--quiet"]
    scored += ["--system-prompt-file", fake_model / "system.txt"]
    done = CliRunner().invoke(app, [str(argument) for argument in scored])
    assert done.exit_code == 0, done.output
    done = ask(tmp_path / "run", "--out", tmp_path / "c.json", "--resamples", 5, "--force")
    assert done.exit_code == 0, done.output
    calibration = Calibration.load(tmp_path / "c.json")
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert calibration.model.fingerprint == about["model"]["fingerprint"]
    assert calibration.model.chat_template_sha256 == about["chat_template_sha256"]
    assert {name: one.rows for name, one in calibration.classes.items()} == {"attack": 15, "benign": 80}
    assert calibration.classes["benign"].ended_early > 0  # the fake engine ends every third answer at once
    assert set(calibration.confounds) >= {"prompt_tokens", "system_share", "head_agreement", "focus"}
