"""Attention mass of key regions from a known LSE: exp(score - LSE) summed over the regions' keys, and no others read.

For queries whose attention another kernel has computed: prefill rows at answer positions, replay, and backends that
keep their own decode kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from headrift_kernels.triton.decode_mass import _LOG2E, _NEVER, log2_scores


@triton.jit
def _region(bounds_ptr, r: tl.constexpr, prompt, generated, PROMPT: tl.constexpr):
    """First and one-past-last key to sum for region r: those after the prompt where the prompt's mass is 1 - theirs."""
    low = tl.load(bounds_ptr + 2 * r)
    high = tl.load(bounds_ptr + 2 * r + 1)
    if r == PROMPT:
        low = tl.where(generated, prompt, low)
        high = tl.where(generated, _NEVER, high)
    return low, high


@triton.jit(do_not_specialize=["layer", "steps", "layers", "window"])
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
    n = tl.load(seq_lens_ptr + row)
    token_end = tl.load(query_start_ptr + row + 1)
    prompt = tl.load(prompt_len_ptr + slot)
    context = n - (token_end - tl.load(query_start_ptr + row))
    begin = tl.maximum(context - prompt + 1, 0) + tl.program_id(1) * BLOCK_Q
    end = tl.minimum(tl.minimum(tl.load(n_rows_ptr + slot), steps), n - prompt + 1)
    end = tl.minimum(end, begin + BLOCK_Q)
    if begin >= end:
        return
    member = tl.arange(0, BLOCK_M)
    step = begin + member // GROUP
    heads = kv_head * GROUP + member % GROUP
    valid = step < end
    position = prompt - 1 + step
    token = (token_end - n + position).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    in_dim = (dims < HEAD_DIM)[None, :]
    q_at = token * stride_qt + heads.to(tl.int64) * stride_qh
    q = tl.load(query_ptr + q_at[:, None] + dims[None, :], mask=valid[:, None] & in_dim, other=0.0)
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
                keys = tile + tl.arange(0, BLOCK_N)
                live = keys < until
                page = tl.load(block_table_ptr + keys // PAGE, mask=live, other=0).to(tl.int64)
                k_at = page * stride_kb + (keys % PAGE) * stride_kt
                k = tl.load(key_ptr + k_at[:, None] + dims[None, :], mask=live[:, None] & in_dim, other=0.0)
                distance = position[:, None] - keys[None, :]
                s = log2_scores(q, k, distance, slope, scale, softcap, SOFTCAP, ALIBI)
                seen = live[None, :] & (distance >= 0)
                if WINDOW:
                    seen &= distance < window
                p += tl.where(seen, tl.exp2(s - lse[:, None] * _LOG2E), 0.0)
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
                rest -= tl.exp2((tl.load(sinks_ptr + heads, mask=valid, other=0.0) - lse) * _LOG2E)[:, None]
            mass = tl.where((column == PROMPT)[None, :], tl.where(rest < 0.0, 0.0, rest), mass)
    cell = ((slot.to(tl.int64) * steps + step) * layers + layer) * HEADS + heads
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
    heads, head_dim = query.shape[1:]
    page, kv_heads = key_cache.shape[1:3]
    rows, regions = row_slot.shape[0], bounds.shape[1]
    group = heads // kv_heads
    longest = min(mass.shape[1], max_query_len or query.shape[0])
    # several queries of a row share its keys; a lone one still takes the 16 rows of a tensor core's tile
    block_m = max(16, triton.next_power_of_2(group * min(longest, 64 // min(group, 64))))
    block_q = block_m // group
    if rows == 0 or longest == 0:
        return
    span_mass_kernel[(rows, triton.cdiv(longest, block_q), kv_heads)](
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
        GROUP=group,
        PAGE=page,
        HEAD_DIM=head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_Q=block_q,
        BLOCK_M=block_m,
        BLOCK_N=block_n or (32 if key_cache.element_size() == 1 else 64),
        REGIONS=regions,
        WIDTH=triton.next_power_of_2(regions),
        PROMPT=-1 if prompt_region is None else prompt_region,
        WINDOW=window is not None,
        SOFTCAP=softcap > 0.0,
        ALIBI=alibi_slopes is not None,
        SINKS=sinks is not None,
        FP8=key_cache.element_size() == 1,
        num_warps=8 if block_m > 32 else 4,
        num_stages=3,
    )
