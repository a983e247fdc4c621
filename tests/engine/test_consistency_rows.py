"""Distances and entropies of attention rows taken inside vLLM against transformers' eager attention; and what taking
them must leave alone."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import entr

from headrift.probed_engine import ProbedEngine
from headrift.requests import ProbeRequest
from headrift.vllm_plugin.recorder import Recorder

# What the proposal asks for: two float32 computations of one model tell probabilities apart by some 1e-6.
TOLERANCE = 1e-5
# Probabilities of a row that move by so much move its entropy by that times their logarithms, of up to some 10.
NATS = 1e-4
MODELS = ["llama-3to1", pytest.param("qwen3", marks=pytest.mark.slow), "gemma3"]
REFERENCES, KEYS, STEPS = 8, 240, 4
one_model = pytest.mark.parametrize("tiny", MODELS[:1], indirect=True)


@pytest.fixture(scope="module", params=MODELS)
def tiny(request, tiny_model, oracle, settings_of_tests):
    """A tiny model's engine with chunks and cached prefixes that keeps attention rows, and its oracle."""
    settings = {**settings_of_tests, "skip_tokenizer_init": True, "max_num_seqs": 8, "max_model_len": 256}
    rows = {"row_references": REFERENCES, "row_keys": KEYS, "row_entropy": True}
    with ProbedEngine(tiny_model(request.param), steps=STEPS, slots=12, **rows, engine_args=settings) as engine:
        yield engine, oracle(request.param)


def make_pair(rng, core: int, *, vocab: int = 200):
    """A clean and a wrapped prompt, and their runs: a head and a tail in common, words around the core in the wrapped
    one, and at the core's edge a token that the clean one alone has."""
    head, middle, tail, before, after = (
        rng.integers(3, vocab, n).tolist() for n in (40, core, 9, int(rng.integers(1, 40)), int(rng.integers(1, 40)))
    )
    clean = [*head, 7, *middle, *tail]
    wrapped = [*head, *before, *middle, *after, *tail]
    runs = [
        (0, 0, len(head)),
        (len(head) + 1, len(head) + len(before), len(middle)),
        (len(clean) - len(tail), len(wrapped) - len(tail), len(tail)),
    ]
    return clean, wrapped, runs


def regions_of(ids) -> dict[str, tuple[int, int]]:
    return {"system": (2, 14), "user": (15, 24), "prompt": (0, len(ids))}


def run_pairs(run, engine, pairs, *, replay: bool, others=()):
    """Clean requests, and then the wrapped ones in one batch with requests that ask for nothing; and their items."""
    clean = [ProbeRequest(ids, regions_of(ids), STEPS, ignore_eos=True, rows_as=i) for i, (ids, *_) in enumerate(pairs)]
    clean_items = run(engine, clean)
    wrapped = []
    for i, (_, ids, runs) in enumerate(pairs):
        answer = clean_items[i].done.answer_ids if replay else None
        how = {
            "answer_ids": answer,
            "skip_prefix_cache": replay,
            "ignore_eos": True,
            "rows_against": i,
            "aligned": runs,
        }
        wrapped.append(ProbeRequest(ids, regions_of(ids), STEPS - i % 2, **how))
    mixed = [request for both in zip(wrapped, others) for request in both] + wrapped[len(others) :]
    items = run(engine, mixed)
    return clean_items, [item for item in items if item.done.request.rows_against is not None], items


@pytest.mark.parametrize("replay", [True, False])
def test_distances_agree_with_eager_attention_in_mixed_batches(tiny, run, random_requests, assert_agrees, replay):
    """Prompts of many lengths in chunks of 64 tokens, some in a cached prefix, beside requests that ask for nothing."""
    engine, oracle = tiny
    rng = np.random.default_rng(3 + replay)
    pairs = [make_pair(rng, int(n)) for n in rng.integers(4, 90, REFERENCES - 1)]
    others = random_requests(11, 6, steps=STEPS, ignore_eos=True)
    clean, wrapped, items = run_pairs(run, engine, pairs, replay=replay, others=others)
    assert assert_agrees(oracle, [*clean, *items]) > 0
    seen = []
    for (ids, wrapped_ids, runs), ours, theirs in zip(pairs, wrapped, clean, strict=True):
        n = ours.done.n_steps
        other, own = (ids, theirs.done.answer_ids[:n]), (wrapped_ids, ours.done.answer_ids[:n])
        expected = oracle.row_distances(other, own, runs)
        np.testing.assert_allclose(ours.recording.distance, expected, rtol=0, atol=TOLERANCE)
        assert "distance" not in theirs.recording.measures
        seen.append(expected)
    assert not any("distance" in i.recording.measures for i in items if i.recording and i not in wrapped)
    every = np.concatenate([result.reshape(-1, 2) for result in seen])
    assert np.ptp(every, axis=0).min() > 0.1, "the rows are about as far apart everywhere: a weak test"


@pytest.mark.parametrize("replay", [True, False])
def test_entropies_agree_with_eager_attention_in_mixed_batches(tiny, run, random_requests, assert_agrees, replay):
    """Of prompts in chunks, some in a cached prefix, beside requests that ask for nothing."""
    engine, oracle = tiny
    logged = {"answer_ids": list(range(20, 20 + STEPS)), "skip_prefix_cache": True} if replay else {"ignore_eos": True}
    measured = random_requests(23, 6, unprobed=0.0, steps=STEPS, row_entropy=True, **logged)
    others = random_requests(24, 6, steps=STEPS, **logged)
    items = run(engine, [request for both in zip(measured, others) for request in both])
    assert assert_agrees(oracle, items) > 0
    every = []
    for item in items[::2]:
        request, n = item.done.request, item.done.n_steps
        fed = [*request.prompt_ids, *item.done.answer_ids[:n]]
        expected = entr(oracle.run(fed, len(request.prompt_ids) - 1).attentions).sum(-1)
        np.testing.assert_allclose(item.recording.row_entropy, expected, rtol=0, atol=NATS)
        every.append(expected.ravel())
    assert np.ptp(np.concatenate(every)) > 1, "about as much entropy everywhere: a weak test"
    assert not any("row_entropy" in item.recording.measures for item in items[1::2] if item.recording)


@one_model
def test_the_same_prompt_is_no_distance_away_and_one_with_nothing_in_common_all_of_its_mass(tiny, run):
    engine, _ = tiny
    ids = np.random.default_rng(1).integers(3, 200, 70).tolist()
    (clean,) = run(engine, [ProbeRequest(ids, regions_of(ids), 2, ignore_eos=True, rows_as=0)])
    how = {"answer_ids": clean.done.answer_ids, "skip_prefix_cache": True, "rows_against": 0}
    same = ProbeRequest(ids, regions_of(ids), 2, aligned=[(0, 0, 70)], **how)
    apart = ProbeRequest(ids, regions_of(ids), 2, aligned=[], **how)
    same, apart = run(engine, [same, apart])
    assert np.abs(same.recording.distance).max() < TOLERANCE
    # Of the answers' own keys, which are always lined up, both rows have the same.
    np.testing.assert_allclose(apart.recording.distance[..., 1], apart.recording.mass[..., 2] / 2, atol=TOLERANCE)


@one_model
def test_what_was_never_computed_is_no_number(tiny, run, run_once):
    engine, _ = tiny
    ids = np.random.default_rng(2).integers(3, 200, 62).tolist()
    answer = list(range(10, 15))
    regions, runs = regions_of(ids), [(0, 0, 62)]
    run(engine, [ProbeRequest(ids, regions, STEPS, ignore_eos=True, rows_as=1)])
    # 66 tokens are fed; the second time 64 of them lie in cached blocks: positions 61, 62 and 63 are steps 0, 1, 2.
    # Where all layers have full attention, hits may end inside a block: all but the last token were found.
    holes = 3 if any(engine.windows) else 4
    how = {"answer_ids": answer, "rows_against": 1, "aligned": runs, "row_entropy": True}
    request = ProbeRequest(ids, regions, STEPS, **how)
    (first,) = run(engine, [request])
    second = run_once(engine, request)
    assert np.isfinite(first.recording.distance).all()
    assert second.recording.missing_steps == list(range(holes))
    for name, tolerance in (("distance", TOLERANCE), ("row_entropy", NATS)):
        result, expected = getattr(second.recording, name), getattr(first.recording, name)
        assert np.isnan(result[:holes]).all()
        np.testing.assert_allclose(result[holes:], expected[holes:], rtol=0, atol=tolerance)
    # The reference has a new owner, whose prompt takes two steps: after the first nothing of the old one is left.
    engine.submit(ProbeRequest([*ids[::-1], *ids], regions, 0, rows_as=1))
    assert engine.step() == []
    engine.abort()
    (third,) = run(engine, [ProbeRequest(ids, regions, STEPS, skip_prefix_cache=True, **how)])
    assert np.isnan(third.recording.distance).all()


@one_model
def test_taking_rows_changes_no_other_number(tiny, run):
    """Masses and answers are the same bit for bit, of requests that ask and of those beside them."""
    engine, _ = tiny
    prompts = np.random.default_rng(15).integers(3, 200, (4, 45)).tolist()

    def requests(**fields):
        others = [ProbeRequest(ids, regions_of(ids), 4, ignore_eos=True, skip_prefix_cache=True) for ids in prompts[2:]]
        first = ProbeRequest(prompts[0], regions_of(prompts[0]), 4, ignore_eos=True, skip_prefix_cache=True, **fields)
        return [first, *others]

    run(engine, [ProbeRequest(prompts[1], regions_of(prompts[1]), 4, ignore_eos=True, rows_as=2)])
    clean = run(engine, requests())
    distances = run(engine, requests(rows_as=3, rows_against=2, aligned=[(0, 0, 4), (30, 31, 14)]))
    entropies = run(engine, requests(row_entropy=True))
    assert np.isfinite(distances[0].recording.distance).all()
    assert np.isfinite(entropies[0].recording.row_entropy).all()
    for measured in (distances, entropies):
        for one, other in zip(clean, measured, strict=True):
            assert one.done.answer_ids == other.done.answer_ids
            np.testing.assert_array_equal(one.recording.mass, other.recording.mass)


@one_model
def test_a_step_in_which_nobody_asks_plans_nothing(tiny, run, random_requests):
    engine, _ = tiny

    def planned(worker):
        return Recorder.required(worker.vllm_config).layer_plans

    ids = np.random.default_rng(2).integers(3, 200, 90).tolist()
    result = []
    for requests in (random_requests(4, 2, unprobed=0.0, steps=2), [ProbeRequest(ids, regions_of(ids), 0, rows_as=0)]):
        for request in requests:
            engine.submit(request)
        while engine.running:
            finished = engine.step()
            result.append(engine.llm_engine.collective_rpc(planned)[0])
            engine.drain(finished)
    # Only the second of the two steps that the last prompt takes has its last token.
    assert [bool(step) for step in result] == [False] * (len(result) - 1) + [True]
    ((_, (queries,)),) = result[-1]
    assert queries.kept.shape[1] == 1


@one_model
def test_rows_of_heads_on_the_device_take_what_is_said(tiny):
    engine, _ = tiny

    def sizes(worker):
        recorder = Recorder.required(worker.vllm_config)
        distance, entropy = recorder.instrument("RowDistance"), recorder.instrument("RowEntropy")
        return distance.rows.nbytes, entropy.nbytes, distance.nbytes

    rows, entropies, bank = engine.llm_engine.collective_rpc(sizes)[0]
    of_a_step = engine.layers * engine.heads * (STEPS + 1) * 4
    assert (rows, entropies) == (REFERENCES * KEYS * of_a_step, engine.slots * of_a_step)
    assert engine.recorder_bytes > bank + entropies > rows + entropies


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rows_as": REFERENCES}, f"rows_as={REFERENCES}: this engine keeps {REFERENCES}"),
        ({"rows_as": -1}, "rows_as=-1: this engine keeps"),
        ({"rows_as": 0, "probed": False}, "probed"),
        ({"row_entropy": True, "probed": False}, "probed"),
        ({"rows_against": REFERENCES - 1}, "have not been kept"),
        ({"rows_against": 6, "aligned": [(0, 0, 4)]}, "have 3 and 3 tokens"),
        ({"rows_against": 6, "aligned": [(1, 0, 1), (0, 1, 1)]}, "in order"),
        ({"rows_against": 6, "aligned": [(0, 0)]}, "length"),
        ({"rows_as": 0, "prompt_ids": [5] * KEYS}, "row_keys"),
    ],
)
@one_model
def test_requests_that_are_refused_leave_the_engine_as_it_was(tiny, run, fields, message):
    engine, _ = tiny
    run(engine, [ProbeRequest([5, 6, 7], {"prompt": (0, 3)}, 0, rows_as=6)])
    request = ProbeRequest(**{"prompt_ids": [5, 6, 7], "regions": {"prompt": (0, 3)}, "steps": 1, **fields})
    free = engine.free_slots
    with pytest.raises(ValueError, match=message):
        engine.submit(request)
    assert (engine.free_slots, engine.running) == (free, 0)


@one_model
def test_an_engine_that_was_not_started_for_entropies_refuses_them(tiny, monkeypatch):
    engine, _ = tiny
    options = {**engine.options, "row_entropy": False}
    monkeypatch.setattr(engine, "_config", replace(engine._config, options=options))
    with pytest.raises(ValueError, match="set row_entropy=True"):
        engine.submit(ProbeRequest([5, 6, 7], {"prompt": (0, 3)}, 0, row_entropy=True))
