"""`headrift heads evaluate`: what is refused before a model is loaded, which heads are taken, what the figures say."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from headrift.cli import app
from headrift.runs.folder import JobError
from headrift.safety_heads.evaluate import EvaluateConfig, EvaluateJob, Evaluation
from headrift.safety_heads.jobs import HeadsConfig, ShipsJob
from headrift.safety_heads.refusals import ABLATED, CLEAN, ArmAnswers, against_controls, is_refusal, summarise, table
from headrift.safety_heads.ships import rank

TOPICS = Path(__file__).resolve().parents[2] / "datasets" / "safety_topics.jsonl"


@pytest.fixture
def queries(tmp_path):
    file = tmp_path / "queries.jsonl"
    rows = [{"prompt": f"Question {i}?", "label": ("attack", "benign")[i % 2]} for i in range(8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def ranked(tmp_path):
    """A run of `ships` over 30 layers of 9 heads whose first heads are 29:8, 29:7, 29:6."""
    folder = tmp_path / "ships"
    folder.mkdir()
    heads = [asdict(head) for head in rank(np.arange(270.0).reshape(1, 30, 9))]
    settings = {"kind": "scaling", "epsilon": 0.25, "model": "f"}
    (folder / "ships.json").write_text(json.dumps({"settings": settings, "heads": heads}), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no head to ablate"),
        (["--heads", "30:0"], "it has layers 0 to 29"),
        (["--heads", "0:9"], "query heads 0 to 8"),
        (["--heads", "1:1", "--from", "RUN", "--top", "2"], "both choose heads"),
        (["--heads", "1:1", "--top", "2"], "--from RUN"),
        (["--from", "RUN"], "has 270 heads: give the number"),
        (["--from", "RUN", "--top", "271"], "has 270 heads; give 270 at most"),
        (["--from", "RUN", "--top", "136"], "only 134 others"),
        (["--from", "nowhere", "--top", "2"], "has no results"),
        (["--heads", "1:1", "--epsilon", "nan"], "epsilon"),
        (["--heads", "1:1", "--epsilon", "small"], "Invalid value for '--epsilon'"),
        (["--heads", "1:1", "--tokens", "9000"], "context of 8,192"),
        (["--heads", "1:1", "--labels", "attack,benign"], "2 labels for 1 input"),
        (["--heads", "1:1", "--choosing-queries", "mark"], "'keep'"),
    ],
)
def test_refused(queries, ranked, demo_model, tmp_path, options, message):
    options = [str(ranked) if option == "RUN" else option for option in options]
    out = tmp_path / "out"
    command = ["heads", "evaluate", str(queries), "--model", str(demo_model), "--out", str(out), *options]
    done = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert done.exit_code == 2, done.output
    assert message in done.output
    assert not out.exists()


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        ("input\nTell me.\n", None, "it has no label"),
        ("input\nTell me.\n", ("benign",), "no query is labelled attack"),
        ("input,label\nTell me.,benign\n", ("attack",), "no query is labelled attack"),
    ],
)
def test_queries_that_nothing_can_be_said_of(demo_model, tmp_path, rows, labels, message):
    file = tmp_path / "queries.csv"
    file.write_text(rows, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        EvaluateJob(EvaluateConfig((str(file),), demo_model, tmp_path / "out", heads=((1, 1),), labels=labels))


def test_heads_of_a_run_and_as_many_others(queries, ranked, demo_model, tmp_path):
    """The run's kind and epsilon hold unless others are given; controls are other heads, and the same with one seed."""
    options = {"inputs": (str(queries),), "model": demo_model, "run": ranked, "top": 3}
    job = EvaluateJob(EvaluateConfig(**options, out=tmp_path / "a", limit=3))
    assert (job.heads, job.kind, job.epsilon) == (((29, 8), (29, 7), (29, 6)), "scaling", 0.25)
    assert job.labels == ["attack", "benign"] * 3
    assert list(job.arms) == [CLEAN, ABLATED, "control 1", "control 2", "control 3"]
    draws = list(job.arms.values())[2:]
    assert [len({*heads}) for heads in draws] == [3, 3, 3]
    assert len(set(draws)) == 3
    assert not {head for heads in draws for head in heads} & set(job.heads)
    again = EvaluateJob(EvaluateConfig(**options, out=tmp_path / "b", limit=3))
    assert again.arms == job.arms
    other = EvaluateJob(EvaluateConfig(**options, out=tmp_path / "c", seed=1, kind="mean_query", epsilon=0.5))
    assert other.arms != job.arms
    assert (other.kind, other.epsilon) == ("mean_query", 0.5)
    quick = EvaluateJob(EvaluateConfig(**options, out=tmp_path / "d", quick=True))
    assert (quick.tokens, len(quick.arms), len(quick.passages), len(quick.queries)) == (32, 3, 4, 8)


@pytest.fixture
def ranked_on_three(ranked, queries, demo_model, tmp_path):
    """A run as `ranked`, of the first three attacks, which stand in a file of their own, in capitals."""
    file = tmp_path / "three.txt"
    file.write_text("".join(f"QUESTION  {i}?\n" for i in (0, 2, 4)), encoding="utf-8")
    job = ShipsJob(HeadsConfig((str(file),), demo_model, tmp_path / "searched"))
    about = json.loads((job.config.out / "ships.json").read_text("utf-8"))["about"]
    results = json.loads((ranked / "ships.json").read_text("utf-8"))
    (ranked / "ships.json").write_text(json.dumps(results | {"about": about}), encoding="utf-8")
    return ranked


def test_queries_that_chose_the_heads(queries, ranked_on_three, demo_model, tmp_path):
    """They are refused, left out, or kept and marked in the table and in evaluate.json."""
    options = {"inputs": (str(queries),), "model": demo_model, "run": ranked_on_three, "top": 3}
    with pytest.raises(JobError, match=r"3 of the 8 queries chose the heads of .*--choosing-queries leave-out"):
        EvaluateJob(EvaluateConfig(**options, out=tmp_path / "a"))
    assert not (tmp_path / "a").exists()
    with pytest.raises(JobError, match=r"1 of the 2 queries"):
        EvaluateJob(EvaluateConfig(**options, out=tmp_path / "a", limit=1))
    job = EvaluateJob(EvaluateConfig(**options, out=tmp_path / "b", choosing_queries="leave-out", limit=2))
    assert job.labels == ["benign", "benign", "attack"]
    assert job.chosen_on.to_json() == {
        "queries": 0, "evaluated": 3, "left_out": 3, "held_out": True,
        "note": "held out: none of the 3 queries chose the heads (3 that did are left out)",
    }  # fmt: skip
    job = EvaluateJob(EvaluateConfig(**options, out=tmp_path / "c", choosing_queries="keep"))
    note = "chosen on these queries: not held out (3 of 8)"
    assert job.chosen_on.to_json() == {"queries": 3, "evaluated": 8, "left_out": 0, "held_out": False, "note": note}
    none = np.zeros(8, bool)
    arms = {name: ArmAnswers((), none, np.zeros(8, int), none, np.full(12, -9.0)) for name in job.arms}
    summaries = summarise(arms, job.labels, np.full(12, 10.0))
    assert table(summaries, {}, note).startswith(note)
    result = job._to_json(Evaluation(summaries, {}, job.chosen_on, 1.0))
    assert result["chosen_on_these_queries"]["note"] == note


def test_all_queries_chose_the_heads(ranked_on_three, demo_model, tmp_path):
    options = {"model": demo_model, "run": ranked_on_three, "top": 3, "labels": ("attack",)}
    inputs = (str(tmp_path / "three.txt"),)
    with pytest.raises(JobError, match="all of the 3 queries chose the heads: give others"):
        EvaluateJob(EvaluateConfig(inputs, out=tmp_path / "a", choosing_queries="leave-out", **options))


@pytest.mark.parametrize("heads", [None, ((1, 1),)])
def test_which_queries_chose_the_heads_may_not_be_known(queries, ranked, demo_model, tmp_path, heads):
    """Of runs of earlier versions, and of heads that are named."""
    source = {"run": ranked, "top": 3} if heads is None else {"heads": heads}
    options = {"inputs": (str(queries),), "model": demo_model, **source}
    job = EvaluateJob(EvaluateConfig(**options, out=tmp_path / "a"))
    assert (job.chosen_on.queries, job.chosen_on.held_out) == (None, None)
    assert "not known" in str(job.chosen_on)
    with pytest.raises(JobError, match="leave-out: which queries chose the heads is not known"):
        EvaluateJob(EvaluateConfig(**options, out=tmp_path / "b", choosing_queries="leave-out"))


def test_what_the_figures_say():
    labels = ["attack", "benign"] * 10
    attack = np.array(labels) == "attack"
    none = np.zeros(20, bool)
    lengths = np.array([10.0] * 12)

    def answers(refused, log_likelihood, changed=none):
        return ArmAnswers((), refused, np.zeros(20, int), changed, np.full(12, log_likelihood))

    refuses_six = attack & (np.arange(20) < 12)
    arms = {
        CLEAN: answers(attack, -20.0),
        ABLATED: answers(refuses_six, -30.0, changed=~attack),
        "control 1": answers(attack, -20.0),
        "control 2": answers(none, -20.0),
    }
    arms[ABLATED].log_likelihood[:6] -= 5.0
    clean, ablated, *_ = summaries = summarise(arms, labels, lengths)
    assert clean.refused["attack"].value == 1.0
    assert clean.refused_against_clean == {}
    assert clean.perplexity == pytest.approx(np.exp(2.0))
    assert (ablated.refused["attack"].true, ablated.refused["attack"].n) == (6, 10)
    assert ablated.attack_success.true == 4
    assert ablated.attack_success.interval == pytest.approx(
        tuple(1 - at for at in ablated.refused["attack"].interval[::-1])
    )
    difference = ablated.refused_against_clean["attack"]
    assert (difference.began, difference.ended, difference.difference) == (0, 4, pytest.approx(-0.4))
    assert ablated.refused_against_clean["benign"].difference == 0.0
    assert ablated.changed["benign"].value == 1.0
    # A nat more for ten tokens, and one and a half for half of the passages.
    assert ablated.damage == pytest.approx(np.exp(1.25))
    assert np.exp(1.0) <= ablated.damage_interval[0] < ablated.damage < ablated.damage_interval[1] <= np.exp(1.5)
    against = against_controls(arms, labels)
    assert against["attack"].difference == pytest.approx(0.6 - 0.5)
    assert against["benign"].difference == 0.0
    # None of ten differs, and no interval has no width.
    assert against["benign"].interval[0] < -0.1 < 0.1 < against["benign"].interval[1]
    shown = table(summaries, against)
    assert "4 stopped refusing, 0 began" in shown
    assert "attacks not refused" in shown
    assert max(map(len, shown.splitlines())) <= 120


@pytest.mark.slow  # the notebook's test runs the command
def test_an_evaluation_from_end_to_end(tiny_model, tmp_path):
    """The figures are those of the rows, and no answer is in the folder."""
    queries = tmp_path / "queries.csv"
    queries.write_text("input\n" + "".join(f"What is {i} times three?\n" for i in range(6)), encoding="utf-8")
    benign = tmp_path / "benign.txt"
    benign.write_text("How are you?\nWhat is tea?\n", encoding="utf-8")
    out = tmp_path / "out"
    command = [Path(sys.executable).with_name("headrift"), "heads", "evaluate", queries, benign]
    command += ["--labels", "attack,benign", "--model", tiny_model, "--out", out, "--heads", "0:1,1:2"]
    command += ["--kind", "scaling", "--tokens", 20, "--draws", 1, "--dtype", "float32"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "attack success, ablated" in done.stdout
    assert {path.name for path in out.iterdir()} == {"evaluate.json", "answers.parquet", "arms.png"}
    result = json.loads((out / "evaluate.json").read_text("utf-8"))
    assert result["settings"]["heads"] == [[0, 1], [1, 2]]
    assert result["settings"]["queries"] == {"attack": 6, "benign": 2}
    assert list(result["arms"]) == [CLEAN, ABLATED, "control 1"]
    rows = pq.read_table(out / "answers.parquet").to_pylist()
    assert len(rows) == 3 * 8
    assert set(rows[0]) == {"query", "id", "label", "category", "arm", "refused", "answer_tokens", "same_tokens"}
    for name, arm in result["arms"].items():
        own = [row for row in rows if row["arm"] == name]
        assert all(0 <= row["same_tokens"] <= row["answer_tokens"] <= 20 for row in own)
        for label, rate in arm["refused"].items():
            assert rate["true"] == sum(row["refused"] for row in own if row["label"] == label)
        for label, rate in arm["answers_changed"].items():
            # Two answers that end before, alike, have not changed.
            clean = {row["query"]: row for row in rows if row["arm"] == CLEAN}
            differ = [
                row["same_tokens"] < min(16, max(row["answer_tokens"], clean[row["query"]]["answer_tokens"]))
                for row in own
                if row["label"] == label
            ]
            assert rate["true"] == sum(differ)
    clean, ablated = result["arms"][CLEAN], result["arms"][ABLATED]
    assert clean["perplexity_over_clean"]["value"] == 1.0
    # Half of a layer's heads gone: a text is not read as before.
    assert ablated["perplexity"] != pytest.approx(clean["perplexity"], rel=1e-3)
    assert any(row["same_tokens"] < row["answer_tokens"] for row in rows if row["arm"] == ABLATED)


@pytest.mark.slow
def test_the_demonstration_model_keeps_its_answers_where_that_is_asked_for(demo_model, tmp_path):
    """Refusals are those of the texts, and a layer without its heads reads a text worse."""
    out = tmp_path / "out"
    command = [Path(sys.executable).with_name("headrift"), "heads", "evaluate", TOPICS, "--model", demo_model]
    command += ["--out", out, "--quick", "--keep-completions", "--heads", ",".join(f"0:{head}" for head in range(9))]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = pq.read_table(out / "answers.parquet").to_pylist()
    assert len(rows) == 3 * 10
    assert [is_refusal(row["text"]) for row in rows] == [row["refused"] for row in rows]
    assert all(row["text"] for row in rows if row["arm"] == CLEAN)
    arms = json.loads((out / "evaluate.json").read_text("utf-8"))["arms"]
    # English that it has learnt to read: far from the 49,152 of knowing nothing.
    assert 5 < arms[CLEAN]["perplexity"] < 60
    assert arms[ABLATED]["perplexity_over_clean"]["value"] > 1.2
