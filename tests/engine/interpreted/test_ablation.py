"""Ablated heads in the GPU backend, on both model runners, against transformers with hooks."""

import numpy as np
import pytest
import torch

from headrift.requests import ProbeRequest

REGIONS = {"system": (2, 9), "user": (9, 12), "prompt": (0, 24)}
ROWS = [
    [(0, 1, "undifferentiated")],
    [(0, 0, "scaling"), (1, 2, "mean_query"), (1, 3, "undifferentiated")],
    [(1, 1, "mean_output"), (0, 3, "mean_query")],
]


def test_every_kind_agrees_with_hooks_beside_clean_rows(only_once, tiny, run, assert_agrees):
    """Masses at the last prompt token and at two decode steps; the divergence from the kept clean row, and the angle to
    its last hidden state."""
    engine, oracle = tiny
    ids = np.random.default_rng(6).integers(3, 200, 24).tolist()
    clean = ProbeRequest(ids, REGIONS, 2, ignore_eos=True, keep_as=1, hidden_as=0)
    options = {"ignore_eos": True, "epsilon": 0.01, "compare_with": 1}
    rows = [ProbeRequest(ids, REGIONS, 2, ablate=row, hidden_as=i, **options) for i, row in enumerate(ROWS, 1)]
    # A step takes 64 tokens: the first two decode while the rest of the third and the fourth are prefilled.
    items = run(engine, [clean, *rows])
    assert assert_agrees(oracle, items[:1]) == 3
    angles = engine.principal_angles([0], [[1], [2], [3]], 1)
    log_p = torch.log_softmax(oracle.run(ids, -1).logits[-1].double(), -1)
    one = oracle.last_hidden(ids)
    for item, row, (angle,) in zip(items[1:], ROWS, angles, strict=True):
        with oracle.ablated(row, 0.01):
            assert assert_agrees(oracle, [item]) == 3
            other = oracle.last_hidden(ids)
            log_q = torch.log_softmax(oracle.run(ids, -1).logits[-1].double(), -1)
        # float32 logits, whose rounding enters squared
        expected = float((log_p.exp() * (log_p - log_q)).sum())
        assert item.recording.divergence == pytest.approx(expected, rel=1e-3, abs=1e-8)
        assert expected > 1e-3
        # Hidden states are some 1e-6 of their size apart, and a radian is 57 degrees.
        cosine = abs(float(one @ other)) / float(one.norm() * other.norm())
        assert angle == pytest.approx(np.rad2deg(np.arccos(cosine)), abs=2e-3)
        assert angle > 1
