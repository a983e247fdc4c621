"""What is read off the logits: next-token statistics, and how far the next token is from another request's."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import torch

from headrift.vllm_plugin.instruments.base import (
    Instrument,
    Output,
    check_number,
    keep_at_step_0,
    number_or_none,
    wipe,
)
from headrift.vllm_plugin.plugin import BACKEND
from headrift.vllm_plugin.probe import Probe, RecorderConfig
from headrift.vllm_plugin.slots import Place, SlotTable

STATISTICS = ("entropy", "top1", "margin")
# Logits that are compared at a time: float64 copies of them are made.
_ROWS = 16


class LogitStatistics(Instrument):
    """Next-token entropy (nats), top-1 probability and margin of every recorded step.

    stats: [slots, steps, 3] float32.
    """

    options = {"logit_stats": False}
    outputs = (Output("stats", per_head=False),)
    reads_logits = True

    def __init__(self, table: SlotTable, place: Place):
        super().__init__(table, place)
        self.stats = self.per_slot(table.config.steps + 1, len(STATISTICS))

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
    """KL(kept || own), in nats, of next-token distributions at the last prompt token; one number a request leaves.

    kept: [references, vocab] float32, logits at step 0. divergence: [slots] float32, NaN unless compared.
    """

    options = {"references": 0}
    fields = {"keep_as": None, "compare_with": None}
    outputs = (Output("divergence", per_step=False, per_head=False),)
    reads_logits = True

    def __init__(self, table: SlotTable, place: Place):
        super().__init__(table, place)
        slots, references = table.config.slots, table.config.options["references"]
        self.kept = torch.full((references, place.vocab), torch.nan, dtype=torch.float32, device=table.device)
        self.divergence = self.per_slot()
        # By slot: the reference that it keeps and the one that it is compared with, -1 for none.
        self._keeps, self._compares = np.full(slots, -1), np.full(slots, -1)

    @classmethod
    def check(cls, probe: Probe, config: RecorderConfig) -> None:
        for reference in map(probe.fields.get, cls.fields):
            check_number(reference, config.options["references"], "reference")

    def admit(self, slot: int, probe: Probe) -> None:
        self._keeps[slot] = number_or_none(probe.fields.get("keep_as"))
        self._compares[slot] = number_or_none(probe.fields.get("compare_with"))

    def install(self, slots: np.ndarray, index: torch.Tensor) -> None:
        super().install(slots, index)
        wipe(self.table, self.kept, self._keeps[slots])

    def read_logits(self, logits: torch.Tensor) -> None:
        """What a request is compared with was kept in an earlier step, or in this one; if not, the number is NaN."""
        table = self.table
        for rows in _rows_with(self._keeps, table.slots):
            keep_at_step_0(table, self.kept, rows, self._keeps[table.slots[rows]], logits)
        for rows in _rows_with(self._compares, table.slots):
            slots = table.slots[rows]
            row, reference, slot = table.index(np.stack([rows, self._compares[slots], slots]))
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


def _rows_with(numbers: np.ndarray, slots: np.ndarray) -> Iterator[np.ndarray]:
    """Batch rows whose slot has a number ([S], -1: none), _ROWS at a time."""
    rows = np.flatnonzero((slots >= 0) & (numbers[slots] >= 0))
    for start in range(0, len(rows), _ROWS):
        yield rows[start : start + _ROWS]
