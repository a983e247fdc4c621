"""Attention mass of the queries of prefill rows, whose attention another kernel computes: replayed answers.

A program takes up to BLOCK_Q steps of one row and the heads of one KV head, so that they share the keys: row m of its
tile is step begin + m // GROUP of the group's head m % GROUP. One pass over K gives the denominators and the masses; V
is not read.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from headrift_kernels.triton.attend import attend, keys_per_split
from headrift_kernels.triton.common import LN2, LOG2E, LOWEST, UNALIGNED, UNSPECIALIZED, cell_of, next_power_of_2
from headrift_kernels.triton.decode_mass import CHUNK, MOST_SPLITS, Tiles


@triton.jit
def _steps_of(
    row,
    block,
    slot,
    query_start_ptr,
    seq_lens_ptr,
    prompt_len_ptr,
    n_rows_ptr,
    steps,
    queries,
    window,
    BLOCK_Q: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Steps begin..end-1 of a row's block (none: begin >= end), the keys first..until-1 that they attend, the prompt's
    length, and the token that is position 0. The row's last query is left out: `decode_mass` measures it.
    """
    n = tl.load(seq_lens_ptr + row)
    token_end = tl.load(query_start_ptr + row + 1)
    prompt = tl.load(prompt_len_ptr + slot)
    context = n - (token_end - tl.load(query_start_ptr + row))
    begin = tl.maximum(context - prompt + 1, 0)
    end = tl.minimum(tl.minimum(tl.load(n_rows_ptr + slot), steps), tl.minimum(n - prompt, begin + queries))
    begin += block * BLOCK_Q
    end = tl.minimum(end, begin + BLOCK_Q)
    first = tl.maximum(prompt + begin - window, 0) if WINDOW else 0
    return begin, end, first, prompt - 1 + end, prompt, token_end - n


@triton.jit
def _store_step(
    mass_ptr,
    entropy_ptr,
    cell,
    valid,
    mass,
    whole,
    l,
    moment,
    REGIONS: tl.constexpr,
    WIDTH: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    column = tl.arange(0, WIDTH)
    at = mass_ptr + cell[:, None] * REGIONS + column[None, :]
    tl.store(at, mass / whole[:, None], mask=valid[:, None] & (column < REGIONS)[None, :])
    if ENTROPY:
        tl.store(entropy_ptr + cell, (l * tl.log2(whole) - moment) / whole * LN2, mask=valid)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def replay_kernel(
    mass_ptr,
    entropy_ptr,
    part_stat_ptr,
    part_mass_ptr,
    query_ptr,
    key_ptr,
    block_table_ptr,
    query_start_ptr,
    seq_lens_ptr,
    row_slot_ptr,
    prompt_len_ptr,
    n_rows_ptr,
    bounds_ptr,
    slopes_ptr,
    sinks_ptr,
    k_scale_ptr,
    scale,
    softcap,
    window,
    layer,
    steps,
    layers,
    queries,
    splits,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_table,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    CHUNK: tl.constexpr,
    REGIONS: tl.constexpr,
    WIDTH: tl.constexpr,
    ENTROPY: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    SINKS: tl.constexpr,
    FP8: tl.constexpr,
):
    """Grid (blocks of BLOCK_Q steps, kv_heads * splits, rows). A block whose keys one split takes is finished here."""
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    block = tl.program_id(0)
    kv_head = tl.program_id(1) // splits
    split = tl.program_id(1) % splits
    row = tl.program_id(2)
    slot = tl.load(row_slot_ptr + row)
    if slot < 0:
        return
    begin, end, first, until, prompt, origin = _steps_of(
        row,
        block,
        slot,
        query_start_ptr,
        seq_lens_ptr,
        prompt_len_ptr,
        n_rows_ptr,
        steps,
        queries,
        window,
        BLOCK_Q,
        WINDOW,
    )
    if SPLIT:
        per_split = keys_per_split(until - first, splits, BLOCK_N, CHUNK)
        in_parts = until - first > per_split
        first += split * per_split
    if (begin >= end) | (first >= until):
        return
    if SPLIT:
        until = tl.minimum(first + per_split, until)
    member = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    step = begin + member // GROUP
    heads = kv_head * GROUP + member % GROUP
    valid = step < end
    position = prompt - 1 + step
    at = (origin + position).to(tl.int64) * stride_qt + heads.to(tl.int64) * stride_qh
    q = tl.load(query_ptr + at[:, None] + dims[None, :], mask=valid[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    slope = tl.load(slopes_ptr + heads, mask=valid, other=0.0) if ALIBI else 0.0
    if FP8:
        scale *= tl.load(k_scale_ptr)
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    if SINKS:
        # from the sink on, so that 2^(sink - m) is at most 1
        sink = tl.load(sinks_ptr + heads, mask=valid, other=0.0) * LOG2E
        m = sink
    m, l, moment, _, mass = attend(
        q,
        key_ptr + kv_head.to(tl.int64) * stride_kh,
        key_ptr,
        block_table_ptr + row.to(tl.int64) * stride_table,
        bounds_ptr + slot.to(tl.int64) * (2 * REGIONS),
        True,
        first,
        until,
        position,
        m,
        stride_kb,
        stride_kt,
        0,
        0,
        slope,
        scale,
        softcap,
        window,
        PAGE,
        HEAD_DIM,
        BLOCK_D,
        BLOCK_M,
        BLOCK_N,
        REGIONS,
        WIDTH,
        False,
        True,
        True,
        ENTROPY,
        WINDOW,
        SOFTCAP,
        ALIBI,
    )
    if SPLIT:  # noqa: SIM102
        if in_parts:
            column = tl.arange(0, WIDTH)
            part = ((row.to(tl.int64) * queries + block * BLOCK_Q + member // GROUP) * HEADS + heads) * splits + split
            tl.store(part_stat_ptr + part * 3, m, mask=valid)
            tl.store(part_stat_ptr + part * 3 + 1, l, mask=valid)
            if ENTROPY:
                tl.store(part_stat_ptr + part * 3 + 2, moment, mask=valid)
            mass_at = part_mass_ptr + part[:, None] * REGIONS + column[None, :]
            tl.store(mass_at, mass, mask=valid[:, None] & (column < REGIONS)[None, :])
            return
    whole = l
    if SINKS:
        whole += tl.exp2(sink - m)
    cell = cell_of(slot, step, layer, heads, steps, layers, HEADS)
    _store_step(mass_ptr, entropy_ptr, cell, valid, mass, whole, l, moment, REGIONS, WIDTH, ENTROPY)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def replay_combine_kernel(
    mass_ptr,
    entropy_ptr,
    part_stat_ptr,
    part_mass_ptr,
    query_start_ptr,
    seq_lens_ptr,
    row_slot_ptr,
    prompt_len_ptr,
    n_rows_ptr,
    sinks_ptr,
    window,
    layer,
    steps,
    layers,
    queries,
    splits,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    CHUNK: tl.constexpr,
    REGIONS: tl.constexpr,
    WIDTH: tl.constexpr,
    ENTROPY: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Grid (blocks of BLOCK_Q steps, kv_heads, rows): the parts of a block's splits made one."""
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    block = tl.program_id(0)
    kv_head = tl.program_id(1)
    row = tl.program_id(2)
    slot = tl.load(row_slot_ptr + row)
    if slot < 0:
        return
    begin, end, first, until, _, _ = _steps_of(
        row,
        block,
        slot,
        query_start_ptr,
        seq_lens_ptr,
        prompt_len_ptr,
        n_rows_ptr,
        steps,
        queries,
        window,
        BLOCK_Q,
        WINDOW,
    )
    per_split = keys_per_split(until - first, splits, BLOCK_N, CHUNK)
    if (begin >= end) | (until - first <= per_split):
        return
    member = tl.arange(0, BLOCK_M)
    column = tl.arange(0, WIDTH)
    step = begin + member // GROUP
    heads = kv_head * GROUP + member % GROUP
    valid = step < end
    stored = valid[:, None] & (column < REGIONS)[None, :]
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    moment = tl.zeros([BLOCK_M], tl.float32)
    mass = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    part = ((row.to(tl.int64) * queries + block * BLOCK_Q + member // GROUP) * HEADS + heads) * splits
    for split in tl.range(0, tl.cdiv(until - first, per_split)):
        at = part + split
        m_part = tl.load(part_stat_ptr + at * 3, mask=valid, other=LOWEST)
        l_part = tl.load(part_stat_ptr + at * 3 + 1, mask=valid, other=0.0)
        m_new = tl.maximum(m, m_part)
        alpha = tl.exp2(m - m_new)
        beta = tl.exp2(m_part - m_new)
        if ENTROPY:
            moment_part = tl.load(part_stat_ptr + at * 3 + 2, mask=valid, other=0.0)
            moment = alpha * (moment + (m - m_new) * l) + beta * (moment_part + (m_part - m_new) * l_part)
        l = alpha * l + beta * l_part
        parts = tl.load(part_mass_ptr + at[:, None] * REGIONS + column[None, :], mask=stored, other=0.0)
        mass = mass * alpha[:, None] + parts * beta[:, None]
        m = m_new
    whole = l
    if SINKS:
        whole += tl.exp2(tl.load(sinks_ptr + heads, mask=valid, other=0.0) * LOG2E - m)
    cell = cell_of(slot, step, layer, heads, steps, layers, HEADS)
    _store_step(mass_ptr, entropy_ptr, cell, valid, mass, whole, l, moment, REGIONS, WIDTH, ENTROPY)


@functools.cache
def block_rows(group: int, queries: int) -> int:
    """Rows of a tile, queries times the group's heads: 16, 32 or 64, so that few kernels are compiled."""
    return max(16, next_power_of_2(group), min(64, next_power_of_2(group * queries)))


@functools.cache
def replay_tiles(block_m: int, element_size: int, cache_size: int, hip: bool = torch.version.hip is not None) -> Tiles:
    """Keys per tile, warps and stages, by the rows of a tile and the bytes of an element of the query and the keys."""
    # four waves of AMD's are as many threads as eight warps
    return Tiles(32 if cache_size == 1 or element_size == 4 else 64, 8 if block_m > 32 and not hip else 4, 3)


@dataclass(frozen=True)
class ReplayScratch:
    """Where the splits of up to `rows` rows of up to `queries` measured queries leave their parts.

    stat: [rows, queries, heads, splits, 3]; mass: [rows, queries, heads, splits, regions].
    """

    stat: torch.Tensor
    mass: torch.Tensor

    @property
    def splits(self) -> int:
        return self.stat.shape[3]

    @classmethod
    def allocate(
        cls, rows: int, queries: int, heads: int, regions: int, splits: int, device: torch.device | str
    ) -> ReplayScratch:
        like = {"dtype": torch.float32, "device": device}
        return cls(*(torch.empty(rows, queries, heads, splits, last, **like) for last in (3, regions)))


def replay_splits(
    rows: int, kv_heads: int, group: int, queries: int, longest: int, processors: int, most: int = MOST_SPLITS
) -> int:
    """Return the splits of a block's keys that give every multiprocessor about two programs, of a chunk at least.

    Args:
        rows: rows that measure several queries, if the host knows, otherwise the batch's.
        kv_heads: KV heads.
        group: query heads a KV head.
        queries: the most that a row measures.
        longest: keys of the longest row.
        processors: multiprocessors of the GPU.
        most: limit of the result.

    Returns:
        A power of two.
    """
    blocks = -(-queries // (block_rows(group, queries) // group))
    idle = next_power_of_2(-(-2 * processors // max(rows * kv_heads * blocks, 1)))
    return min(idle, next_power_of_2(max(-(-longest // CHUNK), 1)), most)


def replay_mass(
    mass: torch.Tensor,
    layer: int,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    row_slot: torch.Tensor,
    prompt_len: torch.Tensor,
    n_rows: torch.Tensor,
    bounds: torch.Tensor,
    *,
    most_queries: int,
    scale: float,
    window: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    scratch: ReplayScratch | None = None,
    tiles: Tiles | None = None,
) -> None:
    """Write the masses of every measured query but each row's last into the recorder's buffer, in place.

    The last query of a row is measured by `decode_mass` with `query_start_loc`. A query at position p is at step
    p - (prompt_len - 1), and measured at steps 0..min(n_rows, steps)-1 of a probed row. Nothing is read on the host,
    and the grid depends on shapes and `most_queries` alone: a CUDA graph may hold the call.

    Args:
        mass: [slots, steps, layers, heads, regions] float32, contiguous.
        layer: index in `mass`.
        query: [tokens, heads, head_dim], any strides but a last one of 1.
        key_cache: [blocks, page, kv_heads, head_dim] in the query's type or an fp8, any strides but a last one of 1.
        block_table: [rows, pages] int32.
        query_start_loc: [rows + 1] int32, the first token of each row.
        seq_lens: [rows] int32, this step's tokens included.
        row_slot: [rows] int32, -1 if the row is not probed.
        prompt_len: [slots] int32.
        n_rows: [slots] int32, steps to record.
        bounds: [slots, regions, 2] int32, half-open key positions.
        most_queries: at least as many as any row measures here. Queries past it are not measured.
        entropy: [slots, steps, layers, heads] float32, attention entropy in nats over the keys.
        scratch: splits the keys of a block among several programs.
        tiles: how the kernel is launched (default: `replay_tiles`).
        scale, window, softcap, alibi_slopes, sinks, k_scale: as in `decode_mass`.

    Raises:
        ValueError: `scratch` is for fewer rows, queries or regions.
    """
    rows, (heads, head_dim), (page, kv_heads) = seq_lens.shape[0], query.shape[1:], key_cache.shape[1:3]
    steps, layers, regions = mass.shape[1], mass.shape[2], mass.shape[4]
    queries, group = min(most_queries, steps), heads // kv_heads
    if rows == 0 or queries < 1:
        return
    if scratch is not None and any(
        size < needed
        for size, needed in zip((*scratch.stat.shape[:2], scratch.mass.shape[4]), (rows, queries, regions))
    ):
        raise ValueError(
            f"the scratch of replay_mass is for {scratch.stat.shape[0]} rows of {scratch.stat.shape[1]} queries and "
            f"{scratch.mass.shape[4]} regions, and the batch has {rows} rows of {queries} queries and {regions} "
            "regions: allocate it for the largest batch, with ReplayScratch.allocate"
        )
    splits = 1 if scratch is None else scratch.splits
    parts = (None, None) if scratch is None else (scratch.stat, scratch.mass)
    block_m = block_rows(group, queries)
    tiles = tiles or replay_tiles(block_m, query.element_size(), key_cache.element_size())
    blocks = -(-queries // (block_m // group))
    shared = {
        "HEADS": heads,
        "GROUP": group,
        "BLOCK_M": block_m,
        "BLOCK_N": tiles.block_n,
        "SPLIT": splits > 1,
        "CHUNK": max(tiles.chunk, tiles.block_n),
        "REGIONS": regions,
        "WIDTH": next_power_of_2(regions),
        "ENTROPY": entropy is not None,
        "WINDOW": window is not None,
        "SINKS": sinks is not None,
    }
    replay_kernel[(blocks, kv_heads * splits, rows)](
        mass,
        entropy,
        *parts,
        query,
        key_cache,
        block_table,
        query_start_loc,
        seq_lens,
        row_slot,
        prompt_len,
        n_rows,
        bounds,
        alibi_slopes,
        sinks,
        k_scale,
        scale,
        softcap,
        window or 0,
        layer,
        steps,
        layers,
        queries,
        splits,
        *query.stride()[:2],
        *key_cache.stride()[:3],
        block_table.stride(0),
        PAGE=page,
        HEAD_DIM=head_dim,
        BLOCK_D=max(16, next_power_of_2(head_dim)),
        SOFTCAP=softcap > 0.0,
        ALIBI=alibi_slopes is not None,
        FP8=key_cache.element_size() == 1,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **shared,
    )
    if splits > 1:
        replay_combine_kernel[(blocks, kv_heads, rows)](
            mass,
            entropy,
            *parts,
            query_start_loc,
            seq_lens,
            row_slot,
            prompt_len,
            n_rows,
            sinks,
            window or 0,
            layer,
            steps,
            layers,
            queries,
            splits,
            num_warps=4,
            **shared,
        )
