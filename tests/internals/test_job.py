"""Whole runs with two random layers: what is in the folder, resumed runs, planted truths."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from headrift.cli import app
from headrift.internals.cases import CHECK
from headrift.internals.comparing import COMPARISONS, SYSTEM
from headrift.internals.job import CKA, COMPONENTS, PLACEMENTS, SENTENCES, Asked, InternalsJob, JobError

QUESTIONS = (
    "What is the capital of Norway?", "How do bees find their way home?", "Name three uses of vinegar.",
    "Why is the sea salty?", "Suggest a name for a grey cat.", "What rhymes with orange?",
    "How long does an egg take to boil?", "Who painted the ceiling of a famous chapel in Rome?",
    "Is a tomato a fruit?", "What is the opposite of humid?", "How many sides has a cube?", "Where do puffins nest?",
)  # fmt: skip
SYSTEMS = {
    "short": "Answer in one word.",
    "three": "You are a pirate. Never say 'ship'. Think step by step before you answer.",
    "long": "Be kind to everybody you meet, and say so. " * 6,
    "too_long": "Be kind to everybody. " * 120,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "systems").mkdir()
    for name, text in SYSTEMS.items():
        (folder / "systems" / f"{name}.txt").write_text(text)
    rows = [{"id": f"q{i}", "prompt": text, "category": "odd" if i % 2 else "even"} for i, text in enumerate(QUESTIONS)]
    lines = [json.dumps(row) for row in rows]
    (folder / "prompts.jsonl").write_text("\n".join([*lines, '{"prompt": ""}']) + "\n")
    return folder


@pytest.fixture(scope="module")
def asked(inputs, tiny_model, tmp_path_factory) -> Asked:
    return Asked(
        model=tiny_model,
        system_prompts=inputs / "systems",
        prompts=(str(inputs / "prompts.jsonl"),),
        out=tmp_path_factory.mktemp("run") / "out",
        drop_sentences=3,
        steps=4,
        attention=False,
    )


@pytest.fixture(scope="module")
def run(asked):
    """A job, what it found, and how many rows it told of."""
    job = InternalsJob(asked)
    told: list[int] = []
    expected = job.rows
    found = job.run(told.append)
    assert sum(told) == expected
    assert job.rows == 0
    return job, found


def test_every_prompt_is_compared_or_rejected(run):
    job, found = run
    table = job.table(COMPONENTS)
    rows = table.to_pylist()
    assert len(rows) == len(COMPARISONS) * 12 * 4  # three system prompts and the check
    assert {row["system"] for row in rows} == {"short", "three", "long", CHECK}
    rejects = pq.read_table(job.asked.out / "rejects.parquet").to_pylist()
    assert found["rejected"] == len(rejects) == 1 + 12
    assert {(row["reason"], row["system"]) for row in rejects} == {
        ("no_user_message", None),
        ("prompt_too_long", "too_long"),
    }
    about = json.loads(table.schema.metadata[b"headrift"])
    assert about["layers"] == 2
    for row in rows:
        assert np.isfinite(row["kl"])
        for place in ("last", "question"):
            assert np.shape(row[f"{place}_cosine"]) == (6,)
            assert np.all(np.abs(row[f"{place}_cosine"]) <= 1 + 1e-6)
            assert min(row[f"{place}_l2"]) > 0
        assert 0 <= row["same_steps"] <= row["steps"] <= 4
        assert row["top1_changed"] == (row["same_steps"] == 0)


def test_the_first_kl_and_the_common_answer_are_those_of_the_model(run, asked):
    """Against plain transformers: the next token's KL, and greedy answers of both renderings."""
    import torch
    import transformers

    job, _ = run
    model = transformers.AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32).eval()

    def next_log_probs(ids):
        with torch.inference_mode():
            return torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], -1)

    def greedy(ids):
        said = []
        for _ in range(4):
            said.append(int(next_log_probs([*ids, *said]).argmax()))
        return said

    rows = [
        row for row in job.table(COMPONENTS).to_pylist() if row["comparison"] == SYSTEM and row["system"] == "three"
    ]
    for row in rows[:4]:
        question = job.questions[row["prompt"]]
        ours = question.base.token_ids
        theirs = job.renderer.with_system(question.text, SYSTEMS["three"]).token_ids
        p, q = next_log_probs(ours), next_log_probs(theirs)
        expected = float((p.exp() * (p - q)).sum())
        # Both are sums over 49,152 float32 probabilities.
        assert row["kl"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
        same = [a == b for a, b in zip(greedy(ours), greedy(theirs))]
        assert row["same_steps"] == (len(same) if all(same) else same.index(False))


def test_what_was_found_rests_on_rows_and_is_on_the_page(run, asked):
    _, found = run
    numbers = found["numbers"]
    assert numbers["output"][SYSTEM]["kl"]["rows"] == 36
    assert numbers["output"][SYSTEM]["kl"]["prompts"] == 12
    assert numbers["beyond_neutral"]["kl"][CHECK]["rows"] == 12
    assert set(numbers["placements"]) == {"system prompt", "before the question", "behind the question"}
    # Nothing behind the question changes the question's own states: no token sees a later one.
    behind = numbers["placements"]["behind the question"]["residual_question"]["value"]
    assert behind < 1e-5
    page = (asked.out / "report.html").read_text()
    assert "Model internals" in page
    for statement in (*found["summary"], found["findings"]["Does the position matter?"][0]):
        assert statement.split("(")[0].strip()[:60] in page
    pictures = {path.stem for path in (asked.out / "report-files").glob("*.png")}
    assert {
        "last_cosine",
        "by_system",
        "beyond",
        "length_kl",
        "sentences",
        "placements",
        "cka",
        "within_last",
    } <= pictures


def test_only_system_prompts_of_several_sentences_are_taken_apart(run):
    job, _ = run
    rows = job.table(SENTENCES).to_pylist()
    by_system = {row["system"]: row["sentence"] for row in rows}
    assert by_system == {"three": 2, "long": 5}
    assert len(rows) == 3 * (3 + 6)
    for row in rows:
        assert row["effect"] == pytest.approx(row["kl"] - row["kl_neutral"])


def test_neutral_text_shows_no_effect_beyond_neutral_text(run):
    """Planted truth: in the check both texts are neutral, drawn anew for each prompt."""
    _, found = run
    for measure in found["numbers"]["beyond_neutral"].values():
        low, high = measure[CHECK]["interval"]
        assert low <= 0 <= high


def test_a_run_goes_on_where_it_was_left(run, asked, tmp_path):
    job, _ = run
    again = replace(asked, out=tmp_path / "out")
    broken = InternalsJob(again)

    def stop_at_a_part(n: int) -> None:
        if (broken.asked.out / COMPONENTS / "part-001.parquet").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken.measure(stop_at_a_part)
    resumed = InternalsJob(replace(again, resume=True))
    assert 0 < resumed.rows < job_rows(asked, tmp_path)
    resumed.measure()
    for kind in (COMPONENTS, CKA, PLACEMENTS, SENTENCES):
        assert job.table(kind).equals(resumed.table(kind))
    assert resumed.rows == 0


def job_rows(asked: Asked, tmp_path: Path) -> int:
    return InternalsJob(replace(asked, out=tmp_path / "fresh")).rows


def test_another_question_is_refused_on_resuming(run, asked):
    with pytest.raises(JobError, match="another steps"):
        InternalsJob(replace(asked, resume=True, steps=3))
    with pytest.raises(JobError, match="--resume"):
        InternalsJob(asked)


def test_what_is_wrong_is_said_before_the_model_is_loaded(asked, inputs, tmp_path):
    def refused(*more: str) -> str:
        command = ["internals", "--model", str(asked.model), "--out", str(tmp_path / "out"), "-q", *more]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 2, done.output
        return done.output

    prompts, systems = str(inputs / "prompts.jsonl"), str(inputs / "systems")
    assert "is no folder" in refused("--prompts", prompts, "--system-prompts", prompts)
    assert "has no .txt file" in refused("--prompts", prompts, "--system-prompts", str(tmp_path))
    (tmp_path / "empty.txt").write_text("")
    assert "is empty" in refused("--prompts", prompts, "--system-prompts", str(tmp_path))
    assert "can be used" in refused("--prompts", str(tmp_path / "empty.txt"), "--system-prompts", systems)
    rules = tmp_path / "rules.toml"
    for text, said in (("[a", "no TOML"), ("[a]\nx = 1", "needs `patterns`"), ("[a]\npatterns = ['(']", "no regular")):
        rules.write_text(text)
        assert said in refused("--prompts", prompts, "--system-prompts", systems, "--features", str(rules))
    assert not (tmp_path / "out").exists()


def test_the_command(asked, inputs, tmp_path):
    rules = tmp_path / "rules.toml"
    rules.write_text("[kindness]\npatterns = ['\\bkind\\b']\n")
    out = tmp_path / "out"
    command = ["internals", "--model", str(asked.model), "--prompts", str(inputs / "prompts.jsonl"), "--quick"]
    command += [
        "--system-prompts",
        str(inputs / "systems"),
        "--out",
        str(out),
        "--features",
        str(rules),
        "--steps",
        "2",
    ]
    command += ["--drop-sentences", "0", "--no-attention"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "too few prompts" in done.output
    assert "No sentences were dropped" in done.output
    found = json.loads((out / "internals.json").read_text())
    assert found["settings"]["prompts"] == 6
    assert found["numbers"]["features"]["kindness"]["with"] == 1
    assert found["about"]["template_default"].startswith("You are a helpful AI assistant")
    assert not (out / "sentences").exists()
