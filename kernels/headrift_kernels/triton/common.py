"""What the attention kernels share: scores in base 2, where a mass goes, and what a launch may not compile anew for."""

from __future__ import annotations

import functools

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Where a running maximum starts: -inf would make inf - inf of a row that has seen no key.
LOWEST = tl.constexpr(-1.0e30)
NEVER = tl.constexpr(2147483647)

# For launches: Triton's own wraps and unwraps its argument, 3 microseconds a call.
next_power_of_2 = functools.cache(triton.next_power_of_2)

# What changes from call to call: Triton would compile a kernel anew for an integer that is 1 or divisible by 16, and
# for a pointer that is aligned, such as that to the prefill rows of a batch.
UNSPECIALIZED = ["layer", "steps", "layers", "window", "queries", "splits", "stride_table"]
UNALIGNED = [
    f"{name}_ptr" for name in ("block_table", "query_start", "seq_lens", "row_slot", "prompt_len", "n_rows", "bounds")
]


@triton.jit
def tanh(x):
    """tanh without overflow; the series below 0.1, where 1 - e^-2x cancels."""
    size = tl.maximum(x, -x)
    e = tl.exp2(size * (-2.0 * LOG2E))
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
    return s * (LOG2E if SOFTCAP or ALIBI else scale * LOG2E)


@triton.jit
def cell_of(slot, step, layer, head, steps, layers, HEADS: tl.constexpr):
    """Where [slot, step, layer, head] lies in the recorder's buffers, in heads."""
    return ((slot.to(tl.int64) * steps + step) * layers + layer) * HEADS + head
