"""Next-token entropy, top-1 probability and margin of logit rows, each row read once, nothing of its size allocated."""

from __future__ import annotations

import struct
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc

from headrift_kernels.cpu import pool
from headrift_kernels.cpu.compile import cache_folder, kernel
from headrift_kernels.cpu.math import LOG2E, exp2

_CHUNK = 1024
_ARGUMENTS = np.dtype(
    [
        (name, np.int64)
        for name in ("stats", "slots", "steps", "logits", "rows", "stride", "vocab", "row_slot", "row_step", "n_rows")
    ]
)
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


@kernel()
def _work(a):
    """This thread's rows."""
    stats = carray(pool.pointer(a.stats), (a.slots, a.steps, 3), np.float32)
    logits = carray(pool.pointer(a.logits), (a.rows, a.stride), np.float32)
    row_slot = carray(pool.pointer(a.row_slot), a.rows, np.int32)
    row_step = carray(pool.pointer(a.row_step), a.rows, np.int32)
    n_rows = carray(pool.pointer(a.n_rows), a.slots, np.int32)
    for row in range(pool.thread_number(), a.rows, pool.thread_count()):
        slot, step = row_slot[row], row_step[row]
        if slot >= 0 and 0 <= step < min(n_rows[slot], a.steps):
            _row(logits[row, : a.vocab], stats[slot, step])


@cache
def _body() -> Any:
    with cache_folder():

        @cfunc(pool.BODY, cache=True)
        def body(data):
            _work(carray(data, 1, _ARGUMENTS)[0])

        return body


def logit_statistics(
    stats: torch.Tensor,
    logits: torch.Tensor,
    row_slot: torch.Tensor,
    row_step: torch.Tensor,
    n_rows: torch.Tensor,
) -> None:
    """Write the statistics of each probed row's next-token distribution into the recorder's buffer, in place.

    stats: [slots, steps, 3] float32 (entropy in nats, top-1 probability, margin). logits: [rows, vocab] float32, rows
    contiguous. row_slot, row_step: [rows] int32, the row's slot (-1: not probed) and the step of its last query; rows
    before step 0 or past the buffer are skipped. n_rows: [slots] int32.
    """
    arguments = struct.pack(
        f"{len(_ARGUMENTS.names or ())}q",
        *(stats.data_ptr(), stats.shape[0], stats.shape[1]),
        *(logits.data_ptr(), logits.shape[0], logits.stride(0), logits.shape[1]),
        *(row_slot.data_ptr(), row_step.data_ptr(), n_rows.data_ptr()),
    )
    pool.run(_body().address, arguments)
