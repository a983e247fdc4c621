"""Generalised SHIPS and Sahara: how far an ablation turns the subspace of a set of queries' hidden states.

SHIPS looks at the first token of one answer. Generalised SHIPS takes the last hidden states of all queries at their
last prompt token, and the principal angles between their subspaces without and with an ablation (see
`instruments.hidden_states`).
Sahara searches a group greedily: each step ablates every remaining head together with those chosen before, and chooses
the one whose group has the largest angles. Step 1 is the ranking of single heads.

A group and a query make one request. Hidden states stay on the device, and only angles leave it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from headrift import ablation
from headrift.probed_engine import ProbedEngine
from headrift.requests import ProbeRequest
from headrift.runs.folder import OnRows, ignore_rows
from headrift.safety_heads.ships import Head
from headrift.stats import Floats

# Principal angles [r_main] in degrees, smallest first; and those of several heads.
Angles = Floats
HeadAngles = Mapping[Head, Angles]
# Requests of a block, about: its hidden states are kept until the angles of all its groups are computed at once.
_BLOCK_ROWS = 512


def hidden_states_for(queries: int) -> int:
    """Number of hidden states that the engine has to keep: the clean ones and those of a block."""
    return queries * (1 + max(1, _BLOCK_ROWS // queries))


class SubspaceProbe:
    """A set of queries in an engine, and the angles by which ablations turn their subspace.

    The clean requests run once, with the first angles. ValueError if engine, queries or r_main cannot be used.

    Args:
        engine: started with `ablation=True` and `hidden_states=hidden_states_for(len(queries))`.
        queries: token ids.
        r_main: number of vectors that span the subspace.
        on_rows: called with the number of requests that finished, as they finish.
    """

    def __init__(
        self,
        engine: ProbedEngine,
        queries: Sequence[Sequence[int]],
        r_main: int = 1,
        kind: str = ablation.UNDIFFERENTIATED,
        epsilon: float = ablation.EPSILON,
        on_rows: OnRows = ignore_rows,
    ):
        needed = hidden_states_for(max(1, len(queries)))
        if not engine.options["ablation"] or engine.options["hidden_states"] < needed:
            raise ValueError(
                f"Sahara over {len(queries)} queries needs an engine that was started with ablation=True and "
                f"hidden_states={needed} or more"
            )
        check_r_main(r_main, queries)
        self.engine, self.r_main, self.kind, self.epsilon = engine, r_main, kind, epsilon
        self._queries, self._on_rows = [list(ids) for ids in queries], on_rows
        self._is_clean_done = False

    def angles(self, groups: Sequence[Sequence[Head]]) -> Iterator[dict[Head, Angles]]:
        """Yield the angles of groups of heads, each ablated together, by the group's last head, a block at a time.

        Raises:
            ValueError: the model does not have a head.
            RuntimeError: a group's hidden states span fewer than r_main directions.
        """
        for group in groups:
            ablation.check([(*head, self.kind) for head in group], self.epsilon)
            ablation.check_heads(group, self.engine.layers, self.engine.heads)
        n = len(self._queries)
        size = hidden_states_for(n) // n - 1
        if not self._is_clean_done:
            self._run([()], first=0)
            self._is_clean_done = True
        for start in range(0, len(groups), size):
            block = groups[start : start + size]
            self._run(block, first=n)
            kept = [range(n * i, n * (i + 1)) for i in range(1, len(block) + 1)]
            angles = self.engine.principal_angles(range(n), kept, self.r_main)
            if np.isnan(angles).any():
                layer, head = block[int(np.isnan(angles).any(1).argmax())][-1]
                raise RuntimeError(
                    f"with layer {layer} head {head} ablated, the queries' hidden states span fewer than {self.r_main} "
                    "directions: lower r_main, or give queries that differ more"
                )
            yield {group[-1]: own for group, own in zip(block, angles, strict=True)}

    def _run(self, groups: Sequence[Sequence[Head]], first: int) -> None:
        """Run each query with each group ablated, and keep the hidden states under the numbers from `first` on."""
        pairs = ((group, ids) for group in groups for ids in self._queries)
        requests = (
            ProbeRequest(
                ids,
                {"prompt": (0, len(ids))},
                0,
                ignore_eos=True,
                ablate=[(*head, self.kind) for head in group],
                epsilon=self.epsilon,
                hidden_as=number,
            )
            for number, (group, ids) in enumerate(pairs, first)
        )
        with closing(self.engine.run((None, request) for request in requests)) as results:
            for _ in results:
                self._on_rows(1)


@dataclass(frozen=True, slots=True)
class Step:
    """A step of the search: the chosen head, and the angles of every head that could be chosen."""

    chosen: Head
    angles: HeadAngles

    @classmethod
    def from_angles(cls, angles: HeadAngles) -> Step:
        """The step that chooses the head with the largest sum of angles, the first of several."""
        return cls(max(angles, key=lambda head: angles[head].sum()), angles)

    @property
    def ranking(self) -> list[Head]:
        """The heads by the sum of their angles, largest first."""
        return sorted(self.angles, key=lambda head: -self.angles[head].sum())


def sahara(
    probe: SubspaceProbe,
    heads: Sequence[Head],
    steps: int,
    known: Sequence[HeadAngles] = (),
    on_block: Callable[[int, HeadAngles], None] | None = None,
) -> list[Step]:
    """Search greedily for the group of `steps` heads that turns the queries' subspace most.

    Args:
        heads: heads to choose from.
        known: angles already computed, of steps 1, 2, ...
        on_block: called with the step's number, from 1, and the angles of each block of heads.

    Raises:
        ValueError: there are fewer heads than steps; and see `SubspaceProbe`.
    """
    check_steps(steps, heads)
    search: list[Step] = []
    for number in range(1, steps + 1):
        chosen = [step.chosen for step in search]
        angles = dict(known[number - 1]) if number <= len(known) else {}
        missing = [head for head in heads if head not in chosen and head not in angles]
        for block in probe.angles([[*chosen, head] for head in missing]) if missing else ():
            angles |= block
            if on_block is not None:
                on_block(number, block)
        search.append(Step.from_angles({head: angles[head] for head in heads if head not in chosen}))
    return search


def check_steps(steps: int, heads: Sequence[Head]) -> None:
    """Raise ValueError unless there are at least as many heads as steps, and one step."""
    if not 1 <= steps <= len(heads):
        raise ValueError(f"--steps {steps}: there are {len(heads)} heads to choose from; give 1 to {len(heads)}")


def check_r_main(r_main: int, queries: Sequence[Sequence[int]]) -> None:
    """Raise ValueError unless the queries can span r_main directions; repeated queries count once."""
    distinct = len({tuple(ids) for ids in queries})
    if not 1 <= r_main <= distinct:
        raise ValueError(
            f"--r-main {r_main}: the queries have {distinct} distinct prompt{'' if distinct == 1 else 's'}; give 1 to "
            f"{distinct}, or more queries"
        )


def table(steps: Sequence[Step], top: int) -> str:
    """The chosen heads, and the first `top` heads of step 1, as text of at most 80 columns."""
    lines = ["step  layer  head  angle (degrees)  next best"]
    for number, step in enumerate(steps, 1):
        (layer, head), *others = step.ranking
        second = f"{others[0][0]}:{others[0][1]} {step.angles[others[0]].sum():.4f}" if others else "none"
        lines.append(f"{number:>4}  {layer:>5}  {head:>4}  {step.angles[layer, head].sum():>15.4f}  {second}")
    lines += ["", "rank  layer  head  angle (degrees) of the head alone"]
    for place, (layer, head) in enumerate(steps[0].ranking[:top], 1):
        lines.append(f"{place:>4}  {layer:>5}  {head:>4}  {steps[0].angles[layer, head].sum():>15.4f}")
    return "\n".join(lines)
