"""Attention rows on the device: their entropy, and how far each is from another request's.

An attention row is what a query's softmax gives to each key it may see: all keys up to its own position, or the last
ones if the layer has a sliding window. A sink's share belongs to no key. Step t's row is that of the query at position
prompt_len - 1 + t.

Runs say which tokens of the two prompts are the same. Answer token u, at position prompt_len + u, is lined up with the
other's answer token u, whichever tokens the two are: at step t both see those with u < t. The target of a request's row
is, on a key that is lined up with one of the other's, what the other's row has there, and 0 on every other key (the
words around a question); what the other's row has on keys that this request lacks is left out. Over the keys k of this
request

    L2 = sqrt(sum_k (own_k - target_k)^2)    (0 to sqrt(2))
    TV = 1/2 sum_k |own_k - target_k|        (total variation, 0 to 1)

Only requests that ask have their rows computed, in torch, from their query and the keys in vLLM's cache. Which queries
these are is decided once a step, on the host, for all layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from headrift.requests import ProbeRequest, Run
from headrift.vllm_plugin.instruments import Attended, Instrument, Output, StepBatch
from headrift.vllm_plugin.slots import Place, Probe, RecorderConfig, SlotTable

# Keys that are gathered from the cache at a time, of all requests together: with 8 KV heads of 128 numbers, 64 MB.
_KEYS_AT_ONCE = 1 << 14


class RowEntropy(Instrument):
    """Entropy (nats) of each head's attention row over its keys: row_entropy [slots, steps, layers, heads]. The kernels
    write it beside the masses."""

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
    """The next c queries of m requests of the batch, whose attention rows are computed; n = m c; int64 tensors."""

    rows: torch.Tensor  # [m] indices into the batch
    tokens: torch.Tensor  # [n] indices into the batch's tokens
    positions: torch.Tensor  # [m, c]
    keys: int  # how many keys, from the first, are gathered
    kept: torch.Tensor | None  # [3, k] indices into the n, references and steps of the rows to keep
    compared: torch.Tensor | None  # [4, k] indices into the n, slots, references and steps of the rows to compare


class RowDistance(Instrument):
    """Keeps attention rows and measures how far others are from them.

    rows: [references, layers, steps, heads, keys] float32, NaN if never computed: 4 bytes times the product, the bound
    of what is kept. distance: [slots, steps, layers, heads, 2] float32, L2 and TV. partners: [slots, keys] int64, see
    `partner_positions`, `keys` if the reference has no such key.
    """

    options = {"row_references": 0, "row_keys": 0}
    fields = {"rows_as": None, "rows_against": None, "aligned": (), "other_len": 0}
    references = {"rows_as": "row_references", "rows_against": "row_references"}
    outputs = (Output("distance"),)
    in_layers = True

    def __init__(self, table: SlotTable, place: Place):
        super().__init__(table, place)
        slots, layers, heads = table.config.slots, len(place.layers), len(place.heads)
        n_steps, self.keys = table.config.steps + 1, table.config.options["row_keys"]
        self.rows = self.kept_as("rows_as", layers, n_steps, heads, self.keys)
        self.distance = self.per_slot(n_steps, layers, heads, 2)
        self.partners = torch.full((slots, self.keys), self.keys, dtype=torch.int64, device=table.device)
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
        return {**super().ask(request, memory), "other_len": other_len}

    @classmethod
    def remember(cls, request: ProbeRequest) -> dict[int, int]:
        """The prompt's length by the reference that its rows are kept under."""
        return {} if request.rows_as is None else {request.rows_as: len(request.prompt_ids)}

    @classmethod
    def check(cls, probe: Probe, config: RecorderConfig) -> None:
        other_len, keys = probe.fields.get("other_len", 0), config.options["row_keys"]
        longest = max(other_len, probe.prompt_len)
        if longest + probe.steps > keys:
            size = f"a prompt of {longest} tokens with {probe.steps} steps"
            raise ValueError(f"{size} exceeds the {keys} keys of a kept row; raise row_keys")
        check_runs(probe.fields.get("aligned", ()), other_len, probe.prompt_len)

    def admit(self, slot: int, probe: Probe) -> None:
        super().admit(slot, probe)
        if self.numbers["rows_against"][slot] >= 0:
            runs, other_len = probe.fields.get("aligned", ()), probe.fields.get("other_len", 0)
            partners = partner_positions(runs, other_len, probe.prompt_len, probe.steps, missing=self.keys)
            self._new_partners[slot] = np.pad(partners, (0, self.keys - len(partners)), constant_values=self.keys)

    def install(self, slots: np.ndarray, index: torch.Tensor) -> None:
        super().install(slots, index)
        for slot in slots.tolist():
            if slot in self._new_partners:
                self.partners[slot].copy_(self.table.pinned(self._new_partners.pop(slot)), non_blocking=True)

    def plan(self, batch: StepBatch) -> list[Queries] | None:
        """The queries whose rows are computed, so many at a time that their keys are bounded; None for none."""
        slots, table = batch.slots, self.table
        asks = (self.numbers["rows_as"] >= 0) | (self.numbers["rows_against"] >= 0)
        selected = (slots >= 0) & asks[slots]
        if not selected.any():
            return None
        last = batch.seq_lens - table.prompt_lens[slots]  # the step of each request's last query
        first = np.maximum(last + 1 - np.diff(batch.query_start), 0)
        counts = np.where(selected, np.minimum(last + 1, table.step_limits[slots]) - first, 0)
        plan = []
        for count in np.unique(counts[counts > 0]).tolist():
            alike = np.flatnonzero(counts == count)
            most = max(1, _KEYS_AT_ONCE // int(batch.seq_lens[alike].max()))
            for start in range(0, len(alike), most):
                rows = alike[start : start + most]
                steps = first[rows, None] + np.arange(count)
                positions = table.prompt_lens[slots[rows], None] - 1 + steps
                tokens = batch.query_start[rows + 1, None] - (batch.seq_lens[rows, None] - positions)
                plan.append(self._queries(rows, slots[rows], steps, positions, tokens))
        return plan or None

    def _queries(
        self, rows: np.ndarray, slots: np.ndarray, steps: np.ndarray, positions: np.ndarray, tokens: np.ndarray
    ) -> Queries:
        index, slot, step = self.table.index, np.repeat(slots, steps.shape[1]), steps.ravel()
        own, against = self.numbers["rows_as"][slot], self.numbers["rows_against"][slot]
        kept, compared = np.flatnonzero(own >= 0), np.flatnonzero(against >= 0)
        keep = np.stack([kept, own[kept], step[kept]])
        compare = np.stack([compared, slot[compared], against[compared], step[compared]])
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

        query: [tokens, heads, head_dim] of the batch; keys: [m, KV heads, head_dim, queries.keys or more] of the cache.
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
        query: [m, c, heads, head_dim], at positions [m, c].
        keys: [m, KV heads, head_dim, n], key j at position j; anything past a query's own position.

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


def check_runs(runs: Sequence[Any], other_len: int, own_len: int) -> None:
    """Raise ValueError unless these are runs of prompts of so many tokens, in order and apart."""
    ends = [0, 0]
    for run in runs:
        if not isinstance(run, (list, tuple)) or len(run) != 3 or not all(isinstance(n, int) for n in run):
            raise ValueError(f"a run is (start in the other prompt, start in one's own, length), not {run!r}")
        *starts, length = run
        if length < 0 or any(start < end for start, end in zip(starts, ends, strict=True)):
            raise ValueError(f"runs have to be in order and apart, unlike {list(runs)}")
        ends = [start + length for start in starts]
    if ends[0] > other_len or ends[1] > own_len:
        raise ValueError(f"runs end at {ends[0]} and {ends[1]}, and the prompts have {other_len} and {own_len} tokens")


def partner_positions(runs: Sequence[Run], other_len: int, own_len: int, steps: int, missing: int = -1) -> np.ndarray:
    """Position in the other request of each key that a request sees in steps 0..`steps`, or `missing`."""
    partners = np.full(own_len + steps, missing)
    for other, own, length in runs:
        partners[own : own + length] = np.arange(other, other + length)
    partners[own_len:] = np.arange(other_len, other_len + steps)
    return partners
