"""Last hidden states kept on the device, of which only angles leave: what generalised SHIPS and Sahara compare.

The last hidden states of a set of queries, one column a query, make a matrix; its leading left singular vectors span
the queries' subspace. Between the subspace of the clean model and that of an ablated one are principal angles: "On the
Role of Attention Heads in Large Language Model Safety", arXiv:2410.13708, section 4. The paper's released code takes
one vector (r_main = 1) and sums the arc cosines of the singular values of U_clean^T U_ablated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from headrift.vllm_plugin.instruments import Instrument
from headrift.vllm_plugin.slots import Place, SlotTable

# Directions that make up less than this of the leading one are rounding of float32 hidden states.
_ROUNDING = 1e-6
# Ablated matrices are decomposed so many at a time that they have no more float64 numbers than this.
_NUMBERS_AT_ONCE = 1 << 24


class HiddenStates(Instrument):
    """Keeps what the language-model head reads at the last prompt token: hidden [hidden_states, width]."""

    options = {"hidden_states": 0}
    fields = {"hidden_as": None}
    references = {"hidden_as": "hidden_states"}
    reads_hidden_states = True

    def __init__(self, table: SlotTable, place: Place):
        super().__init__(table, place)
        self.hidden = self.kept_as("hidden_as", place.width)

    def read_hidden_states(self, hidden: torch.Tensor) -> None:
        rows = self.rows_with("hidden_as")
        if len(rows):
            self.keep_at_step_0("hidden_as", rows, hidden)

    def principal_angles(self, clean: Sequence[int], ablated: Sequence[Sequence[int]], r_main: int) -> Any:
        """`subspace_angles` of kept hidden states, by their numbers, as a list; NaN if one was not kept."""
        at = self.table.index(np.array([clean, *ablated]))
        states = self.hidden.index_select(0, at.flatten()).view(*at.shape, -1)
        return subspace_angles(states[0], states[1:], r_main).tolist()


def subspace_angles(clean: torch.Tensor, ablated: torch.Tensor, r_main: int) -> torch.Tensor:
    """Principal angles [n, r_main] between the subspace of clean hidden states [queries, hidden] and that of each of n
    sets of ablated ones [n, queries, hidden], computed in float64 where the states are.

    In degrees, smallest first; NaN if either side has fewer than r_main directions. ValueError unless r_main is 1 to
    the number of queries and hidden states.
    """
    basis, has_basis = leading_vectors(clean.T, r_main)
    angles = []
    for some in ablated.split(max(1, _NUMBERS_AT_ONCE // clean.numel())):
        vectors, has_vectors = leading_vectors(some.transpose(1, 2), r_main)
        defined = (has_vectors & has_basis).unsqueeze(1)
        angles.append(principal_angles(basis, vectors).masked_fill(~defined, torch.nan))
    return torch.cat(angles)


def leading_vectors(states: torch.Tensor, r_main: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The leading left singular vectors [n, hidden, r_main], float64, of n matrices [n, hidden, queries].

    Also returns whether each matrix has so many, [n]: not if queries are alike or a number is NaN.
    """
    most = min(states.shape[-2:])
    if not 1 <= r_main <= most:
        raise ValueError(f"r_main is 1 to {most} for {states.shape[-1]} queries, not {r_main}")
    whole = states.isfinite().all(-1).all(-1)
    vectors, sizes, _ = torch.linalg.svd(torch.where(whole[..., None, None], states.double(), 0.0), full_matrices=False)
    return vectors[..., :r_main], sizes[..., r_main - 1] > _ROUNDING * sizes[..., 0]


def principal_angles(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Principal angles [..., r] in degrees, smallest first, between subspaces with orthonormal bases [..., hidden, r].

    Their cosines are the singular values of one^T other. Near 1 a cosine says little of its angle, so the sines, which
    are the singular values of other - one one^T other, are taken as well: Knyazev and Argentati, SIAM J. Sci. Comput.
    23 (2002).
    """
    shared = one.transpose(-1, -2) @ other
    cosines = torch.linalg.svdvals(shared)
    sines = torch.linalg.svdvals(other - one @ shared).flip(-1)
    return torch.rad2deg(torch.atan2(sines, cosines))
