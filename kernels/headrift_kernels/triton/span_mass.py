"""Attention mass of key regions from a known LSE: exp(score - LSE) summed over the regions' keys, and no others read.

For queries whose attention another kernel has computed: prefill rows at answer positions, replay, and backends that
keep their own decode kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from headrift_kernels.triton.common import LOG2E, NEVER, UNALIGNED, UNSPECIALIZED, cell_of, next_power_of_2
from headrift_kernels.triton.measured import launch_of, load_queries, measured_steps, tile_scores


@triton.jit
def _region(bounds_ptr, r: tl.constexpr, prompt, generated, PROMPT: tl.constexpr):
    """First and one-past-last key to sum for region r: those after the prompt where the prompt's mass is 1 - theirs."""
    low = tl.load(bounds_ptr + 2 * r)
    high = tl.load(bounds_ptr + 2 * r + 1)
    if r == PROMPT:
        low = tl.where(generated, prompt, low)
        high = tl.where(generated, NEVER, high)
    return low, high


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def span_mass_kernel(
    mass_ptr,
    query_ptr,
    key_ptr,
    lse_ptr,
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
    stride_qt,
    stride_qh,
    stride_lh,
    stride_lt,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_table,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REGIONS: tl.constexpr,
    WIDTH: tl.constexpr,
    PROMPT: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    SINKS: tl.constexpr,
    FP8: tl.constexpr,
):
    """Grid (rows, blocks of BLOCK_Q steps, kv_heads): the measured queries of a row that share its keys."""
    row = tl.program_id(0)
    kv_head = tl.program_id(2)
    slot = tl.load(row_slot_ptr + row)
    if slot < 0:
        return
    begin, end, prompt, origin = measured_steps(
        row, tl.program_id(1), slot, query_start_ptr, seq_lens_ptr, prompt_len_ptr, n_rows_ptr, steps, BLOCK_Q
    )
    if begin >= end:
        return
    q, step, position, token, heads, valid = load_queries(
        query_ptr, kv_head, begin, end, prompt, origin, stride_qt, stride_qh, GROUP, HEAD_DIM, BLOCK_D, BLOCK_M
    )
    lse = tl.load(lse_ptr + heads.to(tl.int64) * stride_lh + token * stride_lt, mask=valid, other=float("inf"))
    slope = tl.load(slopes_ptr + heads, mask=valid, other=0.0) if ALIBI else 0.0
    if FP8:
        scale *= tl.load(k_scale_ptr)
    key_ptr += kv_head.to(tl.int64) * stride_kh
    block_table_ptr += row.to(tl.int64) * stride_table
    bounds_ptr += slot.to(tl.int64) * (2 * REGIONS)
    column = tl.arange(0, WIDTH)
    mass = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    keys_end = prompt - 1 + end
    generated = keys_end - prompt < prompt
    at = 0
    if WINDOW:
        at = tl.maximum(prompt + begin - window, 0)
    while at < keys_end:
        # no bound lies between `at` and `until`: a region holds all of these keys or none
        until = keys_end
        holders = 0
        for r in tl.static_range(REGIONS):
            low, high = _region(bounds_ptr, r, prompt, generated, PROMPT)
            until = tl.where((low > at) & (low < until), low, until)
            until = tl.where((high > at) & (high < until), high, until)
            holders += ((low <= at) & (at < high)).to(tl.int32)
        if holders > 0:
            p = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for tile in tl.range(at, until, BLOCK_N):
                s, seen = tile_scores(
                    q,
                    position,
                    key_ptr,
                    block_table_ptr,
                    tile,
                    until,
                    stride_kb,
                    stride_kt,
                    slope,
                    scale,
                    softcap,
                    window,
                    PAGE,
                    HEAD_DIM,
                    BLOCK_D,
                    BLOCK_N,
                    WINDOW,
                    SOFTCAP,
                    ALIBI,
                )
                p += tl.where(seen, tl.exp2(s - lse[:, None] * LOG2E), 0.0)
            part = tl.sum(p, 1)
            for r in tl.static_range(REGIONS):
                low, high = _region(bounds_ptr, r, prompt, generated, PROMPT)
                held = tl.where((low <= at) & (at < high), part, 0.0)
                mass += tl.where((column == r)[None, :], held[:, None], 0.0)
        at = until
    if PROMPT >= 0:  # noqa: SIM102
        if generated:
            rest = 1.0 - mass
            if SINKS:
                rest -= tl.exp2((tl.load(sinks_ptr + heads, mask=valid, other=0.0) - lse) * LOG2E)[:, None]
            mass = tl.where((column == PROMPT)[None, :], tl.where(rest < 0.0, 0.0, rest), mass)
    cell = cell_of(slot, step, layer, heads, steps, layers, HEADS)
    stored = valid[:, None] & (column < REGIONS)[None, :]
    tl.store(mass_ptr + cell[:, None] * REGIONS + column[None, :], mass, mask=stored)


def span_mass(
    mass: torch.Tensor,
    layer: int,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    lse: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    row_slot: torch.Tensor,
    prompt_len: torch.Tensor,
    n_rows: torch.Tensor,
    bounds: torch.Tensor,
    *,
    scale: float,
    max_query_len: int | None = None,
    prompt_region: int | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    block_n: int | None = None,
) -> None:
    """Write the masses of a batch's measured queries into the recorder's buffer, in place; nothing else is touched.

    mass: [slots, steps, layers, heads, regions] float32, contiguous. query: [tokens, heads, head_dim]. key_cache:
    [blocks, page, kv_heads, head_dim] in the query's type or an fp8. Both: any strides but a last one of 1. lse:
    [heads, tokens] float32, natural logarithm, sinks included, any strides. block_table: [rows, pages];
    query_start_loc: [rows + 1]; seq_lens: [rows], this step's tokens included; row_slot: [rows], -1 where the row is
    not probed; prompt_len, n_rows: [slots]; bounds: [slots, regions, 2], half open key positions; all int32. A query at
    position p is at step p - (prompt_len - 1), and measured at steps 0..min(n_rows, steps)-1. max_query_len: the
    longest run of query tokens, where the host knows it. prompt_region: the region that is [0, prompt_len) in every
    slot, if there is one; where fewer keys follow the prompt than are in it, its mass is then 1 minus theirs (minus the
    sink's), with the absolute precision of the LSE. k_scale: [1] float32, of an fp8 cache. The others: as in
    `decode_mass`.
    """
    heads, regions = query.shape[1], bounds.shape[1]
    grid, constants = launch_of(
        query,
        key_cache,
        row_slot.shape[0],
        mass.shape[1],
        max_query_len,
        block_n,
        window=window,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
    )
    if 0 in grid:
        return
    span_mass_kernel[grid](
        mass,
        query,
        key_cache,
        lse,
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
        mass.shape[1],
        mass.shape[2],
        *query.stride()[:2],
        *lse.stride(),
        *key_cache.stride()[:3],
        block_table.stride(0),
        HEADS=heads,
        REGIONS=regions,
        WIDTH=next_power_of_2(regions),
        PROMPT=-1 if prompt_region is None else prompt_region,
        **constants,
    )
