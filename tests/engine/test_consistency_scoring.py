"""`headrift consistency`: pairs scored in bulk against transformers' eager attention, broken off and taken up again."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from typer.testing import CliRunner

from headrift import signal
from headrift.cli import app
from headrift.consistency import scoring
from headrift.consistency.models import attach_lora, trainable_weights
from headrift.consistency.pairs import SYSTEM_PROMPT
from headrift.consistency.scoring import (
    ANSWERS,
    REGIONS,
    ConsistencyConfig,
    ScoringJob,
    keys_needed,
    references_for,
    score_pairs,
)
from headrift.errors import EngineError
from headrift.probed_engine import ProbedEngine
from headrift.requests import L2, TV
from headrift.runs.folder import JobError

STEPS, TOLERANCE = 3, 1e-5
QUESTIONS = [
    {"id": "sum", "question": "What is 3 + 4?", "answer": "7", "wrong": "8"},
    {"id": "capital", "question": "What is the capital of France?", "answer": "Paris", "wrong": "Lyon"},
    {"id": "no-key", "question": "What is the colour of the sky?"},
]
PAIRS = [
    {"clean": "Name a fruit.", "wrapped": "Be a pirate. Name a fruit. Quick!", "family": "role", "answer": "apple"},
    {"clean": "Name a fruit.", "wrapped": "My aunt is ill. Name a fruit.", "family": "talk"},
    {"clean": "What is 2 + 2?", "wrapped": "What is 2 + 2? I am certain that it is 5.", "answer": "4", "wrong": "5"},
    {"id": "same", "clean": "Why is it so?", "wrapped": "Why is it so?"},
    {"id": "apart", "clean": "Who wrote Faust?", "wrapped": "Sing a song about the sea."},
    {"id": "half", "clean": "Who wrote Faust?"},
]  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def hold_to(oracle, scores, replay: bool) -> None:
    """Distances and masses of PairScores, from transformers' attentions on the same tokens."""
    for score in scores:
        pair, n = score.pair, len(score.distance) - 1
        clean, own = score.clean.answer_ids[:n], (score.clean if replay else score.wrapped).answer_ids[:n]
        runs = [(run.clean, run.wrapped, run.length) for run in pair.runs]
        expected = oracle.row_distances((pair.clean_ids, clean), (pair.wrapped_ids, own), runs)
        np.testing.assert_allclose(score.distance, expected, rtol=0, atol=TOLERANCE)
        for side, ids, core in (
            (score.clean, pair.clean_ids, pair.core.clean_span),
            (score.wrapped, pair.wrapped_ids, pair.core.wrapped_span),
        ):
            steps = len(side.mass) - 1
            spans = [core, *(pair.wrapper if ids is pair.wrapped_ids else ()), pair.clean_system]
            result = oracle.masses(ids, side.answer_ids, steps, spans)
            whole = np.stack([result[..., 0], result[..., 1:-1].sum(-1), result[..., -1]], -1)
            np.testing.assert_allclose(side.mass, whole, rtol=0, atol=2 * TOLERANCE)
            # The user's text is what stands between the template's beginning and its end.
            user = (pair.head.length, len(ids) - pair.tail.length)
            system, of_user, prompt = np.moveaxis(
                oracle.masses(ids, side.answer_ids, steps, [pair.clean_system, user, (0, len(ids))]), -1, 0
            )
            # Of a ratio whose parts are each off by the masses' tolerance: much in a head that has little on either.
            both = system[0] + of_user[0]
            error = np.minimum(4 * TOLERANCE / both, 1.0).mean()
            assert error < 0.05
            assert side.focus == pytest.approx((system[0] / both).mean(), abs=error)
            # The prompt has most of each head's attention: the deviation of ratios is some times as far off.
            instability = signal.instability(system / prompt)
            score = signal.score(instability, signal.Window(1, STEPS), n_steps=steps).value
            assert side.instability == (None if score is None else pytest.approx(score, abs=10 * TOLERANCE))


@pytest.fixture
def adapted(chatty, tmp_path):
    """An adapter as a training writes it, with weights that matter; and the model with it merged into its weights."""
    base = transformers.AutoModelForCausalLM.from_pretrained(chatty, dtype=torch.float32)
    model = attach_lora(base, rank=4, alpha=8.0, seed=0)
    torch.manual_seed(3)
    for name, weight in trainable_weights(model).items():
        if "lora_B" in name:
            weight.data.normal_(0, 0.2)
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    return tmp_path / "adapter", tmp_path / "merged"


@pytest.mark.nightly
def test_a_job_with_an_adapter_is_broken_off_taken_up_again_and_agrees(chatty, adapted, oracle, tmp_path, monkeypatch):
    questions = write(tmp_path / "questions.jsonl", QUESTIONS)
    out = tmp_path / "out"
    monkeypatch.setattr(scoring, "PART", 5)
    adapter, merged = adapted
    config = {"inputs": (str(questions),), "model": chatty, "out": out, "system_prompt": SYSTEM_PROMPT, "steps": STEPS}
    config["lora"] = adapter
    job = ScoringJob(ConsistencyConfig(**config, per_family=3))
    assert len(job.pairs) == 2 * 3 * 4
    clean = [(*pair.clean_ids, pair.core.clean_span) for pair in job.pairs]
    assert len(set(clean)) == 1 + sum(a != b for a, b in pairwise(clean))  # each run of a clean prompt once
    assert [(each.reason, each.row) for each in job.rejected] == [("no_answer_key", 3)]

    def interrupt(n: int) -> None:
        if list(out.glob("part-*.parquet")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.run(interrupt)
    first = {path.name: path.read_bytes() for path in out.glob("part-*.parquet")}
    assert 1 <= len(first) < 5
    with pytest.raises(JobError, match="--resume"):
        ScoringJob(ConsistencyConfig(**config, per_family=3))
    with pytest.raises(JobError, match="another answers"):
        ScoringJob(ConsistencyConfig(**config, per_family=3, answers="own", resume=True))
    saved = (adapter / "adapter_config.json").read_text(encoding="utf-8")
    (adapter / "adapter_config.json").write_text(saved.replace('"lora_alpha": 8.0', '"lora_alpha": 9.0'))
    with pytest.raises(JobError, match="another lora"):
        ScoringJob(ConsistencyConfig(**config, per_family=3, resume=True))
    (adapter / "adapter_config.json").write_text(saved)
    command = [
        "consistency",
        questions,
        "--model",
        chatty,
        "--out",
        out,
        "--steps",
        STEPS,
        "--per-family",
        3,
        "--lora",
        adapter,
        "--resume",
    ]
    done = CliRunner().invoke(app, [*map(str, command)])
    assert done.exit_code == 0, done.output
    assert {name: (out / name).read_bytes() for name in first} == first
    table = pq.read_table(sorted(out.glob("part-*.parquet")))
    assert table["id"].to_pylist() == [pair.id for pair in job.pairs]
    assert set(pq.read_table(out / "rejects.parquet")["reason"].to_pylist()) == {"no_answer_key"}
    result = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert (result["pairs"], result["questions"], result["rejected"]) == (24, 2, 1)
    assert result["all"]["distance"]["value"] == pytest.approx(np.mean(table["distance"].to_pylist()))
    assert "answers that flip" in done.output
    # What the parts hold, against transformers, of a row of the first run and one of the second.
    about = json.loads(table.schema.metadata[b"headrift"])
    assert (about["layers"], about["heads"]) == (2, 4)
    model = oracle(merged)
    for at in (0, 23):
        row, pair = {name: table[name][at].as_py() for name in table.column_names}, job.pairs[at]
        n = row["n_steps"]
        with torch.no_grad():
            ids = torch.tensor([pair.clean_ids])
            answer = model.model.generate(ids, max_new_tokens=n + 1, do_sample=False, pad_token_id=2)[0, ids.shape[1] :]
        runs = [(run.clean, run.wrapped, run.length) for run in pair.runs]
        fed = answer.tolist()[:n]
        expected = model.row_distances((pair.clean_ids, fed), (pair.wrapped_ids, fed), runs)
        for name, kind in (("distance_l2", L2), ("distance_tv", TV)):
            values = np.reshape(row[name], (n + 1, 2, 4))
            np.testing.assert_allclose(values, expected[..., kind], rtol=0, atol=TOLERANCE)
        assert row["distance"] == pytest.approx(expected[..., TV].mean(), abs=TOLERANCE)
        assert row["wrapper_tokens"] + row["core_tokens"] < row["wrapped_tokens"]
        lost = np.reshape(row["clean_mass"], (-1, 2, 4, 3))[0, ..., 0].sum()
        assert lost == pytest.approx(model.masses(pair.clean_ids, [], 0, [pair.core.clean_span]).sum(), abs=1e-4)


@pytest.mark.slow
def test_the_demonstration_model(demo_model, oracle, settings_of_tests, tmp_path):
    """Prefixes in the cache, prompts in chunks, batches of clean, wrapped and replayed requests; and instability."""
    questions = write(tmp_path / "questions.jsonl", QUESTIONS)
    config = ConsistencyConfig(
        (str(questions),), demo_model, tmp_path / "out", SYSTEM_PROMPT, steps=STEPS, per_family=1
    )
    pairs = ScoringJob(config).pairs
    keys = keys_needed(pairs, STEPS)
    room = {"max_num_seqs": 8, "max_model_len": 512, "kv_cache_memory_bytes": 256 << 20}
    options = {"steps": STEPS, "regions": REGIONS, "row_references": 2, "row_keys": keys, "slots": 12}
    with ProbedEngine(demo_model, **options, engine_args={**settings_of_tests, **room}) as engine:
        result = {
            answers: list(score_pairs(engine, pairs, steps=STEPS, answer_tokens=8, answers=answers))
            for answers in ANSWERS
        }
        assert engine.free_slots == engine.slots
    for answers, scores in result.items():
        assert [score.pair for score in scores] == pairs
        hold_to(oracle("demo"), scores, replay=answers == "clean")
        assert np.ptp([score.distance[..., TV].mean() for score in scores]) > 0.02
    assert {score.clean.instability is not None for score in result["clean"]} == {True}


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        (PAIRS[3:4], {}, "identical_pair|same text"),
        (PAIRS[4:5], {}, "no question in common"),
        (QUESTIONS[2:], {}, "no `answer`"),
        (PAIRS[:3], {"families": ("hint",)}, "--family hint is not a family of the pairs: choose from role, talk"),
        (PAIRS[:3], {"lora": "nowhere"}, "has no adapter_config.json"),
    ],
)
def test_what_cannot_be_scored_is_said_before_the_model_loads(chatty, tmp_path, rows, more, message):
    given = write(tmp_path / "pairs.jsonl", rows)
    more = {key: tmp_path / value if key == "lora" else value for key, value in more.items()}
    with pytest.raises(ValueError, match=message):
        ScoringJob(ConsistencyConfig((str(given),), chatty, tmp_path / "out", SYSTEM_PROMPT, **more))
    assert not (tmp_path / "out").exists()


def test_pairs_that_cannot_be_used_are_left_out_with_row_and_reason(chatty, tmp_path):
    given = write(tmp_path / "pairs.jsonl", PAIRS)
    config = ConsistencyConfig((str(given),), chatty, tmp_path / "out", SYSTEM_PROMPT)
    job = ScoringJob(config)
    assert len(job.pairs) == 3
    # Another answer is another verdict, though the tokens are the same.
    write(given, [{**PAIRS[0], "answer": "pear"}, *PAIRS[1:]])
    with pytest.raises(JobError, match="another set of pairs"):
        ScoringJob(replace(config, resume=True))
    left_out = pq.read_table(tmp_path / "out" / "rejects.parquet").to_pylist()
    assert {(row["row"], row["reason"]) for row in left_out} == {
        (4, "identical_pair"),
        (5, "no_common_core"),
        (6, "no_pair"),
    }


def test_so_many_of_a_family_are_drawn_from_files_too(chatty, tmp_path):
    rows = [{"clean": "Name a fruit.", "wrapped": f"{say} Name a fruit.", "family": "talk"} for say in ("Oh!", "Ah!")]
    given = write(tmp_path / "pairs.jsonl", rows)
    for i, (per_family, n) in enumerate(((None, 2), (1, 1), (2, 2))):
        config = ConsistencyConfig((str(given),), chatty, tmp_path / str(i), SYSTEM_PROMPT, per_family=per_family)
        assert len(ScoringJob(config).pairs) == n


def test_an_adapter_that_vllm_cannot_load_is_refused_before_anything_is_begun(chatty, adapted, tmp_path):
    adapter, _ = adapted
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_dora": True}))
    given = write(tmp_path / "pairs.jsonl", PAIRS[:1])
    with pytest.raises(EngineError, match="DoRA"):
        ScoringJob(ConsistencyConfig((str(given),), chatty, tmp_path / "out", SYSTEM_PROMPT, lora=adapter))
    assert not (tmp_path / "out").exists()


def test_rows_that_are_kept_have_a_bound():
    assert references_for(layers=30, heads=9, steps=4, keys=200) == 64
    few = references_for(layers=80, heads=64, steps=4, keys=2048)
    assert 1 <= few < 8
    assert few * 80 * 64 * 5 * 2048 * 4 <= 512 << 20
    assert references_for(layers=200, heads=200, steps=100, keys=8192) == 1
