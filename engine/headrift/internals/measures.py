"""How far apart two sets of states are, and two distributions."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def cosine(ours: Any, theirs: Any) -> Floats:
    """Cosine of the vectors on the last axis; 0 where one of them is 0."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.divide((a * b).sum(-1), lengths, out=np.zeros(lengths.shape), where=lengths > 0)


def relative_l2(ours: Any, theirs: Any) -> Floats:
    """|theirs - ours| / |ours| of the vectors on the last axis; NaN where ours is 0."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    length = np.linalg.norm(a, axis=-1)
    return np.divide(np.linalg.norm(b - a, axis=-1), length, out=np.full(length.shape, np.nan), where=length > 0)


def kl(ours: Any, theirs: Any) -> Floats:
    """KL(ours || theirs) in nats of log probabilities on the last axis."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return np.maximum((np.exp(a) * (a - b)).sum(-1), 0.0)


def gram(states: Any) -> Floats:
    """[..., n, n] inner products of n examples [n, ..., p], each of the p columns centred first."""
    x = np.moveaxis(np.asarray(states, np.float64), 0, -2)
    x = x - x.mean(-2, keepdims=True)
    return x @ np.swapaxes(x, -1, -2)


def linear_cka(ours: Floats, theirs: Floats) -> Floats:
    """Linear centred kernel alignment [...] of two states' `gram`s [..., n, n]; 0 to 1, NaN where one never varies.

    CKA(X, Y) = |Y'X|^2 / (|X'X| |Y'Y|), Frobenius norms, columns centred (Kornblith et al., Similarity of Neural
    Network Representations Revisited, 2019, section 3); by n x n matrices, since n is far below p here.
    """
    norms = np.linalg.norm(ours, axis=(-2, -1)) * np.linalg.norm(theirs, axis=(-2, -1))
    return np.divide((ours * theirs).sum((-2, -1)), norms, out=np.full(norms.shape, np.nan), where=norms > 0)


def cka_by_chance(ours: Floats, theirs: Floats, draws: int = 20, seed: int = 0) -> Floats:
    """Mean CKA [...] with the examples of one side in random order. With far fewer examples than dimensions CKA is far
    above 0 for states that have nothing to do with each other; this says how far."""
    random = np.random.default_rng(seed)
    orders = (random.permutation(theirs.shape[-1]) for _ in range(draws))
    return np.mean([linear_cka(ours, theirs[..., order, :][..., order]) for order in orders], axis=0)
