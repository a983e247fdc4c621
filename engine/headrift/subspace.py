"""Generalised SHIPS: the angles by which an ablation turns what a model makes of a set of queries.

The last hidden states of the last prompt token, one column a query, make a matrix; its leading left singular vectors
span the queries' subspace. Between the subspace of the clean model and that of the ablated one lie principal angles:
"On the Role of Attention Heads in Large Language Model Safety", arXiv:2410.13708, section 4. The paper's released code
takes one vector (r_main = 1) and sums the arc cosines of the singular values of U_clean^T U_ablated.
"""

from __future__ import annotations

import torch

# Directions that make up less than this of the leading one are rounding of float32 hidden states.
_ROUNDING = 1e-6
# So many ablated matrices are decomposed at a time that they have no more float64 numbers than this.
_AT_A_TIME = 1 << 24


def leading_vectors(states: torch.Tensor, r_main: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `r_main` leading left singular vectors [n, hidden, r_main] of n matrices [n, hidden, queries], in float64,
    and whether each matrix has so many, [n]: it has not if queries are alike, or a number is NaN.

    ValueError where r_main is not 1 to the number of queries and hidden states.
    """
    most = min(states.shape[-2:])
    if not 1 <= r_main <= most:
        raise ValueError(f"r_main is 1 to {most} for {states.shape[-1]} queries, not {r_main}")
    whole = states.isfinite().all(-1).all(-1)
    vectors, sizes, _ = torch.linalg.svd(torch.where(whole[..., None, None], states.double(), 0.0), full_matrices=False)
    return vectors[..., :r_main], sizes[..., r_main - 1] > _ROUNDING * sizes[..., 0]


def principal_angles(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The principal angles [..., r] in degrees, smallest first, between subspaces with the orthonormal bases `one` and
    `other` [..., hidden, r].

    Their cosines are the singular values of one^T other. Near 1 a cosine says little of its angle, so the sines, which
    are the singular values of other - one one^T other, are taken as well: Knyazev and Argentati, SIAM J. Sci. Comput.
    23 (2002).
    """
    shared = one.transpose(-1, -2) @ other
    cosines = torch.linalg.svdvals(shared)
    sines = torch.linalg.svdvals(other - one @ shared).flip(-1)
    return torch.rad2deg(torch.atan2(sines, cosines))


def turned(clean: torch.Tensor, ablated: torch.Tensor, r_main: int) -> torch.Tensor:
    """How far each of n ablations turns the subspace of the queries: principal angles [n, r_main] in degrees.

    clean: [queries, hidden], a query's last hidden state a row; ablated: [n, queries, hidden]. NaN where either side
    has fewer than r_main directions. Computed in float64 where the states are, so many at a time that memory stays
    bounded. ValueError: see `leading_vectors`.
    """
    basis, has_basis = leading_vectors(clean.T, r_main)
    found = []
    for some in ablated.split(max(1, _AT_A_TIME // clean.numel())):
        vectors, there = leading_vectors(some.transpose(1, 2), r_main)
        found.append(principal_angles(basis, vectors).masked_fill(~(there & has_basis).unsqueeze(1), torch.nan))
    return torch.cat(found)
