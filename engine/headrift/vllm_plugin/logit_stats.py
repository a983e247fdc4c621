"""Next-token entropy, top-1 probability and margin of probed rows, taken where the sampler holds the logits."""

from __future__ import annotations

import os

import torch

from headrift.vllm_plugin.plugin import BACKEND
from headrift.vllm_plugin.recorder import Recorder


def record(recorder: Recorder, logits: torch.Tensor, row_slot: torch.Tensor, row_step: torch.Tensor) -> None:
    """Write the statistics of each probed row at its step.

    logits: [rows, vocab] float32. row_slot, row_step: [rows] int32; rows with slot -1 or a step outside the buffer are
    left alone.
    """
    if os.environ.get(BACKEND, "cpu") == "cpu":
        from headrift_kernels.cpu.logit_stats import logit_statistics
    else:
        from headrift_kernels.triton.logit_stats import logit_statistics

    logit_statistics(recorder.stats, logits, row_slot, row_step, recorder.n_rows)


def warm_up(recorder: Recorder, vocab: int) -> None:
    """Launch the kernel once, for a row that is not probed."""
    logits = torch.zeros((1, vocab), dtype=torch.float32, device=recorder.stats.device)
    row = torch.full((1,), -1, dtype=torch.int32, device=logits.device)
    record(recorder, logits, row, row)
