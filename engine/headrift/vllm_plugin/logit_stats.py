"""Next-token entropy, top-1 probability and margin of probed rows, taken where the sampler holds the logits."""

from __future__ import annotations

import torch

from headrift.vllm_plugin.recorder import Recorder


def record(recorder: Recorder, logits: torch.Tensor, row_slot: torch.Tensor, row_step: torch.Tensor) -> None:
    """Write the statistics of each probed row at its step.

    logits: [rows, vocab] float32. row_slot, row_step: [rows] int32; rows with slot -1 or a step outside the buffer are
    left alone.
    """
    from headrift_kernels.cpu.logit_stats import logit_statistics

    logit_statistics(recorder.stats, logits, row_slot, row_step, recorder.n_rows)
