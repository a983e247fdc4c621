"""Paged attention, the mass of key spans and the entropy in one pass over K and V, from vLLM's x86 KV cache.

Within a (block, KV head) of the cache the keys lie packed as [head_dim, block_size], so that a row holds one
coordinate of `block_size` neighbouring keys, and the values as [block_size, head_dim]. The work is cut by keys, not
by queries: every thread gets the same number of blocks, and a query whose blocks fall to several threads is put
together afterwards.
"""

from __future__ import annotations

import struct
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc

from headrift_kernels.cpu import pool
from headrift_kernels.cpu.compile import cache_folder, kernel
from headrift_kernels.cpu.math import LN2, LOG2E, exp2, from_float32, to_float32
from headrift_kernels.cpu.queries import KEYS, ROW, SLOT, STEP, TOKEN, Queries
from headrift_kernels.cpu.simd import (
    KEY_TILE,
    LEAST_TILE,
    MOST_HEADS,
    VALUE_TILE,
    exponentials,
    sum_of_rows,
    sums_between,
)

# Sums may be reassociated, so that they vectorise; NaN keeps its meaning, so a poisoned key is never hidden.
_SUMS = {"reassoc", "contract", "nsz", "arcp"}

# What the kernel is told: first what stays the same for a layer, then what belongs to a call.
_FIXED = np.dtype(
    [
        *((name, np.int64) for name in ("mass", "slots", "steps", "layers", "heads", "regions", "layer", "bounds")),
        ("entropy", np.int64),
        *((name, np.int64) for name in ("cache", "block_stride", "head_stride", "kv_heads", "page", "head_dim")),
        *((name, np.int64) for name in ("window", "alibi_slopes", "sinks")),
        *((name, np.float32) for name in ("scale", "softcap")),
    ]
)
_OF_CALL = np.dtype(
    [
        *((name, np.int64) for name in ("query", "query_stride", "output", "output_stride", "table", "table_stride")),
        *((name, np.int64) for name in ("queries", "n_queries", "work", "longest")),
        *((name, np.int64) for name in ("scratch", "scratch_bytes", "parts")),
    ]
)
_ARGUMENTS = np.dtype([*_FIXED.descr, *_OF_CALL.descr])


def _packed(record: np.dtype) -> struct.Struct:
    return struct.Struct("".join({"i": "q", "f": "f"}[record[name].kind] for name in record.names or ()))


_pack_fixed, _pack_of_call = _packed(_FIXED).pack, _packed(_OF_CALL).pack

# Products of a query's and a key's coordinate that make another thread worth waking: some two microseconds of work.
_WORTH_A_THREAD = 1 << 16


@kernel(fastmath=_SUMS)
def _bend(scores, distance, softcap, slope):
    """Softcap and ALiBi on scores in base 2, in place; scores[j] belongs to the key `distance - j` before the query."""
    for j in range(scores.shape[0]):
        s = scores[j] / LOG2E
        if softcap > 0.0:
            s = softcap * np.tanh(s / softcap)
        scores[j] = (s - slope * np.float32(distance - j)) * LOG2E


@kernel()
def _hide(scores, start, end):
    """Scores of keys that the query does not attend."""
    for j in range(start, end):
        scores[j] = -np.float32(np.inf)


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


# The widths in which score rows and value rows are taken; the last is for what the wide ones leave over of either.
_wide_scores = sum_of_rows(KEY_TILE)
_wide_values = sum_of_rows(VALUE_TILE)
_thin_rows = sum_of_rows(LEAST_TILE)


@kernel()
def _floats(address, shape):
    return carray(pool.pointer(address), shape, np.float32)


@kernel()
def _part(a, thread, index):
    """Views of a thread's place for part 0 or 1: m, l, moment, value sums, masses. A third is never needed (see
    `_work`)."""
    group = a.heads // a.kv_heads
    at = a.scratch + thread * a.scratch_bytes + 4 * group * (a.head_dim + a.longest)
    at += 4 * index * group * (3 + a.head_dim + a.regions)
    sums_at = at + 12 * group
    return (
        _floats(at, group),
        _floats(at + 4 * group, group),
        _floats(at + 8 * group, group),
        _floats(sums_at, (group, a.head_dim)),
        _floats(sums_at + 4 * group * a.head_dim, (group, a.regions)),
    )


@kernel()
def _first_key(a, query):
    """The first key that a query attends."""
    return max(np.int64(query[KEYS]) - a.window, 0) if a.window > 0 else 0


@kernel()
def _takes_entropy(a, query):
    return a.entropy != 0 and query[SLOT] >= 0


@kernel()
def _block_table(a, query):
    return carray(pool.pointer(a.table + query[ROW] * a.table_stride * 4), a.table_stride, np.int32)


@kernel()
def _keys_at(a, size, query, kv_head, block):
    """Where the keys of a query's block lie; its values follow them."""
    return a.cache + (_block_table(a, query)[block] * a.block_stride + kv_head * a.head_stride) * size


@kernel()
def _attend_part(a, element, query, kv_head, first, past, next_at, room_at, m, l, moment, sums, masses):
    """What blocks first..past-1 contribute to one query's heads on one KV head.

    Leaves, per head, the largest score m (base 2), the sum l of 2**(score - m), and the value sums and span masses in
    units of 2**m; of a query whose entropy is taken also moment, the sum of 2**(score - m) * (score - m). next_at:
    what to fetch into the cache at the end. room_at: place for the query in float32, [group, head_dim], and the
    scores, [group, longest].
    """
    size = np.int64(4) if element is np.float32 else np.int64(2)
    group, head_dim, page = a.heads // a.kv_heads, a.head_dim, a.page
    low = _first_key(a, query)
    low, high = max(low, first * page), min(np.int64(query[KEYS]), past * page)
    if low >= high:
        m[:], l[:], moment[:] = np.float32(-1e30), np.float32(0.0), np.float32(0.0)
        sums[:], masses[:] = np.float32(0.0), np.float32(0.0)
        return
    q_at, row_bytes = room_at, np.int64(4 * head_dim)
    scores_at, score_bytes = room_at + group * row_bytes, np.int64(4 * a.longest)
    given_at = a.query + (query[TOKEN] * a.query_stride + kv_head * group * head_dim) * size
    given = carray(pool.pointer(given_at), group * head_dim, element)
    _scaled(given, a.scale * LOG2E, _floats(q_at, group * head_dim))

    first, past = low // page, (high + page - 1) // page
    base, half = first * page, head_dim * page * size
    for p in range(first, past):
        keys = _keys_at(a, size, query, kv_head, p)
        if p + 1 < past:
            ahead = _keys_at(a, size, query, kv_head, p + 1) - keys
        elif a.output != 0:
            ahead = _keys_at(a, size, query, kv_head, first) + half - keys
        else:
            ahead = next_at - keys
        tile: Any = np.int64(0)
        while tile < page:
            rows, out = keys + tile * size, scores_at + 4 * (p * page - base + tile)
            wide = tile + KEY_TILE <= page
            for g in range(0, group, MOST_HEADS):
                heads, fetch = np.int64(min(MOST_HEADS, group - g)), ahead if g == 0 else np.int64(0)
                x, to, step = q_at + g * row_bytes, out + g * score_bytes, page * size
                if wide:
                    _wide_scores(element, heads, x, row_bytes, rows, step, head_dim, to, score_bytes, 0, fetch)
                else:
                    _thin_rows(element, heads, x, row_bytes, rows, step, head_dim, to, score_bytes, 0, fetch)
            tile += KEY_TILE if wide else LEAST_TILE

    n = (past - first) * page
    for g in range(group):
        row = _floats(scores_at + g * score_bytes, n)
        slope = np.float32(0.0)
        if a.alibi_slopes != 0:
            slope = _floats(a.alibi_slopes, a.heads)[kv_head * group + g]
        if a.softcap > 0.0 or slope != 0.0:
            _bend(row, query[KEYS] - 1 - base, a.softcap, slope)
        _hide(row, 0, low - base)
        _hide(row, high - base, n)
    moments = moment.ctypes.data if _takes_entropy(a, query) else np.int64(0)
    exponentials(np.int64(group), scores_at, score_bytes, n, m.ctypes.data, l.ctypes.data, moments)
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
        values = _keys_at(a, size, query, kv_head, p) + half + skip * head_dim * size
        next_values = _keys_at(a, size, query, kv_head, p + 1) + half if p + 1 < past else next_at
        weights, onto = scores_at + 4 * (p * page - base + skip), np.int64(p > first)
        for g in range(0, group, MOST_HEADS):
            heads, fetch = np.int64(min(MOST_HEADS, group - g)), next_values - values if g == 0 else np.int64(0)
            x, out = weights + g * score_bytes, sums.ctypes.data + g * row_bytes
            column: Any = np.int64(0)
            while column < head_dim:
                rows, step, to = values + column * size, head_dim * size, out + 4 * column
                if column + VALUE_TILE <= head_dim:
                    _wide_values(element, heads, x, score_bytes, rows, step, n, to, row_bytes, onto, fetch)
                    column += VALUE_TILE
                else:
                    _thin_rows(element, heads, x, score_bytes, rows, step, n, to, row_bytes, onto, fetch)
                    column += LEAST_TILE


@kernel()
def _finish(a, element, query, kv_head, m, l, moment, sums, masses):
    """Divide by the whole sum, sinks included, and write the output and, if the query is measured, its numbers.

    With p_j = 2**(s_j - top) / total, the entropy -sum p_j log2 p_j is (log2(total) sum 2**(s_j - top) - moment) /
    total, moment relative to `top`; both terms are positive, so none costs the other precision.
    """
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
            if a.entropy != 0:
                bits = (np.log2(total) + top - m[g]) * l[g] - moment[g]
                _floats(a.entropy, cell + 1)[cell] = bits * factor * LN2
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
    m, l, moment, sums, masses = _part(a, 0, 0)
    open_item = np.int64(-1)
    for thread in range(threads):
        for index in range(2):
            item = parts[thread, index]
            if item < 0:
                continue
            if item != open_item:
                if open_item >= 0:
                    query, kv_head = queries[open_item // a.kv_heads], open_item % a.kv_heads
                    _finish(a, element, query, kv_head, m, l, moment, sums, masses)
                open_item = item
                m, l, moment, sums, masses = _part(a, thread, index)
                continue
            m_more, l_more, moment_more, sums_more, masses_more = _part(a, thread, index)
            for g in range(m.shape[0]):
                top = max(m[g], m_more[g])
                ours, theirs = exp2(m[g] - top), exp2(m_more[g] - top)
                if a.entropy != 0:
                    moment[g] = ours * (moment[g] + (m[g] - top) * l[g])
                    moment[g] += theirs * (moment_more[g] + (m_more[g] - top) * l_more[g])
                m[g], l[g] = top, l[g] * ours + l_more[g] * theirs
                for d in range(sums.shape[1]):
                    sums[g, d] = sums[g, d] * ours + sums_more[g, d] * theirs
                for r in range(masses.shape[1]):
                    masses[g, r] = masses[g, r] * ours + masses_more[g, r] * theirs
    if open_item >= 0:
        query, kv_head = queries[open_item // a.kv_heads], open_item % a.kv_heads
        _finish(a, element, query, kv_head, m, l, moment, sums, masses)


@kernel()
def _work(a, element):
    """One thread's blocks: finishes the queries it has all of, and leaves what it has of others in its parts.

    Only the first and the last query of a thread's stretch of blocks can be cut, so two parts are enough.
    """
    thread, threads = pool.thread_number(), pool.thread_count()
    size = np.int64(4) if element is np.float32 else np.int64(2)
    queries = carray(pool.pointer(a.queries), (a.n_queries, 5), np.int32)
    work = carray(pool.pointer(a.work), a.n_queries + 1, np.int64)
    parts = carray(pool.pointer(a.parts), (threads, 2), np.int64)[thread]
    parts[0], parts[1], used = -1, -1, 0
    unit = work[a.n_queries] * a.kv_heads * thread // threads
    end = work[a.n_queries] * a.kv_heads * (thread + 1) // threads
    if unit < end:
        i = _find(work, unit // a.kv_heads)
        kv_head, first = divmod(unit - work[i] * a.kv_heads, work[i + 1] - work[i])
    while unit < end:
        query, blocks = queries[i], work[i + 1] - work[i]
        taken = min(blocks - first, end - unit)
        unit += taken
        next_i, next_head = (i, kv_head + 1) if kv_head + 1 < a.kv_heads else (i + 1, np.int64(0))
        next_at = np.int64(0)
        if unit < end:
            next_at = _keys_at(a, size, queries[next_i], next_head, _first_key(a, queries[next_i]) // a.page)
        m, l, moment, sums, masses = _part(a, thread, used)
        room_at = a.scratch + thread * a.scratch_bytes
        _attend_part(a, element, query, kv_head, first, first + taken, next_at, room_at, m, l, moment, sums, masses)
        if taken == blocks:
            _finish(a, element, query, kv_head, m, l, moment, sums, masses)
        else:
            parts[used] = i * a.kv_heads + kv_head
            used += 1
        i, kv_head, first = next_i, next_head, np.int64(0)
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


class PagedAttention:
    """One layer's attention, span masses and entropies over vLLM's KV cache.

    All tensors are kept, and read or written in place by every `attend`.

    Args:
        mass: [slots, steps, layers, heads, regions] float32, contiguous: the buffer that `layer`'s masses are written
            to.
        layer: index into `mass`.
        kv_cache: vLLM's [blocks, kv_heads, block_size, 2 * head_dim], the last two contiguous, block_size and head_dim
            multiples of 16, float32 or bfloat16.
        bounds: [slots, regions, 2] int32, half open key positions.
        scale: factor of the scores.
        window: a query attends the keys at distance < window; None: all.
        softcap: 0 for none.
        alibi_slopes, sinks: [heads] float32.
        entropy: [slots, steps, layers, heads] float32, contiguous: the buffer that the entropy of each head's attention
            over its keys is written to, in nats; a sink's share adds no term. None: it is not taken.

    Raises:
        ValueError: the cache's block size or head size is not one that the kernel reads, or `entropy` does not have
            the shape of `mass`.
    """

    def __init__(
        self,
        mass: torch.Tensor,
        layer: int,
        kv_cache: torch.Tensor,
        bounds: torch.Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float = 0.0,
        alibi_slopes: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        entropy: torch.Tensor | None = None,
    ):
        if entropy is not None and entropy.shape != mass.shape[:4]:
            raise ValueError(f"entropy of shape {list(entropy.shape)} beside mass of shape {list(mass.shape)}")
        self.kv_cache = kv_cache
        self._kept = (mass, bounds, alibi_slopes, sinks, entropy)
        heads, regions = mass.shape[3:]
        kv_heads, page, head_dim = kv_cache.shape[1], kv_cache.shape[2], kv_cache.shape[3] // 2
        if page % LEAST_TILE or head_dim % LEAST_TILE:
            raise ValueError(
                f"a KV cache of block size {page} and head size {head_dim}: both must be multiples of {LEAST_TILE}"
            )
        self._fixed = _pack_fixed(
            *(mass.data_ptr(), *mass.shape, layer, bounds.data_ptr(), _address(entropy)),
            *(kv_cache.data_ptr(), kv_cache.stride(0), kv_cache.stride(1), kv_heads, page, head_dim),
            *(window or 0, _address(alibi_slopes), _address(sinks), scale, softcap),
        )
        self._body = body_for(kv_cache.dtype).address
        self._group = heads // kv_heads
        # `sums_between` reads past the end of the last row of scores: the parts lie there.
        self._floats = self._group * (head_dim + 2 * (3 + head_dim + regions)) + LEAST_TILE
        self._block_work = heads * page * head_dim

    def attend(
        self,
        query: torch.Tensor,
        block_table: torch.Tensor,
        queries: Queries,
        *,
        output: torch.Tensor | None = None,
        threads: int | None = None,
    ) -> None:
        """Attend for the queries listed and write the numbers of those that are measured; nothing else is touched.

        query: [tokens, heads, head_dim] of the cache's type, heads contiguous within a token. block_table: [batch,
        pages] int32. output: like query, written at the queries' tokens; None to take masses only. threads: of torch's
        pool; by default all that the work is worth.
        """
        if threads is None:
            threads = min(torch.get_num_threads(), 1 + queries.blocks * self._block_work // _WORTH_A_THREAD)
        floats = self._floats + self._group * queries.longest
        scratch, parts = _workspace.take(threads, floats)
        of_call = _pack_of_call(
            *(query.data_ptr(), query.stride(0)),
            *((0, 0) if output is None else (output.data_ptr(), output.stride(0))),
            *(block_table.data_ptr(), block_table.stride(0)),
            *(*queries.addresses, queries.longest, scratch, 4 * floats, parts),
        )
        pool.run(self._body, self._fixed + of_call, threads)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
