"""Ranking of heads over queries, and how far the queries agree."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from headrift.safety_heads.ships import agreement, rank, table


def test_rank_by_the_mean_with_dispersion():
    scores = np.random.default_rng(0).lognormal(size=(7, 4, 5))
    scores[:, 2, 3] += 9
    scores[:, 1, 1] = np.nan
    ranked = rank(scores)
    assert len(ranked) == 19
    assert [head.rank for head in ranked] == list(range(1, 20))
    assert (ranked[0].layer, ranked[0].head, ranked[0].first_of) == (2, 3, 7)
    assert sum(head.first_of for head in ranked) == 7 * 10
    for head in ranked:
        own = scores[:, head.layer, head.head]
        assert (head.mean, head.sd, head.median) == pytest.approx((own.mean(), own.std(), np.median(own)))
        assert head.low <= head.median <= head.high
    assert [head.mean for head in ranked] == sorted((head.mean for head in ranked), reverse=True)


def test_agreement_is_the_mean_rank_correlation():
    scores = np.random.default_rng(1).random((4, 3, 6))
    flat = scores.reshape(4, -1)
    pairs = [spearmanr(flat[i], flat[j]).statistic for i in range(4) for j in range(i)]
    assert agreement(scores) == pytest.approx(np.mean(pairs))
    assert agreement(scores[:1]) is None
    assert agreement(np.stack([scores[0], scores[0] ** 3])) == pytest.approx(1.0)
    assert agreement(np.stack([scores[0], np.ones((3, 6))])) is None


def test_the_table_fits_a_terminal():
    lines = table(rank(np.random.default_rng(2).random((100, 30, 32)) * 10), 100, 20).splitlines()
    assert len(lines) == 21
    assert max(map(len, lines)) <= 80
