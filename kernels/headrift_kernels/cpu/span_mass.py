"""Attention mass of key spans per head, for the measured queries of one layer's batch, from vLLM's x86 K cache.

The K cache is packed: within a (block, KV head) the keys lie as [head_dim, block_size], so a row holds one coordinate
of `block_size` neighbouring keys, and the dot products vectorise over keys.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import carray, cfunc

from headrift_kernels.cpu import pool
from headrift_kernels.cpu.compile import cache_folder, kernel
from headrift_kernels.cpu.math import LOG2E, exp2, to_float32

# Reassociation lets the sums vectorise; NaN and inf keep their meaning, so a poisoned key is never hidden.
_FAST = {"reassoc", "contract", "nsz", "arcp"}

# Columns of a measured query: batch row, token in the batch, recorder slot, step, number of keys up to its position.
ROW, TOKEN, SLOT, STEP, KEYS = range(5)

_ARGUMENTS = np.dtype(
    [
        *((name, np.int64) for name in ("mass", "slots", "steps", "layers", "heads", "regions", "layer")),
        *((name, np.int64) for name in ("query", "tokens", "query_stride", "kv_heads", "head_dim")),
        *((name, np.int64) for name in ("cache", "blocks", "block_stride", "head_stride", "page")),
        *((name, np.int64) for name in ("block_table", "rows", "table_stride", "measured", "n_measured", "bounds")),
        *((name, np.int64) for name in ("window", "alibi_slopes", "sinks")),
        *((name, np.float32) for name in ("scale", "softcap")),
    ]
)


@kernel()
def measured_queries(query_start_loc, seq_lens, row_slot, prompt_len, n_rows, steps):
    """[n, 5] int32 (ROW, TOKEN, SLOT, STEP, KEYS) of every query of a batch whose step is recorded, in batch order.

    query_start_loc: [batch+1], seq_lens: [batch] with this step's tokens, row_slot: [batch] (-1: not probed),
    prompt_len and n_rows: [slots], all int32; steps: the buffer's. A query at position p has step p - (prompt_len -
    1).
    """
    found = np.empty((query_start_loc[row_slot.shape[0]], 5), np.int32)
    n = 0
    for row in range(row_slot.shape[0]):
        slot = row_slot[row]
        if slot < 0:
            continue
        end = query_start_loc[row + 1]
        limit = min(n_rows[slot], steps)
        for token in range(query_start_loc[row], end):
            keys = seq_lens[row] - (end - token) + 1
            step = keys - prompt_len[slot]
            if 0 <= step < limit:
                found[n, ROW] = row
                found[n, TOKEN] = token
                found[n, SLOT] = slot
                found[n, STEP] = step
                found[n, KEYS] = keys
                n += 1
    return found[:n]


@kernel(fastmath=_FAST)
def _dot_products(q, keys, out):
    """out[g, j] = q[g] . key j for the keys of one packed block; head_dim is a multiple of 8, as all of vLLM's are.

    Eight coordinates at a time, so that the sums are read and written once for eight multiply-adds.
    """
    head_dim, page = keys.shape
    for g in range(q.shape[0]):
        for j in range(page):
            out[g, j] = np.float32(0.0)
    for d in range(0, head_dim, 8):
        for g in range(q.shape[0]):
            q0, q1, q2, q3 = q[g, d], q[g, d + 1], q[g, d + 2], q[g, d + 3]
            q4, q5, q6, q7 = q[g, d + 4], q[g, d + 5], q[g, d + 6], q[g, d + 7]
            for j in range(page):
                out[g, j] += (
                    q0 * to_float32(keys[d, j])
                    + q1 * to_float32(keys[d + 1, j])
                    + q2 * to_float32(keys[d + 2, j])
                    + q3 * to_float32(keys[d + 3, j])
                    + q4 * to_float32(keys[d + 4, j])
                    + q5 * to_float32(keys[d + 5, j])
                    + q6 * to_float32(keys[d + 6, j])
                    + q7 * to_float32(keys[d + 7, j])
                )


@kernel(fastmath=_FAST)
def _head_masses(scores, low, n, scale, softcap, slope, sink, spans, out):
    """out[r] = mass of keys spans[r, 0]..spans[r, 1]-1 among the keys low..n-1, given their raw dot products."""
    if softcap > 0.0 or slope != 0.0:
        for j in range(low, n):
            s = scores[j] * scale
            if softcap > 0.0:
                s = softcap * np.tanh(s / softcap)
            scores[j] = (s - slope * np.float32(n - 1 - j)) * LOG2E
    else:
        to_log2 = scale * LOG2E
        for j in range(low, n):
            scores[j] *= to_log2
    top = sink * LOG2E
    for j in range(low, n):
        top = max(top, scores[j])
    total = exp2(sink * LOG2E - top)
    for j in range(low, n):
        p = exp2(scores[j] - top)
        scores[j] = p
        total += p
    for r in range(spans.shape[0]):
        part = np.float32(0.0)
        for j in range(max(low, spans[r, 0]), min(n, spans[r, 1])):
            part += scores[j]
        out[r] = part / total


@kernel()
def _work(a, element):
    """This thread's (query, KV head) pairs; the heads of a pair share their keys. element: the cache's numpy type."""
    mass = carray(pool.pointer(a.mass), (a.slots, a.steps, a.layers, a.heads, a.regions), np.float32)
    bounds = carray(pool.pointer(a.bounds), (a.slots, a.regions, 2), np.int32)
    measured = carray(pool.pointer(a.measured), (a.n_measured, 5), np.int32)
    table = carray(pool.pointer(a.block_table), (a.rows, a.table_stride), np.int32)
    queries = carray(pool.pointer(a.query), (a.tokens, a.query_stride), element)
    slopes = carray(pool.pointer(a.alibi_slopes), a.heads, np.float32)
    sinks = carray(pool.pointer(a.sinks), a.heads, np.float32)
    cache = carray(pool.pointer(a.cache), a.blocks * a.block_stride, element)
    group = a.heads // a.kv_heads
    q = np.empty((group, a.head_dim), np.float32)
    for item in range(pool.thread_number(), a.n_measured * a.kv_heads, pool.thread_count()):
        found, kv_head = measured[item // a.kv_heads], item % a.kv_heads
        n = found[KEYS]
        low = max(0, n - a.window) if a.window > 0 else 0
        for g in range(group):
            for d in range(a.head_dim):
                q[g, d] = to_float32(queries[found[TOKEN], (kv_head * group + g) * a.head_dim + d])
        last_page = (n - 1) // a.page
        scores = np.empty((group, (last_page + 1) * a.page), np.float32)
        for page in range(low // a.page, last_page + 1):
            start = table[found[ROW], page] * a.block_stride + kv_head * a.head_stride
            keys = cache[start : start + a.head_dim * a.page].reshape((a.head_dim, a.page))
            _dot_products(q, keys, scores[:, page * a.page : (page + 1) * a.page])
        for g in range(group):
            head = kv_head * group + g
            slope = slopes[head] if a.alibi_slopes != 0 else np.float32(0.0)
            sink = sinks[head] if a.sinks != 0 else np.float32(-np.inf)
            out = mass[found[SLOT], found[STEP], a.layer, head]
            _head_masses(scores[g], low, n, a.scale, a.softcap, slope, sink, bounds[found[SLOT]], out)


with cache_folder():

    @cfunc(pool.BODY, cache=True)
    def _float32(data):
        _work(carray(data, 1, _ARGUMENTS)[0], np.float32)

    @cfunc(pool.BODY, cache=True)
    def _bfloat16(data):
        _work(carray(data, 1, _ARGUMENTS)[0], np.uint16)


def span_mass(
    mass: torch.Tensor,
    layer: int,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    measured: np.ndarray,
    bounds: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """Write each measured query's masses into the recorder's buffer, in place; nothing else is touched.

    mass: [slots, steps, layers, heads, regions] float32, contiguous. query: [tokens, heads, head_dim], heads contiguous
    within a token. key_cache: [blocks, kv_heads, head_dim, block_size], the last two contiguous; both float32 or both
    bfloat16. block_table: [batch, pages] int32. measured: from `measured_queries`. bounds: [slots, regions, 2] int32,
    half open key positions. window: a query attends the keys at distance < window (None: all). softcap: 0 for none.
    alibi_slopes, sinks: [heads] float32.
    """
    tokens, _, head_dim = query.shape
    blocks, kv_heads, _, page = key_cache.shape
    arguments = np.array(
        (
            *(mass.data_ptr(), *mass.shape, layer),
            *(query.data_ptr(), tokens, query.stride(0), kv_heads, head_dim),
            *(key_cache.data_ptr(), blocks, key_cache.stride(0), key_cache.stride(1), page),
            *(block_table.data_ptr(), block_table.shape[0], block_table.stride(0)),
            *(measured.ctypes.data, len(measured), bounds.data_ptr()),
            *(window or 0, _address(alibi_slopes), _address(sinks), scale, softcap),
        ),
        _ARGUMENTS,
    )
    pool.run(_bfloat16 if key_cache.dtype == torch.bfloat16 else _float32, arguments)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
