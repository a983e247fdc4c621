"""Generalised SHIPS and Sahara: heads by how far their ablation turns what the model makes of a whole set of queries.

Where SHIPS looks at the first token of one answer, generalised SHIPS takes the last hidden states of all queries at
their last prompt token, and the principal angles between their subspaces without and with an ablation
(`headrift.subspace`). Sahara looks for a group: in each step every head that is left is ablated together with those
chosen before, and the one whose group turns the subspace most is chosen. Step 1 is the ranking of single heads.

A group and a query are a row of the engine's batches. Hidden states stay on the device, and only angles leave it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrift import ablation
from headrift.probed_engine import ProbedEngine
from headrift.requests import ProbeRequest
from headrift.safety_heads.ships import Head

# Principal angles [r_main] in degrees, smallest first, and those of many heads.
Angles = NDArray[np.float64]
AnglesOf = Mapping[Head, Angles]
# Rows of a block, about: its hidden states are kept until the angles of all its groups are taken at once.
_BLOCK_ROWS = 512


def hidden_states_of(queries: int) -> int:
    """How many hidden states an engine has to keep for so many queries: the clean ones and those of a block."""
    return queries * (1 + _groups_of_block(queries))


def _groups_of_block(queries: int) -> int:
    return max(1, _BLOCK_ROWS // queries)


class Turning:
    """A set of queries in an engine, and how far ablations turn their subspace.

    engine: started with `ablation=True` and `hidden_states=hidden_states_of(len(queries))`. queries: token ids. r_main:
    the vectors that span the subspace. kind, epsilon: see `headrift.ablation`. on_rows: told how many rows have run,
    again and again. The clean rows run once, at the first angles. ValueError where engine, queries or r_main will not
    do.
    """

    def __init__(
        self,
        engine: ProbedEngine,
        queries: Sequence[Sequence[int]],
        r_main: int = 1,
        kind: str = ablation.UNDIFFERENTIATED,
        epsilon: float = ablation.EPSILON,
        on_rows: Callable[[int], None] | None = None,
    ):
        needed = hidden_states_of(max(1, len(queries)))
        if not engine.ablates or engine.hidden_states < needed:
            raise ValueError(
                f"Sahara over {len(queries)} queries needs an engine that was started with ablation=True and "
                f"hidden_states={needed} or more"
            )
        check_r_main(r_main, queries)
        self.engine, self.r_main, self.kind, self.epsilon = engine, r_main, kind, epsilon
        self._queries = [list(ids) for ids in queries]
        self._clean: range | None = None
        self._on_rows = on_rows or (lambda rows: None)

    def angles(self, groups: Sequence[Sequence[Head]]) -> Iterator[dict[Head, Angles]]:
        """The angles of each group of heads, ablated together, by its last head; block by block.

        ValueError for heads that the model does not have; RuntimeError where a group has no angles.
        """
        for group in groups:
            ablation.check(self._ablate(group), self.epsilon)
            ablation.check_heads(group, self.engine.layers, self.engine.heads)
        n, size = len(self._queries), _groups_of_block(len(self._queries))
        if self._clean is None:
            self._run(self._rows((), range(n)))
            self._clean = range(n)
        for start in range(0, len(groups), size):
            block = groups[start : start + size]
            kept = [range(n * i, n * (i + 1)) for i in range(1, len(block) + 1)]
            self._run(row for group, numbers in zip(block, kept, strict=True) for row in self._rows(group, numbers))
            found = self.engine.turned(self._clean, kept, self.r_main)
            if np.isnan(found).any():
                layer, head = block[int(np.isnan(found).any(1).argmax())][-1]
                raise RuntimeError(
                    f"with layer {layer} head {head} ablated the queries' hidden states have fewer directions than "
                    f"r_main = {self.r_main}: ask for fewer, or give queries that differ more"
                )
            yield {group[-1]: angles for group, angles in zip(block, found, strict=True)}

    def _ablate(self, group: Sequence[Head]) -> list[ablation.HeadAblation]:
        return [(layer, head, self.kind) for layer, head in group]

    def _rows(self, group: Sequence[Head], numbers: range) -> Iterator[ProbeRequest]:
        """A request for each query, with these heads ablated; what they keep has these numbers."""
        for ids, number in zip(self._queries, numbers, strict=True):
            regions = {"prompt": (0, len(ids))}
            yield ProbeRequest(
                ids,
                regions,
                0,
                ignore_eos=True,
                ablate=self._ablate(group),
                epsilon=self.epsilon,
                hidden_as=number,
            )

    def _run(self, rows: Iterable[ProbeRequest]) -> None:
        """Put rows through the engine; what is to be had of them is kept there."""
        todo = list(rows)[::-1]
        try:
            while todo or self.engine.running:
                while todo and self.engine.free_slots:
                    self.engine.submit(todo.pop())
                finished = self.engine.step()
                self.engine.drain(finished)
                if finished:
                    self._on_rows(len(finished))
        finally:
            if self.engine.running:
                self.engine.abort()


@dataclass(frozen=True, slots=True)
class Step:
    """A step of the search: the head chosen, and the angles of every head that there was to choose from."""

    chosen: Head
    angles: AnglesOf

    @classmethod
    def of(cls, angles: AnglesOf) -> Step:
        """The step that has these angles: the head with the greatest sum is chosen, the first of several."""
        return cls(max(angles, key=lambda head: angles[head].sum()), angles)

    @property
    def ranking(self) -> list[Head]:
        """The heads by the sum of their angles, most first."""
        return sorted(self.angles, key=lambda head: -self.angles[head].sum())


def sahara(
    turning: Turning,
    heads: Sequence[Head],
    steps: int,
    known: Sequence[AnglesOf] = (),
    on_block: Callable[[int, AnglesOf], None] | None = None,
) -> list[Step]:
    """The steps of a greedy search for the group of `steps` heads that turns the queries' subspace most.

    known: angles that are there already, of steps 1, 2, ...; on_block: told the number of the step, from 1, and the
    angles of each block of heads as they come. ValueError where there are not so many heads; and see `Turning`.
    """
    check_steps(steps, heads)
    found: list[Step] = []
    for number in range(1, steps + 1):
        chosen = [step.chosen for step in found]
        angles = dict(known[number - 1]) if number <= len(known) else {}
        missing = [head for head in heads if head not in chosen and head not in angles]
        for block in turning.angles([[*chosen, head] for head in missing]) if missing else ():
            angles |= block
            if on_block is not None:
                on_block(number, block)
        found.append(Step.of({head: angles[head] for head in heads if head not in chosen}))
    return found


def check_steps(steps: int, heads: Sequence[Head]) -> None:
    """ValueError where there are not so many heads to choose."""
    if not 1 <= steps <= len(heads):
        raise ValueError(f"a search of {steps} steps is not to be had: there are {len(heads)} heads to choose from")


def check_r_main(r_main: int, queries: Sequence[Sequence[int]]) -> None:
    """ValueError where the queries cannot span r_main directions. A query that comes again adds none."""
    different = len({tuple(ids) for ids in queries})
    if not 1 <= r_main <= different:
        raise ValueError(
            f"r_main = {r_main}: {different} different {'query spans' if different == 1 else 'queries span'} 1 to "
            f"{different} directions; give more queries, or ask for fewer directions"
        )
