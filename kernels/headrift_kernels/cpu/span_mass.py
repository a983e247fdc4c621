"""Attention mass of key spans per head, for the measured queries of one layer's batch, from vLLM's x86 K cache.

The K cache is packed: within a (block, KV head) the keys lie as [head_dim, block_size], so a row holds one coordinate of
`block_size` neighbouring keys and the dot products vectorise over keys.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from headrift_kernels.cpu.compile import kernel
from headrift_kernels.cpu.math import LOG2E, exp2, to_float32

# Reassociation lets the sums vectorise; NaN and inf keep their meaning, so an unwritten or poisoned key is never hidden.
_FAST = {"reassoc", "contract", "nsz", "arcp"}


@kernel(fastmath=_FAST)
def _scores(q, keys, out):
    """out[g, j] = q[g] . key j for the keys of one packed block. head_dim is a multiple of 8 (vLLM's CPU backend: of 16).

    Eight coordinates at a time, so that the sums are read and written once for eight multiply-adds.
    """
    head_dim, page = keys.shape
    for g in range(q.shape[0]):
        for j in range(page):
            out[g, j] = np.float32(0.0)
    for d in range(0, head_dim, 8):
        for g in range(q.shape[0]):
            a, b, c, e = q[g, d], q[g, d + 1], q[g, d + 2], q[g, d + 3]
            s, t, u, v = q[g, d + 4], q[g, d + 5], q[g, d + 6], q[g, d + 7]
            for j in range(page):
                out[g, j] += (
                    a * to_float32(keys[d, j])
                    + b * to_float32(keys[d + 1, j])
                    + c * to_float32(keys[d + 2, j])
                    + e * to_float32(keys[d + 3, j])
                    + s * to_float32(keys[d + 4, j])
                    + t * to_float32(keys[d + 5, j])
                    + u * to_float32(keys[d + 6, j])
                    + v * to_float32(keys[d + 7, j])
                )


@kernel(fastmath=_FAST)
def _head_masses(scores, low, n, scale, softcap, slope, sink, spans, out):
    """out[r] = mass of the keys spans[r, 0]..spans[r, 1]-1 among keys low..n-1, given their raw dot products."""
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
    top = scores[low]
    for j in range(low + 1, n):
        top = max(top, scores[j])
    sink_log2 = sink * LOG2E
    top = max(top, sink_log2)
    total = np.float32(0.0)
    for j in range(low, n):
        p = exp2(scores[j] - top)
        scores[j] = p
        total += p
    total += exp2(sink_log2 - top)
    for r in range(spans.shape[0]):
        part = np.float32(0.0)
        for j in range(max(low, spans[r, 0]), min(n, spans[r, 1])):
            part += scores[j]
        out[r] = part / total


@kernel()
def _measured(query_start_loc, seq_lens, row_slot, prompt_len, n_rows, max_rows):
    """[n, 4] (row, token, slot, step) of every query whose step the buffer keeps."""
    found = np.empty((query_start_loc[row_slot.shape[0]], 4), np.int64)
    n = 0
    for row in range(row_slot.shape[0]):
        slot = row_slot[row]
        if slot < 0:
            continue
        end = query_start_loc[row + 1]
        limit = min(n_rows[slot], max_rows)
        for token in range(query_start_loc[row], end):
            step = seq_lens[row] - (end - token) - (prompt_len[slot] - 1)
            if 0 <= step < limit:
                found[n, 0] = row
                found[n, 1] = token
                found[n, 2] = slot
                found[n, 3] = step
                n += 1
    return found[:n]


@kernel(parallel=True)
def span_mass(
    mass,
    layer,
    query,
    key_cache,
    block_table,
    query_start_loc,
    seq_lens,
    row_slot,
    prompt_len,
    n_rows,
    bounds,
    scale,
    window,
    softcap,
    alibi_slopes,
    sinks,
):
    """Write each measured query's masses into the recorder's buffer, in place; nothing else is touched.

    mass: [slots, steps, layers, heads, regions] float32. layer: int. query: [tokens, heads, head_dim] and key_cache:
    [blocks, kv_heads, head_dim, block_size], both float32 or bfloat16 seen as uint16. block_table: [batch, pages] int32.
    query_start_loc: [batch+1], seq_lens: [batch], row_slot: [batch] int32 (-1: not probed). prompt_len, n_rows: [slots]
    int32. bounds: [slots, regions, 2] int32 key positions, half open. window: keys at distance < window, -1 for all.
    softcap: 0 for none. alibi_slopes, sinks: [heads] float32, or empty for none.
    """
    found = _measured(query_start_loc, seq_lens, row_slot, prompt_len, n_rows, mass.shape[1])
    kv_heads, head_dim, page = key_cache.shape[1], key_cache.shape[2], key_cache.shape[3]
    group = query.shape[1] // kv_heads
    for item in prange(found.shape[0] * kv_heads):
        i, kv_head = item // kv_heads, item % kv_heads
        row, token, slot, step = found[i, 0], found[i, 1], found[i, 2], found[i, 3]
        n = step + prompt_len[slot]
        low = max(0, n - window) if window > 0 else 0
        q = np.empty((group, head_dim), np.float32)
        for g in range(group):
            for d in range(head_dim):
                q[g, d] = to_float32(query[token, kv_head * group + g, d])
        last_page = (n - 1) // page
        scores = np.empty((group, (last_page + 1) * page), np.float32)
        for p in range(low // page, last_page + 1):
            _scores(q, key_cache[block_table[row, p], kv_head], scores[:, p * page : (p + 1) * page])
        for g in range(group):
            head = kv_head * group + g
            slope = alibi_slopes[head] if alibi_slopes.shape[0] > 0 else np.float32(0.0)
            sink = sinks[head] if sinks.shape[0] > 0 else np.float32(-np.inf)
            _head_masses(
                scores[g],
                low,
                n,
                np.float32(scale),
                np.float32(softcap),
                slope,
                sink,
                bounds[slot],
                mass[slot, step, layer, head],
            )
