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
from headrift.internals.job import CKA, COMPONENTS, PLACEMENTS, SENTENCES, InternalsConfig, InternalsJob
from headrift.runs.folder import JobError

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
def config(inputs, tiny_model, tmp_path_factory) -> InternalsConfig:
    return InternalsConfig(
        model=tiny_model,
        system_prompts=inputs / "systems",
        prompts=(str(inputs / "prompts.jsonl"),),
        out=tmp_path_factory.mktemp("run") / "out",
        drop_sentences=3,
        steps=4,
        attention=False,
    )


@pytest.fixture(scope="module")
def run(config):
    """A job and its results; it counted all its rows."""
    job = InternalsJob(config)
    counts: list[int] = []
    expected = job.rows
    results = job.run(counts.append)
    assert sum(counts) == expected
    assert job.rows == 0
    return job, results


def test_every_prompt_is_compared_or_rejected(run):
    job, results = run
    table = job.table(COMPONENTS)
    rows = table.to_pylist()
    assert len(rows) == len(COMPARISONS) * 12 * 4  # three system prompts and the check
    assert {row["system"] for row in rows} == {"short", "three", "long", CHECK}
    rejects = pq.read_table(job.config.out / "rejects.parquet").to_pylist()
    assert results["rejected"] == len(rejects) == 1 + 12
    assert {(row["reason"], row["system"]) for row in rejects} == {
        ("no_user_message", None),
        ("prompt_too_long", "too_long"),
    }
    assert json.loads(table.schema.metadata[b"headrift"])["layers"] == 2
    for row in rows:
        assert np.isfinite(row["kl"])
        for place in ("last", "question"):
            assert np.shape(row[f"{place}_cosine"]) == (6,)
            assert np.all(np.abs(row[f"{place}_cosine"]) <= 1 + 1e-6)
            assert min(row[f"{place}_l2"]) > 0
        assert 0 <= row["same_steps"] <= row["steps"] <= 4
        assert row["top1_changed"] == (row["same_steps"] == 0)


def test_the_first_kl_and_the_common_answer_are_those_of_the_model(run, config):
    """Against plain transformers: the next token's KL, and greedy answers of both renderings."""
    import torch
    import transformers

    job, _ = run
    model = transformers.AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32).eval()

    def next_log_probs(ids):
        with torch.inference_mode():
            return torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], -1)

    def greedy(ids):
        answer = []
        for _ in range(4):
            answer.append(int(next_log_probs([*ids, *answer]).argmax()))
        return answer

    rows = [
        row for row in job.table(COMPONENTS).to_pylist() if row["comparison"] == SYSTEM and row["system"] == "three"
    ]
    for row in rows[:4]:
        question = job.questions[row["prompt"]]
        alone = question.base.token_ids
        under_system = job.renderer.with_system(question.text, SYSTEMS["three"]).token_ids
        p, q = next_log_probs(alone), next_log_probs(under_system)
        expected = float((p.exp() * (p - q)).sum())
        # Both are sums over 49,152 float32 probabilities.
        assert row["kl"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
        same = [a == b for a, b in zip(greedy(alone), greedy(under_system))]
        assert row["same_steps"] == (len(same) if all(same) else same.index(False))


def test_results_say_their_rows_and_are_on_the_page(run, config):
    _, results = run
    numbers = results["numbers"]
    assert numbers["output"][SYSTEM]["kl"]["rows"] == 36
    assert numbers["output"][SYSTEM]["kl"]["prompts"] == 12
    assert numbers["beyond_neutral"]["kl"][CHECK]["rows"] == 12
    assert set(numbers["placements"]) == {"system prompt", "before the question", "behind the question"}
    # Nothing behind the question changes the question's own states: no token sees a later one.
    behind = numbers["placements"]["behind the question"]["residual_question"]["value"]
    assert behind < 1e-5
    page = (config.out / "report.html").read_text()
    assert "Model internals" in page
    for finding in (*results["summary"], results["findings"]["Does the position matter?"][0]):
        assert f">{finding['measure']}</td>" in page
        assert f">{finding['value']:#.3g}</td>" in page
    assert results["summary"][2]["verdict"] == "not judged: 3 system prompts, 30 needed"
    assert results["summary"][2]["systems"] == 3
    pictures = {path.stem for path in (config.out / "report-files").glob("*.png")}
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
    _, results = run
    for measure in results["numbers"]["beyond_neutral"].values():
        low, high = measure[CHECK]["interval"]
        assert low <= 0 <= high


def test_results_made_again_are_the_same_and_keep_the_seconds_of_the_measurement(run, config):
    _, results = run
    again = InternalsJob(replace(config, resume=True)).run()
    assert again["numbers"] == results["numbers"]
    assert again["seconds_of"] == results["seconds_of"]
    assert again["seconds"] >= results["seconds"] > 0


def test_a_run_goes_on_where_it_was_left(run, config, tmp_path):
    job, _ = run
    again = replace(config, out=tmp_path / "out")
    broken = InternalsJob(again)

    def stop_at_a_part(n: int) -> None:
        if (again.out / "components" / "part-001.parquet").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken.measure(stop_at_a_part)
    resumed = InternalsJob(replace(again, resume=True))
    assert 0 < resumed.rows < job_rows(config, tmp_path)
    resumed.measure()
    for kind in (COMPONENTS, CKA, PLACEMENTS, SENTENCES):
        assert job.table(kind).equals(resumed.table(kind))
    assert resumed.rows == 0


def job_rows(config: InternalsConfig, tmp_path: Path) -> int:
    return InternalsJob(replace(config, out=tmp_path / "fresh")).rows


def test_another_question_is_refused_on_resuming(run, config):
    with pytest.raises(JobError, match="another steps"):
        InternalsJob(replace(config, resume=True, steps=3))
    with pytest.raises(JobError, match="--resume"):
        InternalsJob(config)


def test_what_is_wrong_is_said_before_the_model_is_loaded(config, inputs, tmp_path):
    def refused(*more: str) -> str:
        command = ["internals", "--model", str(config.model), "--out", str(tmp_path / "out"), "-q", *more]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 2, result.output
        return result.output

    prompts, systems = str(inputs / "prompts.jsonl"), str(inputs / "systems")
    assert "is not a folder" in refused("--prompts", prompts, "--system-prompts", prompts)
    assert "has no .txt file" in refused("--prompts", prompts, "--system-prompts", str(tmp_path))
    (tmp_path / "empty.txt").write_text("")
    assert "is empty" in refused("--prompts", prompts, "--system-prompts", str(tmp_path))
    assert "can be used" in refused("--prompts", str(tmp_path / "empty.txt"), "--system-prompts", systems)
    rules = tmp_path / "rules.toml"
    for text, message in (
        ("[a", "not a TOML file"),
        ("[a]\nx = 1", "needs `patterns`"),
        ("[a]\npatterns = ['(']", "is not valid"),
    ):
        rules.write_text(text)
        assert message in refused("--prompts", prompts, "--system-prompts", systems, "--features", str(rules))
    assert not (tmp_path / "out").exists()


def test_the_command(config, inputs, tmp_path):
    rules = tmp_path / "rules.toml"
    rules.write_text("[kindness]\npatterns = ['\\bkind\\b']\n")
    out = tmp_path / "out"
    command = ["internals", "--model", str(config.model), "--prompts", str(inputs / "prompts.jsonl"), "--quick"]
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
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "not judged: 3 system" in result.output
    results = json.loads((out / "internals.json").read_text())
    assert results["settings"]["prompts"] == 6
    assert results["numbers"]["features"]["kindness"]["with"] == 1
    assert results["about"]["template_default"].startswith("You are a helpful AI assistant")
    assert not (out / "sentences").exists()
