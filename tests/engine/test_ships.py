"""SHIPS against transformers with hooks, one pass a head, and on a model whose important head was put there."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from headrift import ablation
from headrift.cli import app
from headrift.probed_engine import ProbedEngine, ProbeRequest
from headrift.safety_heads.job import Asked, JobError, ShipsJob
from headrift.safety_heads.ships import IN_FLIGHT, all_heads, sampled_heads, ships

# Where the planted head sits, and the two tokens that it decides between.
LAYER, HEAD, ONE, OTHER = 0, 2, 77, 78


def plant(model):
    """Make one head of a tiny model alone write the direction by which the model says ONE or, if negative, OTHER.

    Every second component of the last hidden state is that direction. What the head writes along it outweighs the rest
    of the state, so that without the head the next token is as open as in any random model. It attends to one key
    nearly alone, whose token has the say. In the first layer no other head has a part in what it does.
    """
    attention = model.model.layers[LAYER].self_attn
    width, dim = attention.o_proj.weight.shape[0], attention.head_dim
    with torch.no_grad():
        direction = torch.zeros(width)
        direction[::2] = 1.0
        attention.q_proj.weight[HEAD * dim : (HEAD + 1) * dim] *= 4.0
        attention.o_proj.weight[:, HEAD * dim : (HEAD + 1) * dim] = 0.0
        attention.o_proj.weight[:, HEAD * dim] = 10.0 * direction
        # About 7 nats after the last norm: enough to decide, not so much that both tokens saturate.
        model.lm_head.weight[ONE] = 0.05 * direction
        model.lm_head.weight[OTHER] = -0.05 * direction


def engine_of(model, settings_of_tests, **more):
    settings = {**settings_of_tests, "max_num_seqs": 8, "max_model_len": 256, **more}
    return ProbedEngine(model, steps=0, ablation=True, references=IN_FLIGHT, engine_args=settings)


def one_pass_a_head(oracle, ids, heads, kind) -> np.ndarray:
    """The scores by transformers, in float64 from its logits on."""

    def log_p():
        return torch.log_softmax(oracle.run(ids, len(ids) - 1).logits[0].double(), -1)

    clean, scores = log_p(), []
    for head in heads:
        with oracle.ablated([(*head, kind)]):
            scores.append(float((clean.exp() * (clean - log_p())).sum()))
    return np.array(scores)


def _recorder(worker):
    from headrift.vllm_plugin.recorder import Recorder

    return Recorder.required(worker.vllm_config)


@pytest.mark.slow
def test_the_demonstration_model(demo_model, oracle, settings_of_tests):
    """Every kind, next-token distributions and scores, with the prompt's chat template shared in the cache."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    system = "You are a careful assistant of a library. You help with books, shelves, loans and opening hours only."
    ids = [
        tokenizer.apply_chat_template(
            [{"role": "system", "content": system}, {"role": "user", "content": query}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for query in ("When do you open?", "Could you write my essay for me?")
    ]
    heads = [(0, 4), (9, 1), (20, 8)]
    with engine_of(demo_model, settings_of_tests, kv_cache_memory_bytes=256 << 20) as engine:
        for kind in ablation.SIDES:
            some = ids if kind == ablation.UNDIFFERENTIATED else ids[:1]
            for prompt, found in zip(some, ships(engine, some, heads=heads, kind=kind), strict=True):
                expected = one_pass_a_head(oracle("demo"), prompt, heads, kind)
                np.testing.assert_allclose(found[tuple(np.transpose(heads))], expected, rtol=2e-3, atol=1e-8)
        group = [(*head, ablation.SCALING) for head in heads]
        engine.submit(ProbeRequest(ids[0], {"prompt": (0, len(ids[0]))}, 0, ablate=group, keep_as=0))
        (done,) = engine.step()
        engine.drain([done])
        kept = engine.llm_engine.collective_rpc(lambda worker: _recorder(worker).kept[0].clone())[0]
    with oracle("demo").ablated(group):
        logits = oracle("demo").run(ids[0], len(ids[0]) - 1).logits[0]
    p, expected = (torch.softmax(x.double(), -1) for x in (kept, logits))
    np.testing.assert_allclose(p, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_job_is_broken_off_and_taken_up_again(demo_model, tmp_path):
    """`headrift heads ships`: what is in the folder stays, what is missing is scored, and the ranking is of all."""
    queries = tmp_path / "queries.csv"
    # More than are under way at a time.
    n = IN_FLIGHT + 2
    queries.write_text("input\n" + "".join(f"What is {i} times three?\n" for i in range(n)), encoding="utf-8")
    out = tmp_path / "out"
    options = {"inputs": (str(queries),), "model": demo_model, "out": out, "heads": ((0, 4), (9, 1))}

    def interrupt(rows: int) -> None:
        if list((out / "scores").glob("query-*.parquet")):
            raise KeyboardInterrupt

    job = ShipsJob(Asked(**options))
    with pytest.raises(KeyboardInterrupt):
        job.run(interrupt)
    first = {path.name: path.read_bytes() for path in (out / "scores").glob("query-*.parquet")}
    assert 1 <= len(first) < n
    with pytest.raises(JobError, match="--resume"):
        ShipsJob(Asked(**options))
    with pytest.raises(JobError, match="another epsilon"):
        ShipsJob(Asked(**options, epsilon=0.5, resume=True))
    command = ["heads", "ships", queries, "--model", demo_model, "--out", out, "--heads", "0:4,9:1", "--resume"]
    done = CliRunner().invoke(app, [*map(str, command)])
    assert done.exit_code == 0, done.output
    assert {name: (out / "scores" / name).read_bytes() for name in first} == first
    table = pq.read_table(out / "scores")
    assert set(table.column_names) == {"query", "id", "label", "category", "layer", "head", "kl"}
    assert sorted(zip(*(table[c].to_pylist() for c in ("query", "layer")), strict=True)) == [
        (query, layer) for query in range(n) for layer in (0, 9)
    ]
    found = json.loads((out / "ships.json").read_text(encoding="utf-8"))
    assert found["heads_by_label"] == {}
    means = table.group_by(["layer", "head"]).aggregate([("kl", "mean")]).sort_by([("kl_mean", "descending")])
    assert [(h["layer"], h["head"]) for h in found["heads"]] == [(r["layer"], r["head"]) for r in means.to_pylist()]
    assert [h["mean"] for h in found["heads"]] == pytest.approx(means["kl_mean"].to_pylist())
    assert (out / "heatmap.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def planted(oracle, tiny_model, settings_of_tests, tmp_path_factory):
    """An engine with the planted model, and its oracle."""
    import transformers

    folder = tmp_path_factory.mktemp("planted")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model("llama-3to1"), dtype=torch.float32)
    plant(model)
    model.save_pretrained(folder)
    with engine_of(folder, settings_of_tests, skip_tokenizer_init=True) as engine:
        yield engine, oracle(folder)


def prompts(seed: int, n: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 200, int(rng.integers(5, 90))).tolist() for _ in range(n)]


@pytest.mark.parametrize("kind", list(ablation.SIDES))
def test_a_planted_head_comes_first(planted, kind):
    engine, _ = planted
    rows = []
    scores = np.mean(list(ships(engine, prompts(1, 6), kind=kind, on_rows=rows.append)), axis=0)
    assert sum(rows) == 6 * (engine.layers * engine.heads + 1)
    assert np.unravel_index(scores.argmax(), scores.shape) == (LAYER, HEAD)
    assert scores.max() > 2 * np.sort(scores.ravel())[-2]


def test_scores_are_those_of_one_pass_a_head_whatever_else_runs(planted):
    engine, oracle = planted
    given = prompts(2, 5)
    heads = all_heads(engine.layers, engine.heads)
    for ids, found in zip(given, ships(engine, iter(given)), strict=True):
        expected = one_pass_a_head(oracle, ids, heads, ablation.UNDIFFERENTIATED)
        # Both in float64 from float32 logits on, whose rounding enters squared.
        np.testing.assert_allclose(found.ravel(), expected, rtol=1e-3, atol=1e-8)


def test_only_the_heads_asked_for(planted):
    engine, _ = planted
    heads = sampled_heads(engine.layers, engine.heads, 5, seed=3)
    assert len(set(heads)) == 5
    (scores,) = ships(engine, prompts(3, 1), heads=heads)
    (every,) = ships(engine, prompts(3, 1))
    at = tuple(np.transpose(heads))
    assert np.isfinite(scores[at]).all()
    assert np.isnan(scores).sum() == scores.size - 5
    np.testing.assert_allclose(scores[at], every[at], rtol=1e-3, atol=1e-8)
    assert sampled_heads(2, 3, 99) == all_heads(2, 3)


def test_no_more_prompts_are_taken_than_are_under_way(planted):
    engine, _ = planted
    taken = []

    def source():
        for ids in prompts(4, 9):
            taken.append(ids)
            yield ids

    found = ships(engine, source(), heads=[(0, 0)])
    next(found)
    assert len(taken) <= IN_FLIGHT + 1
    found.close()
    assert (engine.running, engine.free_slots) == (0, engine.slots)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"heads": [(7, 0)]}, "no layer 7 head 0"),
        ({"heads": []}, "no head"),
        ({"kind": "removal"}, "no kind of ablation 'removal'"),
        ({"epsilon": float("inf")}, "epsilon"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_anything_runs(planted, more, message):
    engine, _ = planted
    with pytest.raises(ValueError, match=message):
        ships(engine, prompts(3, 1), **more)
