"""Next-token entropy, top-1 probability and margin of logit rows, each row read once, nothing of its size allocated.

Every lane keeps its own running maximum, runner-up and sums over its share of the vocabulary, at one exponential a
logit; the lanes are merged once, at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from headrift_kernels.triton.common import LN2, LOG2E, LOWEST


@triton.jit(do_not_specialize=["vocab", "steps"])
def logit_statistics_kernel(
    stats_ptr,
    logits_ptr,
    row_slot_ptr,
    row_step_ptr,
    n_rows_ptr,
    vocab,
    steps,
    stride,
    BLOCK: tl.constexpr,
):
    """Grid (rows). With m the maximum, l = sum 2^(x-m) and moment = sum 2^(x-m) (x-m): entropy = log l - moment/l."""
    row = tl.program_id(0)
    slot = tl.load(row_slot_ptr + row)
    if slot < 0:
        return
    step = tl.load(row_step_ptr + row)
    if (step < 0) | (step >= tl.minimum(tl.load(n_rows_ptr + slot), steps)):
        return
    logits_ptr += row.to(tl.int64) * stride
    lane = tl.arange(0, BLOCK)
    first = tl.full([BLOCK], LOWEST, tl.float32)
    second = first
    l = tl.zeros([BLOCK], tl.float32)
    moment = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + lane, mask=start + lane < vocab, other=-float("inf")).to(tl.float32) * LOG2E
        higher = x > first
        apart = tl.where(higher, first - x, x - first)
        e = tl.exp2(apart)
        # a logit of -inf is infinitely far, and adds nothing
        added = e * tl.where(apart < -1.0e4, -1.0e4, apart)
        moment = tl.where(higher, e * (moment + apart * l), moment + added)
        l = tl.where(higher, l * e + 1.0, l + e)
        second = tl.maximum(second, tl.minimum(first, x))
        first = tl.maximum(first, x)
    top = tl.max(first, 0)
    runner_up = tl.max(tl.where(lane == tl.argmax(first, 0), second, first), 0)
    weight = tl.exp2(first - top)
    moment = tl.sum(weight * (moment + (first - top) * l), 0)
    l = tl.sum(weight * l, 0)
    at = stats_ptr + (slot.to(tl.int64) * steps + step) * 3
    tl.store(at, (tl.log2(l) - moment / l) * LN2)
    tl.store(at + 1, 1.0 / l)
    tl.store(at + 2, (1.0 - tl.exp2(runner_up - top)) / l)


def logit_statistics(
    stats: torch.Tensor,
    logits: torch.Tensor,
    row_slot: torch.Tensor,
    row_step: torch.Tensor,
    n_rows: torch.Tensor,
) -> None:
    """Write the statistics of each probed row's next-token distribution into the recorder's buffer, in place.

    stats: [slots, steps, 3] float32, contiguous (entropy in nats, top-1 probability, margin). logits: [rows, vocab]
    float32, bfloat16 or float16, rows contiguous. row_slot, row_step: [rows] int32, the row's slot (-1: not probed,
    nothing is read) and the step of its last query; rows before step 0 or past the buffer are skipped. n_rows: [slots]
    int32. A logit of -inf has probability 0.
    """
    rows, vocab = logits.shape
    if rows:
        logit_statistics_kernel[(rows,)](
            stats,
            logits,
            row_slot,
            row_step,
            n_rows,
            vocab,
            stats.shape[1],
            logits.stride(0),
            BLOCK=2048,
            num_warps=8,
        )
