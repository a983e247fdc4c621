"""The demonstration model: every number against transformers, and whether probing changes what the model says."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.inputs import TokensPrompt

from headrift.requests import ProbeRequest
from headrift.vllm_plugin.recorder import Recorder
from headrift_kernels import reference

# See test_parity.py.
TOLERANCE = 2e-5
# Where the two best tokens' logits lie closer than this, float rounding may choose (30 layers, logits of about 20).
NEAR_TIE = 1e-3


@pytest.fixture(scope="module")
def requests(scorer, random_requests):
    """64 random prompts with steps and regions of their own; a quarter is not probed, a third shares a prefix."""
    return random_requests(11, 64, vocab=40_000, steps=8, longest=45)


@pytest.fixture(scope="module")
def generated(scorer, requests, run):
    return run(scorer.engine, requests)


@pytest.mark.parametrize("at_once", [pytest.param(2, marks=pytest.mark.nightly), 64])
def test_masses_agree_with_eager_attention(scorer, requests, generated, run, oracle, at_once):
    items = generated if at_once == 64 else run(scorer.engine, requests[:12], at_once=at_once)
    compared = 0
    for item in items if at_once == 2 else items[::6]:
        if item.recording is None:
            continue
        request, n = item.done.request, item.done.n_steps
        spans = [request.regions.get(name, (0, 0)) for name in scorer.engine.regions]
        expected = oracle("demo").masses(request.prompt_ids, item.done.answer_ids, n, spans)
        assert item.recording.missing_steps == []
        np.testing.assert_allclose(item.recording.mass, expected, rtol=0, atol=TOLERANCE)
        compared += n + 1
    assert compared > 20


def test_replay_agrees_with_generation(scorer, generated, run):
    probed = [item for item in generated if item.recording is not None][:16]
    replays = [
        ProbeRequest(
            d.request.prompt_ids, d.request.regions, d.request.steps, answer_ids=d.answer_ids, skip_prefix_cache=True
        )
        for d in (item.done for item in probed)
    ]
    for once, again in zip(probed, run(scorer.engine, replays), strict=True):
        np.testing.assert_allclose(again.recording.mass, once.recording.mass, rtol=0, atol=TOLERANCE)


def test_logit_statistics_agree_with_transformers(scorer, generated, oracle):
    for item in [item for item in generated if item.recording is not None][:6]:
        done = item.done
        fed = [*done.request.prompt_ids, *done.answer_ids[: done.n_steps]]
        logits = oracle("demo").run(fed, len(done.request.prompt_ids) - 1).logits
        expected = reference.logit_statistics(logits).numpy()
        # Logits of about 20 agree to some 1e-4; entropy weighs those differences with p log p.
        np.testing.assert_allclose(item.recording.stats, expected, rtol=0, atol=5e-4)


def test_probing_changes_no_token_but_at_near_ties(scorer, requests, generated, run, oracle, record_property):
    """The same prompts without probes, in another batch: answers equal up to the first near-tie."""
    plain = [ProbeRequest(r.prompt_ids, {}, r.steps, probed=False) for r in requests]
    ties = 0
    for with_probe, without in zip(generated, run(scorer.engine, plain), strict=True):
        a, b = with_probe.done.answer_ids, without.done.answer_ids
        if a == b:
            continue
        first = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
        prompt = with_probe.done.request.prompt_ids
        logits = oracle("demo").run([*prompt, *a[:first]], len(prompt) - 1 + first).logits[0]
        top = logits.topk(2).values
        assert float(top[0] - top[1]) < NEAR_TIE, f"token {first} differs and is no near-tie"
        ties += 1
    record_property("near_ties", ties)
    print(f"answers that differ at a near-tie: {ties} of {len(requests)}")
    assert ties <= len(requests) // 8


# Run in a process of its own, where headrift is installed and not asked for.
STOCK_VLLM = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.v1.attention.backends.registry import AttentionBackendEnum

model, settings, prompts, n = json.loads(sys.argv[1])
llm = LLM(model=model, enforce_eager=True, **settings)
params = SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, logprobs=0, detokenize=False)
outputs = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], params, use_tqdm=False)
answers = [output.outputs[0] for output in outputs]
result = [
    [list(a.token_ids), [step[t].logprob for t, step in zip(a.token_ids, a.logprobs, strict=True)]] for a in answers
]
backend = AttentionBackendEnum.CPU_ATTN.get_class()
loaded = sorted(name for name in sys.modules if name.split(".")[0] in ("headrift", "headrift_kernels"))
print("RESULT" + json.dumps([result, f"{backend.__module__}.{backend.__name__}", loaded]))
"""


@pytest.mark.nightly
def test_unprobed_answers_are_plain_vllms_bit_for_bit(scorer, demo_model, settings_of_tests):
    """Tokens and log probabilities of unprobed requests in our engine equal those of vLLM started without headrift."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, 40_000, n).tolist() for n in (5, 40, 63, 64, 65, 100, 130, 7)]
    settings = {**settings_of_tests, "max_model_len": 1024, "kv_cache_memory_bytes": 1 << 28, "max_num_seqs": 64}
    environment = {k: v for k, v in os.environ.items() if k != "HEADRIFT"}
    done = subprocess.run(
        [sys.executable, "-c", STOCK_VLLM, json.dumps([str(demo_model), settings, prompts, 10])],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    theirs, backend, loaded = json.loads(line.removeprefix("RESULT"))

    engine = scorer.engine.llm_engine
    engine.reset_prefix_cache()
    params = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True, logprobs=0, detokenize=False)
    for i, ids in enumerate(prompts):
        engine.add_request(f"plain-{i}", TokensPrompt(prompt_token_ids=ids), params)
    result = {}
    while engine.has_unfinished_requests():
        result |= {output.request_id: output.outputs[0] for output in engine.step() if output.finished}
    answers = [result[f"plain-{i}"] for i in range(len(prompts))]
    ours = [
        [list(a.token_ids), [step[t].logprob for t, step in zip(a.token_ids, a.logprobs, strict=True)]] for a in answers
    ]
    assert ours == theirs
    assert backend == "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"
    assert loaded == ["headrift", "headrift.vllm_plugin", "headrift.vllm_plugin.plugin"]


def test_a_batch_without_probes_never_reaches_the_kernel(scorer, run, monkeypatch):
    from headrift.vllm_plugin.backends import cpu

    calls = []
    kernel = cpu.PagedAttention.attend
    monkeypatch.setattr(cpu.PagedAttention, "attend", lambda *a, **k: (calls.append(1), kernel(*a, **k)))
    request = ProbeRequest(list(range(100, 140)), {"system": (0, 9), "prompt": (0, 40)}, steps=3, ignore_eos=True)
    run(scorer.engine, [ProbeRequest(request.prompt_ids, {}, 3, probed=False, ignore_eos=True)])
    assert calls == []
    run(scorer.engine, [request])
    assert len(calls) == 4 * scorer.engine.layers


def test_an_answer_that_ends_early_has_the_steps_it_has(scorer, run):
    """EOS stops: n tokens give steps 0..n-1, and rows past them stay unwritten."""
    text = (
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\nThe capital of France is Paris"
    )
    ids = scorer.tokenizer(text, add_special_tokens=False)["input_ids"]
    request = ProbeRequest(ids, {"system": (0, 4), "prompt": (0, len(ids))}, steps=12)
    (item,) = run(scorer.engine, [request])
    assert item.done.finish_reason == "stop"
    assert item.done.answer_ids[-1] == scorer.tokenizer.eos_token_id
    assert item.done.n_steps == len(item.done.answer_ids) - 1 < 12
    assert item.recording.missing_steps == []
    assert len(item.recording.mass) == item.done.n_steps + 1


def test_what_leaves_is_small(scorer, generated):
    """The share tensor is all that leaves by default: no keys, no rows, no masses."""
    engine = scorer.engine
    ids = list(range(200, 300))
    request_id = engine.submit(ProbeRequest(ids, {"system": (0, 50), "prompt": (0, 100)}, steps=8, ignore_eos=True))
    finished = []
    while not finished:
        finished = engine.step()
    slot = engine._slots[request_id]
    engine.llm_engine.collective_rpc("headrift_call", args=("collect", -1, [(slot, request_id)], 9, False))
    (raw,) = engine.llm_engine.collective_rpc("headrift_call", args=("fetch", -1))
    cells = engine.layers * engine.heads * 4
    assert len(raw) <= 9 * cells + len(engine.regions) * cells + 9 * 16 + 1024
    engine.drain(finished)


def test_a_recording_that_contradicts_itself_is_refused(scorer):
    """A prompt region said to be whole whose mass at step 0 is not 1."""
    engine = scorer.engine
    ids = list(range(200, 300))
    engine.submit(ProbeRequest(ids, {"system": (0, 50), "prompt": (0, 100)}, steps=1, ignore_eos=True))
    finished = []
    while not finished:
        finished = engine.step()
    engine.llm_engine.collective_rpc(lambda worker: Recorder.required(worker.vllm_config).mass.mul_(0.9).ndim)
    with pytest.raises(RuntimeError, match="cannot be trusted"):
        engine.drain(finished)
    engine.abort()
    assert engine.free_slots == engine.slots


def test_recorder_memory_is_what_is_reported(scorer):
    engine = scorer.engine
    mass = engine.slots * 13 * engine.layers * engine.heads * len(engine.regions) * 4
    assert mass <= engine.recorder_bytes <= mass + 100_000
