"""Distances and entropies of attention rows in the GPU backend, on both model runners, against transformers' eager
attention."""

import numpy as np
from scipy.special import entr

from headrift.requests import ProbeRequest

HEAD, CORE, TAIL, WORDS = np.split(np.random.default_rng(7).integers(3, 200, 36), [8, 20, 24])
CLEAN, WRAPPED = ([*map(int, np.concatenate(parts))] for parts in ((HEAD, CORE, TAIL), (HEAD, WORDS, CORE, TAIL)))
RUNS = [(0, 0, 8), (8, 20, 12), (20, 32, 4)]


def regions(ids) -> dict[str, tuple[int, int]]:
    return {"system": (2, 6), "user": (8, 20), "prompt": (0, len(ids))}


def test_distances_agree_with_eager_attention_beside_others(only_once, tiny, run, assert_agrees):
    """At the last prompt token and at two more, decoded and replayed, with rows that ask for nothing in the batch."""
    engine, oracle = tiny
    (clean,) = run(engine, [ProbeRequest(CLEAN, regions(CLEAN), 2, ignore_eos=True, rows_as=1)])
    how = {"ignore_eos": True, "rows_against": 1, "aligned": RUNS, "row_entropy": True}
    options = [
        ProbeRequest(WRAPPED, regions(WRAPPED), 2, **how),
        ProbeRequest(WRAPPED, regions(WRAPPED), 2, answer_ids=clean.done.answer_ids, **how),
    ]
    items = run(engine, [*options, ProbeRequest(CLEAN[::-1], regions(CLEAN), 2, ignore_eos=True)])
    assert assert_agrees(oracle, [clean, *items]) == 4 * 3
    for item in items[:2]:
        fed = clean.done.answer_ids[:2], item.done.answer_ids[:2]
        expected = oracle.row_distances((CLEAN, fed[0]), (WRAPPED, fed[1]), RUNS)
        np.testing.assert_allclose(item.recording.distance, expected, rtol=0, atol=1e-5)
        entropy = entr(oracle.run([*WRAPPED, *fed[1]], len(WRAPPED) - 1).attentions).sum(-1)
        np.testing.assert_allclose(item.recording.row_entropy, entropy, rtol=0, atol=1e-4)
    assert "distance" not in items[2].recording.measures
    assert "row_entropy" not in items[2].recording.measures
