"""Paged decode attention with masses: one query a row, its keys split among several programs if there are many."""

from __future__ import annotations

import triton
import triton.language as tl

from headrift_kernels.triton.attend import attend, keys_per_split
from headrift_kernels.triton.common import LN2, LOG2E, LOWEST, UNALIGNED, UNSPECIALIZED, cell_of


@triton.jit
def _first_key(n, window, WINDOW: tl.constexpr):
    """The first key that a query at position n-1 attends."""
    return tl.maximum(n - window, 0) if WINDOW else 0


@triton.jit
def _token(row, query_start_ptr, LAST_TOKENS: tl.constexpr):
    """The token that is a row's query, and how many tokens the row has."""
    token = row
    tokens = 1
    if LAST_TOKENS:
        until = tl.load(query_start_ptr + row + 1)
        token = until - 1
        tokens = until - tl.load(query_start_ptr + row)
    return token, tokens


@triton.jit
def _step(row, n, row_slot_ptr, prompt_len_ptr, n_rows_ptr, steps, MASS: tl.constexpr):
    """Slot and step of a row's last query, and whether the step is recorded."""
    slot = 0
    step = 0
    recorded = False
    if MASS:
        slot = tl.load(row_slot_ptr + row)
        probed = slot >= 0
        step = n - tl.load(prompt_len_ptr + slot, mask=probed, other=0)
        recorded = probed & (step >= 0) & (step < tl.minimum(tl.load(n_rows_ptr + slot, mask=probed, other=0), steps))
    return slot, step, recorded


@triton.jit
def _load_query(query_ptr, token, heads, valid, stride_qt, stride_qh, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    dims = tl.arange(0, BLOCK_D)
    at = token.to(tl.int64) * stride_qt + heads.to(tl.int64) * stride_qh
    return tl.load(query_ptr + at[:, None] + dims[None, :], mask=valid[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def decode_kernel(
    output_ptr,
    part_acc_ptr,
    part_stat_ptr,
    part_mass_ptr,
    query_start_ptr,
    seq_lens_ptr,
    query_ptr,
    block_table_ptr,
    stride_table,
    mass_ptr,
    entropy_ptr,
    key_ptr,
    value_ptr,
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
    splits,
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
    MASS: tl.constexpr,
    LAST_TOKENS: tl.constexpr,
    ENTROPY: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    SINKS: tl.constexpr,
    FP8: tl.constexpr,
):
    """Grid (rows, kv_heads, splits). A row whose keys one split takes is finished here, others by `combine_kernel`."""
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    n = tl.load(seq_lens_ptr + row)
    begin = _first_key(n, window, WINDOW)
    end = n
    if SPLIT:
        per_split = keys_per_split(n - begin, splits, BLOCK_N, CHUNK)
        in_parts = n - begin > per_split
        begin += tl.program_id(2) * per_split
        end = tl.minimum(begin + per_split, n)
        if (tl.program_id(2) > 0) & (begin >= n):
            return
    token, tokens = _token(row, query_start_ptr, LAST_TOKENS)
    slot, step, recorded = _step(row, n, row_slot_ptr, prompt_len_ptr, n_rows_ptr, steps, MASS)
    if LAST_TOKENS:  # noqa: SIM102
        if (tokens < 1) | ((tokens > 1) & (recorded == 0)):
            return
    member = tl.arange(0, BLOCK_M)
    valid = member < GROUP
    heads = kv_head * GROUP + member
    if FP8:
        scale *= tl.load(k_scale_ptr)
    slope = tl.load(slopes_ptr + heads, mask=valid, other=0.0) if ALIBI else 0.0
    q = _load_query(query_ptr, token, heads, valid, stride_qt, stride_qh, HEAD_DIM, BLOCK_D)
    if MASS:
        bounds_ptr += slot.to(tl.int64) * (2 * REGIONS)
    m, l, moment, acc, mass = attend(
        q,
        key_ptr + kv_head.to(tl.int64) * stride_kh,
        value_ptr + kv_head.to(tl.int64) * stride_vh,
        block_table_ptr + row.to(tl.int64) * stride_table,
        bounds_ptr,
        recorded,
        begin,
        end,
        n - 1,
        tl.full([BLOCK_M], LOWEST, tl.float32),
        stride_kb,
        stride_kt,
        stride_vb,
        stride_vt,
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
        True,
        False,
        MASS,
        ENTROPY,
        WINDOW,
        SOFTCAP,
        ALIBI,
    )
    dims = tl.arange(0, BLOCK_D)
    column = tl.arange(0, WIDTH)
    stored = valid[:, None] & (dims < HEAD_DIM)[None, :]
    if SPLIT:  # noqa: SIM102
        if in_parts:
            part = (row.to(tl.int64) * HEADS + heads) * splits + tl.program_id(2)
            tl.store(part_acc_ptr + part[:, None] * HEAD_DIM + dims[None, :], acc, mask=stored)
            tl.store(part_stat_ptr + part * 3, m, mask=valid)
            tl.store(part_stat_ptr + part * 3 + 1, l, mask=valid)
            if MASS:  # noqa: SIM102
                if recorded:
                    at = part_mass_ptr + part[:, None] * REGIONS + column[None, :]
                    tl.store(at, mass, mask=valid[:, None] & (column < REGIONS)[None, :])
                    if ENTROPY:
                        tl.store(part_stat_ptr + part * 3 + 2, moment, mask=valid)
            return
    whole = l
    if SINKS:
        whole += tl.exp2(tl.load(sinks_ptr + heads, mask=valid, other=0.0) * LOG2E - m)
    whole = tl.where(whole == 0.0, 1.0, whole)  # no key at all; a NaN stays
    if tokens == 1:
        out = acc / whole[:, None]
        if FP8:
            out *= tl.load(v_scale_ptr)
        out_at = token.to(tl.int64) * stride_ot + heads[:, None].to(tl.int64) * stride_oh + dims[None, :]
        tl.store(output_ptr + out_at, out.to(output_ptr.dtype.element_ty), mask=stored)
    if MASS:  # noqa: SIM102
        if recorded:
            cell = cell_of(slot, step, layer, heads, steps, layers, HEADS)
            at = mass_ptr + cell[:, None] * REGIONS + column[None, :]
            tl.store(at, mass / whole[:, None], mask=valid[:, None] & (column < REGIONS)[None, :])
            if ENTROPY:
                value = (l * tl.log2(whole) - moment) / whole * LN2
                tl.store(entropy_ptr + cell, value, mask=valid)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def combine_kernel(
    output_ptr,
    part_acc_ptr,
    part_stat_ptr,
    part_mass_ptr,
    query_start_ptr,
    seq_lens_ptr,
    mass_ptr,
    entropy_ptr,
    row_slot_ptr,
    prompt_len_ptr,
    n_rows_ptr,
    sinks_ptr,
    v_scale_ptr,
    window,
    layer,
    steps,
    layers,
    splits,
    stride_ot,
    stride_oh,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    REGIONS: tl.constexpr,
    WIDTH: tl.constexpr,
    MASS: tl.constexpr,
    LAST_TOKENS: tl.constexpr,
    ENTROPY: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    FP8: tl.constexpr,
):
    """Grid (rows, heads): the parts of one head's splits made one. Region masses merge exactly as l does."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    n = tl.load(seq_lens_ptr + row)
    begin = _first_key(n, window, WINDOW)
    per_split = keys_per_split(n - begin, splits, BLOCK_N, CHUNK)
    if n - begin <= per_split:
        return
    token, tokens = _token(row, query_start_ptr, LAST_TOKENS)
    slot, step, recorded = _step(row, n, row_slot_ptr, prompt_len_ptr, n_rows_ptr, steps, MASS)
    if LAST_TOKENS:  # noqa: SIM102
        if (tokens < 1) | ((tokens > 1) & (recorded == 0)):
            return
    split = tl.arange(0, BLOCK_S)
    used = begin + split * per_split < n
    dims = tl.arange(0, BLOCK_D)
    part = (row.to(tl.int64) * HEADS + head) * splits + split
    m = tl.load(part_stat_ptr + part * 3, mask=used, other=LOWEST)
    l = tl.load(part_stat_ptr + part * 3 + 1, mask=used, other=0.0)
    top = tl.max(m, 0)
    weight = tl.exp2(m - top)
    seen = tl.sum(weight * l, 0)
    whole = seen
    if SINKS:
        whole += tl.exp2(tl.load(sinks_ptr + head) * LOG2E - top)
    if tokens == 1:
        acc = tl.load(
            part_acc_ptr + part[:, None] * HEAD_DIM + dims[None, :],
            mask=used[:, None] & (dims < HEAD_DIM)[None, :],
            other=0.0,
        )
        out = tl.sum(acc * weight[:, None], 0) / whole
        if FP8:
            out *= tl.load(v_scale_ptr)
        at = output_ptr + token.to(tl.int64) * stride_ot + head.to(tl.int64) * stride_oh + dims
        tl.store(at, out.to(output_ptr.dtype.element_ty), mask=dims < HEAD_DIM)
    if MASS:  # noqa: SIM102
        if recorded:
            column = tl.arange(0, WIDTH)
            parts = tl.load(
                part_mass_ptr + part[:, None] * REGIONS + column[None, :],
                mask=used[:, None] & (column < REGIONS)[None, :],
                other=0.0,
            )
            cell = cell_of(slot, step, layer, head, steps, layers, HEADS)
            merged = tl.sum(parts * weight[:, None], 0) / whole
            tl.store(mass_ptr + cell * REGIONS + column, merged, mask=column < REGIONS)
            if ENTROPY:
                moment = tl.load(part_stat_ptr + part * 3 + 2, mask=used, other=0.0)
                # a split's moment is relative to its own maximum
                shifted = tl.sum(weight * (moment + (m - top) * l), 0)
                tl.store(entropy_ptr + cell, (seen * tl.log2(whole) - shifted) / whole * LN2)
