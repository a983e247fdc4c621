"""Several ranks of one engine: the numbers of one rank, in the model's own order of heads."""

import numpy as np
import pytest
import torch
from vllm.engine.arg_utils import EngineArgs

from headrift.errors import EngineError
from headrift.probed_engine import ProbedEngine
from headrift.requests import ProbeRequest
from headrift.vllm_plugin import plugin
from headrift.vllm_plugin.slots import Place

# Two float32 computations of the same model. Ranks add up the parts of each matrix product in an all-reduce, another
# order of summation, which moves q and k by some 1e-6 relative; a softmax turns that into some 1e-5 of a probability
# (test_parity.py allows the same between one rank and transformers).
TOLERANCE = 2e-5
# Entropy adds the logarithms of all 211 probabilities; float32 gives it some 1e-5 nats.
STATISTICS_TOLERANCE = 1e-4
# Both ranks of gemma3 hold its one KV head; llama-3to1's two KV heads go one to each.
MODELS = [pytest.param("gemma3", marks=pytest.mark.nightly), pytest.param("llama-3to1", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=MODELS)
def both(request, tiny_model, settings_of_tests, random_requests, run):
    """A model's name, an engine of two ranks, and the same requests run by one rank and by two."""
    settings = {**settings_of_tests, "skip_tokenizer_init": True, "max_num_seqs": 8, "max_model_len": 256}
    options = {"steps": 8, "slots": 6, "logit_stats": True}
    requests = random_requests(11, 14, ignore_eos=True)
    with ProbedEngine(tiny_model(request.param), **options, engine_args=settings) as engine:
        alone = run(engine, requests)
    settings["tensor_parallel_size"] = 2
    with ProbedEngine(tiny_model(request.param), **options, engine_args=settings) as engine:
        yield request.param, engine, alone, run(engine, requests)


def test_each_rank_holds_half_of_the_heads(both, oracle):
    name, engine, _, _ = both
    config = oracle(name).model.config
    first, second = engine.llm_engine.collective_rpc("headrift_call", args=("describe",))
    half = config.num_attention_heads // 2
    assert (first["heads"], second["heads"]) == (list(range(half)), list(range(half, 2 * half)))
    assert first["layers"] == second["layers"] == [0, 1, 2]
    assert (engine.layers, engine.heads) == (3, config.num_attention_heads)
    window = getattr(config, "sliding_window", None)
    assert engine.windows == ([window, None, window] if name == "gemma3" else [None] * 3)
    assert engine.recorder_bytes == first["recorder_bytes"] + second["recorder_bytes"]


def test_two_ranks_record_what_one_records(both):
    _, _, alone, together = both
    compared = 0
    for one, two in zip(alone, together, strict=True):
        assert (one.recording is None) == (two.recording is None)
        if one.recording is None:
            continue
        # A random model's logits nearly tie now and then; from a token that differs on, the steps are other ones.
        same = np.cumprod(np.equal(one.done.answer_ids, two.done.answer_ids)).sum()
        steps = min(same, two.done.n_steps) + 1
        mass, expected = two.recording.mass[:steps], one.recording.mass[:steps]
        np.testing.assert_allclose(mass, expected, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(
            two.recording.stats[:steps], one.recording.stats[:steps], rtol=0, atol=STATISTICS_TOLERANCE
        )
        swapped = np.roll(mass, mass.shape[2] // 2, axis=2)
        assert np.abs(swapped - expected).max() > 100 * TOLERANCE, "heads are alike: their order shows nothing"
        compared += steps
    assert compared > 30


def test_two_ranks_agree_with_transformers(both, oracle):
    name, _, _, together = both
    for item in together:
        request, recording, n = item.done.request, item.recording, item.done.n_steps
        if not request.probed:
            continue
        assert recording.missing_steps == []
        spans = [request.regions[region] for region in ("system", "user", "prompt")]
        expected = oracle(name).masses(request.prompt_ids, item.done.answer_ids, n, spans)
        np.testing.assert_allclose(recording.mass, expected, rtol=0, atol=TOLERANCE)
        fed = [*request.prompt_ids, *item.done.answer_ids[:n]]
        probabilities = torch.softmax(oracle(name).run(fed, len(request.prompt_ids) - 1).logits.double(), -1)
        top = probabilities.topk(2).values
        entropy = -torch.special.xlogy(probabilities, probabilities).sum(-1)
        statistics = torch.stack([entropy, top[:, 0], top[:, 0] - top[:, 1]], -1)
        np.testing.assert_allclose(recording.stats, statistics, rtol=0, atol=STATISTICS_TOLERANCE)


def test_what_is_collected_may_be_read_when_its_slots_have_new_requests(both, oracle):
    name, engine, _, _ = both
    rng = np.random.default_rng(4)

    def fill() -> list[int]:
        ids_of_requests = []
        while engine.free_slots:
            ids = rng.integers(3, 200, 40).tolist()
            request = ProbeRequest(ids, {"system": (0, 15), "prompt": (0, 40)}, steps=3, ignore_eos=True)
            ids_of_requests.append(engine.submit(request))
        return ids_of_requests

    def finish(submitted: list[int]) -> list:
        done = []
        while len(done) < len(submitted):
            done += engine.step()
        return done

    first = finish(fill())
    early = engine.collect(first, want_mass=True)
    second = finish(fill())
    assert {done.request_id for done in second}.isdisjoint(done.request_id for done in first)
    late = engine.collect(second, want_mass=True)
    # The later ticket first: each is fetched by itself.
    for ticket in (late, early):
        for done, recording in zip(ticket.finished, engine.recordings(ticket), strict=True):
            expected = oracle(name).masses(done.request.prompt_ids, done.answer_ids, 3, [(0, 15), (0, 0), (0, 40)])
            np.testing.assert_allclose(recording.mass, expected, rtol=0, atol=TOLERANCE)
    with pytest.raises(ValueError, match="read already"):
        engine.recordings(late)
    dropped = engine.collect(finish(fill()))
    fill()
    engine.abort()
    assert engine.free_slots == engine.slots
    with pytest.raises(ValueError, match="dropped"):
        engine.recordings(dropped)


def config_of(folder, **options):
    settings = {"dtype": "float32", "skip_tokenizer_init": True, "enforce_eager": True, **options}
    return EngineArgs(model=str(folder), **settings).create_engine_config()


def test_places_follow_vllms_order_of_ranks(tiny_model):
    config = config_of(tiny_model("llama-3to1"), tensor_parallel_size=3, pipeline_parallel_size=2)
    places = []
    for config.parallel_config.rank in range(6):
        place = Place.from_config(config)
        places.append((list(place.layers), list(place.heads), place.logits))
    first, second = ([0, 1], [2]) if len(places[0][0]) == 2 else ([0], [1, 2])
    assert places == [
        (first, [0, 1], False),
        (first, [2, 3], False),
        (first, [4, 5], False),
        (second, [0, 1], True),
        (second, [2, 3], False),
        (second, [4, 5], False),
    ]


def test_what_ranks_are_refused(tiny_model):
    folder = tiny_model("llama-3to1")
    assert plugin.refusals(config_of(folder, tensor_parallel_size=2)) == []
    (reason,) = plugin.refusals(config_of(folder, pipeline_parallel_size=2))
    assert "not run on hardware yet" in reason
    config = config_of(folder, tensor_parallel_size=2)
    config.parallel_config.distributed_executor_backend = "ray"
    (reason,) = plugin.refusals(config)
    assert "'ray'" in reason
    with pytest.raises(EngineError, match="divisible by tensor parallel size"):
        ProbedEngine(folder, steps=2, engine_args={"skip_tokenizer_init": True, "tensor_parallel_size": 4})
