"""Last hidden states kept on the device, of which only angles leave: what generalised SHIPS and Sahara compare.

The last hidden states of a set of queries, one column a query, make a matrix; its leading left singular vectors span
the queries' subspace. Between the subspace of the clean model and that of an ablated one are principal angles: "On the
Role of Attention Heads in Large Language Model Safety", arXiv:2410.13708, section 4. The paper's released code takes
one vector (r_main = 1) and sums the arc cosines of the singular values of U_clean^T U_ablated.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from headrift.vllm_plugin.instruments.base import Instrument, check_number, keep_at_step_0, number_or_none, wipe
from headrift.vllm_plugin.probe import Probe, RecorderConfig
from headrift.vllm_plugin.slots import Place, SlotTable

# Directions that make up less than this of the leading one are rounding of float32 hidden states.
_ROUNDING = 1e-6
# Ablated matrices are decomposed so many at a time that they have no more float64 numbers than this.
_NUMBERS_AT_ONCE = 1 << 24


class HiddenStates(Instrument):
    """Keeps what the language-model head reads at the last prompt token.

    hidden: [hidden_states, width] float32, NaN if nothing was kept.
    """

    options = {"hidden_states": 0}
    fields = {"hidden_as": None}
    reads_hidden_states = True

    def __init__(self, table: SlotTable, place: Place):
        super().__init__(table, place)
        shape = (table.config.options["hidden_states"], place.width)
        self.hidden = torch.full(shape, torch.nan, dtype=torch.float32, device=table.device)
        self._numbers = np.full(table.config.slots, -1)

    @classmethod
    def check(cls, probe: Probe, config: RecorderConfig) -> None:
        check_number(probe.fields["hidden_as"], config.options["hidden_states"], "hidden state")

    def admit(self, slot: int, probe: Probe) -> None:
        self._numbers[slot] = number_or_none(probe.fields.get("hidden_as"))

    def install(self, slots: np.ndarray, index: torch.Tensor) -> None:
        wipe(self.table, self.hidden, self._numbers[slots])

    def read_hidden_states(self, hidden: torch.Tensor) -> None:
        slots = self.table.slots
        rows = np.flatnonzero((slots >= 0) & (self._numbers[slots] >= 0))
        if len(rows):
            keep_at_step_0(self.table, self.hidden, rows, self._numbers[slots[rows]], hidden)

    def principal_angles(
        self, clean: Sequence[int], ablated: Sequence[Sequence[int]], r_main: int
    ) -> list[list[float]]:
        """`subspace_angles` of kept hidden states, by their numbers; NaN if one was not kept."""
        at = self.table.index(np.array([clean, *ablated]))
        states = self.hidden.index_select(0, at.flatten()).view(*at.shape, -1)
        angles: list[list[float]] = subspace_angles(states[0], states[1:], r_main).tolist()
        return angles


def subspace_angles(clean: torch.Tensor, ablated: torch.Tensor, r_main: int) -> torch.Tensor:
    """Principal angles between the subspace of the clean hidden states and that of each set of ablated ones.

    Args:
        clean: [queries, hidden], one query's last hidden state a row.
        ablated: [n, queries, hidden].
        r_main: Dimensions of the subspaces.

    Returns:
        [n, r_main] degrees, smallest first; NaN if either side has fewer than r_main directions. Computed in float64
        where the states are.

    Raises:
        ValueError: see `leading_vectors`.
    """
    basis, has_basis = leading_vectors(clean.T, r_main)
    angles = []
    for some in ablated.split(max(1, _NUMBERS_AT_ONCE // clean.numel())):
        vectors, has_vectors = leading_vectors(some.transpose(1, 2), r_main)
        defined = (has_vectors & has_basis).unsqueeze(1)
        angles.append(principal_angles(basis, vectors).masked_fill(~defined, torch.nan))
    return torch.cat(angles)


def leading_vectors(states: torch.Tensor, r_main: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The leading left singular vectors of n matrices.

    Args:
        states: [n, hidden, queries].
        r_main: How many vectors.

    Returns:
        [n, hidden, r_main] float64, and whether each matrix has so many, [n]: not if queries are alike or a number is
        NaN.

    Raises:
        ValueError: r_main is not 1 to the number of queries and hidden states.
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
