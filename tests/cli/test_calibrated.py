"""`headrift score --calibration`: what it adds, what it refuses and when, and one real run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from headrift import Calibration
from headrift.calibration.artifact import discoveries
from headrift.cli import app
from headrift.testing import FakeEngine, fake_engines
from helpers.fakes import FailAt, must_not_start, raises

SYSTEM = "Be brief."
KINDS = (("Break", "attack", 20), ("Tell me about", "benign", 80))


def rows(*kinds, **others) -> list[dict]:
    """Prompts, some of which come twice."""
    made = [
        {"prompt": f"{word} {n}" + " again" * (n % 3), "label": label, **others}
        for word, label, many in kinds or KINDS
        for n in range(many)
    ]
    return made + made[:5] + made[-5:]


def headrift_(*arguments: object):
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "80"})


def read(folder: Path, stem: str = "part") -> list[dict]:
    return [row for path in sorted(folder.glob(f"{stem}-*.parquet")) for row in pq.read_table(path).to_pylist()]


def fake_scores(*options: object, out: str, model: Path):
    options_of_all = ["--model", model, "--out", out, "--system-prompt-file", "system.txt"]
    return headrift_("score", "in.jsonl", *options_of_all, *options)


@pytest.fixture(scope="module")
def begun(model_folder, tmp_path_factory) -> Path:
    """A folder with an input, a run of it (a fake engine) and its calibration, c.json."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch, fake_engines():
        patch.chdir(folder)
        Path("in.jsonl").write_text("\n".join(map(json.dumps, rows())))
        Path("system.txt").write_text(SYSTEM)
        done = fake_scores("--window", "1:4", out="plain", model=model_folder)
        assert done.exit_code == 0, done.output
        done = headrift_("calibrate", "plain", "--out", "c.json", "--window", "1:4", "--resamples", 0)
        assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def work(begun, fake_model, tmp_path, monkeypatch):
    """A copy of that folder, and what scores in there, in shards of 40 rows."""
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("headrift.corpus.config._MIN_SHARD_ROWS", 40)

    def score(*options: object, out: str = "out", given: list[dict] | None = None, model: Path = fake_model):
        if given is not None:
            Path("in.jsonl").write_text("\n".join(map(json.dumps, given)))
        return fake_scores(*options, out=out, model=model)

    return SimpleNamespace(score=score, folder=tmp_path, model=fake_model, calibration=Calibration.load("c.json"))


def changed(work, name: str = "other.json", **changes) -> str:
    """The calibration with something changed, `model` in part; the file's name."""
    model = work.calibration.model.model_copy(update=changes.pop("model", {}))
    work.calibration.model_copy(update={"model": model, **changes}).save(name)
    return name


# ------------------------------------------------------------------------------------------------------ what it adds


def test_each_row_has_a_verdict_and_nothing_else_changes(work):
    done = work.score("--calibration", "c.json")
    assert done.exit_code == 0, done.output
    plain, judged = read(Path("plain")), read(Path("out"))
    assert len(list(Path("out").glob("part-*"))) > 2
    added = dict.fromkeys(("detector", "flagged", "p_value"))
    assert [row | added for row in plain] == [row | added for row in judged]
    direction = work.calibration.detector.direction
    values = [row["detector"] for row in judged]
    assert values == [None if row["score"] is None else direction * row["score"] for row in judged]
    expected = work.calibration.apply(values)
    assert [row["flagged"] for row in judged] == expected.flagged.tolist()
    np.testing.assert_array_equal([row["p_value"] if row["p_value"] else np.nan for row in judged], expected.p_value)
    assert None in values
    assert all((row["score"] is None) == (row["p_value"] is None) for row in judged)
    schema = pq.read_schema("out/part-00000.parquet")
    assert schema.names[-3:] == list(added)
    assert json.loads(schema.metadata[b"headrift"])["layers"] == 6


def test_the_run_says_what_is_flagged_by_class_and_distinct_prompt(work):
    # A lower threshold, so that some are flagged of either class.
    scores = [row["score"] for row in read(Path("plain")) if row["score"] is not None]
    lower = work.calibration.detector.direction * float(np.median(scores))
    done = work.score("--calibration", changed(work, threshold=lower))
    assert done.exit_code == 0, done.output
    run = json.loads(Path("out/run.json").read_text())
    assert run["settings"] | {"window": "1:4", "drop_shallow": 0.25, "drop_deep": 0.15} == run["settings"]
    assert (run["calibration"]["threshold"], run["calibration"]["differs"]) == (lower, [])
    judged = read(Path("out"))
    for name in ("attack", "benign"):
        of_class = [row for row in judged if row["label"] == name]
        prompts = {(row["group"], row["system_hash"]): row["flagged"] for row in of_class}
        counts = run["judged"]["flagged"][name]
        assert (counts["rows"], counts["flagged"]) == (len(of_class), sum(row["flagged"] for row in of_class))
        assert (counts["prompts"], counts["prompts_flagged"]) == (len(prompts), sum(prompts.values()))
        assert counts["rate"] == counts["prompts_flagged"] / counts["prompts"]
        assert counts["interval"][0] < counts["rate"] < counts["interval"][1]
    words = " ".join(done.stdout.split())
    n = run["judged"]["flagged"]["benign"]
    assert f"value >= {lower:.6f} rows flagged of prompts 95% interval" in words
    low, high = n["interval"]
    assert f"benign (flagged: FPR) {n['rows']} {n['flagged']} {n['rate']:.1%} {low:.1%}-{high:.1%}" in words
    assert "attack (found: TPR) 25 " in words
    assert max(map(len, done.stdout.splitlines())) <= 80
    # The threshold was lowered, and the distribution is the same.
    drift = run["judged"]["drift"]
    assert drift["warning"].startswith(
        f"more benign prompts than promised: {n['rate']:.1%} of {n['prompts']} are flagged"
    )
    assert drift["p_value"] > 0.01 > drift["p_flagged"]
    assert run["judged"]["new_system_prompts"] == {"rows": 0, "hashes": []}


def test_system_prompts_that_the_calibration_does_not_know_are_told(work):
    """However many there are, run.json stays small."""
    given = rows()
    others = [{**row, "system": f"Be kind, {number}."} for number, row in enumerate(given[-30:])]
    done = work.score("--calibration", "c.json", given=[*given[:-30], *others])
    assert done.exit_code == 0, done.output
    assert "Warning: 30 rows have system prompts that the threshold was not set under" in " ".join(done.stdout.split())
    new = json.loads(Path("out/run.json").read_text())["judged"]["new_system_prompts"]
    known = set(work.calibration.data.system_prompts)
    hashes = {row["system_hash"] for row in read(Path("out"))} - known
    assert (new["rows"], len(known), len(hashes), len(new["hashes"])) == (30, 1, 30, 20)
    assert set(new["hashes"]) < hashes
    # A file of an earlier version does not know them.
    earlier = changed(work, data=work.calibration.data.model_copy(update={"system_prompts": None}))
    done = work.score("--calibration", earlier, out="again")
    assert "system prompts that" not in done.stdout


def test_a_run_of_step_0_is_judged_and_shown_by_its_detector(work):
    assert work.score("--steps", 0, out="first").exit_code == 0
    assert not Path("first/scores.png").exists()
    done = headrift_("calibrate", "first", "--out", "r.json", "--signal", "readout", "--force", "--resamples", 0)
    assert done.exit_code == 0, done.output
    done = work.score("--calibration", "r.json")
    assert done.exit_code == 0, done.output
    label = f"detector: {Calibration.load('r.json').label}"
    (comparison,) = json.loads(Path("out/run.json").read_text())["comparisons"]
    assert list(comparison["measures"]) == [label, "prompt length", "answer length", "number of steps"]
    prompts = {(row["group"], row["label"]): row for row in reversed(read(Path("out")))}.values()
    attack, values = zip(*((row["label"] == "attack", row["detector"]) for row in prompts))
    assert comparison["measures"][label]["auroc"] == pytest.approx(roc_auc_score(attack, values))
    assert Path("out/scores.png").stat().st_size > 10_000
    assert [line for line in done.stdout.splitlines() if line.startswith(("detector: ", "score ", "answer"))] != []
    assert "score (no score" not in done.stdout
    assert "answer length" not in done.stdout


def test_the_list_is_that_of_benjamini_and_hochberg_over_prompts(work):
    # Known benign scores far below all others: p-values are small, and the list is long.
    low = work.calibration.scores.model_copy(update={"values": [s - 0.04 for s in work.calibration.scores.values]})
    popular = rows()[20]
    done = work.score("--calibration", changed(work, scores=low), given=[*rows(), *[popular] * 30])
    judged, listed = read(Path("out")), pq.read_table("out/flagged-fdr.parquet").to_pylist()
    prompts = {(row["prompt_hash"], row["system_hash"]): row["p_value"] for row in judged}
    p_values = [np.nan if value is None else value for value in prompts.values()]
    on_list = {prompt for prompt, on in zip(prompts, discoveries(p_values)) if on}
    assert 10 < len(on_list) < len(prompts) < len(judged)
    of_row = {(row["source"], row["row"]): (row["prompt_hash"], row["system_hash"]) for row in judged}
    expected = [row for row in judged if of_row[row["source"], row["row"]] in on_list]
    names = ("id", "source", "row", "score", "detector", "p_value")
    by_row = {row["row"]: {name: row[name] for name in names} for row in expected}
    assert {row["row"]: {name: row[name] for name in names} for row in listed} == by_row
    # Distinct prompts, the most suspicious first, each with its rows beneath it.
    entries = [row["entry"] for row in listed]
    assert entries == sorted(entries)
    assert set(entries) == set(range(1, len(on_list) + 1))
    assert len({(row["entry"], of_row[row["source"], row["row"]]) for row in listed}) == len(on_list)
    assert [row["p_value"] for row in listed] == sorted(row["p_value"] for row in listed)
    message = f"flagged-fdr.parquet: review list of {len(on_list)} prompts ({len(listed)} rows)"
    assert message in " ".join(done.stdout.split())
    run = json.loads(Path("out/run.json").read_text())
    about = run["judged"]["fdr_list"]
    assert (about["prompts"], about["rows"]) == (len(on_list), len(listed))
    assert about["highest_p_value"] == max(row["p_value"] for row in listed)
    drift = run["judged"]["drift"]
    assert drift["of"] == "benign"
    assert drift["warning"].startswith("benign scores have moved since the calibration")
    assert "Warning: benign scores have moved since the calibration" in done.stdout


def test_rates_and_drift_count_the_groups_of_rows(work):
    """Ten sessions of eight prompts each are ten groups: the interval is wider, and drift is of ten values."""
    given = [{**row, "session": f"s{number % 10}"} for number, row in enumerate(rows(("Tell me about", "benign", 80)))]
    assert work.score("--calibration", "c.json", given=given, out="alone").exit_code == 0
    done = work.score("--calibration", "c.json", "--column", "group=session", given=given)
    assert done.exit_code == 0, done.output
    alone, grouped = (json.loads(Path(out, "run.json").read_text())["judged"] for out in ("alone", "out"))
    assert (alone["drift"]["n"], grouped["drift"]["n"]) == (80, 10)
    assert (alone["flagged"]["benign"]["prompts"], grouped["flagged"]["benign"]["prompts"]) == (80, 80)
    widths = [one["flagged"]["benign"]["interval"][1] - one["flagged"]["benign"]["rate"] for one in (alone, grouped)]
    assert widths[0] < widths[1]
    assert len({row["group"] for row in read(Path("out"))}) == 10
    for row in ({"prompt": "x", "session": 1.5}, {"prompt": "x", "session": [1]}):
        done = work.score("--column", "group=session", given=[row, *given], out=f"bad{len(str(row))}")
        (reject,) = read(Path(f"bad{len(str(row))}"), "rejects")
        assert (reject["reason"], "`group` is" in reject["detail"]) == ("wrong_type", True)


def test_an_empty_list_says_why(work):
    done = work.score("--calibration", "c.json")
    assert pq.read_table("out/flagged-fdr.parquet").num_rows == 0
    assert "flagged-fdr.parquet is empty: too few calibration prompts" in " ".join(done.stdout.split())


def test_of_rows_without_a_label_the_warning_says_that_attacks_may_be_among_them(work):
    low = work.calibration.scores.model_copy(update={"values": [s - 0.04 for s in work.calibration.scores.values]})
    done = work.score("--calibration", changed(work, scores=low), given=rows(("Tell me about", None, 60)))
    assert done.exit_code == 0, done.output
    run = json.loads(Path("out/run.json").read_text())
    assert set(run["judged"]["flagged"]) == {run["judged"]["drift"]["of"]} == {"unlabelled"}
    words = " ".join(done.stdout.split())
    assert "Warning: the scores of rows without a label, whatever attacks are among them, have moved since" in words


def test_a_calibrated_run_is_calibrated_on_and_explained_as_any_other(work):
    assert work.score("--calibration", "c.json").exit_code == 0
    done = headrift_("calibrate", "out", "--out", "again.json", "--window", "1:4", "--resamples", 0)
    assert done.exit_code == 0, done.output
    again = Calibration.load("again.json")
    same = {"created", "data"}
    assert again.model_dump(exclude=same) == work.calibration.model_dump(exclude=same)
    assert headrift_("explain", "out", "--id", read(Path("out"))[1]["id"]).exit_code == 0


def test_more_steps_are_recorded_where_the_window_needs_them(work):
    steps = []

    def factory(*args: object, **options: object) -> FakeEngine:
        steps.append(options["steps"])
        return FakeEngine(*args, **options)

    long = changed(work, window="2:20", drop_shallow=0.4, drop_deep=0.0)
    with fake_engines(factory):
        done = work.score("--calibration", long)
        assert done.exit_code == 0, done.output
        assert "Note: steps 0 to 20 are recorded" in done.stderr
        settings = json.loads(Path("out/run.json").read_text())["settings"]
        assert (settings["steps"], settings["window"], settings["drop_shallow"], settings["drop_deep"]) == (
            20,
            "2:20",
            0.4,
            0.0,
        )
        assert max(row["n_steps"] for row in read(Path("out"))) == 20
        done = work.score("--calibration", "c.json", "--window", "1:4", "--drop-deep", 0.15, "--steps", 7, out="same")
    assert (done.exit_code, "are recorded" in done.stderr) == (0, False)
    assert steps == [20, 7]


# -------------------------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--calibration", "in.jsonl"], "in.jsonl is not a calibration (Invalid JSON"),
        (["--calibration", "plain/run.json"], "run.json is not a calibration ("),
        (["--calibration", "none.json"], "none.json cannot be read: No such file"),
        (["--calibration", "c.json", "--window", "2:4"], "--window 2:4: the --calibration is for --window 1:4: leave"),
        (["--calibration", "c.json", "--drop-deep", "0.2"], "the --calibration is for --drop-deep 0.15: leave --drop"),
        (["--calibration", "c.json", "--steps", "3"], "leave --steps out, or give at least 4"),
        (["--calibration-anyway"], "--calibration-anyway goes with --calibration"),
    ],
)
def test_what_contradicts_the_calibration_is_refused_before_anything_is_done(work, options, says):
    done = work.score(*options)
    assert (done.exit_code, done.stdout) == (2, "")
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not Path("out").exists()


@pytest.fixture
def other_models(work, tiny_model, tmp_path) -> list[Path]:
    """Another model, and the calibration's own with another chat template."""
    template = tmp_path / "template"
    template.mkdir()
    for path in work.model.iterdir():
        (template / path.name).symlink_to(path)
    (template / "chat_template.jinja").unlink()
    (template / "chat_template.jinja").write_text((work.model / "chat_template.jinja").read_text() + "\n")
    return [tiny_model, template]


def test_another_model_or_template_is_refused_before_it_is_loaded(work, other_models):
    for model in other_models:
        with fake_engines(must_not_start):
            done = work.score("--calibration", "c.json", model=model)
        assert done.exit_code == 2
        assert "--calibration is for something else than this run: the model differs" in done.stderr
        assert "or give --calibration-anyway, and its promise does not hold" in done.stderr
        assert list(Path("out").iterdir()) == []


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"chat_template_sha256": "x"}, "the chat template differs"),
        ({"dtype": "bfloat16", "heads": 4}, "the type it is computed in and the number of heads differ"),
    ],
)
def test_what_only_the_engine_knows_is_refused_before_the_first_row(work, model, says):
    other = changed(work, model=model)
    done = work.score("--calibration", other)
    assert done.exit_code == 2
    assert f"something else than this run: {says}" in done.stderr
    assert list(Path("out").iterdir()) == []
    done = work.score("--calibration", other, "--calibration-anyway")
    assert done.exit_code == 0, done.output
    assert "Note: the calibration is for something else and used anyway: " in done.stderr
    run = json.loads(Path("out/run.json").read_text())
    assert f"{' and '.join(run['calibration']['differs'])} differ" in says.replace("differs", "differ")


def test_replayed_answers_are_refused_by_a_calibration_of_made_ones(work):
    given = [{**row, "response": f"Answer {number}."} for number, row in enumerate(rows())]
    done = work.score("--calibration", "c.json", "--replay", given=given)
    assert done.exit_code == 2
    assert "answers (in the calibration made, here replayed) differs" in done.stderr
    assert list(Path("out").iterdir()) == []
    done = work.score("--calibration", "c.json", "--replay", "--calibration-anyway", given=given)
    assert done.exit_code == 0, done.output
    differs = json.loads(Path("out/run.json").read_text())["calibration"]["differs"]
    assert differs == ["answers (in the calibration made, here replayed)"]
    # A replayed run is for itself, and different answers to one prompt are different samples of one group.
    done = work.score("--replay", "--window", "1:4", given=given, out="replayed")
    assert done.exit_code == 0, done.output
    done = headrift_("calibrate", "replayed", "--out", "r.json", "--window", "1:4", "--resamples", 0)
    assert done.exit_code == 0, done.output
    calibration = Calibration.load("r.json")
    assert (calibration.data.replay, work.calibration.data.replay, work.calibration.data.steps) == (True, False, 12)
    assert (calibration.classes["benign"].distinct, work.calibration.classes["benign"].distinct) == (85, 80)
    assert calibration.setting.n == 80
    done = work.score("--calibration", "r.json", given=rows(), out="made")
    assert "answers (in the calibration replayed, here made) differs" in done.stderr
    assert headrift_("report", "replayed", "--calibration", "c.json", "--out", "r.html").exit_code == 2


def test_a_run_is_resumed_with_its_own_calibration_only(work):
    assert work.score("--calibration", "c.json", out="whole").exit_code == 0
    with fake_engines(on_submit=FailAt(70, raises(RuntimeError("the engine fell over")))):
        assert work.score("--calibration", "c.json").exit_code == 1
    assert len(read(Path("out"))) == 40
    other = changed(work, threshold=0.3)
    for options, says in (
        (["--calibration", other], "--calibration: the run was begun with another one"),
        (["--steps", 12, "--window", "1:4"], "--calibration: the run was begun with one"),
    ):
        done = work.score(*options, "--resume")
        assert done.exit_code == 2
        assert says in done.stderr
    done = work.score("--resume", "--calibration", "c.json")
    assert done.exit_code == 0, done.output
    assert read(Path("out")) == read(Path("whole"))
    whole, resumed = (json.loads(Path(name, "run.json").read_text()) for name in ("whole", "out"))
    assert whole["judged"] == resumed["judged"]
    assert pq.read_table("out/flagged-fdr.parquet") == pq.read_table("whole/flagged-fdr.parquet")
    done = work.score("--resume", "--calibration", "c.json", out="plain")
    assert "--calibration: the run was begun without one" in done.stderr


# --------------------------------------------------------------------------------------------------------- a real run


@pytest.mark.slow  # two engines
def test_real_scores_are_judged_as_they_were_calibrated(tiny_model, tmp_path):
    """The commands as a user starts them, on a tiny model."""
    Path(tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows())))
    Path(tmp_path / "system.txt").write_text(SYSTEM)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1", "COLUMNS": "80"}

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [Path(sys.executable).parent / "headrift", *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    command_of_all = ["score", "in.jsonl", "--model", tiny_model, "--system-prompt-file", "system.txt"]
    for command in (
        [*command_of_all, "--out", "first", "--steps", 4, "--window", "2:4", "--drop-shallow", 0],
        ["calibrate", "first", "--out", "c.json", "--target-fpr", 0.2, "--window", "2:4", "--resamples", 0],
        [*command_of_all, "--out", "second", "--calibration", "c.json", "--save", "mass"],
    ):
        done = run(*command)
        assert done.returncode == 0, done.stderr
    first, second = read(tmp_path / "first"), read(tmp_path / "second")
    calibration = Calibration.load(tmp_path / "c.json")
    expected = calibration.apply([row["score"] for row in second])
    assert [row["flagged"] for row in second] == expected.flagged.tolist()
    assert any(expected.flagged)
    # The same prompts in the same window; only rounding tells the two runs apart.
    np.testing.assert_allclose([row["score"] for row in first], [row["score"] for row in second], atol=1e-5)
    assert f"value >= {calibration.threshold:.6f}" in done.stdout
    assert json.loads((tmp_path / "second" / "run.json").read_text())["calibration"]["differs"] == []
