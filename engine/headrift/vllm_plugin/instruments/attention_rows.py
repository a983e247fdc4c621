"""Attention rows on the device: their entropy, and how far each is from another request's.

`headrift.key_alignment` defines a row and the distance of two rows. Only requests that ask have their rows computed, in
torch, from their query and the keys in vLLM's cache. Which queries these are is decided once a step, on the host, for
all layers; in a step without any, nothing is done. The entropy of a row is a by-product of the attention kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from headrift.key_alignment import DISTANCES, check_rows, check_runs, partner_positions
from headrift.requests import ProbeRequest
from headrift.vllm_plugin.instruments.base import Attended, Instrument, Output, StepBatch, number_or_none, wipe
from headrift.vllm_plugin.probe import Probe, RecorderConfig
from headrift.vllm_plugin.slots import Place, SlotTable

# Keys that are gathered from the cache at a time, of all requests together: with 8 KV heads of 128 numbers, 64 MB.
_KEYS_AT_ONCE = 1 << 14


class RowEntropy(Instrument):
    """Entropy of each head's attention row over its keys, in nats; the kernels write it beside the masses.

    row_entropy: [slots, steps, layers, heads] float32.
    """

    options = {"row_entropy": False}
    fields = {"row_entropy": False}
    outputs = (Output("row_entropy"),)

    def __init__(self, table: SlotTable, place: Place):
        super().__init__(table, place)
        self.row_entropy = self.per_slot(table.config.steps + 1, len(place.layers), len(place.heads))

    def kernel_options(self) -> dict[str, Any]:
        return {"entropy": self.row_entropy}


@dataclass(frozen=True, slots=True)
class Queries:
    """The next c queries of m requests of the batch, whose attention rows are computed; n = m c.

    Attributes (int64, on the device):
        rows: [m] indices into the batch.
        tokens: [n] indices into the batch's tokens.
        positions: [m, c].
        keys: How many keys, from the first, are gathered.
        kept: [3, k] indices into the n, references and steps of the rows to keep; None: none.
        compared: [4, k] indices into the n, slots, references and steps of the rows to compare; None: none.
    """

    rows: torch.Tensor
    tokens: torch.Tensor
    positions: torch.Tensor
    keys: int
    kept: torch.Tensor | None
    compared: torch.Tensor | None


class RowDistance(Instrument):
    """Keeps attention rows and measures how far others are from them.

    rows: [references, layers, steps, heads, keys] float32, NaN if never computed: 4 bytes times the product, the bound
    of what is kept. distance: [slots, steps, layers, heads, 2] float32, L2 and TV. partners: [slots, keys] int64, see
    `partner_positions`, `keys` if the reference has no such key.
    """

    options = {"row_references": 0, "row_keys": 0}
    fields = {"rows_as": None, "rows_against": None, "aligned": (), "other_len": 0}
    outputs = (Output("distance"),)
    in_layers = True

    def __init__(self, table: SlotTable, place: Place):
        super().__init__(table, place)
        config, layers, heads = table.config, len(place.layers), len(place.heads)
        n_steps, references, self.keys = config.steps + 1, config.options["row_references"], config.options["row_keys"]
        shape = (references, layers, n_steps, heads, self.keys)
        self.rows = torch.full(shape, torch.nan, dtype=torch.float32, device=table.device)
        self.distance = self.per_slot(n_steps, layers, heads, len(DISTANCES))
        self.partners = torch.full((config.slots, self.keys), self.keys, dtype=torch.int64, device=table.device)
        # By slot: the reference that it keeps and the one that it is compared with, -1 for none.
        self._keeps, self._compares = np.full(config.slots, -1), np.full(config.slots, -1)
        self._new_partners: dict[int, np.ndarray] = {}

    @classmethod
    def is_for(cls, request: ProbeRequest) -> bool:
        return request.rows_against is not None

    @classmethod
    def ask(cls, request: ProbeRequest, memory: Mapping[int, int]) -> dict[str, Any]:
        if (request.rows_as, request.rows_against) == (None, None):
            return {}
        other_len = len(request.prompt_ids)
        if request.rows_against is not None:
            other_len = memory.get(request.rows_against, 0)
            if not other_len:
                raise ValueError(f"rows {request.rows_against} have not been kept: submit a request with rows_as first")
        runs = [list(run) for run in request.aligned]
        fields = {"rows_as": request.rows_as, "rows_against": request.rows_against}
        return {**fields, "aligned": runs, "other_len": other_len}

    @classmethod
    def remember(cls, request: ProbeRequest) -> dict[int, int]:
        """The prompt's length by the reference that its rows are kept under."""
        return {} if request.rows_as is None else {request.rows_as: len(request.prompt_ids)}

    @classmethod
    def check(cls, probe: Probe, config: RecorderConfig) -> None:
        fields, options = probe.fields, config.options
        references, other_len = (fields.get("rows_as"), fields.get("rows_against")), fields.get("other_len", 0)
        kept, keys = options["row_references"], options["row_keys"]
        check_rows(references, other_len, probe.prompt_len, probe.steps, kept=kept, keys=keys)
        check_runs(fields.get("aligned", ()), other_len, probe.prompt_len)

    def admit(self, slot: int, probe: Probe) -> None:
        self._keeps[slot] = number_or_none(probe.fields.get("rows_as"))
        self._compares[slot] = number_or_none(probe.fields.get("rows_against"))
        if self._compares[slot] >= 0:
            runs, other_len = probe.fields.get("aligned", ()), probe.fields.get("other_len", 0)
            partners = partner_positions(runs, other_len, probe.prompt_len, probe.steps)
            self._new_partners[slot] = np.full(self.keys, self.keys)
            self._new_partners[slot][: len(partners)] = np.where(partners < 0, self.keys, partners)

    def install(self, slots: np.ndarray, index: torch.Tensor) -> None:
        super().install(slots, index)
        wipe(self.table, self.rows, self._keeps[slots])
        for slot in slots.tolist():
            if slot in self._new_partners:
                self.partners[slot].copy_(self.table.pinned(self._new_partners.pop(slot)), non_blocking=True)

    def plan(self, batch: StepBatch) -> list[Queries] | None:
        """The queries whose rows are computed, so many at a time that their keys are bounded; None for none."""
        slots, table = batch.slots, self.table
        rows = np.flatnonzero((slots >= 0) & ((self._keeps >= 0) | (self._compares >= 0))[slots])
        if not len(rows):
            return None
        own, lengths = slots[rows], batch.seq_lens[rows]
        ends = lengths - table.prompt_lens[own] + 1  # the step after that of the last query
        first = np.maximum(ends - np.diff(batch.query_start)[rows], 0)
        counts = np.minimum(ends, table.step_limits[own]) - first
        plan = []
        for count in np.unique(counts[counts > 0]).tolist():
            alike = np.flatnonzero(counts == count)
            most = max(1, _KEYS_AT_ONCE // int(lengths[alike].max()))
            for start in range(0, len(alike), most):
                some = alike[start : start + most]
                steps = first[some, None] + np.arange(count)
                positions = table.prompt_lens[own[some], None] - 1 + steps
                tokens = batch.query_start[rows[some] + 1, None] - (lengths[some, None] - positions)
                plan.append(self._queries(rows[some], own[some], steps, positions, tokens))
        return plan or None

    def _queries(
        self, rows: np.ndarray, slots: np.ndarray, steps: np.ndarray, positions: np.ndarray, tokens: np.ndarray
    ) -> Queries:
        index = self.table.index
        slot, step = np.repeat(slots, steps.shape[1]), steps.ravel()
        kept, compared = np.flatnonzero(self._keeps[slot] >= 0), np.flatnonzero(self._compares[slot] >= 0)
        keep = np.stack([kept, self._keeps[slot[kept]], step[kept]])
        compare = np.stack([compared, slot[compared], self._compares[slot[compared]], step[compared]])
        return Queries(
            rows=index(rows),
            tokens=index(tokens.ravel()),
            positions=index(positions),
            keys=int(positions.max()) + 1,
            kept=index(keep) if len(kept) else None,
            compared=index(compare) if len(compared) else None,
        )

    def after_attention(self, plan: list[Queries], attended: Attended) -> None:
        impl, cache = attended.impl, attended.kv_cache
        for queries in plan:
            pages = -(-queries.keys // cache.shape[2])
            blocks = attended.block_table.index_select(0, queries.rows)[:, :pages]
            keys = impl.gathered_keys(attended.layer, cache, blocks)
            self.take(impl.layer_index, queries, attended.query, keys, **impl.attention_options())

    def take(self, layer: int, queries: Queries, query: torch.Tensor, keys: torch.Tensor, **options: Any) -> None:
        """Compute a layer's rows, keep and compare them. What a row is compared with was kept in an earlier step.

        Args:
            layer: Index of the layer.
            queries: Which rows.
            query: [tokens, heads, head_dim] of the batch.
            keys: [m, KV heads, head_dim, at least queries.keys] of the cache.
            **options: See `attention_rows`.
        """
        m, c = queries.positions.shape
        picked = query.index_select(0, queries.tokens)
        rows = attention_rows(picked.view(m, c, *picked.shape[1:]), keys, queries.positions, **options).flatten(0, 1)
        rows = torch.nn.functional.pad(rows[..., : self.keys], (0, max(0, self.keys - rows.shape[-1])))
        if queries.kept is not None:
            at, references, steps = queries.kept
            self.rows[:, layer].index_put_((references, steps), rows.index_select(0, at))
        if queries.compared is not None:
            at, slots, references, steps = queries.compared
            others = torch.nn.functional.pad(self.rows[:, layer][references, steps], (0, 1))  # position `keys` has 0
            partners = self.partners.index_select(0, slots)[:, None].expand(-1, rows.shape[1], -1)
            difference = rows.index_select(0, at) - others.gather(-1, partners)
            both = torch.stack([difference.square().sum(-1).sqrt(), difference.abs().sum(-1) / 2], -1)
            self.distance[:, :, layer].index_put_((slots, steps), both)


def attention_rows(
    query: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Softmax over the keys that each query may see, as `headrift_kernels.reference.attend` has it, in float32.

    Args:
        query: [m, c, heads, head_dim].
        keys: [m, KV heads, head_dim, n], key j at position j; anything past a query's own position.
        positions: [m, c] of the queries.

    Returns:
        [m, c, heads, n], 0 for keys that are not seen.
    """
    m, c, heads, dim = query.shape
    kv_heads, n = keys.shape[1], keys.shape[3]
    grouped = query.float().view(m, c, kv_heads, -1, dim).transpose(1, 2).reshape(m, kv_heads, -1, dim)
    scores = (grouped @ keys.float()).view(m, kv_heads, c, -1, n).transpose(1, 2).reshape(m, c, heads, n) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = positions[..., None] - torch.arange(n, device=keys.device)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[:, None] * distance[:, :, None]
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    scores = scores.masked_fill(hidden[:, :, None], -torch.inf)
    lse = torch.logsumexp(scores, -1, keepdim=True)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks[:, None])
    return torch.exp(scores - lse)
