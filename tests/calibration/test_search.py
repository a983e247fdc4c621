"""Summed-area tables, bins and the choice, against signal.score and exact curves."""

import numpy as np
import pytest

from headrift import stats
from headrift.calibration.search import Search, SumTable, grid, standard_error
from headrift.signal import ScoreRange, Window


def filled(instability) -> SumTable:
    sums = SumTable(len(instability), instability.shape[1] - 1, instability.shape[2])
    half = len(instability) // 2
    sums.put(slice(0, half), instability[:half])
    sums.put(slice(half, None), instability[half:])
    return sums


def ragged(seed: int, n: int = 40):
    """Instability with cells that do not count and answers that end early."""
    random = np.random.default_rng(seed)
    values = random.gamma(2, 0.05, (n, 10, 7)).astype(np.float32)
    values[random.random(values.shape) < 0.2] = np.nan
    n_steps = random.integers(0, 10, n)
    values[np.arange(10) > n_steps[:, None]] = np.nan
    return values, n_steps


@pytest.mark.parametrize("seed", range(3))
def test_scores_from_sums_are_those_of_the_definition(seed):
    values, n_steps = ragged(seed)
    sums, cells = filled(values), grid(9, 7)
    for score_range in np.random.default_rng(seed).choice(np.array(cells, object), 40):
        defined = [score_range.score(one, last).value for one, last in zip(values, n_steps)]
        # Sums of up to 70 numbers below 1 in another order: a few units of 1e-16 each.
        np.testing.assert_allclose(sums.scores(score_range), np.array(defined, float), rtol=0, atol=1e-13)


def test_the_grid_has_every_window_and_every_trim_once():
    cells = grid(9, 30)
    windows = {(score_range.window.start, score_range.window.end) for score_range in cells}
    assert windows == {(start, end) for end in range(1, 10) for start in range(1, end + 1)}
    assert len({(score_range.window, score_range.layers(30)) for score_range in cells}) == len(cells)
    assert ScoreRange(Window(1, 9)) in cells
    assert len({score_range.window for score_range in grid(1000, 1)}) == 160 * 161 / 2


@pytest.mark.parametrize("seed", range(3))
def test_binned_aurocs_are_close_to_exact_ones(seed):
    random = np.random.default_rng(seed)
    values, _ = ragged(seed, 600)
    attack, fold = random.random(600) < 0.4, random.integers(0, 3, 600)
    values[attack] *= np.float32(1.2)
    weights = random.integers(0, 4, 600)
    cells = grid(9, 7)[::17]
    sums = filled(values)
    result = Search(sums, cells, attack, fold, 3).aurocs(weights)
    for at, score_range in enumerate(cells):
        scores = sums.scores(score_range)
        for held_out in (0, 1, 2, 3):
            own = fold != held_out
            rank = stats.ranks(scores[own])
            exact = stats.area(*stats.roc_curve(rank, attack[own], weights[own].astype(float)))
            # Rows in one bin count as ties: a bin is 8/255 of a standard deviation wide, so 1 pair in 50 at most ties,
            # and those come out even. 0.003 is 30 times less than the standard error of such an AUROC.
            assert result[at, held_out] == pytest.approx(exact, abs=0.003)


def test_no_auroc_without_both_classes():
    values, _ = ragged(0)
    search = Search(filled(values), grid(2, 7), np.zeros(40, bool), np.zeros(40, np.int64), 1)
    assert (search.aurocs(np.ones(40, np.int64)) == 0.5).all()
    assert standard_error(0.7, 0, 10) == float("inf")


def test_standard_error_is_that_of_simulation():
    random = np.random.default_rng(0)
    drawn = []
    for _ in range(2000):
        values = np.concatenate([random.standard_normal(30) + 1, random.standard_normal(50)])
        rank, attack = stats.ranks(values), np.arange(80) < 30
        drawn.append(stats.area(*stats.roc_curve(rank, attack, np.ones(80))))
    # The formula takes exponential distributions; for Gaussians it is known to be within some 10%.
    assert standard_error(float(np.mean(drawn)), 30, 50) == pytest.approx(np.std(drawn), rel=0.15)


def test_a_planted_effect_is_found(make):
    values = make.made_up(0, 1500, 1500, steps=8, layers=20, effect=0.02, window=(3, 6), at=slice(6, 14))
    attack = np.arange(3000) < 1500
    cells = grid(8, 20)
    (_, chosen) = Search(filled(values), cells, attack, np.zeros(3000, np.int64), 1).best(np.ones(3000, np.int64))
    assert abs(chosen.window.start - 3) <= 1
    assert abs(chosen.window.end - 6) <= 1
    start, end = chosen.layers(20)
    assert abs(start - 6) <= 2
    assert abs(end - 14) <= 2


def test_of_equally_good_cells_the_largest_is_chosen(make):
    """An effect everywhere, so large that every cell separates perfectly."""
    values = make.made_up(0, 40, 40, effect=1.0)
    attack = np.arange(80) < 40
    search = Search(filled(values), grid(6, 8), attack, np.arange(80) % 2, 2)
    for score_range in search.best(np.ones(80, np.int64)):
        assert score_range.window == Window(1, 6)
        assert score_range.layers(8) == (2, 8)


def test_the_choice_outside_a_fold_does_not_see_it(make):
    """Fold 1's labels turned round change what is chosen outside fold 0, and not what is chosen outside fold 1."""
    values = make.made_up(1, 60, 60, effect=0.02, window=(2, 3))
    attack, fold = np.arange(120) < 60, np.arange(120) % 2
    flipped = np.where(fold == 1, ~attack, attack)
    sums, ones = filled(values), np.ones(120, np.int64)
    before = Search(sums, grid(6, 8), attack, fold, 2).aurocs(ones)
    after = Search(sums, grid(6, 8), flipped, fold, 2).aurocs(ones)
    assert (before[:, 1] == after[:, 1]).all()
    assert (before[:, 0] != after[:, 0]).any()
