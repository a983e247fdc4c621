"""Masses recorded inside vLLM against transformers' eager attention, on the same token ids, in every hard batch."""

import numpy as np
import pytest

from headrift.probed_engine import ProbedEngine
from headrift.requests import ProbeRequest
from headrift.vllm_plugin.recorder import Recorder

# Model and size of its KV cache in 32-token blocks: small enough that requests are preempted. A sliding-window layer
# gives back what its window has left behind; Gemma-3's layers fall in groups that take blocks each.
MODELS = {"llama-3to1": 20, "llama-4to1": 20, "qwen3": 20, "mistral": 7, "gemma3": 32}
FULL_ATTENTION = ("llama-3to1", "llama-4to1", "qwen3")


PUSH = ("llama-3to1", "gemma3")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name in PUSH else pytest.mark.nightly) for name in MODELS],
)
def tiny(request, tiny_model, oracle, settings_of_tests):
    """A tiny model's name, an engine with a KV cache too small for its batch, and its oracle."""
    settings = {
        **settings_of_tests,
        "skip_tokenizer_init": True,
        "max_num_seqs": 8,
        "max_model_len": 256,
        "num_gpu_blocks_override": MODELS[request.param],
    }
    with ProbedEngine(tiny_model(request.param), steps=8, slots=12, engine_args=settings) as engine:
        yield request.param, engine, oracle(request.param)


def test_every_mass_in_mixed_chunked_cached_and_preempted_batches(
    tiny, random_requests, run, preemptions, assert_agrees
):
    name, engine, oracle = tiny
    requests = random_requests(1, 16, ignore_eos=True)
    items = run(engine, requests) + run(engine, requests[:6:3] * 2, at_once=1)
    assert assert_agrees(oracle, items) > 30
    assert any(item.done.cached_tokens for item in items), "no prompt found its prefix cached"
    attentions = oracle.run(items[0].done.request.prompt_ids, 0).attentions[-1]
    assert attentions.max() > 3 / len(items[0].done.request.prompt_ids), f"{name}'s attention is uniform: a weak test"


@pytest.mark.slow
def test_a_compiled_model_agrees_and_is_found_again(
    tiny_model, oracle, settings_of_tests, random_requests, run, assert_agrees, monkeypatch, tmp_path
):
    from vllm.compilation.counter import compilation_counter as counts

    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    settings = {**settings_of_tests, "skip_tokenizer_init": True, "max_num_seqs": 8, "max_model_len": 256}
    settings |= {"enforce_eager": False}
    before = counts.num_aot_compiles, counts.num_aot_artifacts_loaded
    for compiled, loaded in ((1, 0), (1, 1)):
        with ProbedEngine(tiny_model("llama-3to1"), steps=8, slots=12, engine_args=settings) as engine:
            assert not engine.llm_engine.vllm_config.model_config.enforce_eager
            items = run(engine, random_requests(1, 16, ignore_eos=True))
        assert assert_agrees(oracle("llama-3to1"), items) > 30
        result = counts.num_aot_compiles - before[0], counts.num_aot_artifacts_loaded - before[1]
        assert result == (compiled, loaded)


def test_preempted_requests_resume_and_agree(tiny, run, preemptions, assert_agrees):
    name, engine, oracle = tiny
    rng = np.random.default_rng(5)
    # Prompts that end just before a block does: while they answer, all running requests want another block. (Where
    # every layer has a sliding window a long prompt holds no more blocks than a short one.)
    length = 26 if name == "mistral" else 90
    probed, unprobed = [], []
    for i in range(6):
        ids = rng.integers(3, 200, length + i).tolist()
        regions = {"system": (2, 14), "user": (15, 24), "prompt": (0, len(ids))}
        probed.append(ProbeRequest(ids, regions, steps=8, ignore_eos=True))
        unprobed.append(ProbeRequest(ids[::-1], {}, steps=8, ignore_eos=True, probed=False))
    items = run(engine, [r for pair in zip(probed, unprobed, strict=True) for r in pair])
    assert preemptions, "no request was preempted: the cache is too large for this test to mean anything"
    assert assert_agrees(oracle, items) == 6 * 9


def test_replay_records_what_generation_recorded(tiny, random_requests, run, assert_agrees):
    _, engine, oracle = tiny
    generated = run(engine, random_requests(2, 9, unprobed=0.0, ignore_eos=True))
    replays = [
        ProbeRequest(
            item.done.request.prompt_ids,
            item.done.request.regions,
            item.done.request.steps,
            answer_ids=item.done.answer_ids,
            skip_prefix_cache=True,
        )
        for item in generated
    ]
    replayed = run(engine, replays)
    assert_agrees(oracle, replayed)
    for once, again in zip(generated, replayed, strict=True):
        assert once.done.n_steps == again.done.n_steps
        np.testing.assert_allclose(again.recording.mass, once.recording.mass, rtol=0, atol=assert_agrees.tolerance)


def test_hits_that_end_inside_a_block_agree(tiny, run, assert_agrees):
    name, engine, oracle = tiny
    rng = np.random.default_rng(11)
    shared = rng.integers(3, 200, 45).tolist()
    prompts = [shared + rng.integers(3, 200, n).tolist() for n in (1, 3, 18, 19, 20, 40, 60, 2)]
    prompts[1][45] = prompts[0][45] + 1  # no two go on alike
    spans = [{"system": (2, 30), "user": (31, 43), "prompt": (0, len(ids))} for ids in prompts]
    requests = [ProbeRequest(ids, entry, steps=8, ignore_eos=True) for ids, entry in zip(prompts, spans, strict=True)]
    first = ProbeRequest(prompts[0], {}, steps=0, probed=False)
    run(engine, [first], at_once=1)
    items = run(engine, requests)
    cached = {len(item.done.request.prompt_ids): item.done.cached_tokens for item in items}
    if name in FULL_ATTENTION:
        assert cached.pop(46) == 45, "all but the last token, which is computed anew"
        assert set(cached.values()) == {45}
    else:
        assert set(cached.values()) <= {0, 32}
    assert assert_agrees(oracle, items) == 8 * 9


def test_a_block_is_not_copied_in_the_step_that_writes_it(tiny, run, assert_agrees):
    _, engine, oracle = tiny
    ids = np.random.default_rng(12).integers(3, 200, 46).tolist()
    entry = {"system": (2, 30), "user": (31, 43), "prompt": (0, 46)}
    items = run(engine, [ProbeRequest(ids, entry, steps=8, ignore_eos=True) for _ in range(3)])
    assert max(item.done.cached_tokens for item in items) <= 32
    assert assert_agrees(oracle, items) == 3 * 9


def test_a_step_inside_a_cached_block_is_missing_and_run_computes_it(tiny, run, run_once, assert_agrees):
    name, engine, _ = tiny
    ids = np.random.default_rng(9).integers(3, 200, 62).tolist()
    answer = list(range(10, 19))
    request = ProbeRequest(ids, {"system": (0, 30), "prompt": (0, 62)}, steps=8, answer_ids=answer)
    (first,) = run(engine, [request])
    second = run_once(engine, request)
    assert first.recording.missing_steps == []
    # 70 tokens were fed, 64 of them are two full blocks: positions 61, 62, 63 are steps 0, 1, 2. Where hits may end
    # inside a block, all but the last token were found.
    cached = 69 if name in FULL_ATTENTION else 64
    assert second.done.cached_tokens == cached
    assert second.recording.missing_steps == list(range(cached - 61))
    (third,) = run(engine, [request], reruns=True)
    assert third.done.request.skip_prefix_cache
    np.testing.assert_allclose(third.recording.mass, first.recording.mass, rtol=0, atol=assert_agrees.tolerance)


def test_slots_never_show_a_former_request(tiny, run, assert_agrees):
    _, engine, oracle = tiny
    rng = np.random.default_rng(3)

    def request(n: int, steps: int) -> ProbeRequest:
        ids = rng.integers(3, 200, n).tolist()
        return ProbeRequest(ids, {"system": (0, n // 2), "prompt": (0, n)}, steps=steps, ignore_eos=True)

    long = run(engine, [request(60, 8) for _ in range(engine.slots)])
    short = run(engine, [request(20, 1) for _ in range(engine.slots)])
    assert {item.done.n_steps for item in long} == {8}
    mass = engine.llm_engine.collective_rpc(lambda worker: Recorder.required(worker.vllm_config).mass.numpy().copy())[0]
    assert not np.isnan(mass[:, :2]).any()
    assert np.isnan(mass[:, 2:]).all()
    for item in short:
        spans = [(0, 10), (0, 0), (0, 20)]
        expected = oracle.masses(item.done.request.prompt_ids, item.done.answer_ids, 1, spans)
        np.testing.assert_allclose(item.recording.mass, expected, rtol=0, atol=assert_agrees.tolerance)
