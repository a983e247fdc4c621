"""The Triton logit statistics against the float64 oracle."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrift_kernels import reference
from headrift_kernels.triton.logit_stats import logit_statistics
from tools.traffic import counted

# Lanes of at most some dozens of float32 terms, merged pairwise; entropy is a difference of two such sums.
TOLERANCE = 5e-6


def run(logits, slots, steps, n_rows, buffer=(8, 4)):
    whole = torch.full((buffer[0] * buffer[1] * 3 + 64,), 7.0)
    stats = whole[32:-32].view(*buffer, 3)
    stats.fill_(torch.nan)
    logit_statistics(stats, logits, *(torch.from_numpy(np.asarray(a, np.int32)) for a in (slots, steps, n_rows)))
    assert (whole[:32] == 7.0).all()
    assert (whole[-32:] == 7.0).all()
    return stats.numpy()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    vocab=st.sampled_from([2, 3, 2047, 2048, 2049, 5000, 49152, 151_936]),
    spread=st.sampled_from([0.0, 0.5, 5.0, 40.0]),
    masked=st.booleans(),
    shift=st.sampled_from([0.0, -300.0, 300.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_agrees_with_the_oracle(seed, vocab, spread, masked, shift, dtype):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy((shift + spread * rng.standard_normal((3, vocab))).astype(np.float32))
    if masked:
        logits[:, rng.integers(0, vocab, vocab // 2)] = -torch.inf
        logits[:, :2] = torch.tensor([shift, shift + 1.0])
    wide = torch.full((3, vocab + 5), torch.nan, dtype=dtype)  # rows lie further apart than they are long
    wide[:, :vocab] = logits.to(dtype)
    result = run(wide[:, :vocab], range(3), [1, 1, 1], [4] * 8)
    expected = reference.logit_statistics(wide[:, :vocab]).numpy()
    # a logit of 300 in base 2 is rounded to 1.5e-5
    np.testing.assert_allclose(result[:3, 1], expected, rtol=2e-5, atol=TOLERANCE + 3e-5 * bool(shift))


def test_only_probed_rows_within_their_steps_are_written():
    logits = torch.randn(5, 100, generator=torch.Generator().manual_seed(0))
    stats = run(logits, [3, -1, 0, 1, 2], [0, 0, -1, 2, 3], [4, 4, 4, 3, 4, 4, 4, 4])
    written = {tuple(cell) for cell in np.argwhere(~np.isnan(stats[..., 0]))}
    assert written == {(3, 0), (1, 2), (2, 3)}


def test_each_logit_of_a_probed_row_is_read_once_and_no_other():
    logits = torch.randn(2, 5000)
    stats = torch.full((4, 2, 3), torch.nan)
    slots, steps, n_rows = (torch.tensor(x, dtype=torch.int32) for x in ([-1, 2], [0, 1], [2] * 4))
    tensors = {"stats": stats, "logits": logits, "slots": slots, "steps": steps, "n_rows": n_rows}
    with counted(tensors, per_element=("logits",)) as traffic:
        logit_statistics(stats, logits, slots, steps, n_rows)
    reads = traffic.reads["logits"].reshape(2, 5000)
    assert (reads[0] == 0).all()
    assert (reads[1] == 1).all()
    assert traffic.total("stats") == 12


def test_a_certain_token_has_entropy_zero_and_margin_one():
    logits = torch.full((1, 300), -torch.inf)
    logits[0, 42] = 3.0
    assert run(logits, [0], [0], [4] * 8)[0, 0] == pytest.approx([0.0, 1.0, 1.0], abs=1e-6)


def test_the_two_best_may_be_equal_and_far_apart():
    logits = torch.zeros(1, 5000)
    logits[0, [7, 4999]] = 3.0
    assert run(logits, [0], [0], [4] * 8)[0, 0, 2] == 0.0


def test_equal_logits_have_the_entropy_of_the_vocabulary():
    stats = run(torch.zeros(1, 5000), [0], [0], [4] * 8)[0, 0]
    assert stats == pytest.approx([np.log(5000), 1 / 5000, 0.0], abs=3e-6)


def test_a_nan_shows():
    logits = torch.zeros(1, 5000)
    logits[0, 3000] = torch.nan
    assert np.isnan(run(logits, [0], [0], [4] * 8)[0, 0, :2]).all()
