"""Attention rows worked out on the device: how far each is from another request's may leave.

What a row is, and what the distances of two rows are, `headrift.aligned_keys` says. Only requests that ask have their
rows worked out, in torch, from their query and the keys in vLLM's cache. Which queries these are is worked out once a
step, on the host, for all layers; in a step without any, nothing is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from headrift.aligned_keys import check_rows, check_runs, places

if TYPE_CHECKING:
    from headrift.vllm_plugin.recorder import Probe, Settings

F = TypeVar("F", bound=Callable[..., torch.Tensor])
# A tensor of this array that the device can copy while the host goes on.
Staged = Callable[[np.ndarray], torch.Tensor]

# Keys that are gathered from the cache at a time, of all rows together: with 8 KV heads of 128 numbers, 64 MB.
_KEYS_AT_ONCE = 1 << 14


def check(probe: Probe, settings: Settings) -> None:
    """ValueError where a request's attention rows cannot be measured, kept or compared as it asks."""
    references = probe.rows_as, probe.rows_against
    if references != (None, None):
        kept, keys = settings.row_references, settings.row_keys
        check_rows(references, probe.other_len, probe.prompt_len, probe.steps, kept=kept, keys=keys)
        check_runs(probe.aligned, probe.other_len, probe.prompt_len)


@dataclass(frozen=True, slots=True)
class Queries:
    """m batch rows of c queries each, whose attention rows are wanted; n = m c. All tensors int64, on the device.

    rows: [m]; tokens: [n] of the batch; positions: [m, c]; keys: so many from the first are gathered. kept: which of
    the n are kept [k], as which reference [k] and step [k], as one tensor [3, k], None where none is; compared: which
    are compared, their slots, references and steps, [4, k] or None.
    """

    rows: torch.Tensor
    tokens: torch.Tensor
    positions: torch.Tensor
    keys: int
    kept: torch.Tensor | None
    compared: torch.Tensor | None


class RowBank:
    """Rows that are kept, and what is found of rows: S slots, N+1 steps, L layers, H heads, K keys.

    rows: [references, L, N+1, H, K] float32, NaN where unwritten: 4 bytes times the product, the bound of what is kept.
    distance: [S, N+1, L, H, 2] float32, L2 and TV, NaN where unwritten. places: [S, K] int64, of `aligned_keys.places`,
    K where the reference has no such key.

    On the host, by slot: keeps and compares, the references, -1 for none.
    """

    def __init__(
        self, slots: int, references: int, steps: int, layers: int, heads: int, keys: int, device: torch.device
    ):
        def unwritten(*shape: int) -> torch.Tensor:
            return torch.full(shape, torch.nan, dtype=torch.float32, device=device)

        self.rows = unwritten(references, layers, steps + 1, heads, keys)
        self.distance = unwritten(slots, steps + 1, layers, heads, 2)
        self.places = torch.full((slots, keys), keys, dtype=torch.int64, device=device)
        self.keys = keys
        self.keeps = np.full(slots, -1)
        self.compares = np.full(slots, -1)
        self._places: dict[int, np.ndarray] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return sum(tensor.nbytes for tensor in (self.rows, self.distance, self.places))

    def admit(self, slot: int, probe: Probe) -> None:
        """Take down what a slot's new tenant keeps and compares."""
        self.keeps[slot] = -1 if probe.rows_as is None else probe.rows_as
        self.compares[slot] = -1 if probe.rows_against is None else probe.rows_against
        if probe.rows_against is not None:
            found = places(probe.aligned, probe.other_len, probe.prompt_len, probe.steps)
            self._places[slot] = np.full(self.keys, self.keys)
            self._places[slot][: len(found)] = np.where(found < 0, self.keys, found)

    def install(self, slots: np.ndarray, on_device: torch.Tensor, staged: Staged) -> None:
        """Wipe what new tenants will write, and set their places; on_device: their slots as an index."""
        device = self.rows.device
        self.distance.index_fill_(0, on_device, torch.nan)
        kept = self.keeps[slots]
        if (kept >= 0).any():
            self.rows.index_fill_(0, staged(kept[kept >= 0]).to(device, non_blocking=True), torch.nan)
        for slot in slots.tolist():
            if slot in self._places:
                self.places[slot].copy_(staged(self._places.pop(slot)), non_blocking=True)

    def plan(
        self,
        slots: np.ndarray,
        query_start: np.ndarray,
        seq_lens: np.ndarray,
        prompt_lens: np.ndarray,
        rows_wanted: np.ndarray,
        staged: Staged,
    ) -> list[Queries] | None:
        """The queries of a step whose rows are wanted, at most so many keys' worth at a time; None for none.

        slots: [rows] of the batch (-1: not probed). query_start: [rows + 1] the rows' first tokens. seq_lens: [rows]
        with this step's tokens. prompt_lens, rows_wanted: [S].
        """
        taken = (self.keeps >= 0) | (self.compares >= 0)
        rows = np.flatnonzero((slots >= 0) & taken[slots])
        if not len(rows):
            return None
        of = slots[rows]
        ends = seq_lens[rows] - prompt_lens[of] + 1  # the step after the row's last query's
        first = np.maximum(ends - np.diff(query_start)[rows], 0)
        counts = np.minimum(ends, rows_wanted[of]) - first
        found = []
        for count in np.unique(counts[counts > 0]).tolist():
            alike = np.flatnonzero(counts == count)
            most = max(1, _KEYS_AT_ONCE // int(seq_lens[rows[alike]].max()))
            for at in range(0, len(alike), most):
                some = alike[at : at + most]
                steps = first[some, None] + np.arange(count)
                positions = prompt_lens[of[some], None] - 1 + steps
                tokens = query_start[rows[some] + 1, None] - (seq_lens[rows[some], None] - positions)
                found.append(self._queries(rows[some], of[some], steps, positions, tokens, staged))
        return found or None

    def _queries(
        self,
        rows: np.ndarray,
        slots: np.ndarray,
        steps: np.ndarray,
        positions: np.ndarray,
        tokens: np.ndarray,
        staged: Staged,
    ) -> Queries:
        def on_device(array: np.ndarray) -> torch.Tensor:
            return staged(array.astype(np.int64)).to(self.rows.device, non_blocking=True)

        slot, step = np.repeat(slots, steps.shape[1]), steps.ravel()
        kept, compared = np.flatnonzero(self.keeps[slot] >= 0), np.flatnonzero(self.compares[slot] >= 0)
        keep = np.stack([kept, self.keeps[slot[kept]], step[kept]])
        compare = np.stack([compared, slot[compared], self.compares[slot[compared]], step[compared]])
        return Queries(
            rows=on_device(rows),
            tokens=on_device(tokens.ravel()),
            positions=on_device(positions),
            keys=int(positions.max()) + 1,
            kept=on_device(keep) if len(kept) else None,
            compared=on_device(compare) if len(compared) else None,
        )

    def take(self, layer: int, queries: Queries, query: torch.Tensor, keys: torch.Tensor, **options: Any) -> None:
        """Work out a layer's rows, keep and compare them. Enqueues its work and waits for nothing.

        query: [tokens, H, D] of the batch. keys: [m, KV heads, D, at least queries.keys], of the cache. options: see
        `attention_rows`. What a row is compared with was kept in an earlier step.
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
            others = torch.nn.functional.pad(self.rows[:, layer][references, steps], (0, 1))  # place K holds 0
            where = self.places.index_select(0, slots)[:, None].expand(-1, rows.shape[1], -1)
            difference = rows.index_select(0, at) - others.gather(-1, where)
            found = torch.stack([difference.square().sum(-1).sqrt(), difference.abs().sum(-1) / 2], -1)
            self.distance[:, :, layer].index_put_((slots, steps), found)


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

    query: [m, c, H, D]; keys: [m, KV heads, D, n], key j at position j, anything at all past a query's; positions: [m,
    c], of the queries. [m, c, H, n], 0 for keys that are not seen.
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


def keeping_rows(forward: F) -> F:
    """An attention implementation's `forward` after which the rows that are wanted are taken.

    The implementation has `gathered_keys(layer, kv_cache, blocks)`: keys [m, KV heads, D, pages * page] of blocks [m,
    pages] of its cache, whose third axis is the page.
    """

    @wraps(forward)
    def with_rows(
        self: Any,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        scales = output_scale, output_block_scale
        forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *scales)
        wanted: Sequence[Queries] = getattr(attn_metadata, "row_queries", None) or ()
        for queries in wanted:
            pages = -(-queries.keys // kv_cache.shape[2])
            blocks = attn_metadata.batch_block_table.index_select(0, queries.rows)[:, :pages]
            keys = self.gathered_keys(layer, kv_cache, blocks)
            self.recorder.bank.take(self.layer_index, queries, query, keys, **self.attention_options())
        return output

    return with_rows  # type: ignore[return-value]
