"""Pairs of prompts for tiny random models."""

from __future__ import annotations

import pytest


@pytest.fixture
def tokenizer_once(monkeypatch, tokenizer):
    """Trainings and evaluations get the tokenizer that is loaded already: every tiny model has the same."""
    monkeypatch.setattr("headrift.consistency.data.load_tokenizer", lambda name, trust: tokenizer)


@pytest.fixture
def make_pair():
    """A Pair of random token ids: a head of 5 tokens, wrapper, core of 6, wrapper, a tail of 3."""
    import numpy as np

    from headrift.consistency.pairs import CommonRun, Pair

    def make(seed: int, before: int = 7, after: int = 4, vocab: int = 211) -> Pair:
        random = np.random.default_rng(seed)
        head, core, tail = (random.integers(3, vocab, n).tolist() for n in (5, 6, 3))
        wraps = [random.integers(3, vocab, n).tolist() for n in (before, after)]
        starts = 5 + before, 5 + before + 6 + after
        return Pair(
            id=str(seed), question=str(seed), family=None, wrapper_name=None,
            clean_ids=head + core + tail, wrapped_ids=head + wraps[0] + core + wraps[1] + tail,
            head=CommonRun(0, 0, 5), core=CommonRun(5, starts[0], 6), tail=CommonRun(11, starts[1], 3),
            clean_system=(1, 4), wrapped_system=(1, 4),
            wrapper=tuple(s for s in ((5, starts[0]), (starts[0] + 6, starts[1])) if s[1] > s[0]),
        )  # fmt: skip

    return make
