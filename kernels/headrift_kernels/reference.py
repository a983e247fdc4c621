"""The definition in code: float64 torch, written to be read, not to be fast. Every kernel is tested against it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Attended:
    """What one query attended: all float64.

    output: [heads, head_dim]; lse: [heads], natural log, sinks included; probabilities: [heads, keys] over keys
    0..position (with sinks they sum to less than 1: the rest is exp(sink - lse)).
    """

    output: torch.Tensor
    lse: torch.Tensor
    probabilities: torch.Tensor

    def mass(self, start: int, end: int) -> torch.Tensor:
        """[heads] sum of the probabilities of keys start..end-1; keys past the last one hold none."""
        return self.probabilities[:, max(start, 0) : max(end, 0)].sum(-1)

    def entropy(self) -> torch.Tensor:
        """[heads] attention entropy in nats over the keys (a sink's share is not counted)."""
        p = self.probabilities
        return -(p * torch.log(p.clamp_min(1e-300))).sum(-1)


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> Attended:
    """One query at the position of the last key, causal.

    query: [heads, head_dim]; keys, values: [n, kv_heads, head_dim], keys 0..n-1 with the query at position n-1.
    window: the query attends keys at distance < window (None: all). softcap: 0 for none. sinks: [heads] logits that
    take part in the softmax and hold no value. Grouped-query attention: head h reads KV head h // (heads / kv_heads).
    """
    q, k, v = query.double(), keys.double(), values.double()
    group = q.shape[0] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("hd,nhd->hn", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    n = k.shape[0]
    distance = (n - 1 - torch.arange(n)).double()
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.double()[:, None] * distance[None, :]
    if window is not None:
        scores = scores.masked_fill(distance[None, :] >= window, -torch.inf)
    logits = scores if sinks is None else torch.cat([scores, sinks.double()[:, None]], 1)
    lse = torch.logsumexp(logits, -1)
    p = torch.exp(scores - lse[:, None])
    return Attended(torch.einsum("hn,nhd->hd", p, v), lse, p)


def paged_keys(cache: torch.Tensor, block_table: torch.Tensor, n: int) -> torch.Tensor:
    """Keys (or values) 0..n-1 of one request as [n, kv_heads, head_dim], from [blocks, page, kv_heads, head_dim]."""
    page = cache.shape[1]
    blocks = cache[block_table[: (n + page - 1) // page].long()]
    return blocks.reshape(-1, *cache.shape[2:])[:n]


def measured(
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    row_slot: torch.Tensor,
    prompt_len: torch.Tensor,
    n_rows: torch.Tensor,
    steps: int,
) -> Iterator[tuple[int, int, int, int]]:
    """Row, token, position and step of every query that is measured; arguments as in `span_mass`."""
    for row, slot in enumerate(row_slot.tolist()):
        if slot < 0:
            continue
        first, last = query_start_loc[row : row + 2].tolist()
        for token in range(first, last):
            position = int(seq_lens[row]) - (last - token)
            step = position - (int(prompt_len[slot]) - 1)
            if 0 <= step < min(int(n_rows[slot]), steps):
                yield row, token, position, step


def query_lse(
    lse: torch.Tensor,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    row_slot: torch.Tensor,
    prompt_len: torch.Tensor,
    n_rows: torch.Tensor,
    steps: int,
    **how: Any,
) -> torch.Tensor:
    """A float64 copy of `lse` [heads, tokens] with that of the measured queries written; others as in `span_mass`."""
    out = lse.double().clone()
    for row, token, position, _ in measured(query_start_loc, seq_lens, row_slot, prompt_len, n_rows, steps):
        keys = paged_keys(key_cache, block_table[row], position + 1)
        out[:, token] = attend(query[token], keys, keys, **how).lse
    return out


def span_mass(
    mass: torch.Tensor,
    layer: int,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    row_slot: torch.Tensor,
    prompt_len: torch.Tensor,
    n_rows: torch.Tensor,
    bounds: torch.Tensor,
    **how: Any,
) -> torch.Tensor:
    """What one call of a mass kernel leaves in the recorder's buffer: a float64 copy of `mass` with the step written.

    mass: [slots, steps, layers, heads, regions]; query: [tokens, heads, head_dim]; key_cache: [blocks, page, kv_heads,
    head_dim]; block_table: [batch, pages]; query_start_loc: [batch+1]; seq_lens: [batch], this step's tokens included;
    row_slot: [batch], -1 where the row is not probed; prompt_len, n_rows: [slots]; bounds: [slots, regions, 2];
    how: as `attend` takes it. The step of a query at position p is p - (prompt_len - 1); only steps
    0..min(n_rows, steps)-1 are written.
    """
    out = mass.double().clone()
    for row, token, position, step in measured(query_start_loc, seq_lens, row_slot, prompt_len, n_rows, mass.shape[1]):
        keys = paged_keys(key_cache, block_table[row], position + 1)
        seen = attend(query[token], keys, keys, **how)
        slot = int(row_slot[row])
        for region, (start, end) in enumerate(bounds[slot].tolist()):
            out[slot, step, layer, :, region] = seen.mass(start, end)
    return out


@dataclass(frozen=True)
class Decoded:
    """What one decode call leaves: output [rows, heads, head_dim], and float64 copies of both buffers, written."""

    output: torch.Tensor
    mass: torch.Tensor
    entropy: torch.Tensor


def decode_mass(
    mass: torch.Tensor,
    layer: int,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    row_slot: torch.Tensor,
    prompt_len: torch.Tensor,
    n_rows: torch.Tensor,
    bounds: torch.Tensor,
    *,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    **how: Any,
) -> Decoded:
    """Paged decode of one query per row, masses and attention entropy; arguments as `span_mass` and `attend` name them.

    value_cache: as key_cache; both are multiplied by their scale (fp8 caches). A row without keys has output 0.
    """
    output = torch.zeros(query.shape, dtype=torch.float64)
    masses = mass.double().clone()
    entropies = torch.full(mass.shape[:4], torch.nan, dtype=torch.float64)
    for row in range(query.shape[0]):
        n, slot = int(seq_lens[row]), int(row_slot[row])
        if n == 0:
            continue
        keys = paged_keys(key_cache, block_table[row], n).float().double() * k_scale
        values = paged_keys(value_cache, block_table[row], n).float().double() * v_scale
        seen = attend(query[row], keys, values, **how)
        output[row] = seen.output
        step = n - int(prompt_len[slot])
        if slot >= 0 and 0 <= step < min(int(n_rows[slot]), mass.shape[1]):
            entropies[slot, step, layer] = seen.entropy()
            for region, (start, end) in enumerate(bounds[slot].tolist()):
                masses[slot, step, layer, :, region] = seen.mass(start, end)
    return Decoded(output, masses, entropies)


def logit_statistics(logits: torch.Tensor) -> torch.Tensor:
    """[rows, 3] float64 of next-token entropy (nats), top-1 probability, and margin (top-1 minus top-2 probability).

    logits: [rows, vocab]; a logit of -inf has probability 0 and adds nothing to the entropy.
    """
    x = logits.double()
    p = torch.softmax(x, -1)
    entropy = -(p * torch.log(p.clamp_min(1e-300))).sum(-1)
    top = p.topk(2, -1).values
    return torch.stack([entropy, top[:, 0], top[:, 0] - top[:, 1]], -1)
