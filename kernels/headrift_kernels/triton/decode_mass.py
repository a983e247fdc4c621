"""Paged decode attention that sums each head's attention mass over key regions in the same pass over K and V.

The key range is walked in tiles. A tile that holds no region bound runs plain attention: its sum of exponentials is
wanted anyway, and is kept once more for the run of tiles since the last bound. A tile that holds a bound closes that
run (which lies wholly inside or outside of every region) and takes a masked sum for each region with a bound in it.
Sums are added, never subtracted, so a key that holds nearly all the mass costs the others no precision; and what makes
the output is computed as without masses: only `run`, `mass` and where they stand are carried besides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
# Where a running maximum starts: -inf would make inf - inf of a row that has seen no key.
_LOWEST = tl.constexpr(-1.0e30)
_NEVER = tl.constexpr(2147483647)
_LOG2E = tl.constexpr(LOG2E)
_LN2 = tl.constexpr(LN2)


@triton.jit
def tanh(x):
    """tanh without overflow; the series below 0.1, where 1 - e^-2x cancels."""
    size = tl.maximum(x, -x)
    e = tl.exp2(size * (-2.0 * _LOG2E))
    far = (1.0 - e) / (1.0 + e)
    square = x * x
    return tl.where(size < 0.1, x - x * square * (1.0 / 3.0 - square * (2.0 / 15.0)), tl.where(x < 0, -far, far))


@triton.jit
def log2_scores(
    q,
    k,
    distance,
    slope,
    scale,
    softcap,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
):
    """[m, n] scores in base 2 of queries q [m, d] and keys k [n, d]; distance: [m or 1, n], slope: [m]."""
    s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
    if SOFTCAP:
        s = softcap * tanh(s * (scale / softcap))
    if ALIBI:
        s = (s if SOFTCAP else s * scale) - slope[:, None] * distance.to(tl.float32)
    return s * (_LOG2E if SOFTCAP or ALIBI else scale * _LOG2E)


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
    m = tl.full([BLOCK_M], _LOWEST, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    moment = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    mass = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    if MASS:
        run = tl.zeros([BLOCK_M], tl.float32)  # l of the tiles since the last bound
        run_start = begin
        mark = m  # the maximum that `mass` is relative to
        bound = _NEVER
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
                bound = _NEVER
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
def _load_query(query_ptr, row, heads, valid, stride_qt, stride_qh, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    dims = tl.arange(0, BLOCK_D)
    at = row.to(tl.int64) * stride_qt + heads.to(tl.int64) * stride_qh
    return tl.load(query_ptr + at[:, None] + dims[None, :], mask=valid[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)


@triton.jit(do_not_specialize=["layer", "steps", "layers", "window"])
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
    begin = 0
    end = n
    if WINDOW:
        begin = tl.maximum(n - window, 0)
    if SPLITS > 1:
        per_split = tl.cdiv(tl.cdiv(n - begin, BLOCK_N), SPLITS) * BLOCK_N
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
            whole += tl.exp2(tl.load(sinks_ptr + heads, mask=valid, other=0.0) * _LOG2E - m)
        whole = tl.where(whole == 0.0, 1.0, whole)  # no key at all; a NaN stays
        out = acc / whole[:, None]
        if FP8:
            out *= tl.load(v_scale_ptr)
        out_at = row.to(tl.int64) * stride_ot + heads[:, None].to(tl.int64) * stride_oh + dims[None, :]
        tl.store(output_ptr + out_at, out.to(output_ptr.dtype.element_ty), mask=stored)
        if MASS:  # noqa: SIM102
            if wanted:
                cell = ((slot.to(tl.int64) * steps + step) * layers + layer) * HEADS + heads
                at = mass_ptr + cell[:, None] * REGIONS + column[None, :]
                tl.store(at, mass / whole[:, None], mask=valid[:, None] & (column < REGIONS)[None, :])
                if ENTROPY:
                    value = (l * tl.log2(whole) - moment) / whole * _LN2
                    tl.store(entropy_ptr + cell, value, mask=valid)


@triton.jit(do_not_specialize=["layer", "steps", "layers", "window"])
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
    begin = 0
    if WINDOW:
        begin = tl.maximum(n - window, 0)
    per_split = tl.maximum(tl.cdiv(tl.cdiv(n - begin, BLOCK_N), SPLITS), 1) * BLOCK_N
    split = tl.arange(0, BLOCK_S)
    there = begin + split * per_split < n
    dims = tl.arange(0, BLOCK_D)
    part = (row.to(tl.int64) * HEADS + head) * SPLITS + split
    m = tl.load(part_stat_ptr + part * 3, mask=there, other=_LOWEST)
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
        whole += tl.exp2(tl.load(sinks_ptr + head) * _LOG2E - top)
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
            cell = ((slot.to(tl.int64) * steps + step) * layers + layer) * HEADS + head
            merged = tl.sum(parts * weight[:, None], 0) / whole
            tl.store(mass_ptr + cell * REGIONS + column, merged, mask=column < REGIONS)
            if ENTROPY:
                moment = tl.load(part_stat_ptr + part * 3 + 2, mask=there, other=0.0)
                # a split's moment is relative to its own maximum; a split without keys has l = 0 and moment = 0
                shifted = tl.sum(weight * (moment + tl.where(l > 0.0, m - top, 0.0) * l), 0)
                tl.store(entropy_ptr + cell, (seen * tl.log2(whole) - shifted) / whole * _LN2)


@dataclass(frozen=True)
class Tiles:
    """How a decode kernel is launched."""

    block_n: int
    num_warps: int
    num_stages: int


def tiles_for(head_dim: int, element_size: int, cache_size: int, hip: bool = torch.version.hip is not None) -> Tiles:
    """Keys per tile and stages, by the bytes of an element of the query and of the caches.

    Shared memory, not registers, is what limits the programs per multiprocessor: so the registers that the masses take
    cost no occupancy (see bench/results/aot.md). A load of page numbers comes before each of K and V, which is why two
    stages more make one more tile in flight.
    """
    if element_size == 4:
        tiles = Tiles(32 if head_dim <= 64 else 16, 4, 5)
    elif head_dim > 128:
        tiles = Tiles(16 if cache_size > 1 else 32, 4, 7)
    elif head_dim > 64:
        tiles = Tiles(64, 4, 5)
    else:
        tiles = Tiles(64, 4, 9 if cache_size > 1 else 7)
    return Tiles(max(tiles.block_n, 32), tiles.num_warps, 2) if hip else tiles


@dataclass(frozen=True)
class SplitScratch:
    """Where the splits of up to `rows` rows leave their parts: allocated once, kept between calls.

    acc: [rows, heads, splits, head_dim]; stat: [rows, heads, splits, 3]; mass: [rows, heads, splits, regions].
    """

    acc: torch.Tensor
    stat: torch.Tensor
    mass: torch.Tensor

    @property
    def splits(self) -> int:
        return self.acc.shape[2]

    @classmethod
    def allocate(
        cls, rows: int, heads: int, head_dim: int, regions: int, splits: int, device: torch.device | str
    ) -> SplitScratch:
        return cls(*(torch.empty(rows, heads, splits, last, device=device) for last in (head_dim, 3, max(regions, 1))))


def splits_for(rows: int, kv_heads: int, longest: int, processors: int, most: int = 32) -> int:
    """Splits per row that give every multiprocessor about two programs, and no split fewer than 256 keys."""
    wanted = -(-2 * processors // max(rows * kv_heads, 1))
    return max(1, min(wanted, longest // 256, most))


def decode_mass(
    output: torch.Tensor,
    mass: torch.Tensor | None,
    layer: int,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    row_slot: torch.Tensor | None = None,
    prompt_len: torch.Tensor | None = None,
    n_rows: torch.Tensor | None = None,
    bounds: torch.Tensor | None = None,
    *,
    scale: float,
    window: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    scratch: SplitScratch | None = None,
    tiles: Tiles | None = None,
) -> None:
    """Attention output of one query per row, and the masses of the rows that are probed, in place.

    output, query: [rows, heads, head_dim], any strides but a last one of 1. mass: [slots, steps, layers, heads,
    regions] float32, contiguous (None: plain attention, without row_slot, prompt_len, n_rows and bounds). key_cache,
    value_cache: [blocks, page, kv_heads, head_dim] in the query's type or an fp8, any strides but a last one of 1.
    block_table: [rows, pages] and seq_lens: [rows] int32, this step's token included; a row of length 0 gives zeros.
    row_slot: [rows] int32, -1 where the row is not probed. prompt_len, n_rows: [slots] int32. bounds: [slots,
    regions, 2] int32, half open key positions. The step is seq_len - prompt_len; outside 0..min(n_rows, steps)-1
    nothing is written. window: a query attends the keys at distance < window (None: all). softcap: 0 for none.
    alibi_slopes, sinks: [heads] float32. k_scale, v_scale: [1] float32, of fp8 caches. entropy: [slots, steps,
    layers, heads] float32, attention entropy in nats over the keys, where wanted. scratch: splits each row's keys
    among several programs.
    """
    rows, heads, head_dim = query.shape
    page, kv_heads = key_cache.shape[1], key_cache.shape[2]
    if rows == 0:
        return
    tiles = tiles or tiles_for(head_dim, query.element_size(), key_cache.element_size())
    regions = 1 if mass is None else mass.shape[4]
    splits = 1 if scratch is None else scratch.splits
    fp8 = key_cache.element_size() == 1
    group = heads // kv_heads
    parts = (None, None, None) if scratch is None else (scratch.acc, scratch.stat, scratch.mass)
    shared = {
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_N": tiles.block_n,
        "SPLITS": splits,
        "REGIONS": regions,
        "WIDTH": triton.next_power_of_2(regions),
        "MASS": mass is not None,
        "ENTROPY": mass is not None and entropy is not None,
        "WINDOW": window is not None,
        "SINKS": sinks is not None,
        "FP8": fp8,
    }
    steps, layers = (0, 0) if mass is None else (mass.shape[1], mass.shape[2])
    decode_kernel[(rows, kv_heads, splits)](
        output,
        mass,
        entropy,
        *parts,
        query,
        key_cache,
        value_cache,
        block_table,
        seq_lens,
        row_slot,
        prompt_len,
        n_rows,
        bounds,
        alibi_slopes,
        sinks,
        k_scale,
        v_scale,
        scale,
        softcap,
        window or 0,
        layer,
        steps,
        layers,
        *output.stride()[:2],
        *query.stride()[:2],
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        block_table.stride(0),
        GROUP=group,
        PAGE=page,
        BLOCK_M=max(16, triton.next_power_of_2(group)),
        SOFTCAP=softcap > 0.0,
        ALIBI=alibi_slopes is not None,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **shared,
    )
    if splits > 1:
        combine_kernel[(rows, heads)](
            output,
            mass,
            entropy,
            *parts,
            seq_lens,
            row_slot,
            prompt_len,
            n_rows,
            sinks,
            v_scale,
            window or 0,
            layer,
            steps,
            layers,
            *output.stride()[:2],
            BLOCK_S=triton.next_power_of_2(splits),
            num_warps=4,
            **shared,
        )
