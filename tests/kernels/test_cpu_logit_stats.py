"""The CPU logit statistics against the float64 oracle."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrift_kernels import reference
from headrift_kernels.cpu.logit_stats import logit_statistics

# Sums of up to 150,000 float32 terms in chunks of 1,024; entropy is a difference of two such sums.
TOLERANCE = 5e-6


def run(logits: torch.Tensor, slots: np.ndarray, steps: np.ndarray, n_rows: np.ndarray, buffer=(8, 4)) -> np.ndarray:
    stats = torch.full((*buffer, 3), torch.nan)
    logit_statistics(stats, logits, *(torch.from_numpy(a.astype(np.int32)) for a in (slots, steps, n_rows)))
    return stats.numpy()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    vocab=st.sampled_from([2, 3, 1023, 1024, 1025, 5000, 49152]),
    spread=st.sampled_from([0.0, 0.5, 5.0, 40.0]),
    masked=st.booleans(),
    shift=st.sampled_from([0.0, -300.0, 300.0]),
)
def test_agrees_with_the_oracle(seed, vocab, spread, masked, shift):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy((shift + spread * rng.standard_normal((3, vocab))).astype(np.float32))
    if masked:
        logits[:, rng.integers(0, vocab, vocab // 2)] = -torch.inf
        logits[:, :2] = torch.tensor([shift, shift + 1.0])
    result = run(logits, np.arange(3), np.ones(3), np.full(8, 4))
    expected = reference.logit_statistics(logits).numpy()
    np.testing.assert_allclose(result[:3, 1], expected, rtol=1e-5, atol=TOLERANCE)


def test_only_probed_rows_within_their_steps_are_written():
    logits = torch.randn(5, 100, generator=torch.Generator().manual_seed(0))
    stats = run(logits, np.array([3, -1, 0, 1, 2]), np.array([0, 0, -1, 2, 3]), np.array([4, 4, 4, 3, 4, 4, 4, 4]))
    written = {tuple(cell) for cell in np.argwhere(~np.isnan(stats[..., 0]))}
    assert written == {(3, 0), (1, 2), (2, 3)}
    assert not written & {(1, 3)}


def test_a_certain_token_has_entropy_zero_and_margin_one():
    logits = torch.full((1, 300), -torch.inf)
    logits[0, 42] = 3.0
    assert run(logits, np.zeros(1), np.zeros(1), np.full(8, 4))[0, 0] == pytest.approx([0.0, 1.0, 1.0], abs=1e-7)


def test_equal_logits_have_the_entropy_of_the_vocabulary():
    stats = run(torch.zeros(1, 5000), np.zeros(1), np.zeros(1), np.full(8, 4))[0, 0]
    assert stats == pytest.approx([np.log(5000), 1 / 5000, 0.0], abs=2e-6)
