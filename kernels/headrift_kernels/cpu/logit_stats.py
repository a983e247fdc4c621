"""Next-token entropy, top-1 probability and margin of logit rows, each row read once, nothing of its size allocated."""

from __future__ import annotations

import numpy as np
from numba import prange

from headrift_kernels.cpu.compile import kernel
from headrift_kernels.cpu.math import LOG2E, exp2

_CHUNK = 1024
_FAST = {"reassoc", "contract", "nsz", "arcp"}


@kernel(fastmath=_FAST)
def _row(logits, out):
    """out = (entropy in nats, top-1 probability, top-1 minus top-2 probability) of one row, online over chunks.

    With m the running maximum, l = sum e^(x-m) and t = sum e^(x-m) (x-m): entropy = log l - t / l.
    """
    first = np.float32(-np.inf)
    second = np.float32(-np.inf)
    total = np.float64(0.0)
    moment = np.float64(0.0)
    for start in range(0, logits.shape[0], _CHUNK):
        end = min(start + _CHUNK, logits.shape[0])
        top = logits[start]
        for j in range(start + 1, end):
            top = max(top, logits[j])
        if top == -np.inf:
            continue
        before = first
        if top > second:
            for j in range(start, end):
                x = logits[j]
                if x > first:
                    second = first
                    first = x
                elif x > second:
                    second = x
        if before > -np.inf and first > before:
            shift = np.float64(before - first)
            moment = np.exp(shift) * (moment + shift * total)
            total *= np.exp(shift)
        l = np.float32(0.0)
        t = np.float32(0.0)
        for j in range(start, end):
            s = logits[j] - first
            p = exp2(s * LOG2E)
            l += p
            t += p * max(s, np.float32(-1e4))
        total += l
        moment += t
    out[0] = np.log(total) - moment / total
    out[1] = 1.0 / total
    out[2] = out[1] - (np.exp(np.float64(second - first)) / total)


@kernel(parallel=True)
def logit_statistics(stats, logits, row_slot, row_step, n_rows):
    """Write the statistics of each probed row's next-token distribution into the recorder's buffer, in place.

    stats: [slots, steps, 3] float32 (entropy in nats, top-1 probability, margin). logits: [rows, vocab] float32.
    row_slot, row_step: [rows] int32, the row's slot (-1: not probed) and the step of its last query; rows before step 0
    or past the buffer are skipped. n_rows: [slots] int32.
    """
    for row in prange(logits.shape[0]):
        slot = row_slot[row]
        if slot >= 0:
            step = row_step[row]
            if 0 <= step < min(n_rows[slot], stats.shape[1]):
                _row(logits[row], stats[slot, step])
