"""LSE of a batch's measured queries, from K alone: for backends whose prefill attention gives none.

`query_lse` and then `span_mass` gives the masses of those queries; all of K is read once for each block of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from headrift_kernels.triton.common import LN2, LOG2E, LOWEST, UNALIGNED, UNSPECIALIZED
from headrift_kernels.triton.measured import launch_of, load_queries, measured_steps, tile_scores


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def query_lse_kernel(
    lse_ptr,
    query_ptr,
    key_ptr,
    block_table_ptr,
    query_start_ptr,
    seq_lens_ptr,
    row_slot_ptr,
    prompt_len_ptr,
    n_rows_ptr,
    slopes_ptr,
    sinks_ptr,
    k_scale_ptr,
    scale,
    softcap,
    window,
    steps,
    stride_lh,
    stride_lt,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_table,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
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
    q, _, position, token, heads, valid = load_queries(
        query_ptr, kv_head, begin, end, prompt, origin, stride_qt, stride_qh, GROUP, HEAD_DIM, BLOCK_D, BLOCK_M
    )
    slope = tl.load(slopes_ptr + heads, mask=valid, other=0.0) if ALIBI else 0.0
    if FP8:
        scale *= tl.load(k_scale_ptr)
    key_ptr += kv_head.to(tl.int64) * stride_kh
    block_table_ptr += row.to(tl.int64) * stride_table
    first = 0
    if WINDOW:
        first = tl.maximum(prompt + begin - window, 0)
    until = prompt - 1 + end
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    if SINKS:
        sink = tl.load(sinks_ptr + heads, mask=valid, other=0.0) * LOG2E
        m = tl.maximum(m, sink)
    l = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tile in tl.range(first, until, BLOCK_N):
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
        s = tl.where(seen, s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        l = l * tl.exp2(m - m_new)[:, None] + tl.exp2(s - m_new[:, None])
        m = m_new
    total = tl.sum(l, 1)
    if SINKS:
        total += tl.exp2(sink - m)
    lse = (m + tl.log2(total)) * LN2
    tl.store(lse_ptr + heads.to(tl.int64) * stride_lh + token * stride_lt, lse, mask=valid)


def query_lse(
    lse: torch.Tensor,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    row_slot: torch.Tensor,
    prompt_len: torch.Tensor,
    n_rows: torch.Tensor,
    steps: int,
    *,
    scale: float,
    max_query_len: int | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    block_n: int | None = None,
) -> None:
    """Write the LSE of a batch's measured queries, in place; that of other queries, and all else, is left as it is.

    lse: [heads, tokens] float32, natural logarithm, sinks included, any strides. steps: the steps of the recorder's
    buffer. The others: as in `span_mass`, which takes this LSE. The grid depends on shapes, `steps` and `max_query_len`
    alone, and nothing is read on the host: a CUDA graph may hold the call.
    """
    grid, constants = launch_of(
        query,
        key_cache,
        row_slot.shape[0],
        steps,
        max_query_len,
        block_n,
        window=window,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
    )
    if 0 in grid:
        return
    query_lse_kernel[grid](
        lse,
        query,
        key_cache,
        block_table,
        query_start_loc,
        seq_lens,
        row_slot,
        prompt_len,
        n_rows,
        alibi_slopes,
        sinks,
        k_scale,
        scale,
        softcap,
        window or 0,
        steps,
        *lse.stride(),
        *query.stride()[:2],
        *key_cache.stride()[:3],
        block_table.stride(0),
        **constants,
    )
