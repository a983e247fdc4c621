"""Keys of two requests lined up, so that an attention row of one can be compared with one of the other.

An attention row is what a query's softmax gives to each key it may see: all keys up to its own position, or the last
ones if the layer has a sliding window. A sink's share belongs to no key. Step t's row is that of the query at position
prompt_len - 1 + t.

Runs say which tokens of the two prompts are the same. Answer token u, at position prompt_len + u, is lined up with the
other's answer token u, whichever tokens the two are: at step t both see those with u < t. The target of a request's row
is, on a key that is lined up with one of the other's, what the other's row has there, and 0 on every other key (the
words around a question); what the other's row has on keys that this request lacks is left out. Over the keys k of this
request

    L2 = sqrt(sum_k (own_k - target_k)^2)    (0 to sqrt(2))
    TV = 1/2 sum_k |own_k - target_k|        (total variation, 0 to 1)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrift.requests import Run

L2, TV = 0, 1  # indices of the distances in an array of both
DISTANCES = ("l2", "tv")


def check_rows(
    references: Iterable[int | None], other_len: int, own_len: int, steps: int, *, kept: int, keys: int
) -> None:
    """Check that attention rows can be kept, or compared, under these reference numbers.

    Args:
        references: Reference numbers; None refers to nothing.
        other_len, own_len: Tokens of the two prompts.
        steps: N of steps 0..N.
        kept: Requests whose rows the engine keeps.
        keys: Keys over which it keeps them.

    Raises:
        ValueError: a reference does not exist, or a row has more keys.
    """
    for reference in references:
        if reference is not None and not 0 <= reference < kept:
            raise ValueError(f"there are no rows {reference}; this engine keeps those of {kept} requests")
    longest = max(other_len, own_len)
    if longest + steps > keys:
        raise ValueError(
            f"a prompt of {longest} tokens with {steps} steps exceeds the {keys} keys of a kept row; raise row_keys"
        )


def check_runs(runs: Sequence[Any], other_len: int, own_len: int) -> None:
    """Check runs (start in the other's prompt, start in one's own, length).

    Raises:
        ValueError: these are not runs of prompts of so many tokens, in order and apart.
    """
    ends = [0, 0]
    for run in runs:
        if not isinstance(run, (list, tuple)) or len(run) != 3 or not all(isinstance(n, int) for n in run):
            raise ValueError(f"a run is (start in the other prompt, start in one's own, length), not {run!r}")
        *starts, length = run
        if length < 0 or any(start < end for start, end in zip(starts, ends, strict=True)):
            raise ValueError(f"runs have to be in order and apart, unlike {list(runs)}")
        ends = [start + length for start in starts]
    if ends[0] > other_len or ends[1] > own_len:
        raise ValueError(f"runs end at {ends[0]} and {ends[1]}, and the prompts have {other_len} and {own_len} tokens")


def partner_positions(runs: Sequence[Run], other_len: int, own_len: int, steps: int) -> NDArray[np.int64]:
    """Position in the other request of each key that a request sees in steps 0..`steps`.

    Args:
        runs: Of these prompts, see `check_runs`.

    Returns:
        [own_len + steps] positions, -1 if the other has no such key.
    """
    partners = np.full(own_len + steps, -1)
    for other, own, length in runs:
        partners[own : own + length] = np.arange(other, other + length)
    partners[own_len:] = np.arange(other_len, other_len + steps)
    return partners
