"""Keys of two requests lined up, so that an attention row of the one can be held against one of the other.

A row is what a query's softmax gives to each key it may see: all keys up to its own position, or the last ones where
the layer has a sliding window. A sink's part is no key's. Step t's row is that of the query at prompt_len - 1 + t.

Runs say which tokens of the two prompts are the same. Answer token u, at position prompt_len + u, is lined up with the
other's answer token u, whichever tokens the two are: at step t both see those with u < t. The target of a request's row
is, on a key that is lined up with one of the other's, what the other's row has there, and 0 on every other (the words
around a question); what the other's row has on keys that this request does not have is left out. Over the keys k of
this request

    L2 = sqrt(sum_k (own_k - target_k)^2)    (0 to sqrt(2))
    TV = 1/2 sum_k |own_k - target_k|        (total variation, 0 to 1)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

L2, TV = 0, 1  # where the distances stand in an array of both
DISTANCES = ("l2", "tv")

# Prompt tokens in common: [other, other + length) of the other prompt are [own, own + length) of this one.
Run = tuple[int, int, int]


def check_rows(
    references: Iterable[int | None], other_len: int, own_len: int, steps: int, *, kept: int, keys: int
) -> None:
    """ValueError where the rows of these references, of prompts of so many tokens, cannot be kept or compared with.

    kept, keys: of how many requests rows are kept, and over how many keys.
    """
    for reference in references:
        if reference is not None and not 0 <= reference < kept:
            raise ValueError(f"there are no rows {reference}; this engine keeps those of {kept} requests")
    if max(other_len, own_len) + steps > keys:
        raise ValueError(
            f"a prompt of {max(other_len, own_len)} tokens with {steps} steps does not fit: this engine keeps rows of "
            f"{keys} keys; start it with more row_keys"
        )


def check_runs(runs: Sequence[Any], other_len: int, own_len: int) -> None:
    """ValueError, with what to give instead, unless these are runs of prompts of so many tokens, in order and apart."""
    ends = [0, 0]
    for run in runs:
        if not isinstance(run, (list, tuple)) or len(run) != 3 or not all(isinstance(n, int) for n in run):
            raise ValueError(
                f"tokens in common are (start in the other's prompt, start in one's own, length), not {run!r}"
            )
        *starts, length = run
        if length < 0 or any(start < end for start, end in zip(starts, ends, strict=True)):
            raise ValueError(f"runs of tokens in common have to be in order and apart, and these are not: {list(runs)}")
        ends = [start + length for start in starts]
    if ends[0] > other_len or ends[1] > own_len:
        raise ValueError(
            f"tokens in common end at {ends[0]} and {ends[1]}, and the prompts have {other_len} and {own_len} tokens"
        )


def places(runs: Sequence[Run], other_len: int, own_len: int, steps: int) -> NDArray[np.int64]:
    """Where each key that a request sees in steps 0..`steps` lies in the other one: [own_len + steps] positions, -1
    where the other has no such key. The runs have to be of these prompts (`check_runs`)."""
    found = np.full(own_len + steps, -1)
    for other, own, length in runs:
        found[own : own + length] = np.arange(other, other + length)
    found[own_len:] = np.arange(other_len, other_len + steps)
    return found
