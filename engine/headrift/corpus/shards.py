"""Which rows of the input a run scores, and how they are dealt out to shards.

The rows of all inputs, good and bad, are numbered through from 0. A Selection takes some of them, in order; the rows
taken are numbered through again, and each shard is a range of these numbers: shard k has the rows [k * size, (k + 1) *
size). A shard's rows end together in part-k and rejects-k, or the shard is not done.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

# A run has about this many shards, each of at least and at most so many rows.
_SHARDS = 1000
_FEWEST_ROWS, _MOST_ROWS = 1000, 10_000


@dataclass(frozen=True, slots=True)
class Selection:
    """The rows to take, in this order: sample: this many of the whole input, drawn with `seed`; shard: (i, n), i from
    1, every n-th row from the i-th; limit: the first so many. None: all."""

    limit: int | None = None
    sample: int | None = None
    seed: int = 0
    shard: tuple[int, int] | None = None

    @property
    def most_read(self) -> int | None:
        """No row after so many of the input is taken; None where that is not known beforehand."""
        if self.limit is None or self.sample is not None:
            return None
        return self.limit * (self.shard[1] if self.shard else 1)

    def count(self, total: int) -> int:
        """How many of `total` rows are taken."""
        taken = total if self.sample is None else min(self.sample, total)
        if self.shard is not None:
            first, step = self.shard
            taken = len(range(first - 1, taken, step))
        return taken if self.limit is None else min(taken, self.limit)

    def marks(self, total: int) -> Iterator[bool]:
        """Of each of `total` rows in order, whether it is taken; ends after the last one that is."""
        random, left, position, taken = Random(self.seed), self.sample, 0, 0
        most = self.count(total)
        for number in range(total):
            if taken == most:
                return
            drawn = True
            if left is not None:  # Knuth's selection sampling: exactly as many as wanted, in one pass, nothing kept
                drawn = random.random() * (total - number) < left
                left -= drawn
            mine = drawn and (self.shard is None or position % self.shard[1] == self.shard[0] - 1)
            position += drawn
            taken += mine
            yield mine


def parse_shard(text: str) -> tuple[int, int]:
    """(i, n) of "i/n"; ValueError unless 1 <= i <= n."""
    found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"--shard is i/n with 1 <= i <= n, as in 2/8 (the second of eight), got {text!r}")
    return int(found[1]), int(found[2])


def rows_per_shard(rows: int) -> int:
    """The size of the shards of a run of so many rows: small enough to lose little, large enough to be few."""
    return min(max(rows // _SHARDS, _FEWEST_ROWS), _MOST_ROWS)
