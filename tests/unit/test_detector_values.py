"""What detectors make of results that lack some of what they read."""

from types import SimpleNamespace

import numpy as np
import pytest

from headrift.signals.detectors import ChosenHeads, Moments, Novelty, Readout
from headrift.signals.features import features, prompts_of

LAYERS, HEADS = 3, 4
D = 2 * LAYERS * HEADS + LAYERS


def result(seed: int, blocks: int = 2, *, user: bool = True) -> SimpleNamespace:
    """A result with log-odds at step 0 and, with two blocks, of the window."""
    random = np.random.default_rng(seed)
    return SimpleNamespace(
        score=0.1,
        signals={"system_share": 0.3},
        system_tokens=20,
        prompt_tokens=50,
        logit_shares=random.standard_normal((blocks, LAYERS, HEADS)).astype(np.float32),
        focus_heads=random.random((LAYERS, HEADS), np.float32) if user else None,
    )


@pytest.fixture
def novelty() -> Novelty:
    random = np.random.default_rng(0)
    factor = random.standard_normal((D, D)) / D**0.5
    upper = (factor @ factor.T)[np.triu_indices(D)]
    moments = Moments(mean=random.random(D).tolist(), spread=(1 + random.random(D)).tolist(), n=40)
    return Novelty(
        shape=(LAYERS, HEADS), layers=list(range(LAYERS)), windowed=True, moments=moments, precision=upper.tolist()
    )


def test_short_answers_beside_longer_ones_have_their_own_values():
    """An answer that ends before the window counts as average there, alone or among others."""
    moments = Moments(mean=[0.5] * D, spread=[2.0] * D, n=40)
    coefficients = np.random.default_rng(1).standard_normal(D)
    readout = Readout(
        shape=(LAYERS, HEADS),
        layers=list(range(LAYERS)),
        windowed=True,
        moments=moments,
        coefficients=coefficients.tolist(),
        intercept=0.25,
        inverse_penalty=1.0,
        head_map=[],
    )
    results = [result(1), result(2, 1), result(3)]
    together = readout.values(prompts_of(results))
    np.testing.assert_allclose(together, [readout.values(prompts_of([one]))[0] for one in results], atol=1e-12)
    scaled = (features(prompts_of(results[1:2]), np.arange(LAYERS), windowed=True)[0] - 0.5) / 2
    in_window = slice(LAYERS * HEADS, 2 * LAYERS * HEADS)
    assert np.isnan(scaled[in_window]).all()
    scaled[in_window] = 0
    assert together[1] == pytest.approx(scaled @ coefficients + 0.25)


def test_prompts_without_a_user_turn_have_no_focus():
    detector = ChosenHeads(heads=[(0, 1), (2, 3)], n=None)
    with_user = result(5)
    expected = -(with_user.focus_heads[0, 1].astype(float) + with_user.focus_heads[2, 3]) / 2
    assert np.isnan(detector.values(prompts_of([result(4, user=False)]))).all()
    values = detector.values(prompts_of([result(4, user=False), with_user]))
    assert np.isnan(values[0])
    assert values[1] == pytest.approx(expected)


def test_novelty_is_the_mahalanobis_distance_and_stays_equal_to_a_copy(novelty):
    copy = Novelty.model_validate_json(novelty.model_dump_json())
    prompts = prompts_of([result(seed) for seed in range(6)])
    matrix = novelty.standardised(prompts)
    precision = np.zeros((D, D))
    precision[np.triu_indices(D)] = novelty.precision
    precision.T[np.triu_indices(D)] = novelty.precision
    expected = np.sqrt([row @ precision @ row for row in matrix])
    np.testing.assert_allclose(novelty.values(prompts), expected, rtol=1e-9)
    np.testing.assert_allclose(novelty.contributions(prompts).sum(axis=(1, 2)), expected**2, rtol=1e-9)
    assert novelty == copy  # though one has made its matrix
    assert novelty.model_dump_json() == copy.model_dump_json()
