"""Estimates over prompts: what an interval covers, and what is too little for one."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from headrift.internals.analysis import length_correlations, mixed_model
from headrift.internals.estimates import (
    PromptBootstrap,
    cka_by_chance,
    cosine,
    gram,
    kl,
    linear_cka,
    pearson,
    relative_l2,
    spearman,
    student,
)
from headrift.stats import side


def test_intervals_are_over_prompts_not_rows():
    """A hundred rows of each of 20 prompts, all alike within a prompt, are 20 numbers and not 2,000."""
    random = np.random.default_rng(0)
    one = random.normal(1.0, 1.0, 20)
    bootstrap = PromptBootstrap(20)
    few, many = bootstrap.mean(one).at(), bootstrap.mean(np.repeat(one[:, None], 100, 1).mean(1)).at()
    assert (few.prompts, few.rows) == (many.prompts, many.rows) == (20, 20)
    assert many.interval == pytest.approx(few.interval)
    # The bootstrap's standard error is the textbook's to within the noise of 1,000 draws, some 10%.
    half = (few.interval[1] - few.interval[0]) / 2
    assert half == pytest.approx(1.96 * one.std() / np.sqrt(20), rel=0.15)


def test_intervals_cover_as_often_as_they_say():
    """95% intervals of 40 prompts miss the mean in 5% of cases (Student), or 6% (percentiles, for so few); of 1,000
    such intervals that is to within 3%, four standard errors."""
    values = np.random.default_rng(2).normal(0.0, 1.0, (40, 1000))
    estimates = PromptBootstrap(40).mean(values)
    assert ((estimates.low > 0) | (estimates.high < 0)).mean() == pytest.approx(0.06, abs=0.03)
    shown = [side(student(column)[0].interval, 0) is not None for column in values.T]
    assert np.mean(shown) == pytest.approx(0.05, abs=0.03)


def test_missing_prompts_are_left_out_and_few_have_no_interval():
    values = np.array([1.0, 3.0, np.nan, np.nan])
    estimate = PromptBootstrap(4).mean(values).at()
    assert (estimate.value, estimate.interval, estimate.prompts) == (2.0, None, 2)
    assert side(estimate.interval, 0) is None
    alike, p = student([2.0, 2.0, 2.0])
    assert (alike.value, alike.interval) == (2.0, None)
    assert np.isnan(p)


def test_student_is_scipys():
    values = np.random.default_rng(2).normal(0.4, 1, 9)
    estimate, p = student(values)
    expected = stats.ttest_1samp(values, 0)
    assert estimate.interval == pytest.approx(tuple(expected.confidence_interval()))
    assert p == pytest.approx(expected.pvalue)


def test_correlations_are_scipys():
    random = np.random.default_rng(3)
    x = random.normal(size=(50, 4)).round(1)  # ties
    y = x + random.normal(size=(50, 4))
    for i in range(4):
        assert spearman(x, y)[i] == pytest.approx(stats.spearmanr(x[:, i], y[:, i]).statistic)
        assert pearson(x, y)[i] == pytest.approx(stats.pearsonr(x[:, i], y[:, i]).statistic)
    assert np.isnan(pearson(np.ones(5), np.arange(5.0)))


def planted(slope_neutral: float, slope_beyond: float, noise: float = 0.05):
    """Effects [prompts, systems] that grow with length by so much per 100 tokens, and a level of each prompt's own."""
    random = np.random.default_rng(4)
    tokens = np.broadcast_to(np.array([10, 20, 50, 100, 200, 400.0]), (30, 6))
    level = random.normal(0, 0.5, (30, 1))
    neutral = level + slope_neutral * tokens / 100 + random.normal(0, noise, tokens.shape)
    system = level + (slope_neutral + slope_beyond) * tokens / 100 + random.normal(0, noise, tokens.shape)
    return system, neutral, tokens


def test_the_mixed_model_finds_planted_slopes():
    system, neutral, tokens = planted(0.2, 0.3)
    results = mixed_model(system, neutral, tokens)
    assert results["converged"]
    assert results["rows"] == 360
    for name, slope in (("per_100_neutral", 0.2), ("per_100_beyond", 0.3)):
        # Wald's standard error is about 0.004 here; 0.02 is five of them.
        assert results[name].value == pytest.approx(slope, abs=0.02)
        assert side(results[name].interval, 0)
    # The levels were drawn with 0.5; of 30 prompts their spread is that to within about a quarter.
    assert results["random_effect_sd"] == pytest.approx(0.5, rel=0.4)


def test_no_slope_beyond_neutral_text_is_none_shown():
    system, neutral, tokens = planted(0.2, 0.0)
    assert side(mixed_model(system, neutral, tokens)["per_100_beyond"].interval, 0) is None
    beyond = length_correlations(system - neutral, tokens, PromptBootstrap(30))
    assert side(beyond["spearman"].interval, 0) is None
    assert side(length_correlations(system, tokens, PromptBootstrap(30))["spearman"].interval, 0)


def test_too_little_for_a_mixed_model_says_why():
    system, neutral, tokens = planted(0.2, 0.1)
    assert "fewer than three" in mixed_model(system[:2], neutral[:2], tokens[:2])["reason"]
    assert "fewer than three" in mixed_model(system[:, :2], neutral[:, :2], tokens[:, :2])["reason"]


def test_cka_knows_turned_and_scaled_states_and_says_what_chance_gives():
    random = np.random.default_rng(5)
    states = random.normal(size=(40, 3, 100))
    turn = np.linalg.qr(random.normal(size=(100, 100)))[0]
    same = linear_cka(gram(states), gram(states @ turn * 7 + 1))
    np.testing.assert_allclose(same, 1, atol=1e-9)
    other = random.normal(size=(40, 3, 100))
    unrelated, chance = linear_cka(gram(states), gram(other)), cka_by_chance(gram(states), gram(other))
    # Far above 0 for want of examples, as the docstring says, and no more than by chance (its spread is about 0.01).
    assert (unrelated > 0.2).all()
    np.testing.assert_allclose(unrelated, chance, atol=0.05)
    # Kornblith et al.'s formula as it is written, by features.
    x, y = (each[:, 0] - each[:, 0].mean(0) for each in (states, other))
    norm = np.linalg.norm
    assert unrelated[0] == pytest.approx(norm(y.T @ x) ** 2 / (norm(x.T @ x) * norm(y.T @ y)))


def test_measures_by_hand():
    assert cosine([3.0, 0.0], [3.0, 4.0]) == pytest.approx(0.6)
    assert relative_l2([3.0, 0.0], [3.0, 4.0]) == pytest.approx(4 / 3)
    assert cosine([0.0, 0.0], [1.0, 0.0]) == 0
    assert np.isnan(relative_l2([0.0, 0.0], [1.0, 0.0]))
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    assert kl(np.log(p), np.log(q)) == pytest.approx(stats.entropy(p, q))
    assert kl(np.log(p), np.log(p)) == 0
