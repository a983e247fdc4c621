"""Paged decode attention that sums each head's attention mass over key regions in the same pass over K and V.

The key range is walked in tiles. A tile that holds no region bound runs plain attention: its sum of exponentials is
wanted anyway, and is kept once more for the run of tiles since the last bound. A tile that holds a bound closes that
run (which lies wholly inside or outside of every region) and takes a masked sum for each region with a bound in it.
Sums are added, never subtracted, so a key that holds nearly all the mass costs the others no precision; and what makes
the output is computed as without masses: only `run`, `mass` and where they stand are carried besides.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headrift_kernels.triton.common import LN2, LOG2E, LOWEST, NEVER, UNALIGNED, UNSPECIALIZED, cell_of, log2_scores


@triton.jit
def earlier(found, bound, after, end):
    """The lesser of `found` and `bound`, where `bound` lies strictly between `after` and `end`."""
    return tl.where((bound > after) & (bound < end), tl.minimum(bound, found), found)


@triton.jit
def _attend(
    q,
    key_ptr,
    value_ptr,
    table_ptr,
    bounds_ptr,
    wanted,
    begin,
    end,
    n,
    stride_kb,
    stride_kt,
    stride_vb,
    stride_vt,
    slope,
    scale,
    softcap,
    PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REGIONS: tl.constexpr,
    WIDTH: tl.constexpr,
    MASS: tl.constexpr,
    ENTROPY: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
):
    """Attention of q [BLOCK_M, BLOCK_D], at position n-1, over keys begin..end-1.

    Returns, relative to the running maximum m [BLOCK_M] of the base-2 scores s: m, l = sum 2^(s-m),
    moment = sum 2^(s-m) (s-m), acc = sum 2^(s-m) v [BLOCK_M, BLOCK_D] and mass [BLOCK_M, WIDTH].
    """
    dims = tl.arange(0, BLOCK_D)
    column = tl.arange(0, WIDTH)
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    moment = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    mass = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    if MASS:
        run = tl.zeros([BLOCK_M], tl.float32)  # l of the tiles since the last bound
        run_start = begin
        mark = m  # the maximum that `mass` is relative to
        bound = NEVER
        if wanted:
            for r in tl.static_range(2 * REGIONS):
                bound = earlier(bound, tl.load(bounds_ptr + r), run_start, end)
    for tile in tl.range(begin, end, BLOCK_N):
        keys = tile + tl.arange(0, BLOCK_N)
        live = keys < end
        there = live[:, None] & (dims < HEAD_DIM)[None, :] if BLOCK_D != HEAD_DIM else live[:, None]
        page = tl.load(table_ptr + keys // PAGE, mask=live, other=0).to(tl.int64)
        k_at = page * stride_kb + (keys % PAGE) * stride_kt
        v_at = page * stride_vb + (keys % PAGE) * stride_vt
        k = tl.load(key_ptr + k_at[:, None] + dims[None, :], mask=there, other=0.0)
        v = tl.load(value_ptr + v_at[:, None] + dims[None, :], mask=there, other=0.0)
        s = log2_scores(q, k, (n - 1 - keys)[None, :], slope, scale, softcap, SOFTCAP, ALIBI)
        s = tl.where(live[None, :], s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(s - m_new[:, None])
        total = tl.sum(p, 1)
        if ENTROPY:
            part = tl.sum(tl.where(live[None, :], p * (s - m_new[:, None]), 0.0), 1)
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
        acc = acc * alpha[:, None]
        acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc, input_precision="ieee")
        m = m_new
    if MASS:  # noqa: SIM102
        if wanted:
            mass = mass * tl.exp2(mark - m)[:, None]
            for r in tl.static_range(REGIONS):
                inside = (tl.load(bounds_ptr + 2 * r) <= run_start) & (run_start < tl.load(bounds_ptr + 2 * r + 1))
                mass += tl.where((column == r)[None, :], tl.where(inside, run, 0.0)[:, None], 0.0)
    return m, l, moment, acc, mass


@triton.jit
def _probed(row, seq_lens_ptr, row_slot_ptr, prompt_len_ptr, n_rows_ptr, steps, MASS: tl.constexpr):
    """Keys, slot and step of a batch row, and whether its step is recorded."""
    n = tl.load(seq_lens_ptr + row)
    slot = 0
    step = 0
    wanted = False
    if MASS:
        slot = tl.load(row_slot_ptr + row)
        probed = slot >= 0
        step = n - tl.load(prompt_len_ptr + slot, mask=probed, other=0)
        wanted = probed & (step >= 0) & (step < tl.minimum(tl.load(n_rows_ptr + slot, mask=probed, other=0), steps))
    return n, slot, step, wanted


@triton.jit
def _keys_per_split(n, window, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr):
    """The first key that a query at position n-1 attends, and how many keys each split takes: whole tiles."""
    begin = 0
    if WINDOW:
        begin = tl.maximum(n - window, 0)
    return begin, tl.maximum(tl.cdiv(tl.cdiv(n - begin, BLOCK_N), SPLITS), 1) * BLOCK_N


@triton.jit
def _load_query(query_ptr, row, heads, valid, stride_qt, stride_qh, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    dims = tl.arange(0, BLOCK_D)
    at = row.to(tl.int64) * stride_qt + heads.to(tl.int64) * stride_qh
    return tl.load(query_ptr + at[:, None] + dims[None, :], mask=valid[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def decode_kernel(
    output_ptr,
    mass_ptr,
    entropy_ptr,
    part_acc_ptr,
    part_stat_ptr,
    part_mass_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    block_table_ptr,
    seq_lens_ptr,
    row_slot_ptr,
    prompt_len_ptr,
    n_rows_ptr,
    bounds_ptr,
    slopes_ptr,
    sinks_ptr,
    k_scale_ptr,
    v_scale_ptr,
    scale,
    softcap,
    window,
    layer,
    steps,
    layers,
    stride_ot,
    stride_oh,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_table,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    REGIONS: tl.constexpr,
    WIDTH: tl.constexpr,
    MASS: tl.constexpr,
    ENTROPY: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    SINKS: tl.constexpr,
    FP8: tl.constexpr,
):
    """Grid (rows, kv_heads, SPLITS). With one split the row is finished here, with more the parts go to `combine`."""
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    member = tl.arange(0, BLOCK_M)
    valid = member < GROUP
    heads = kv_head * GROUP + member
    n, slot, step, wanted = _probed(row, seq_lens_ptr, row_slot_ptr, prompt_len_ptr, n_rows_ptr, steps, MASS)
    begin, per_split = _keys_per_split(n, window, BLOCK_N, SPLITS, WINDOW)
    end = n
    if SPLITS > 1:
        begin += tl.program_id(2) * per_split
        end = tl.minimum(begin + per_split, n)
        if begin >= n:
            return
    if FP8:
        scale *= tl.load(k_scale_ptr)
    slope = tl.load(slopes_ptr + heads, mask=valid, other=0.0) if ALIBI else 0.0
    q = _load_query(query_ptr, row, heads, valid, stride_qt, stride_qh, HEAD_DIM, BLOCK_D)
    if MASS:
        bounds_ptr += slot.to(tl.int64) * (2 * REGIONS)
    m, l, moment, acc, mass = _attend(
        q,
        key_ptr + kv_head.to(tl.int64) * stride_kh,
        value_ptr + kv_head.to(tl.int64) * stride_vh,
        block_table_ptr + row.to(tl.int64) * stride_table,
        bounds_ptr,
        wanted,
        begin,
        end,
        n,
        stride_kb,
        stride_kt,
        stride_vb,
        stride_vt,
        slope,
        scale,
        softcap,
        PAGE,
        HEAD_DIM,
        BLOCK_D,
        BLOCK_M,
        BLOCK_N,
        REGIONS,
        WIDTH,
        MASS,
        ENTROPY,
        SOFTCAP,
        ALIBI,
    )
    dims = tl.arange(0, BLOCK_D)
    column = tl.arange(0, WIDTH)
    stored = valid[:, None] & (dims < HEAD_DIM)[None, :]
    if SPLITS > 1:
        part = (row.to(tl.int64) * HEADS + heads) * SPLITS + tl.program_id(2)
        tl.store(part_acc_ptr + part[:, None] * HEAD_DIM + dims[None, :], acc, mask=stored)
        tl.store(part_stat_ptr + part * 3, m, mask=valid)
        tl.store(part_stat_ptr + part * 3 + 1, l, mask=valid)
        if MASS:  # noqa: SIM102
            if wanted:
                at = part_mass_ptr + part[:, None] * REGIONS + column[None, :]
                tl.store(at, mass, mask=valid[:, None] & (column < REGIONS)[None, :])
                if ENTROPY:
                    tl.store(part_stat_ptr + part * 3 + 2, moment, mask=valid)
    else:
        whole = l
        if SINKS:
            whole += tl.exp2(tl.load(sinks_ptr + heads, mask=valid, other=0.0) * LOG2E - m)
        whole = tl.where(whole == 0.0, 1.0, whole)  # no key at all; a NaN stays
        out = acc / whole[:, None]
        if FP8:
            out *= tl.load(v_scale_ptr)
        out_at = row.to(tl.int64) * stride_ot + heads[:, None].to(tl.int64) * stride_oh + dims[None, :]
        tl.store(output_ptr + out_at, out.to(output_ptr.dtype.element_ty), mask=stored)
        if MASS:  # noqa: SIM102
            if wanted:
                cell = cell_of(slot, step, layer, heads, steps, layers, HEADS)
                at = mass_ptr + cell[:, None] * REGIONS + column[None, :]
                tl.store(at, mass / whole[:, None], mask=valid[:, None] & (column < REGIONS)[None, :])
                if ENTROPY:
                    value = (l * tl.log2(whole) - moment) / whole * LN2
                    tl.store(entropy_ptr + cell, value, mask=valid)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def combine_kernel(
    output_ptr,
    mass_ptr,
    entropy_ptr,
    part_acc_ptr,
    part_stat_ptr,
    part_mass_ptr,
    seq_lens_ptr,
    row_slot_ptr,
    prompt_len_ptr,
    n_rows_ptr,
    sinks_ptr,
    v_scale_ptr,
    window,
    layer,
    steps,
    layers,
    stride_ot,
    stride_oh,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    REGIONS: tl.constexpr,
    WIDTH: tl.constexpr,
    MASS: tl.constexpr,
    ENTROPY: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    FP8: tl.constexpr,
):
    """Grid (rows, heads): the parts of one head's splits made one. Region masses merge exactly as l does."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    n, slot, step, wanted = _probed(row, seq_lens_ptr, row_slot_ptr, prompt_len_ptr, n_rows_ptr, steps, MASS)
    begin, per_split = _keys_per_split(n, window, BLOCK_N, SPLITS, WINDOW)
    split = tl.arange(0, BLOCK_S)
    there = begin + split * per_split < n
    dims = tl.arange(0, BLOCK_D)
    part = (row.to(tl.int64) * HEADS + head) * SPLITS + split
    m = tl.load(part_stat_ptr + part * 3, mask=there, other=LOWEST)
    l = tl.load(part_stat_ptr + part * 3 + 1, mask=there, other=0.0)
    acc = tl.load(
        part_acc_ptr + part[:, None] * HEAD_DIM + dims[None, :],
        mask=there[:, None] & (dims < HEAD_DIM)[None, :],
        other=0.0,
    )
    top = tl.max(m, 0)
    weight = tl.exp2(m - top)
    seen = tl.sum(weight * l, 0)
    whole = seen
    if SINKS:
        whole += tl.exp2(tl.load(sinks_ptr + head) * LOG2E - top)
    whole = tl.where(whole == 0.0, 1.0, whole)  # no key at all; a NaN stays
    out = tl.sum(acc * weight[:, None], 0) / whole
    if FP8:
        out *= tl.load(v_scale_ptr)
    at = output_ptr + row.to(tl.int64) * stride_ot + head.to(tl.int64) * stride_oh + dims
    tl.store(at, out.to(output_ptr.dtype.element_ty), mask=dims < HEAD_DIM)
    if MASS:  # noqa: SIM102
        if wanted:
            column = tl.arange(0, WIDTH)
            parts = tl.load(
                part_mass_ptr + part[:, None] * REGIONS + column[None, :],
                mask=there[:, None] & (column < REGIONS)[None, :],
                other=0.0,
            )
            cell = cell_of(slot, step, layer, head, steps, layers, HEADS)
            merged = tl.sum(parts * weight[:, None], 0) / whole
            tl.store(mass_ptr + cell * REGIONS + column, merged, mask=column < REGIONS)
            if ENTROPY:
                moment = tl.load(part_stat_ptr + part * 3 + 2, mask=there, other=0.0)
                # a split's moment is relative to its own maximum; a split without keys has l = 0 and moment = 0
                shifted = tl.sum(weight * (moment + tl.where(l > 0.0, m - top, 0.0) * l), 0)
                tl.store(entropy_ptr + cell, (seen * tl.log2(whole) - shifted) / whole * LN2)
