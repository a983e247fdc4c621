"""Made-up batches in vLLM's layouts, for tests, byte counts and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass
class DecodeCase:
    """One step's batch: what `decode_mass` and `replay_mass` take, in `triton` and in `reference`."""

    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    row_slot: torch.Tensor
    prompt_len: torch.Tensor
    n_rows: torch.Tensor
    bounds: torch.Tensor
    steps: int
    layers: int
    query_start_loc: torch.Tensor | None = None
    how: dict[str, Any] = field(default_factory=dict)

    @property
    def batch(self) -> tuple[torch.Tensor, ...]:
        return (
            *(self.query, self.key_cache, self.value_cache, self.block_table, self.seq_lens, self.row_slot),
            *(self.prompt_len, self.n_rows, self.bounds),
        )

    @property
    def replay_batch(self) -> tuple[torch.Tensor | None, ...]:
        """What `replay_mass` takes after the layer."""
        return (
            *(self.query, self.key_cache, self.block_table, self.query_start_loc, self.seq_lens, self.row_slot),
            *(self.prompt_len, self.n_rows, self.bounds),
        )

    def mass_shape(self) -> tuple[int, ...]:
        return (self.bounds.shape[0], self.steps, self.layers, self.query.shape[1], self.bounds.shape[1])

    def empty_mass(self) -> torch.Tensor:
        return torch.full(self.mass_shape(), torch.nan, device=self.query.device)

    def empty_entropy(self) -> torch.Tensor:
        return torch.full(self.mass_shape()[:4], torch.nan, device=self.query.device)


def paged(
    rng: np.random.Generator,
    seq_lens: np.ndarray,
    *,
    kv_heads: int,
    head_dim: int,
    page: int,
    dtype: torch.dtype,
    layout: str = "nhd",
    poison: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """K and V caches [blocks, page, kv_heads, head_dim] and a shuffled block table [rows, pages] int32.

    layout: how the caches lie, `nhd` (blocks of tokens), `hnd` (blocks of heads), `joint` (K and V of a token side by
    side, heads outside, as in vLLM 0.32). poison: NaN and inf wherever no row's key lies; table entries past a row's
    last page lead there.
    """
    pages = max(1, -(-int(seq_lens.max(initial=1)) // page))
    blocks = len(seq_lens) * pages + 3
    order = rng.permutation(blocks)
    table = order[: len(seq_lens) * pages].reshape(len(seq_lens), pages).astype(np.int32)
    used = np.zeros((blocks, page), bool)
    for row, n in enumerate(seq_lens):
        positions = np.arange(n)
        used[table[row, positions // page], positions % page] = True
        table[row, -(-int(n) // page) :] = order[-1]
    caches = []
    for bad in (torch.nan, torch.inf):
        values = torch.from_numpy(rng.standard_normal((blocks, page, kv_heads, head_dim), np.float32)).to(dtype)
        if poison:
            if dtype in FP8:
                values.view(torch.uint8)[torch.from_numpy(~used)] = 0x7F  # NaN in both
            else:
                values[torch.from_numpy(~used)] = bad
        caches.append(values)
    if layout == "joint":
        joint = torch.stack([cache.view(_bits(cache)) for cache in caches], 3).permute(0, 2, 1, 3, 4).contiguous()
        caches = [joint[:, :, :, i].permute(0, 2, 1, 3).view(dtype) for i in range(2)]
    elif layout == "hnd":
        caches = [c.view(_bits(c)).permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3).view(dtype) for c in caches]
    return caches[0], caches[1], torch.from_numpy(table)


def _bits(tensor: torch.Tensor) -> torch.dtype:
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]


def decode_case(
    rng: np.random.Generator,
    *,
    seq_lens: np.ndarray | list[int],
    query_lens: np.ndarray | list[int] | None = None,
    kv_heads: int = 2,
    group: int = 3,
    head_dim: int = 64,
    page: int = 16,
    regions: int = 3,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    layout: str = "nhd",
    steps: int = 5,
    layers: int = 2,
    unprobed: float = 0.25,
    poison: bool = True,
    **how: Any,
) -> DecodeCase:
    """A ragged batch whose rows end at steps -1..steps of prompts of their own, a part of them not probed.

    query_lens: tokens of each row in this step (None: one each, without query_start_loc).
    """
    seq_lens = np.asarray(seq_lens, np.int32)
    rows, heads, slots = len(seq_lens), kv_heads * group, len(seq_lens) + 2
    row_slot = rng.permutation(slots)[:rows].astype(np.int32)
    prompt_len = rng.integers(1, 100, slots).astype(np.int32)
    prompt_len[row_slot] = np.maximum(seq_lens - rng.integers(-1, steps + 1, rows), 1)
    row_slot[rng.random(rows) < unprobed] = -1
    longest = int(seq_lens.max(initial=1))
    bounds = np.sort(rng.integers(0, longest + longest // 4 + 2, (slots, regions, 2)), axis=2)
    for slot in range(slots):  # the regions that are easily got wrong, now and then
        n = int(prompt_len[slot])
        for region, kind in enumerate(rng.integers(0, 12, regions)):
            at = int(rng.integers(0, n))
            odd = {0: (0, n), 1: (at, at), 2: (at, at + 1), 3: (0, 1), 4: (0, 1 << 30), 5: (n + 1, n + 9)}
            bounds[slot, region] = odd.get(int(kind), bounds[slot, region])
    keys, values, table = paged(
        rng,
        seq_lens,
        kv_heads=kv_heads,
        head_dim=head_dim,
        page=page,
        dtype=cache_dtype or dtype,
        layout=layout,
        poison=poison,
    )
    starts = np.concatenate([[0], np.cumsum(np.ones(rows, int) if query_lens is None else query_lens)]).astype(np.int32)
    # as vLLM's: a slice of a token's q, k and v, which lie side by side
    qkv = 2 * rng.standard_normal((int(starts[-1]), heads + 2 * kv_heads, head_dim), np.float32)
    return DecodeCase(
        query=torch.from_numpy(qkv).to(dtype)[:, :heads],
        key_cache=keys,
        value_cache=values,
        block_table=table,
        seq_lens=torch.from_numpy(seq_lens),
        row_slot=torch.from_numpy(row_slot),
        prompt_len=torch.from_numpy(prompt_len),
        n_rows=torch.from_numpy(rng.integers(0, steps + 3, slots).astype(np.int32)),
        bounds=torch.from_numpy(bounds.astype(np.int32)),
        steps=steps,
        layers=layers,
        query_start_loc=None if query_lens is None else torch.from_numpy(starts),
        how={"scale": head_dim**-0.5, **how},
    )
