"""Principal angles of the queries' subspaces against scipy, against angles put there, and what has none."""

import numpy as np
import pytest
import scipy.linalg
import torch

from headrift.vllm_plugin.instruments import hidden_states
from headrift.vllm_plugin.instruments.hidden_states import principal_angles, subspace_angles


def states(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


@pytest.mark.parametrize(
    ("queries", "hidden", "r_main"), [(1, 1, 1), (1, 7, 1), (3, 5, 2), (5, 3, 3), (20, 576, 4), (7, 7, 7)]
)
def test_angles_are_scipys(queries, hidden, r_main):
    clean = states(queries, hidden)
    # From all but nothing to another matrix altogether.
    ablated = torch.stack([clean + size * states(queries, hidden, seed=1) for size in (1e-9, 1e-3, 0.3, 10.0)])
    result = subspace_angles(clean, ablated, r_main).numpy()
    assert result.shape == (4, r_main)
    assert (np.diff(result, axis=1) >= 0).all()
    basis = np.linalg.svd(clean.numpy().T)[0][:, :r_main]
    for angles, other in zip(result, ablated.numpy(), strict=True):
        expected = np.rad2deg(scipy.linalg.subspace_angles(basis, np.linalg.svd(other.T)[0][:, :r_main])[::-1])
        # Both in float64 from the same numbers; the vectors of one matrix are 1e-16 off, times what tells its singular
        # values apart, and a radian is 57 degrees.
        np.testing.assert_allclose(angles, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("degrees", [0.0, 1e-9, 1e-4, 30.0, 90.0])
def test_an_angle_that_was_put_there(degrees):
    """The second of two directions is turned; the first stays."""
    angle = np.deg2rad(degrees)
    one = torch.eye(6, dtype=torch.float64)[:, :2]
    other = one.clone()
    other[:, 1] = torch.tensor([0, np.cos(angle), 0, 0, np.sin(angle), 0])
    np.testing.assert_allclose(principal_angles(one, other), [0, degrees], rtol=1e-12, atol=1e-13)
    # Whichever way the singular vectors point.
    np.testing.assert_allclose(principal_angles(one, -other), [0, degrees], rtol=1e-12, atol=1e-13)


def test_so_many_at_a_time_as_fit(monkeypatch):
    clean, ablated = states(4, 9), states(5, 4, 9, seed=1)
    whole = subspace_angles(clean, ablated, 2)
    for numbers in (1, 80):
        monkeypatch.setattr(hidden_states, "_NUMBERS_AT_ONCE", numbers)
        torch.testing.assert_close(subspace_angles(clean, ablated, 2), whole, rtol=1e-12, atol=1e-12)


def test_float32_states_are_decomposed_in_float64():
    clean, ablated = states(4, 9), states(2, 4, 9, seed=1)
    result = subspace_angles(clean.float(), ablated.float(), 3)
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, subspace_angles(clean.float().double(), ablated.float().double(), 3))


def test_directions_that_are_not_there_give_no_angle():
    one, clean = states(1, 9), states(3, 9, seed=2)
    alike = torch.cat([one, 2 * one, states(1, 9, seed=3)])
    missing = clean.clone()
    missing[1, 4] = torch.nan
    result = subspace_angles(clean, torch.stack([clean, alike, missing, torch.zeros_like(clean)]), 3)
    assert result.isnan().all(1).tolist() == [False, True, True, True]
    assert subspace_angles(clean, torch.stack([clean, alike]), 2).isfinite().all()
    assert subspace_angles(alike, clean[None], 3).isnan().all()
    for r_main in (0, 4):
        with pytest.raises(ValueError, match="r_main is 1 to 3 for 3 queries"):
            subspace_angles(clean, clean[None], r_main)
