"""Prompts that are nearly the same, such as those made from one template: found by MinHash of their words.

Of a text the set of its runs of three words is compared. Its MinHash (Broder 1997) is a list of numbers of which two
texts share, on average, the fraction that their sets have in common (Jaccard's index). Texts with 0.4 in common or more
are near duplicates, and so are texts that a chain of such pairs joins. Of two texts of a template with two thirds of
their words the same, this is about what is in common; texts that have nothing to do with each other share nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from datasketch import MinHash

NUMBERS = 64  # of a MinHash: the error of an index is about 0.06
_WORDS = 3
_LIKE = 0.4  # fraction in common
_BAND = 3  # numbers that must agree for two texts to be compared: of pairs with 0.4 in common 75% are, with 0.6 99%
_MOST_WORDS = 5_000  # of a text that are read

Signatures = NDArray[np.uint16]


def minhash(text: str) -> Signatures:
    """The MinHash of a text [NUMBERS]; of each of its numbers the lowest 16 bits."""
    words = text.split(maxsplit=_MOST_WORDS)[:_MOST_WORDS]
    runs = {" ".join(words[first : first + _WORDS]) for first in range(max(1, len(words) - _WORDS + 1))}
    sketch = _empty().copy()
    sketch.update_batch([run.encode(errors="replace") for run in runs])
    return (sketch.hashvalues & 0xFFFF).astype(np.uint16)


@cache
def _empty() -> MinHash:
    from datasketch import MinHash

    return MinHash(NUMBERS, seed=1, hashfunc=zlib.crc32)


def near_groups(signatures: Signatures | Sequence[Signatures]) -> NDArray[np.int64]:
    """The group of each text, from 0: those that a chain of near duplicates joins have the same.

    Args:
        signatures: [n, NUMBERS], of `minhash`.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    signatures = np.asarray(signatures, np.uint16)
    n = len(signatures)
    if not n:
        return np.empty(0, np.int64)
    first, second = [], []
    for start in range(0, NUMBERS - _BAND + 1, _BAND):
        band = np.zeros(n, np.uint64)
        for column in signatures[:, start : start + _BAND].T:
            band = band << np.uint64(16) | column
        order = np.argsort(band, kind="stable")
        # Each text with the one before it in its bucket, and with the first there.
        new = np.concatenate([[True], band[order][1:] != band[order][:-1]])
        head = order[np.maximum.accumulate(np.where(new, np.arange(n), 0))]
        pairs = [(order[1:][~new[1:]], order[:-1][~new[1:]]), (order[~new], head[~new])]
        for one, other in pairs:
            alike = (signatures[one] == signatures[other]).mean(axis=1) >= _LIKE
            first.append(one[alike])
            second.append(other[alike])
    edges = np.concatenate(first), np.concatenate(second)
    graph = coo_array((np.ones(len(edges[0]), np.int8), edges), shape=(n, n))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)
