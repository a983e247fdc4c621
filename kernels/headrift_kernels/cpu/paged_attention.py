"""Paged attention and the mass of key spans in one pass over K and V, from vLLM's x86 KV cache.

Within a (block, KV head) of the cache the keys lie packed as [head_dim, block_size], so that a row holds one
coordinate of `block_size` neighbouring keys, and the values as [block_size, head_dim]. The work is cut by keys, not
by queries: every thread gets the same number of blocks, and a query whose blocks fall to several threads is put
together afterwards.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc

from headrift_kernels.cpu import pool
from headrift_kernels.cpu.compile import cache_folder, kernel
from headrift_kernels.cpu.math import LOG2E, exp2, from_float32, to_float32
from headrift_kernels.cpu.simd import (
    KEY_TILE,
    LEAST_TILE,
    MOST_HEADS,
    VALUE_TILE,
    largest_of,
    sum_of_rows,
    sums_between,
)

# Sums may be reassociated, so that they vectorise; NaN keeps its meaning, so a poisoned key is never hidden.
_SUMS = {"reassoc", "contract", "nsz", "arcp"}

# Columns of a query: batch row, token in the batch, recorder slot (-1: not measured), step, keys up to its position.
ROW, TOKEN, SLOT, STEP, KEYS = range(5)

_ARGUMENTS = np.dtype(
    [
        *((name, np.int64) for name in ("mass", "slots", "steps", "layers", "heads", "regions", "layer", "bounds")),
        *((name, np.int64) for name in ("query", "tokens", "query_stride", "output", "output_stride", "head_dim")),
        *(
            (name, np.int64)
            for name in ("cache", "block_stride", "head_stride", "kv_heads", "page", "table", "rows", "table_stride")
        ),
        *((name, np.int64) for name in ("queries", "n_queries", "work", "window", "alibi_slopes", "sinks")),
        *((name, np.int64) for name in ("scratch", "scratch_bytes", "longest", "parts")),
        *((name, np.float32) for name in ("scale", "softcap")),
    ]
)
_PACKED = struct.Struct("".join({"i": "q", "f": "f"}[_ARGUMENTS[name].kind] for name in _ARGUMENTS.names or ()))


@kernel()
def measured_queries(query_start_loc, seq_lens, row_slot, prompt_len, n_rows, steps, decode_rows):
    """[n, 5] int32 (ROW, TOKEN, SLOT, STEP, KEYS) of every query of a batch whose step is recorded, in batch order.

    query_start_loc: [batch+1], seq_lens: [batch] with this step's tokens, row_slot: [batch] (-1: not probed),
    prompt_len and n_rows: [slots], all int32; steps: the buffer's. A query at position p has step p - (prompt_len - 1).
    decode_rows: list the query of every row with a single one too, measured or not (SLOT -1).
    """
    found = np.empty((query_start_loc[row_slot.shape[0]], 5), np.int32)
    n = 0
    for row in range(row_slot.shape[0]):
        slot = row_slot[row]
        start, end = query_start_loc[row], query_start_loc[row + 1]
        alone = decode_rows and end - start == 1
        if slot < 0 and not alone:
            continue
        for token in range(start, end):
            keys = seq_lens[row] - (end - token) + 1
            step = keys - prompt_len[slot] if slot >= 0 else -1
            measured = slot >= 0 and 0 <= step < min(n_rows[slot], steps)
            if measured or alone:
                found[n, ROW] = row
                found[n, TOKEN] = token
                found[n, SLOT] = slot if measured else -1
                found[n, STEP] = step
                found[n, KEYS] = keys
                n += 1
    return found[:n]


@kernel(fastmath=_SUMS)
def _bend(scores, distance, softcap, slope):
    """Softcap and ALiBi on scores in base 2, in place; scores[j] belongs to the key `distance - j` before the query."""
    for j in range(scores.shape[0]):
        s = scores[j] / LOG2E
        if softcap > 0.0:
            s = softcap * np.tanh(s / softcap)
        scores[j] = (s - slope * np.float32(distance - j)) * LOG2E


@kernel(fastmath=_SUMS)
def _exponentials(scores, top):
    """2**(score - top) in place, and their sum."""
    total = np.float32(0.0)
    for j in range(scores.shape[0]):
        p = exp2(scores[j] - top)
        scores[j] = p
        total += p
    return total


@kernel()
def _scaled(values, factor, out):
    for j in range(out.shape[0]):
        out[j] = to_float32(values[j]) * factor


@kernel()
def _rounded(values, factor, out, element):
    for j in range(out.shape[0]):
        out[j] = from_float32(values[j] * factor, element)


@kernel()
def _find(work, unit):
    """The query that a unit of work belongs to: the last i with work[i] <= unit."""
    low, high = 0, work.shape[0] - 2
    while low < high:
        middle = (low + high + 1) // 2
        if work[middle] <= unit:
            low = middle
        else:
            high = middle - 1
    return low


# Score rows, and the two widths in which value rows are taken.
_key_products = sum_of_rows(KEY_TILE, onto=False)
_wide_values = sum_of_rows(VALUE_TILE, onto=True)
_thin_values = sum_of_rows(LEAST_TILE, onto=True)


@kernel()
def _floats(address, shape):
    return carray(pool.pointer(address), shape, np.float32)


@kernel()
def _part(a, thread, index):
    """Views of a thread's place for part 0 or 1: m, l, value sums, masses. A third is never needed (see `_work`)."""
    group = a.heads // a.kv_heads
    at = a.scratch + thread * a.scratch_bytes + 4 * group * (a.head_dim + a.longest)
    at += 4 * index * group * (2 + a.head_dim + a.regions)
    sums_at = at + 8 * group
    return (
        _floats(at, group),
        _floats(at + 4 * group, group),
        _floats(sums_at, (group, a.head_dim)),
        _floats(sums_at + 4 * group * a.head_dim, (group, a.regions)),
    )


@kernel()
def _attend_part(a, element, query, kv_head, first, past, room_at, m, l, sums, masses):
    """What blocks first..past-1 contribute to one query's heads on one KV head.

    Leaves, per head, the largest score m (base 2), the sum l of 2**(score - m), and the value sums and span masses in
    units of 2**m. room_at: place for the query in float32, [group, head_dim], and the scores, [group, longest].
    """
    size = np.int64(4) if element is np.float32 else np.int64(2)
    group, head_dim, page = a.heads // a.kv_heads, a.head_dim, a.page
    low = max(query[KEYS] - a.window, 0) if a.window > 0 else 0
    low, high = max(low, first * page), min(np.int64(query[KEYS]), past * page)
    for g in range(group):
        m[g], l[g] = np.float32(-1e30), np.float32(0.0)
        for d in range(head_dim):
            sums[g, d] = np.float32(0.0)
        for r in range(a.regions):
            masses[g, r] = np.float32(0.0)
    if low >= high:
        return
    table = carray(pool.pointer(a.table + query[ROW] * a.table_stride * 4), a.table_stride, np.int32)
    q_at, row_bytes = room_at, np.int64(4 * head_dim)
    scores_at, score_bytes = room_at + group * row_bytes, np.int64(4 * a.longest)
    given_at = a.query + (query[TOKEN] * a.query_stride + kv_head * group * head_dim) * size
    given = carray(pool.pointer(given_at), group * head_dim, element)
    _scaled(given, a.scale * LOG2E, _floats(q_at, group * head_dim))

    first, past = low // page, (high + page - 1) // page
    base, block = first * page, a.block_stride * size
    key_half = a.cache + kv_head * a.head_stride * size
    for p in range(first, past):
        keys = key_half + table[p] * block
        ahead = (table[p + 1] - table[p]) * block if p + 1 < past else np.int64(0)
        for tile in range(0, page, KEY_TILE):
            out = scores_at + 4 * (p * page - base + tile)
            for g in range(0, group, MOST_HEADS):
                heads, fetch = np.int64(min(MOST_HEADS, group - g)), ahead if g == 0 else np.int64(0)
                x, rows = q_at + g * row_bytes, keys + tile * size
                _key_products(
                    element, heads, x, row_bytes, rows, page * size, head_dim, out + g * score_bytes, score_bytes, fetch
                )

    for g in range(group):
        row_at = scores_at + g * score_bytes + 4 * (low - base)
        row = _floats(row_at, high - low)
        slope = np.float32(0.0)
        if a.alibi_slopes != 0:
            slope = _floats(a.alibi_slopes, a.heads)[kv_head * group + g]
        if a.softcap > 0.0 or slope != 0.0:
            _bend(row, query[KEYS] - 1 - low, a.softcap, slope)
        m[g] = largest_of(row_at, high - low)
        l[g] = _exponentials(row, m[g])
    if query[SLOT] >= 0:
        bounds = carray(pool.pointer(a.bounds + 8 * query[SLOT] * a.regions), (a.regions, 2), np.int32)
        for r in range(a.regions):
            start, end = max(np.int64(bounds[r, 0]), low) - base, min(np.int64(bounds[r, 1]), high) - base
            out = masses.ctypes.data + 4 * r
            sums_between(np.int64(group), scores_at, score_bytes, start, end, out, np.int64(4 * a.regions))

    if a.output == 0:
        return
    for p in range(first, past):
        skip = max(low - p * page, 0)
        n = min(high - p * page, page) - skip
        values = key_half + table[p] * block + (head_dim * page + skip * head_dim) * size
        ahead = (table[p + 1] - table[p]) * block - skip * head_dim * size if p + 1 < past else np.int64(0)
        weights = scores_at + 4 * (p * page - base + skip)
        for g in range(0, group, MOST_HEADS):
            heads, fetch = np.int64(min(MOST_HEADS, group - g)), ahead if g == 0 else np.int64(0)
            x, out = weights + g * score_bytes, sums.ctypes.data + g * row_bytes
            column: Any = np.int64(0)
            while column < head_dim:
                rows, step = values + column * size, head_dim * size
                if column + VALUE_TILE <= head_dim:
                    _wide_values(element, heads, x, score_bytes, rows, step, n, out + 4 * column, row_bytes, fetch)
                    column += VALUE_TILE
                else:
                    _thin_values(element, heads, x, score_bytes, rows, step, n, out + 4 * column, row_bytes, fetch)
                    column += LEAST_TILE


@kernel()
def _finish(a, element, query, kv_head, m, l, sums, masses):
    """Divide by the whole sum, sinks included, and write the output and, where the query is measured, the masses."""
    group, head_dim = a.heads // a.kv_heads, a.head_dim
    for g in range(group):
        head = kv_head * group + g
        top, total = m[g], l[g]
        if a.sinks != 0:
            sink = _floats(a.sinks, a.heads)[head] * LOG2E
            top = max(m[g], sink)
            total = l[g] * exp2(m[g] - top) + exp2(sink - top)
        factor = exp2(m[g] - top) / total
        if query[SLOT] >= 0:
            cell = ((query[SLOT] * a.steps + query[STEP]) * a.layers + a.layer) * a.heads + head
            mass = _floats(a.mass + 4 * cell * a.regions, a.regions)
            for r in range(a.regions):
                mass[r] = masses[g, r] * factor
        if a.output != 0:
            at = a.output + (query[TOKEN] * a.output_stride + head * head_dim) * (4 if element is np.float32 else 2)
            _rounded(sums[g], factor, carray(pool.pointer(at), head_dim, element), element)


@kernel()
def _join(a, element, threads):
    """Put together the queries whose blocks fell to several threads; parts come in the order of their keys."""
    queries = carray(pool.pointer(a.queries), (a.n_queries, 5), np.int32)
    parts = carray(pool.pointer(a.parts), (threads, 2), np.int64)
    m, l, sums, masses = _part(a, 0, 0)
    open_item = np.int64(-1)
    for thread in range(threads):
        for index in range(2):
            item = parts[thread, index]
            if item < 0:
                continue
            if item != open_item:
                if open_item >= 0:
                    _finish(a, element, queries[open_item // a.kv_heads], open_item % a.kv_heads, m, l, sums, masses)
                open_item = item
                m, l, sums, masses = _part(a, thread, index)
                continue
            m_more, l_more, sums_more, masses_more = _part(a, thread, index)
            for g in range(m.shape[0]):
                top = max(m[g], m_more[g])
                ours, theirs = exp2(m[g] - top), exp2(m_more[g] - top)
                m[g], l[g] = top, l[g] * ours + l_more[g] * theirs
                for d in range(sums.shape[1]):
                    sums[g, d] = sums[g, d] * ours + sums_more[g, d] * theirs
                for r in range(masses.shape[1]):
                    masses[g, r] = masses[g, r] * ours + masses_more[g, r] * theirs
    if open_item >= 0:
        _finish(a, element, queries[open_item // a.kv_heads], open_item % a.kv_heads, m, l, sums, masses)


@kernel()
def _work(a, element):
    """One thread's blocks: finishes the queries it has all of, and leaves what it has of others in its parts.

    Only the first and the last query of a thread's stretch of blocks can be cut, so two parts are enough.
    """
    thread, threads = pool.thread_number(), pool.thread_count()
    queries = carray(pool.pointer(a.queries), (a.n_queries, 5), np.int32)
    work = carray(pool.pointer(a.work), a.n_queries + 1, np.int64)
    parts = carray(pool.pointer(a.parts), (threads, 2), np.int64)[thread]
    parts[0], parts[1], used = -1, -1, 0
    unit = work[a.n_queries] * a.kv_heads * thread // threads
    end = work[a.n_queries] * a.kv_heads * (thread + 1) // threads
    while unit < end:
        i = _find(work, unit // a.kv_heads)
        blocks = work[i + 1] - work[i]
        kv_head, first = divmod(unit - work[i] * a.kv_heads, blocks)
        taken = min(blocks - first, end - unit)
        m, l, sums, masses = _part(a, thread, used)
        room_at = a.scratch + thread * a.scratch_bytes
        _attend_part(a, element, queries[i], kv_head, first, first + taken, room_at, m, l, sums, masses)
        if taken == blocks:
            _finish(a, element, queries[i], kv_head, m, l, sums, masses)
        else:
            parts[used] = i * a.kv_heads + kv_head
            used += 1
        unit += taken
    pool.wait_for_all()
    if thread == 0:
        _join(a, element, threads)


@cache
def body_for(dtype: torch.dtype) -> Any:
    """The compiled body for a cache of float32 or bfloat16: some 6 s at the first call ever, then from a cache."""
    with cache_folder():
        if dtype == torch.bfloat16:

            @cfunc(pool.BODY, cache=True)
            def body_bfloat16(data):
                _work(carray(data, 1, _ARGUMENTS)[0], np.uint16)

            return body_bfloat16

        @cfunc(pool.BODY, cache=True)
        def body_float32(data):
            _work(carray(data, 1, _ARGUMENTS)[0], np.float32)

        return body_float32


class Workspace:
    """Room for the threads' scores and unfinished queries; it grows when it must and is kept."""

    def __init__(self) -> None:
        self._sizes = (0, 0)
        self._addresses = (0, 0)

    def take(self, threads: int, floats: int) -> tuple[int, int]:
        """Addresses of `threads * floats` float32 and `2 * threads` int64, holding anything."""
        if threads > self._sizes[0] or threads * floats > self._sizes[1]:
            self._sizes = max(threads, self._sizes[0]), max(threads * floats, self._sizes[1])
            self._parts = np.empty(2 * self._sizes[0], np.int64)
            self._floats = np.empty(self._sizes[1], np.float32)
            self._addresses = self._floats.ctypes.data, self._parts.ctypes.data
        return self._addresses


_workspace = Workspace()


@dataclass(frozen=True, slots=True)
class Queries:
    """The queries of one step, worked out once for all layers.

    table: [n, 5] int32 (ROW, TOKEN, SLOT, STEP, KEYS). work: [n + 1] int64 running number of the cache blocks they
    attend, by which the work is shared out. longest: keys in the blocks of the longest one. addresses: of table,
    their number, and of work, as the kernel takes them.
    """

    table: np.ndarray
    work: np.ndarray
    longest: int
    addresses: tuple[int, int, int]

    @classmethod
    def of(cls, table: np.ndarray, page: int) -> Queries:
        """From `measured_queries`, at least one, and the size of a cache block."""
        blocks = (table[:, KEYS].astype(np.int64) + page - 1) // page
        work = np.concatenate([np.zeros(1, np.int64), np.cumsum(blocks)])
        addresses = (table.ctypes.data, len(table), work.ctypes.data)
        return cls(table, work, int(blocks.max()) * page, addresses)

    def __len__(self) -> int:
        return len(self.table)


def attend(
    mass: torch.Tensor,
    layer: int,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    queries: Queries,
    bounds: torch.Tensor,
    *,
    output: torch.Tensor | None = None,
    scale: float,
    window: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    threads: int | None = None,
) -> None:
    """Attend for the queries listed and write the masses of those that are measured; nothing else is touched.

    mass: [slots, steps, layers, heads, regions] float32, contiguous. query: [tokens, heads, head_dim], heads
    contiguous within a token. kv_cache: vLLM's [blocks, kv_heads, block_size, 2 * head_dim], the last two contiguous,
    the block size a multiple of 32 and head_dim of 16. Both float32 or both bfloat16. block_table: [batch, pages]
    int32. bounds: [slots, regions, 2] int32, half open key positions. output: [tokens, heads, head_dim] of the same
    type as query, written at the queries' tokens; None to take masses only. window: a query attends the keys at
    distance < window (None: all). softcap: 0 for none. alibi_slopes, sinks: [heads] float32. threads: of torch's
    pool, all by default.
    """
    tokens, heads, head_dim = query.shape
    _, kv_heads, page, _ = kv_cache.shape
    group, threads = heads // kv_heads, threads or torch.get_num_threads()
    # `sums_between` reads past the end of the last row of scores: the parts lie there.
    floats = group * (head_dim + queries.longest + 2 * (2 + head_dim + mass.shape[4])) + LEAST_TILE
    scratch, parts = _workspace.take(threads, floats)
    arguments = _PACKED.pack(
        *(mass.data_ptr(), *mass.shape, layer, bounds.data_ptr()),
        *(query.data_ptr(), tokens, query.stride(0)),
        *((0, 0) if output is None else (output.data_ptr(), output.stride(0))),
        *(head_dim, kv_cache.data_ptr(), kv_cache.stride(0), kv_cache.stride(1), kv_heads, page),
        *(block_table.data_ptr(), block_table.shape[0], block_table.stride(0)),
        *queries.addresses,
        *(window or 0, _address(alibi_slopes), _address(sinks)),
        *(scratch, 4 * floats, queries.longest, parts, scale, softcap),
    )
    pool.run(body_for(kv_cache.dtype), arguments, threads)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
