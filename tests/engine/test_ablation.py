"""Ablated heads inside vLLM against transformers with hooks: masses, next-token distributions, divergences; and what an
ablation must leave alone."""

import numpy as np
import pytest
import torch

from headrift.ablation import SIDES
from headrift.probed_engine import ProbedEngine
from headrift.requests import ProbeRequest
from headrift.safety_heads.evaluate import log_likelihoods, run_arms
from headrift.vllm_plugin.recorder import Recorder

# Next-token probabilities of two float32 computations of the same model: logits of size 10 differ by some 1e-5.
TOLERANCE = 1e-4
# The divergence is quadratic in what tells the logits apart, and both are given to float64.
DIVERGENCE = {"rtol": 1e-3, "atol": 1e-8}
MODELS = ["llama-3to1", "qwen3", "gemma3"]
REFERENCES = 24
# Further from 0 than the default, so that a factor that is not applied, or applied twice, shows.
EPSILON = 0.3
# For tests of what no model changes.
one_model = pytest.mark.parametrize("tiny", MODELS[:1], indirect=True)


def random_heads(rng, engine, n: int) -> list[tuple[int, int, str]]:
    """n different heads, ablated each in its own way."""
    cells = rng.choice(engine.layers * engine.heads, n, replace=False)
    return [(int(c) // engine.heads, int(c) % engine.heads, str(rng.choice(list(SIDES)))) for c in cells]


def kept(engine, reference: int) -> torch.Tensor:
    """The logits that an engine in this process has kept."""

    def read(worker):
        return Recorder.required(worker.vllm_config).instrument("Divergence").kept.clone()

    return engine.llm_engine.collective_rpc(read)[0][reference]


def mixed_requests(engine, seed: int, random_requests, n: int, **options) -> list[ProbeRequest]:
    """Requests of which every third ablates nothing, with prompts that are chunked and share prefixes."""
    rng = np.random.default_rng(seed)
    requests = []
    for i, request in enumerate(random_requests(seed, n, steps=4, unprobed=0.0, ignore_eos=True)):
        heads = [] if i % 3 == 2 else random_heads(rng, engine, int(rng.integers(1, 4)))
        epsilon = EPSILON if i % 2 else 1e-5
        fields = {"ablate": heads, "epsilon": epsilon, "keep_as": i, **options}
        requests.append(ProbeRequest(request.prompt_ids, request.regions, request.steps, ignore_eos=True, **fields))
    return requests


def test_a_preempted_ablated_request_resumes_ablated(
    tiny_model, oracle, settings_of_tests, run, preemptions, assert_agrees
):
    settings = {**settings_of_tests, "skip_tokenizer_init": True, "max_num_seqs": 8, "max_model_len": 256}
    settings["num_gpu_blocks_override"] = 20
    rng = np.random.default_rng(5)
    with ProbedEngine(tiny_model("llama-3to1"), steps=8, slots=12, ablation=True, engine_args=settings) as engine:
        requests = []
        for i in range(8):
            ids = rng.integers(3, 200, 90 + i).tolist()
            regions = {"system": (2, 14), "user": (15, 24), "prompt": (0, len(ids))}
            heads = random_heads(rng, engine, i % 3)
            requests.append(ProbeRequest(ids, regions, steps=8, ignore_eos=True, ablate=heads, epsilon=EPSILON))
        items = run(engine, requests)
    assert preemptions, "no request was preempted: the cache is too large for this test to mean anything"
    for item in items:
        request = item.done.request
        with oracle("llama-3to1").ablated(request.ablate, request.epsilon):
            assert assert_agrees(oracle("llama-3to1"), [item]) == 9


def test_an_engine_that_was_not_started_for_it_refuses(tiny_model, settings_of_tests):
    settings = {**settings_of_tests, "skip_tokenizer_init": True, "max_model_len": 128, "max_num_seqs": 2}
    with ProbedEngine(tiny_model("llama-3to1"), steps=1, engine_args=settings) as engine:
        with pytest.raises(ValueError, match="ablation=True"):
            engine.submit(ProbeRequest([5, 6], {}, 0, ablate=[(0, 0, "scaling")]))
        recorder = engine.llm_engine.collective_rpc(lambda worker: Recorder.required(worker.vllm_config))[0]
        assert recorder.instruments == []


@pytest.mark.slow
def test_two_ranks_ablate_each_its_own_heads(tiny_model, oracle, settings_of_tests, run, assert_agrees):
    settings = {**settings_of_tests, "skip_tokenizer_init": True, "max_num_seqs": 8, "max_model_len": 256}
    settings["tensor_parallel_size"] = 2
    ids = np.random.default_rng(5).integers(3, 200, 60).tolist()
    regions = {"system": (2, 14), "user": (15, 24), "prompt": (0, 60)}
    # Heads 0 to 2 are the first rank's, 3 to 5 the second's.
    sets = [[(0, 1, "undifferentiated")], [(1, 4, "scaling")], [(0, 5, "undifferentiated"), (2, 0, "scaling")]]
    options = {"steps": 2, "slots": 6, "ablation": True, "references": 1}
    with ProbedEngine(tiny_model("llama-3to1"), **options, engine_args=settings) as engine:
        with pytest.raises(ValueError, match="one device"):
            engine.submit(ProbeRequest(ids, regions, 0, ablate=[(0, 1, "mean_output")]))
        run(engine, [ProbeRequest(ids, regions, 0, keep_as=0)])
        rows = [ProbeRequest(ids, regions, 2, ignore_eos=True, ablate=heads, compare_with=0) for heads in sets]
        items = run(engine, rows)
    model = oracle("llama-3to1")
    log_p = torch.log_softmax(model.run(ids, 59).logits[0].double(), -1)
    for item, heads in zip(items, sets, strict=True):
        with model.ablated(heads):
            assert assert_agrees(model, [item]) == 3
            log_q = torch.log_softmax(model.run(ids, 59).logits[0].double(), -1)
        expected = float((log_p.exp() * (log_p - log_q)).sum())
        assert item.recording.divergence == pytest.approx(expected, rel=DIVERGENCE["rtol"], abs=DIVERGENCE["atol"])


@pytest.fixture(scope="module", params=MODELS)
def tiny(request, tiny_model, oracle, settings_of_tests):
    """A tiny model's engine with chunks, cached prefixes and ablation, and its oracle."""
    settings = {**settings_of_tests, "skip_tokenizer_init": True, "max_num_seqs": 8, "max_model_len": 256}
    options = {"steps": 4, "slots": 12, "logit_stats": True, "ablation": True, "references": REFERENCES}
    with ProbedEngine(tiny_model(request.param), **options, engine_args=settings) as engine:
        yield engine, oracle(request.param)


def test_every_kind_agrees_with_hooks_in_mixed_batches(tiny, random_requests, run, assert_agrees):
    """Masses of all layers and steps, next-token distributions and statistics, of different sets in every row."""
    engine, oracle = tiny
    requests = mixed_requests(engine, 21, random_requests, 12)
    items = run(engine, requests)
    logits = [kept(engine, i) for i in range(len(items))]
    # The same once more, one at a time: now every prompt finds what it left in the cache, and nothing of the others.
    again = run(engine, requests, at_once=1)
    assert {kind for request in requests for *_, kind in request.ablate} == set(SIDES)
    assert any(item.done.cached_tokens for item in again), "no prompt found its prefix cached"
    changed = []
    for i, (item, later) in enumerate(zip(items, again, strict=True)):
        request = item.done.request
        with oracle.ablated(request.ablate, request.epsilon):
            assert_agrees(oracle, [item, later])
            last = len(request.prompt_ids) - 1
            expected = torch.softmax(oracle.run(request.prompt_ids, last).logits[0].double(), -1)
            fed = [*request.prompt_ids, *item.done.answer_ids[: item.done.n_steps]]
            top = torch.softmax(oracle.run(fed, last).logits.double(), -1).max(-1).values
        for result in (logits[i], kept(engine, i)):
            probabilities = torch.softmax(result.double(), -1)
            np.testing.assert_allclose(probabilities, expected, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(item.recording.stats[:, 1], top, rtol=0, atol=TOLERANCE)
        clean = torch.softmax(oracle.run(request.prompt_ids, last).logits[0].double(), -1)
        if request.ablate:
            changed.append(float((clean - expected).abs().max()))
    assert np.median(changed) > 20 * TOLERANCE, "the ablations change next to nothing: a weak test"


def test_an_undifferentiated_head_attends_every_key_it_may_see_alike(tiny, run):
    engine, _ = tiny
    ids = np.random.default_rng(4).integers(3, 200, 40).tolist()
    regions = {"system": (20, 30), "user": (0, 0), "prompt": (0, 40)}
    (item,) = run(engine, [ProbeRequest(ids, regions, 2, ignore_eos=True, ablate=[(1, 2, "undifferentiated")])])
    uniform = [10 / min(engine.windows[1] or 1000, 40 + step) for step in range(3)]
    # epsilon 1e-5 of scores that reach 30 or so
    np.testing.assert_allclose(item.recording.mass[:, 1, 2, 0], uniform, rtol=1e-3)
    others = np.delete(item.recording.mass[:, 1, :, 0], 2, axis=1)
    assert (np.abs(others / np.array(uniform)[:, None] - 1) > 1e-2).all()


@one_model
def test_divergence_from_a_kept_clean_row(tiny, random_requests, run):
    engine, oracle = tiny
    rng = np.random.default_rng(8)
    result, expected = [], []
    for request in random_requests(31, 3, steps=0, unprobed=0.0):
        ids, regions = request.prompt_ids, request.regions
        heads = [random_heads(rng, engine, n) for n in (1, 1, 2, 3)]
        clean = ProbeRequest(ids, regions, 0, keep_as=5)
        alike = ProbeRequest(ids, regions, 0, compare_with=5)
        rows = [ProbeRequest(ids, regions, 0, ablate=entries, compare_with=5) for entries in heads]
        first, *items = run(engine, [clean], at_once=1) + run(engine, [alike, *rows])
        assert np.isnan(first.recording.divergence)
        # The same tokens in another batch: rounding of the logits, squared.
        assert 0 <= abs(items[0].recording.divergence) < 1e-9
        log_p = torch.log_softmax(oracle.run(ids, len(ids) - 1).logits[0].double(), -1)
        for item, entries in zip(items[1:], heads, strict=True):
            with oracle.ablated(entries):
                log_q = torch.log_softmax(oracle.run(ids, len(ids) - 1).logits[0].double(), -1)
            expected.append(float((log_p.exp() * (log_p - log_q)).sum()))
            result.append(item.recording.divergence)
    np.testing.assert_allclose(result, expected, **DIVERGENCE)
    assert np.median(expected) > 1e-4


@one_model
def test_a_reference_that_was_not_kept_gives_no_number(tiny, run):
    engine, _ = tiny
    ids = np.random.default_rng(4).integers(3, 200, 70).tolist()
    regions = {"system": (2, 9), "prompt": (0, 70)}
    # Its new owner's prompt takes two steps: after the first the old owner's distribution must be gone.
    run(engine, [ProbeRequest(ids[:9], regions, 0, keep_as=7)])
    engine.submit(ProbeRequest(ids[::-1], regions, 0, keep_as=7))
    assert engine.step() == []
    engine.abort()
    (item,) = run(engine, [ProbeRequest(ids[:20], regions, 0, compare_with=7)])
    assert np.isnan(item.recording.divergence)


@one_model
def test_rows_beside_an_ablated_one_are_the_same_bit_for_bit(tiny, run):
    engine, _ = tiny
    prompts = np.random.default_rng(15).integers(3, 200, (4, 45)).tolist()
    regions = {"system": (2, 14), "user": (15, 24), "prompt": (0, 45)}

    def requests(ablate):
        others = [ProbeRequest(ids, regions, 4, ignore_eos=True, skip_prefix_cache=True) for ids in prompts[1:]]
        return [ProbeRequest(prompts[0], regions, 4, ignore_eos=True, skip_prefix_cache=True, ablate=ablate), *others]

    clean = run(engine, requests([]))
    mixed = run(engine, requests([(0, 1, "undifferentiated"), (1, 0, "mean_output"), (2, 3, "scaling")]))
    assert (clean[0].recording.mass != mixed[0].recording.mass).any()
    for one, other in zip(clean[1:], mixed[1:], strict=True):
        assert one.done.answer_ids == other.done.answer_ids
        np.testing.assert_array_equal(one.recording.mass, other.recording.mass)
        np.testing.assert_array_equal(one.recording.stats, other.recording.stats)


@one_model
def test_a_slot_keeps_nothing_of_a_former_requests_ablation(tiny, random_requests, run, assert_agrees):
    engine, oracle = tiny
    everything = [(layer, head, "scaling") for layer in range(engine.layers) for head in range(engine.heads)]
    ids = np.random.default_rng(2).integers(3, 200, 20).tolist()
    run(engine, [ProbeRequest(ids, {"prompt": (0, 20)}, 0, ablate=everything)] * engine.slots)
    assert assert_agrees(oracle, run(engine, random_requests(5, 12, steps=2, unprobed=0.0, ignore_eos=True))) > 12


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ablate": [(3, 0, "scaling")]}, "has layers 0 to 2"),
        ({"ablate": [(0, 6, "scaling")]}, "query heads 0 to 5"),
        ({"ablate": [(0, -1, "scaling")]}, "numbers from 0 on"),
        ({"ablate": [(0, True, "scaling")]}, "numbers from 0 on"),
        ({"ablate": [(0, 1, "zero")]}, "undifferentiated, scaling, mean_query"),
        ({"ablate": [(0, 1)]}, "layer, head, kind"),
        ({"ablate": [(0, 1, "scaling"), (0, 1, "mean_output")]}, "twice"),
        ({"ablate": [(0, 1, "scaling")], "epsilon": float("nan")}, "epsilon"),
        ({"ablate": [(0, 1, "scaling")], "epsilon": "little"}, "epsilon"),
        ({"ablate": [(0, 1, "scaling")], "probed": False}, "probed"),
        ({"keep_as": REFERENCES}, f"keeps {REFERENCES}"),
        ({"compare_with": -1}, "compare_with=-1: this engine keeps"),
    ],
)
@one_model
def test_requests_that_are_refused_leave_the_engine_as_it_was(tiny, run, fields, message):
    engine, _ = tiny
    request = ProbeRequest([5, 6, 7], {"prompt": (0, 3)}, 0, **fields)
    free = engine.free_slots
    with pytest.raises(ValueError, match=message):
        engine.submit(request)
    assert (engine.free_slots, engine.running) == (free, 0)


def test_answers_and_a_text_are_ablated_throughout(tiny):
    """Long past the recorded steps, in chunks and beside other rows: each token held to the model with hooks."""
    engine, oracle = tiny
    rng = np.random.default_rng(40)
    prompts = rng.integers(3, 200, (3, 90)).tolist()
    prompts[1] = prompts[0][:70] + prompts[1][:9]
    arms = {"clean": [], "one": random_heads(rng, engine, 1), "some": random_heads(rng, engine, 3)}
    rows = []
    result = run_arms(engine, prompts, arms, rows.append, answer_tokens=24, epsilon=EPSILON)
    read = log_likelihoods(run_arms(engine, prompts, arms, ignore_eos=True, logprobs=True, epsilon=EPSILON))
    assert sum(rows) == 9
    assert engine.free_slots == engine.slots
    for number, ids in enumerate(prompts):
        for arm, entries in arms.items():
            answer = result[number][arm].answer_ids
            with oracle.ablated(entries, EPSILON):
                logits = oracle.run([*ids, *answer[:-1]], 0).logits.double()
            assert len(answer) == 24 or answer[-1] == 2  # the end of text
            chosen = logits[len(ids) - 1 :][range(len(answer)), answer]
            # Greedy but where two tokens are as good as equal: then rounding may choose.
            assert (logits[len(ids) - 1 :].max(-1).values - chosen).max() < 1e-3
            of_text = torch.log_softmax(logits, -1)[range(len(ids) - 1), ids[1:]]
            # Rounding of some 1e-5 a token, of which most are positive as often as negative.
            assert read[arm][number] == pytest.approx(float(of_text.sum()), abs=1e-3)
        answers_here = [result[number][arm].answer_ids for arm in arms]
        assert answers_here[0] != answers_here[2]
        assert abs(read["clean"][number] - read["some"][number]) > 0.05
