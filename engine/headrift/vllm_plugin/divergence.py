"""How far an ablated request's next token is from the clean one's, at the last prompt token: one number leaves."""

from __future__ import annotations

import numpy as np
import torch

from headrift.vllm_plugin.recorder import Recorder

# Rows of logits that are compared at a time: float64 copies of them are made.
_ROWS = 16


def keep_and_compare(recorder: Recorder, logits: torch.Tensor) -> None:
    """Keep the logits that rows at step 0 are to keep; write KL(kept || row), in nats, of those that are compared.

    logits: [rows of the running step, vocab] float32. What a row compares with was kept in an earlier step, or in this
    one; where it was not the divergence is NaN. Enqueues its work and waits for nothing.
    """
    slots = recorder.slots
    for rows in _with(recorder.keeps, slots):
        at = recorder.index(np.stack([rows, recorder.keeps[slots[rows]]]))
        step = recorder.row_step.index_select(0, at[0]).unsqueeze(1)
        kept = recorder.kept.index_select(0, at[1])
        recorder.kept.index_copy_(0, at[1], torch.where(step == 0, logits.index_select(0, at[0]).float(), kept))
    for rows in _with(recorder.compares, slots):
        at = recorder.index(np.stack([rows, recorder.compares[slots[rows]], slots[rows]]))
        step = recorder.row_step.index_select(0, at[0])
        found = divergence(recorder.kept.index_select(0, at[1]), logits.index_select(0, at[0])).float()
        before = recorder.divergence.index_select(0, at[2])
        recorder.divergence.index_copy_(0, at[2], torch.where(step == 0, found, before))


def divergence(clean: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
    """KL(softmax(clean) || softmax(changed)) of each row [n, vocab] in nats, [n] float64; logits may be -inf.

    In float64: a head that hardly matters moves the distribution by less than float32 can sum up.
    """
    log_p, log_q = torch.log_softmax(clean.double(), -1), torch.log_softmax(changed.double(), -1)
    return torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q)).sum(-1)


def _with(asked: np.ndarray, slots: np.ndarray) -> list[np.ndarray]:
    """Rows whose slot asks for something ([S], -1: nothing), so many at a time."""
    rows = np.flatnonzero((slots >= 0) & (asked[slots] >= 0))
    return [rows[start : start + _ROWS] for start in range(0, len(rows), _ROWS)]
