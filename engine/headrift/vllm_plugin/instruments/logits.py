"""What is read off the logits: next-token statistics, and how far the next token is from another request's."""

from __future__ import annotations

import os

import numpy as np
import torch

from headrift.vllm_plugin.instruments import Instrument, Output
from headrift.vllm_plugin.plugin import BACKEND
from headrift.vllm_plugin.slots import Place, SlotTable

# Logits that are compared at a time: float64 copies of them are made.
_ROWS = 16


class LogitStatistics(Instrument):
    """Next-token entropy (nats), top-1 probability and margin of every recorded step: stats [slots, steps, 3]."""

    options = {"logit_stats": False}
    outputs = (Output("stats", per_head=False),)
    reads_logits = True

    def __init__(self, table: SlotTable, place: Place):
        super().__init__(table, place)
        self.stats = self.per_slot(table.config.steps + 1, 3)

    def read_logits(self, logits: torch.Tensor) -> None:
        n = logits.shape[0]
        self._measure(logits, self.table.row_slot[:n], self.table.row_step[:n])

    def _measure(self, logits: torch.Tensor, row_slot: torch.Tensor, row_step: torch.Tensor) -> None:
        if os.environ.get(BACKEND, "cpu") == "cpu":
            from headrift_kernels.cpu.logit_stats import logit_statistics
        else:
            from headrift_kernels.triton.logit_stats import logit_statistics

        logit_statistics(self.stats, logits, row_slot, row_step, self.table.step_limit)

    def warm_up(self) -> None:
        logits = torch.zeros((1, self.place.vocab), dtype=torch.float32, device=self.table.device)
        not_probed = torch.full((1,), -1, dtype=torch.int32, device=self.table.device)
        self._measure(logits, not_probed, not_probed)


class Divergence(Instrument):
    """KL(kept || own), in nats, of next-token distributions at the last prompt token; NaN unless compared.

    kept: [references, vocab], logits at step 0; divergence: [slots].
    """

    options = {"references": 0}
    fields = {"keep_as": None, "compare_with": None}
    references = {"keep_as": "references", "compare_with": "references"}
    outputs = (Output("divergence", per_step=False, per_head=False),)
    reads_logits = True

    def __init__(self, table: SlotTable, place: Place):
        super().__init__(table, place)
        self.kept = self.kept_as("keep_as", place.vocab)
        self.divergence = self.per_slot()

    def read_logits(self, logits: torch.Tensor) -> None:
        """What a request is compared with was kept in an earlier step, or in this one; if not, the number is NaN."""
        table, keeping, comparing = self.table, self.rows_with("keep_as"), self.rows_with("compare_with")
        for start in range(0, len(keeping), _ROWS):
            self.keep_at_step_0("keep_as", keeping[start : start + _ROWS], logits)
        for start in range(0, len(comparing), _ROWS):
            rows = comparing[start : start + _ROWS]
            slots = table.slots[rows]
            row, reference, slot = table.index(np.stack([rows, self.numbers["compare_with"][slots], slots]))
            values = kl_divergence(self.kept.index_select(0, reference), logits.index_select(0, row)).float()
            before = self.divergence.index_select(0, slot)
            at_step_0 = table.row_step.index_select(0, row) == 0
            self.divergence.index_copy_(0, slot, torch.where(at_step_0, values, before))


def kl_divergence(clean: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
    """KL(softmax(clean) || softmax(changed)) of each row [n, vocab] in nats, [n] float64; logits may be -inf.

    In float64: a head that hardly matters moves the distribution by less than float32 can sum up.
    """
    log_p, log_q = torch.log_softmax(clean.double(), -1), torch.log_softmax(changed.double(), -1)
    return torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q)).sum(-1)
