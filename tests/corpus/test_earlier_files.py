"""What an earlier version wrote (see tests/data) is still read: a run resumes, and a calibration judges."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from headrift import Calibration
from headrift.cli import app
from headrift.corpus.config import ScoreConfig
from headrift.corpus.job import ScoreJob
from headrift.runs.folder import JobError
from headrift.runs.reading import read_batches

ROOT = Path(__file__).resolve().parents[2]
DATA = Path("tests/data")
SYSTEM_PROMPT = Path("system_prompts/banned_word.txt")


@pytest.fixture
def interrupted(demo_model, tmp_path, monkeypatch) -> Path:
    """A copy of the interrupted run; in the folder that it was begun in."""
    monkeypatch.chdir(ROOT)
    return Path(shutil.copytree(DATA / "interrupted_run" / "run", tmp_path / "run"))


def config(out: Path, **changes) -> ScoreConfig:
    inputs = (str(DATA / "interrupted_run" / "prompts.jsonl"),)
    prompt = SYSTEM_PROMPT.read_text(encoding="utf-8").strip()
    given = {"system_prompt": prompt, "steps": 4, "save": ("text",), "dtype": "float32"}
    return ScoreConfig(inputs, Path("models/smollm2-135m-instruct"), out, **{**given, **changes})


def rows_of(folder: Path) -> dict[str, dict]:
    columns = ["id", "label", "group", "system_hash", "score", "n_steps", "prompt_tokens", "prompt", "text"]
    return {row["id"]: row for batch in read_batches(folder, columns) for row in batch.to_pylist()}


def test_an_interrupted_run_of_the_same_options_is_accepted(interrupted):
    with ScoreJob(config(interrupted), resume=True) as job:
        assert (job.kept, job.total) == (16, 40)


@pytest.mark.parametrize(("change", "option"), [({"steps": 5}, "--steps"), ({"redact": True, "save": ()}, "--redact")])
def test_an_interrupted_run_of_other_options_is_refused(interrupted, change, option):
    with pytest.raises(JobError, match=option):
        ScoreJob(config(interrupted, **change), resume=True)


def test_a_calibration_is_read_as_it_was_written():
    path = ROOT / DATA / "calibration.json"
    calibration = Calibration.load(path)
    written = json.loads(path.read_text(encoding="utf-8"))
    assert calibration.model_dump(mode="json", exclude_unset=True) == written
    assert calibration.detector.signal == "instability"
    assert calibration.sha256 == "69b9d80a2ea2ae6a9e41661393b7bd0a88dbcad16c8621ee52273a1c81e00b4c"
    verdicts = calibration.apply([calibration.threshold, calibration.threshold - 1e-6, None])
    assert verdicts.flagged.tolist() == [True, False, False]


@pytest.mark.slow
def test_an_interrupted_run_ends_as_one_that_was_never_interrupted(interrupted, tmp_path):
    """With the engine: two shards are the earlier version's, three are made now."""
    options = ["score", str(DATA / "interrupted_run" / "prompts.jsonl"), "--model", "models/smollm2-135m-instruct"]
    options += ["--system-prompt-file", str(SYSTEM_PROMPT), "--steps", "4", "--save", "text", "--dtype", "float32"]
    for folder, more in ((interrupted, ["--resume"]), (tmp_path / "whole", [])):
        done = CliRunner().invoke(app, [*options, "--out", str(folder), *more, "--quiet"])
        assert done.exit_code == 0, done.output
    resumed, whole = rows_of(interrupted), rows_of(tmp_path / "whole")
    assert list(resumed) == list(whole)
    assert len(whole) == 38
    for row_id, row in whole.items():
        assert resumed[row_id].pop("score") == pytest.approx(row.pop("score"), abs=1e-4)
        assert resumed[row_id] == row
    counts = [json.loads((folder / "run.json").read_text())["counts"] for folder in (interrupted, tmp_path / "whole")]
    assert counts[0] == counts[1]
    # The second row with its id came after the interruption, the first one before.
    assert counts[0]["rejected"] == {"no_prompt": 1, "duplicate_id": 1}
