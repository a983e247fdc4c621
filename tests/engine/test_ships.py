"""SHIPS and Sahara against transformers with hooks, one pass a head, and on a model whose main head was put there."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from scipy.linalg import subspace_angles
from scipy.stats import spearmanr
from typer.testing import CliRunner

from headrift import ablation
from headrift.cli import app
from headrift.probed_engine import ProbedEngine
from headrift.requests import ProbeRequest
from headrift.runs.folder import JobError
from headrift.safety_heads import sahara as search
from headrift.safety_heads.jobs import HeadsConfig, SaharaJob, ShipsJob
from headrift.safety_heads.sahara import SubspaceProbe, hidden_states_for, sahara
from headrift.safety_heads.ships import IN_FLIGHT, all_heads, sampled_heads, ships

# Where the planted head sits, and the two tokens that it decides between.
LAYER, HEAD, ONE, OTHER = 0, 2, 77, 78
QUERIES = 6
# Degrees, by the directions. Hidden states of two float32 computations differ by some 1e-6 of their size, and a radian
# is 57 degrees; what tells the singular values apart divides, and further directions are closer to their next ones.
ANGLE = {1: 2e-4, 2: 2e-3, 3: 2e-3}


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
    kept = {"references": IN_FLIGHT, "hidden_states": hidden_states_for(QUERIES)}
    return ProbedEngine(model, steps=0, ablation=True, **kept, engine_args=settings)


def one_pass_a_head(oracle, ids, heads, kind) -> np.ndarray:
    """The scores by transformers, in float64 from its logits on."""

    def log_p():
        return torch.log_softmax(oracle.run(ids, len(ids) - 1).logits[0].double(), -1)

    clean, scores = log_p(), []
    for head in heads:
        with oracle.ablated([(*head, kind)]):
            scores.append(float((clean.exp() * (clean - log_p())).sum()))
    return np.array(scores)


def last_hidden_states(oracle, queries) -> np.ndarray:
    """By transformers, [hidden, queries], after the last norm."""
    return torch.stack([oracle.last_hidden(ids) for ids in queries], 1).numpy()


def one_pass_a_group(oracle, queries, groups, r_main, kind=ablation.UNDIFFERENTIATED) -> np.ndarray:
    """Principal angles [groups, r_main] in degrees by transformers and scipy."""

    def basis():
        return np.linalg.svd(last_hidden_states(oracle, queries), full_matrices=False)[0][:, :r_main]

    clean, result = basis(), []
    for group in groups:
        with oracle.ablated([(*head, kind) for head in group]):
            result.append(np.rad2deg(subspace_angles(clean, basis())[::-1]))
    return np.array(result)


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
            for prompt, result in zip(some, ships(engine, some, heads=heads, kind=kind), strict=True):
                expected = one_pass_a_head(oracle("demo"), prompt, heads, kind)
                np.testing.assert_allclose(result[tuple(np.transpose(heads))], expected, rtol=2e-3, atol=1e-8)
        group = [(*head, ablation.SCALING) for head in heads]
        engine.submit(ProbeRequest(ids[0], {"prompt": (0, len(ids[0]))}, 0, ablate=group, keep_as=0))
        (done,) = engine.step()
        engine.drain([done])
        kept = engine.llm_engine.collective_rpc(
            lambda worker: _recorder(worker).instrument("Divergence").kept[0].clone()
        )[0]
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

    job = ShipsJob(HeadsConfig(**options))
    with pytest.raises(KeyboardInterrupt):
        job.run(interrupt)
    first = {path.name: path.read_bytes() for path in (out / "scores").glob("query-*.parquet")}
    assert 1 <= len(first) < n
    with pytest.raises(JobError, match="--resume"):
        ShipsJob(HeadsConfig(**options))
    with pytest.raises(JobError, match="another epsilon"):
        ShipsJob(HeadsConfig(**options, epsilon=0.5, resume=True))
    command = ["heads", "ships", queries, "--model", demo_model, "--out", out, "--heads", "0:4,9:1", "--resume"]
    done = CliRunner().invoke(app, [*map(str, command)])
    assert done.exit_code == 0, done.output
    assert {name: (out / "scores" / name).read_bytes() for name in first} == first
    table = pq.read_table(out / "scores")
    assert set(table.column_names) == {"query", "id", "label", "category", "layer", "head", "kl"}
    assert sorted(zip(*(table[c].to_pylist() for c in ("query", "layer")), strict=True)) == [
        (query, layer) for query in range(n) for layer in (0, 9)
    ]
    result = json.loads((out / "ships.json").read_text(encoding="utf-8"))
    assert result["heads_by_label"] == {}
    means = table.group_by(["layer", "head"]).aggregate([("kl", "mean")]).sort_by([("kl_mean", "descending")])
    assert [(h["layer"], h["head"]) for h in result["heads"]] == [(r["layer"], r["head"]) for r in means.to_pylist()]
    assert [h["mean"] for h in result["heads"]] == pytest.approx(means["kl_mean"].to_pylist())
    assert (out / "heatmap.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def planted_model(tiny_model, demo_model, tmp_path_factory):
    """Its folder. The tokenizer is another model's: it is there, and nothing is put through it."""
    import transformers

    folder = tmp_path_factory.mktemp("planted")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model("llama-3to1"), dtype=torch.float32)
    plant(model)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(demo_model / name, folder / name)
    return folder


@pytest.mark.slow  # two engines
def test_a_search_is_broken_off_and_taken_up_again(planted_model, oracle, tmp_path, monkeypatch):
    """`headrift heads sahara`: what is in the folder stays, and what is missing is searched."""
    monkeypatch.setattr(search, "_BLOCK_ROWS", 5 * 3)  # five heads a block
    queries = tmp_path / "queries.jsonl"
    ids = prompts(7, 3)
    queries.write_text("".join(json.dumps({"token_ids": some}) + "\n" for some in ids), encoding="utf-8")
    out = tmp_path / "out"
    options = {"inputs": (str(queries),), "model": planted_model, "out": out, "kind": "scaling", "r_main": 2}
    job = SaharaJob(HeadsConfig(**options))
    heads = all_heads(3, 6)
    assert (job.angles_left, job.rows) == (18 + 17, 36 * 3)

    def interrupt(rows: int) -> None:
        if len(list((out / "angles").iterdir())) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.run(interrupt)
    first = {path.name: path.read_bytes() for path in (out / "angles").iterdir()}
    assert job.angles_left == 25
    with pytest.raises(JobError, match="another r_main"):
        SaharaJob(HeadsConfig(**options | {"r_main": 1}, resume=True))
    command = ["heads", "sahara", queries, "--model", planted_model, "--out", out, "--kind", "scaling", "--r-main", 2]
    done = CliRunner().invoke(app, [*map(str, command), "--resume"])
    assert done.exit_code == 0, done.output
    assert {name: (out / "angles" / name).read_bytes() for name in first} == first
    rows = pq.read_table(out / "angles").to_pylist()
    present = [(1, *head) for head in heads] + [(2, *head) for head in heads if head != (LAYER, HEAD)]
    assert sorted((row["step"], row["layer"], row["head"]) for row in rows) == present
    assert all(row["angle"] == sum(row["angles"]) for row in rows)
    result = json.loads((out / "sahara.json").read_text(encoding="utf-8"))
    assert (result["heads"][0]["layer"], result["heads"][0]["head"]) == (LAYER, HEAD)
    assert [len(step) for step in result["steps"]] == [18, 17]
    group = [[(h["layer"], h["head"]) for h in result["heads"]]]
    expected = one_pass_a_group(oracle(planted_model), ids, group, 2, "scaling")[0]
    np.testing.assert_allclose(result["heads"][1]["angles"], expected, rtol=0, atol=ANGLE[2])
    assert (out / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    # Nothing is left to do: no engine is started, and the same comes out.
    again = CliRunner().invoke(app, [*map(str, command), "--resume"])
    assert again.stdout == done.stdout
    assert "0 rows to run" in again.stderr


@pytest.fixture(scope="module")
def planted(planted_model, oracle, settings_of_tests):
    """An engine with the planted model, and its oracle."""
    with engine_of(planted_model, settings_of_tests, skip_tokenizer_init=True) as engine:
        yield engine, oracle(planted_model)


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
    for ids, result in zip(given, ships(engine, iter(given)), strict=True):
        expected = one_pass_a_head(oracle, ids, heads, ablation.UNDIFFERENTIATED)
        # Both in float64 from float32 logits on, whose rounding enters squared.
        np.testing.assert_allclose(result.ravel(), expected, rtol=1e-3, atol=1e-8)


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

    result = ships(engine, source(), heads=[(0, 0)])
    next(result)
    assert len(taken) <= IN_FLIGHT + 1
    result.close()
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


def alike_prompts(seed: int, n: int = QUERIES) -> list[list[int]]:
    """Prompts of which the longest are chunked, with a first block in common."""
    rng = np.random.default_rng(seed)
    system = rng.integers(3, 200, 40).tolist()
    return [system + rng.integers(3, 200, int(rng.integers(5, 90))).tolist() for _ in range(n)]


@pytest.mark.parametrize(("r_main", "steps"), [(1, 2), (3, 1)])
def test_angles_are_those_of_one_pass_a_group_and_query(planted, r_main, steps, monkeypatch):
    engine, oracle = planted
    monkeypatch.setattr(search, "_BLOCK_ROWS", 4 * QUERIES)  # four heads a block: the last has two
    finished, step = [], engine.step
    monkeypatch.setattr(engine, "step", lambda: finished.extend(done := step()) or done)
    queries, heads = alike_prompts(11), all_heads(engine.layers, engine.heads)
    rows = []
    probe = SubspaceProbe(engine, queries, r_main, on_rows=rows.append)
    found_steps = sahara(probe, heads, steps)
    assert sum(rows) == QUERIES * (1 + sum(18 - i for i in range(steps)))
    assert sum(done.cached_tokens > 0 for done in finished) > QUERIES, "no prompt found its prefix cached"
    for i, one in enumerate(found_steps):
        before = [other.chosen for other in found_steps[:i]]
        assert list(one.angles) == [head for head in heads if head not in before]
        result = np.array(list(one.angles.values()))
        expected = one_pass_a_group(oracle, queries, [[*before, head] for head in one.angles], r_main)
        np.testing.assert_allclose(result, expected, rtol=0, atol=ANGLE[r_main])
        assert spearmanr(result.sum(1), expected.sum(1)).statistic > 0.999
        assert list(one.angles)[int(expected.sum(1).argmax())] == one.chosen == one.ranking[0]
        assert np.median(expected) > 50 * ANGLE[r_main], "the ablations turn next to nothing: a weak test"


@pytest.mark.parametrize("kind", list(ablation.SIDES))
def test_the_planted_head_turns_the_subspace_most(planted, kind):
    engine, _ = planted
    heads = all_heads(engine.layers, engine.heads)
    (step,) = sahara(SubspaceProbe(engine, prompts(1, QUERIES), kind=kind), heads, 1)
    sums = [float(step.angles[head].sum()) for head in step.ranking]
    assert step.chosen == (LAYER, HEAD)
    assert sums[0] > 2 * sums[1]


def test_hidden_states_are_kept_at_the_last_prompt_token_only(planted, run):
    engine, oracle = planted
    ids = prompts(5, 1)[0] * 3
    regions = {"prompt": (0, len(ids))}
    assert len(ids) > 64, "a prompt that is not chunked"
    answered = ProbeRequest(ids, regions, 0, ignore_eos=True, hidden_as=1, answer_tokens=5)
    reported = ProbeRequest(ids, regions, 0, ignore_eos=True, hidden_as=2, logprobs=True)
    run(engine, [answered, reported, ProbeRequest(ids, regions, 0)])
    result = engine.llm_engine.collective_rpc(
        lambda worker: _recorder(worker).instrument("HiddenStates").hidden.clone()
    )[0]
    expected = last_hidden_states(oracle, [ids])[:, 0]
    for number in (1, 2):
        # Of size 1 after the norm, by two float32 computations.
        np.testing.assert_allclose(result[number], expected, rtol=0, atol=1e-4)
    # Its new owner's prompt takes two steps: after the first the old owner's is gone, and the new one's is not there.
    engine.submit(ProbeRequest(ids[::-1], regions, 0, hidden_as=1))
    assert engine.step() == []
    engine.abort()
    angles = engine.principal_angles([2], [[2], [1]], 1)
    assert angles[0] == pytest.approx(0.0, abs=1e-12)
    assert np.isnan(angles[1])


@pytest.mark.parametrize(
    ("queries", "more", "message"),
    [
        (prompts(3, 2), {"r_main": 3}, "2 distinct prompts"),
        (prompts(3, 1) * 2, {"r_main": 2}, "1 distinct prompt"),
        (prompts(3, 2), {"r_main": 0}, "r-main 0"),
        (prompts(3, 2), {"heads": [(7, 0)]}, "no layer 7 head 0"),
        (prompts(3, 2), {"steps": 2, "heads": [(0, 0)]}, "there are 1 heads"),
        (prompts(3, 2), {"kind": "removal"}, "no kind of ablation 'removal'"),
        (prompts(3, 2), {"epsilon": "little"}, "epsilon"),
        (prompts(3, 600), {}, "hidden_states=1200 or more"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_runs(planted, queries, more, message):
    engine, _ = planted
    before = engine.steps_run
    options = {"heads": [(0, 0)], "steps": 1} | more
    heads, steps = options.pop("heads"), options.pop("steps")
    with pytest.raises(ValueError, match=message):
        sahara(SubspaceProbe(engine, queries, **options), heads, steps)
    assert engine.steps_run == before


def test_hidden_states_that_the_engine_does_not_keep(planted):
    engine, _ = planted
    with pytest.raises(ValueError, match="hidden_as=-1: this engine keeps"):
        engine.submit(ProbeRequest([5, 6], {}, 0, hidden_as=-1))
    for clean, ablated, r_main, message in (
        ([0, 1], [[2]], 1, "as many"),
        ([0], [[engine.options["hidden_states"]]], 1, f"this engine keeps {engine.options['hidden_states']}"),
        ([0, 1], [[2, 3]], 3, "r_main is 1 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.principal_angles(clean, ablated, r_main)
