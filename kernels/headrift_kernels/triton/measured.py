"""What the kernels share that take a batch's measured queries, whose attention another kernel computes.

A program takes up to BLOCK_Q steps of one row and the heads of one KV head, so that they share the keys: row m of its
tile is step begin + m // GROUP of the group's head m % GROUP.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from headrift_kernels.triton.common import log2_scores, next_power_of_2


@triton.jit
def measured_steps(
    row,
    block,
    slot,
    query_start_ptr,
    seq_lens_ptr,
    prompt_len_ptr,
    n_rows_ptr,
    steps,
    BLOCK_Q: tl.constexpr,
):
    """Steps begin..end-1 of a row's block (none: begin >= end), its prompt's length, the token that is position 0."""
    n = tl.load(seq_lens_ptr + row)
    token_end = tl.load(query_start_ptr + row + 1)
    prompt = tl.load(prompt_len_ptr + slot)
    context = n - (token_end - tl.load(query_start_ptr + row))
    begin = tl.maximum(context - prompt + 1, 0) + block * BLOCK_Q
    end = tl.minimum(tl.minimum(tl.load(n_rows_ptr + slot), steps), n - prompt + 1)
    return begin, tl.minimum(end, begin + BLOCK_Q), prompt, token_end - n


@triton.jit
def load_queries(
    query_ptr,
    kv_head,
    begin,
    end,
    prompt,
    origin,
    stride_qt,
    stride_qh,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Of each row of the tile [BLOCK_M]: query [BLOCK_M, BLOCK_D], step, position, token, head, and whether it is."""
    member = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    step = begin + member // GROUP
    heads = kv_head * GROUP + member % GROUP
    valid = step < end
    position = prompt - 1 + step
    token = (origin + position).to(tl.int64)
    at = token * stride_qt + heads.to(tl.int64) * stride_qh
    there = valid[:, None] & (dims < HEAD_DIM)[None, :]
    q = tl.load(query_ptr + at[:, None] + dims[None, :], mask=there, other=0.0)
    return q, step, position, token, heads, valid


@triton.jit
def tile_scores(
    q,
    position,
    key_ptr,
    table_ptr,
    tile,
    until,
    stride_kb,
    stride_kt,
    slope,
    scale,
    softcap,
    window,
    PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
):
    """Scores [m, n] in base 2 of queries [m, d] and the keys tile..until-1, at most BLOCK_N, and which are attended."""
    dims = tl.arange(0, BLOCK_D)
    keys = tile + tl.arange(0, BLOCK_N)
    live = keys < until
    page = tl.load(table_ptr + keys // PAGE, mask=live, other=0).to(tl.int64)
    at = page * stride_kb + (keys % PAGE) * stride_kt
    there = live[:, None] & (dims < HEAD_DIM)[None, :]
    k = tl.load(key_ptr + at[:, None] + dims[None, :], mask=there, other=0.0)
    distance = position[:, None] - keys[None, :]
    s = log2_scores(q, k, distance, slope, scale, softcap, SOFTCAP, ALIBI)
    seen = live[None, :] & (distance >= 0)
    if WINDOW:
        seen &= distance < window
    return s, seen


def launch_of(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    rows: int,
    steps: int,
    max_query_len: int | None,
    block_n: int | None,
    hip: bool = torch.version.hip is not None,
    **options: Any,
) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """The grid (rows, blocks of steps, KV heads), from what the host knows alone, and the constants of a launch.

    options: window, softcap, alibi_slopes and sinks, as in `span_mass`.
    """
    heads, head_dim = query.shape[1:]
    page, kv_heads = key_cache.shape[1:3]
    group = heads // kv_heads
    longest = min(steps, max_query_len or query.shape[0])
    # several queries of a row share its keys; a lone one still takes the 16 rows of a tensor core's tile
    block_m = max(16, next_power_of_2(group * min(longest, 64 // min(group, 64))))
    fp8 = key_cache.element_size() == 1
    constants = {
        "GROUP": group,
        "PAGE": page,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, next_power_of_2(head_dim)),
        "BLOCK_Q": block_m // group,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n or (32 if fp8 else 64),
        "WINDOW": options["window"] is not None,
        "SOFTCAP": options["softcap"] > 0.0,
        "ALIBI": options["alibi_slopes"] is not None,
        "SINKS": options["sinks"] is not None,
        "FP8": fp8,
        # four waves of AMD's are as many threads as eight warps
        "num_warps": 8 if block_m > 32 and not hip else 4,
        "num_stages": 3,
    }
    return (rows, -(-longest // (block_m // group)), kv_heads), constants
