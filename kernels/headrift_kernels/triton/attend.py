"""Paged attention that sums each head's attention mass over key regions in the same pass over the keys.

The key range is walked in tiles. A tile that holds no region bound runs plain attention: its sum of exponentials is
needed anyway, and is kept once more for the run of tiles since the last bound. A tile that holds a bound closes that
run (which lies wholly inside or outside of every region) and takes a masked sum for each region with a bound in it.
Sums are added, never subtracted, so a key that holds nearly all the mass costs the others no precision; and what makes
the output is computed as without masses: only `run`, `mass` and their positions are carried besides.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headrift_kernels.triton.common import NEVER, log2_scores


@triton.jit
def earlier(first, bound, after, end):
    """The lesser of `first` and `bound` if `bound` lies strictly between `after` and `end`, otherwise `first`."""
    return tl.where((bound > after) & (bound < end), tl.minimum(bound, first), first)


@triton.jit
def attend(
    q,
    key_ptr,
    value_ptr,
    table_ptr,
    bounds_ptr,
    recorded,
    begin,
    end,
    position,
    m,
    stride_kb,
    stride_kt,
    stride_vb,
    stride_vt,
    slope,
    scale,
    softcap,
    window,
    PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REGIONS: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUES: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASS: tl.constexpr,
    ENTROPY: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
):
    """Attention of q [BLOCK_M, BLOCK_D] over keys begin..end-1.

    Args:
        recorded: whether masses are taken.
        position: of the queries. CAUSAL: [BLOCK_M], and each attends the keys up to its own position (and within
            `window`). Otherwise one number, and every key is attended.
        m: [BLOCK_M] where the running maximum of the base-2 scores s starts.

    Returns:
        m, and relative to it l = sum 2^(s-m), moment = sum 2^(s-m) (s-m), acc = sum 2^(s-m) v [BLOCK_M, BLOCK_D]
        (0 without VALUES) and mass [BLOCK_M, WIDTH].
    """
    dims = tl.arange(0, BLOCK_D)
    column = tl.arange(0, WIDTH)
    l = tl.zeros([BLOCK_M], tl.float32)
    moment = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    mass = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    if MASS:
        run = tl.zeros([BLOCK_M], tl.float32)  # l of the tiles since the last bound
        run_start = begin
        mark = m  # the maximum that `mass` is relative to
        bound = NEVER
        if recorded:
            for r in tl.static_range(2 * REGIONS):
                bound = earlier(bound, tl.load(bounds_ptr + r), run_start, end)
    for tile in tl.range(begin, end, BLOCK_N):
        keys = tile + tl.arange(0, BLOCK_N)
        live = keys < end
        inside = live[:, None] & (dims < HEAD_DIM)[None, :] if BLOCK_D != HEAD_DIM else live[:, None]
        page = tl.load(table_ptr + keys // PAGE, mask=live, other=0).to(tl.int64)
        k_at = page * stride_kb + (keys % PAGE) * stride_kt
        k = tl.load(key_ptr + k_at[:, None] + dims[None, :], mask=inside, other=0.0)
        if VALUES:
            v_at = page * stride_vb + (keys % PAGE) * stride_vt
            v = tl.load(value_ptr + v_at[:, None] + dims[None, :], mask=inside, other=0.0)
        if CAUSAL:
            distance = position[:, None] - keys[None, :]
            seen = distance >= 0
            if WINDOW:
                seen &= distance < window
        else:
            distance = (position - keys)[None, :]
            seen = live[None, :]
        s = log2_scores(q, k, distance, slope, scale, softcap, SOFTCAP, ALIBI)
        s = tl.where(seen, s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(s - m_new[:, None])
        total = tl.sum(p, 1)
        if ENTROPY:
            part = tl.sum(tl.where(seen, p * (s - m_new[:, None]), 0.0), 1)
            moment = alpha * (moment + (m - m_new) * l) + part
        l = l * alpha + total
        if MASS:
            before = run * alpha
            run = before + total
            if bound < tile + BLOCK_N:
                mass = mass * tl.exp2(mark - m_new)[:, None]
                bound = NEVER
                tile_end = tl.minimum(tile + BLOCK_N, end)
                for r in tl.static_range(REGIONS):
                    low = tl.load(bounds_ptr + 2 * r)
                    high = tl.load(bounds_ptr + 2 * r + 1)
                    part = tl.where((low <= tile) & (high >= tile_end), total, 0.0)
                    if ((low > tile) & (low < tile_end)) | ((high > tile) & (high < tile_end)):
                        within = (keys >= low) & (keys < high)
                        part = tl.sum(tl.where(within[None, :], p, 0.0), 1)
                    part += tl.where((low <= run_start) & (run_start < high), before, 0.0)
                    mass += tl.where((column == r)[None, :], part[:, None], 0.0)
                    bound = earlier(earlier(bound, low, tile_end, end), high, tile_end, end)
                mark = m_new
                run = tl.zeros([BLOCK_M], tl.float32)
                run_start = tile_end
        if VALUES:
            acc = acc * alpha[:, None]
            acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc, input_precision="ieee")
        m = m_new
    if MASS:  # noqa: SIM102
        if recorded:
            mass = mass * tl.exp2(mark - m)[:, None]
            for r in tl.static_range(REGIONS):
                covers = (tl.load(bounds_ptr + 2 * r) <= run_start) & (run_start < tl.load(bounds_ptr + 2 * r + 1))
                mass += tl.where((column == r)[None, :], tl.where(covers, run, 0.0)[:, None], 0.0)
    return m, l, moment, acc, mass


@triton.jit
def keys_per_split(keys, splits, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr):
    """Keys that each split of a row takes: whole tiles, at least CHUNK, so that a short row uses few splits."""
    return tl.maximum(tl.cdiv(tl.cdiv(keys, BLOCK_N), splits) * BLOCK_N, CHUNK)
