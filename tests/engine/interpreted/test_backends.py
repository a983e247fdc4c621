"""The GPU backends inside the real engine: masses against transformers' eager attention in every hard batch, and the
stock backend's tokens. One engine a process; a token costs some 0.3 s."""

import sys

import numpy as np
import pytest
import torch

from headrift.requests import ProbeRequest
from headrift.vllm_plugin.recorder import Recorder

# Two logits closer than this may change places in another order of summation (float32 logits of size 10 or so).
NEAR_TIE = 1e-3


@pytest.fixture(scope="session")
def mixed(tiny, random_requests, run):
    """Probed and unprobed requests of many lengths through batches with chunks, cached prefixes and early ends."""
    engine, _ = tiny
    requests = random_requests(1, 5, steps=4, longest=40, ignore_eos=True)
    return run(engine, requests) + run(engine, [requests[3]] * 2, at_once=1)


def test_the_engine_is_the_one_asked_for(case, tiny):
    engine, _ = tiny
    config = engine.llm_engine.vllm_config
    assert config.use_v2_model_runner == (case["runner"] == "v2")
    (implementations,) = engine.llm_engine.collective_rpc(
        lambda worker: {type(layer.impl).__name__ for layer in _layers(worker)}
    )
    assert implementations == {"TritonMassImpl" if case["backend"] == "triton" else "FlashMassImpl"}


def _layers(worker):
    return worker.vllm_config.compilation_config.static_forward_context.values()


def test_every_mass_in_mixed_chunked_and_cached_batches(tiny, mixed, assert_agrees):
    _, oracle = tiny
    assert assert_agrees(oracle, mixed) > 10
    assert any(item.done.cached_tokens for item in mixed), "no prompt found its prefix cached"
    assert any(len(item.done.request.prompt_ids) > 64 for item in mixed), "no prompt was taken in two chunks"


def test_logit_statistics(tiny, mixed):
    _, oracle = tiny
    assert "headrift_kernels.cpu.logit_stats" not in sys.modules, "the CPU's kernel cannot read a GPU's tensors"
    for item in mixed:
        if item.recording is None:
            continue
        request, n = item.done.request, item.done.n_steps
        fed = [*request.prompt_ids, *item.done.answer_ids[:n]]
        logits = oracle.run(fed, len(request.prompt_ids) - 1).logits.double()
        p = torch.softmax(logits, -1)
        top = p.topk(2).values
        expected = torch.stack([-(p * p.log()).sum(-1), top[:, 0], top[:, 0] - top[:, 1]], -1)
        # logits differ by some 1e-5 between two float32 computations; a probability by no more, entropy by 5 times that
        np.testing.assert_allclose(item.recording.stats, expected.numpy(), rtol=0, atol=2e-4)


def test_tokens_are_the_stock_backends(tiny, mixed, run):
    """A batch without a probed row is attended by the parent alone: what it answers is what vLLM answers."""
    engine, oracle = tiny
    probed = [item.done for item in mixed[:3]]
    stock = run(
        engine,
        [
            ProbeRequest(done.request.prompt_ids, {}, done.request.steps, ignore_eos=True, probed=False)
            for done in probed
        ],
    )
    for done, other in zip(probed, stock, strict=True):
        ours, theirs = done.answer_ids, other.done.answer_ids
        if ours == theirs:
            continue
        at = next(i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
        first, second = oracle.run([*done.request.prompt_ids, *ours[:at]], -1).logits[-1].topk(2).values.tolist()
        assert first - second < NEAR_TIE, f"token {at} differs though the model is sure of it"


def test_step_0_alone(tiny, random_requests, run, assert_agrees):
    """Prompts of which nothing is decoded: no step has a decode row, but the prompts' last tokens."""
    engine, oracle = tiny
    requests = random_requests(11, 4, steps=0, unprobed=0.0, longest=50)
    assert max(len(request.prompt_ids) for request in requests) > 64  # one is taken in two chunks
    before = engine.steps_run
    items = run(engine, requests)
    assert assert_agrees(oracle, items) == len(requests)
    assert {len(item.done.answer_ids) for item in items} == {1}
    assert engine.steps_run - before <= 2 + sum(len(request.prompt_ids) for request in requests) // 64


def test_preempted_requests_resume_and_agree(tiny, run, preemptions, assert_agrees):
    engine, oracle = tiny
    rng = np.random.default_rng(5)
    # Prompts that end just before a block does: while they answer, all running requests want another block.
    requests = []
    for i in range(4):
        ids = rng.integers(3, 200, 28 + i).tolist()
        regions = {"system": (2, 14), "user": (15, 24), "prompt": (0, len(ids))}
        requests.append(ProbeRequest(ids, regions, steps=8, ignore_eos=True))
    items = run(engine, requests)
    assert preemptions, "no request was preempted: the cache is too large for this test to mean anything"
    assert assert_agrees(oracle, items) == 4 * 9


def test_after_an_abort_slots_show_their_new_requests_only(tiny, random_requests, run, assert_agrees):
    engine, oracle = tiny
    for request in random_requests(7, 3, steps=4, unprobed=0.0, longest=30, ignore_eos=True):
        engine.submit(request)
    for _ in range(3):
        engine.step()
    engine.abort()
    assert engine.free_slots == engine.slots
    items = run(engine, random_requests(9, 4, steps=1, unprobed=0.0, longest=30, ignore_eos=True))
    assert_agrees(oracle, items)
    mass = engine.llm_engine.collective_rpc(lambda worker: Recorder.required(worker.vllm_config).mass.clone())[0]
    assert torch.isnan(mass[:, 2:]).all()


def test_replay_records_what_generation_recorded(tiny, mixed, run, assert_agrees):
    engine, oracle = tiny
    generated = [item for item in mixed[:5] if item.recording is not None][:2]
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
        np.testing.assert_allclose(again.recording.mass, once.recording.mass, rtol=0, atol=assert_agrees.tolerance)
