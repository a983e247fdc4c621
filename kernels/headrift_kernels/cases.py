"""Made-up batches in vLLM's layouts, for tests, byte counts and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from headrift_kernels import reference

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass
class DecodeCase:
    """One decode call: what `triton.decode_mass.decode_mass` and `reference.decode_mass` take."""

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
    how: dict[str, Any] = field(default_factory=dict)

    @property
    def batch(self) -> tuple[torch.Tensor, ...]:
        return (
            *(self.query, self.key_cache, self.value_cache, self.block_table, self.seq_lens, self.row_slot),
            *(self.prompt_len, self.n_rows, self.bounds),
        )

    def mass_shape(self) -> tuple[int, ...]:
        return (self.bounds.shape[0], self.steps, self.layers, self.query.shape[1], self.bounds.shape[1])

    def empty_mass(self) -> torch.Tensor:
        return torch.full(self.mass_shape(), torch.nan, device=self.query.device)

    def empty_entropy(self) -> torch.Tensor:
        return torch.full(self.mass_shape()[:4], torch.nan, device=self.query.device)


@dataclass
class SpanCase:
    """One span-mass call: what `triton.span_mass.span_mass` and (without the LSE) `reference.span_mass` take."""

    query: torch.Tensor
    key_cache: torch.Tensor
    lse: torch.Tensor
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    row_slot: torch.Tensor
    prompt_len: torch.Tensor
    n_rows: torch.Tensor
    bounds: torch.Tensor
    steps: int
    layers: int
    k_scale: float = 1.0
    how: dict[str, Any] = field(default_factory=dict)

    @property
    def batch(self) -> tuple[torch.Tensor, ...]:
        return (
            *(self.query, self.key_cache, self.lse, self.block_table, self.query_start_loc, self.seq_lens),
            *(self.row_slot, self.prompt_len, self.n_rows, self.bounds),
        )

    @property
    def lse_batch(self) -> tuple[Any, ...]:
        """What `triton.query_lse.query_lse` takes after the LSE."""
        rows = (self.block_table, self.query_start_loc, self.seq_lens, self.row_slot, self.prompt_len, self.n_rows)
        return (self.query, self.key_cache, *rows, self.steps)

    def keys(self) -> torch.Tensor:
        """The key cache as numbers, scaled: fp8 is no type to compute with."""
        return self.key_cache.float().double() * self.k_scale

    def empty_mass(self) -> torch.Tensor:
        heads, (slots, regions) = self.query.shape[1], self.bounds.shape[:2]
        return torch.full((slots, self.steps, self.layers, heads, regions), torch.nan, device=self.query.device)

    def attention(self) -> dict[str, Any]:
        """`how` the queries attend, without what only says how masses are taken."""
        return {key: x for key, x in self.how.items() if key != "prompt_region"}

    def expected_lse(self) -> torch.Tensor:
        """[heads, tokens] float64; NaN where a query is not measured."""
        batch = (self.query, self.keys(), *self.lse_batch[2:])
        return reference.query_lse(torch.full_like(self.lse, torch.nan), *batch, **self.attention())

    def expected(self, layer: int) -> torch.Tensor:
        batch = (self.query, self.keys(), self.block_table, *self.batch[4:])
        return reference.span_mass(self.empty_mass(), layer, *batch, **self.attention())


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
    """A ragged decode batch whose rows are at steps -1..steps of prompts of their own, a part of them not probed."""
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
    # as vLLM's: a slice of a token's q, k and v, which lie side by side
    qkv = torch.from_numpy(2 * rng.standard_normal((rows, heads + 2 * kv_heads, head_dim), np.float32)).to(dtype)
    return DecodeCase(
        query=qkv[:, :heads],
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
        how={"scale": head_dim**-0.5, **how},
    )


def span_case(
    rng: np.random.Generator,
    *,
    seq_lens: np.ndarray | list[int],
    query_lens: np.ndarray | list[int] | None = None,
    steps: int = 5,
    kv_heads: int = 2,
    group: int = 3,
    dtype: torch.dtype = torch.float32,
    k_scale: float = 1.0,
    **shape: Any,
) -> SpanCase:
    """A ragged batch of decode rows and prefill chunks that end at steps -1..steps; the LSE of other queries is NaN."""
    seq_lens = np.asarray(seq_lens, np.int32)
    chunk = [rng.integers(1, n + 1) if rng.random() < 0.7 else 1 for n in seq_lens]
    query_lens = np.asarray(chunk if query_lens is None else query_lens, np.int32)
    case = decode_case(rng, seq_lens=seq_lens, steps=steps, kv_heads=kv_heads, group=group, dtype=dtype, **shape)
    heads, head_dim = kv_heads * group, case.query.shape[2]
    qkv = 2 * rng.standard_normal((int(query_lens.sum()), heads + 2 * kv_heads, head_dim), np.float32)
    starts = np.concatenate([[0], query_lens.cumsum()]).astype(np.int32)
    found = SpanCase(
        query=torch.from_numpy(qkv).to(dtype)[:, :heads],
        key_cache=case.key_cache,
        lse=torch.full((heads, int(query_lens.sum())), torch.nan),
        block_table=case.block_table,
        query_start_loc=torch.from_numpy(starts),
        seq_lens=case.seq_lens,
        row_slot=case.row_slot,
        prompt_len=case.prompt_len,
        n_rows=case.n_rows,
        bounds=case.bounds,
        steps=steps,
        layers=case.layers,
        k_scale=k_scale,
        how=case.how,
    )
    found.lse = found.expected_lse().float()
    return found
