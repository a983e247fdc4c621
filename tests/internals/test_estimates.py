"""Estimates over prompts and system prompts: what an interval covers, and what is too little for one."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from headrift.internals.analysis import with_feature, with_length
from headrift.internals.estimates import (
    cell_means,
    cka_by_chance,
    corrected,
    cosine,
    gram,
    kl,
    linear_cka,
    over_prompts,
    over_systems,
    pearson,
    relative_l2,
    spearman,
)
from headrift.internals.page import Finding, judge
from headrift.internals.sentences import KL_SCHEMA
from headrift.stats import side

MORE = ("shown: more", "shown: less")


def crossed(seed: int, prompts: int = 40, systems: int = 40) -> np.ndarray:
    """Values [prompts, systems] with effects of both, and noise, all of mean 0."""
    random = np.random.default_rng(seed)
    return random.normal(size=(prompts, 1)) + random.normal(size=systems) + random.normal(size=(prompts, systems))


def verdict(estimate) -> str:
    return judge([Finding("", estimate, claims=MORE)])[0].verdict


def test_rows_of_a_system_prompt_are_not_independent():
    """More prompts, all alike, are the same values of 40 system prompts: the interval is Student's over these."""
    values = np.random.default_rng(0).normal(1.0, 1.0, 40)
    for prompts in (3, 100):
        estimate = over_systems(np.repeat(values[None], prompts, 0)).at()
        expected = stats.ttest_1samp(values, 0)
        assert estimate.interval == pytest.approx(tuple(expected.confidence_interval()))
        assert estimate.p == pytest.approx(expected.pvalue)
        assert (estimate.prompts, estimate.systems, estimate.rows) == (prompts, 40, 40 * prompts)


def test_intervals_cover_as_often_as_they_say():
    """95% intervals miss the mean in 5% of cases; of 400 such intervals that is to within 3%, three standard errors."""
    of_prompts = over_prompts(np.random.default_rng(2).normal(0.0, 1.0, (40, 400)))
    assert (of_prompts.p < 0.05).mean() == pytest.approx(0.05, abs=0.03)
    assert ((of_prompts.low > 0) | (of_prompts.high < 0)).mean() == (of_prompts.p < 0.05).mean()
    values = np.stack([crossed(seed) for seed in range(400)], -1)
    of_both = over_systems(values)
    assert (of_both.p < 0.05).mean() == pytest.approx(0.05, abs=0.03)
    # Over prompts alone, system prompts would count as known: 17% of these intervals miss.
    assert (over_prompts(values.mean(1)).p < 0.05).mean() > 0.1


def test_below_thirty_system_prompts_there_is_an_interval_and_no_verdict():
    strong = 5 + crossed(0)
    few = over_systems(strong[:, :29]).at()
    assert side(few.interval, 0) == 1
    assert verdict(few) == "not judged: 29 system prompts, 30 needed"
    assert verdict(over_systems(strong[:, :30]).at()) == "shown: more"
    assert verdict(over_systems(-strong[:, :30]).at()) == "shown: less"
    # Of one given system prompt prompts are the sample.
    assert verdict(over_prompts(strong[:, 0]).at()) == "shown: more"


def test_missing_values_are_left_out_and_few_or_equal_ones_have_no_interval():
    estimate = over_prompts([1.0, 3.0, np.nan, np.nan]).at()
    assert (estimate.value, estimate.interval, estimate.prompts) == (2.0, None, 2)
    assert over_prompts(np.full(5, 0.1)).at().interval is None
    alike = over_systems(np.full((40, 40), 0.1)).at()
    assert alike.value == pytest.approx(0.1)
    assert (alike.interval, verdict(alike)) == (None, "not judged: too few prompts, or all alike")
    assert np.isnan(alike.p)
    values = crossed(1)
    values[:, 5] = np.nan
    values[3] = np.nan
    values[0, 0] = np.nan
    estimate = over_systems(values).at()
    assert (estimate.prompts, estimate.systems, estimate.rows) == (39, 39, 39 * 39 - 1)
    assert estimate.interval is not None
    assert over_systems(values[:, :2]).at().interval is None
    assert over_systems(values[:2]).at().interval is None


def test_student_is_scipys():
    values = np.random.default_rng(2).normal(0.4, 1, 9)
    estimate = over_prompts(values).at()
    expected = stats.ttest_1samp(values, 0)
    assert estimate.interval == pytest.approx(tuple(expected.confidence_interval()))
    assert estimate.p == pytest.approx(expected.pvalue)


def test_correlations_are_scipys():
    random = np.random.default_rng(3)
    x = random.normal(size=(50, 4)).round(1)  # ties
    y = x + random.normal(size=(50, 4))
    for i in range(4):
        assert spearman(x, y)[i] == pytest.approx(stats.spearmanr(x[:, i], y[:, i]).statistic)
        assert pearson(x, y)[i] == pytest.approx(stats.pearsonr(x[:, i], y[:, i]).statistic)
    assert np.isnan(pearson(np.ones(5), np.arange(5.0)))


TOKENS = np.random.default_rng(5).permutation(np.geomspace(10, 400, 40))


def test_a_planted_slope_and_feature_are_shown_with_forty_system_prompts_and_not_judged_with_twenty():
    has = np.arange(40) % 3 == 0
    values = crossed(4) + 1.5 * TOKENS / 100
    results = with_length(values, TOKENS)
    assert {verdict(one) for one in results.values()} == {"shown: more"}
    low, high = results["per_100_tokens"].interval
    assert low < 1.5 < high
    assert verdict(with_feature(crossed(4) - 3.0 * has, has)) == "shown: less"
    for one in (*with_length(values[:, :20], TOKENS[:20]).values(), with_feature(values[:, :20], has[:20])):
        assert one.interval is not None
        assert verdict(one) == "not judged: 20 system prompts, 30 needed"


def test_the_slope_is_that_of_least_squares_and_welchs_test_that_of_the_difference():
    """With prompts that are all alike, whose part of the variance is 0."""
    values = np.random.default_rng(6).normal(size=40)
    alike, has = np.repeat(values[None], 5, 0), np.arange(40) < 12
    slope = with_length(alike, TOKENS)["per_100_tokens"]
    expected = stats.linregress(TOKENS / 100, values)
    assert (slope.value, slope.p) == pytest.approx((expected.slope, expected.pvalue))
    welch = stats.ttest_ind(values[has], values[~has], equal_var=False)
    assert with_feature(alike, has).p == pytest.approx(welch.pvalue)
    assert with_feature(alike, has).interval == pytest.approx(tuple(welch.confidence_interval()))


def test_a_perfect_correlation_is_one_and_has_no_interval():
    results = with_length(np.repeat(TOKENS[None], 5, 0) ** 2, TOKENS)
    assert results["spearman"].value == pytest.approx(1)
    assert results["spearman"].interval is None
    assert results["pearson"].interval is not None


def test_a_prompt_that_long_system_prompts_lack_is_no_effect_of_length():
    values = np.random.default_rng(7).normal(0, 0.1, (40, 40))
    values[:10] += 50
    values[:10, TOKENS > 100] = np.nan
    assert side(with_length(values, TOKENS)["per_100_tokens"].interval, 0) is None
    assert abs(with_length(values, TOKENS)["pearson"].value) < 0.5


def test_correction_is_for_the_tests_of_the_table_that_can_be_judged():
    random = np.random.default_rng(9)
    findings = [Finding(str(i), over_prompts(random.normal(size=20)).at(), claims=MORE) for i in range(40)]
    findings += [
        Finding("few", over_systems(crossed(0)[:, :10]).at(), claims=MORE),
        Finding("told", findings[0].estimate),
    ]
    judged = judge(findings)
    assert [one.verdict for one in judged[:40]] == ["not shown"] * 40
    assert min(one.estimate.p for one in findings[:40]) < 0.05
    expected = stats.false_discovery_control([one.estimate.p for one in findings[:40]])
    np.testing.assert_allclose([one.p_corrected for one in judged[:40]], expected)
    assert (judged[40].p_corrected, judged[41].verdict) == (None, "")
    assert np.isnan(corrected([np.nan, 0.01])).tolist() == [True, False]


def test_cell_means_are_by_prompt_and_system_prompt():
    import pyarrow as pa

    row = {field.name: None for field in KL_SCHEMA}
    places = [(0, "a", 1.0), (0, "a", 3.0), (0, "b", 5.0), (2, "b", 7.0)]
    rows = [row | {"prompt": prompt, "system": system, "effect": value} for prompt, system, value in places]
    table = pa.Table.from_pylist(rows, schema=KL_SCHEMA)
    np.testing.assert_array_equal(cell_means(table, "effect"), [[2, 5], [np.nan, 7]])
    np.testing.assert_array_equal(cell_means(table, "effect", [0, 1, 0, 0]), [[3, np.nan], [np.nan, np.nan]])


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
