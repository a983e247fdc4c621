"""The definition in code: float64 torch, written to be read, not to be fast. Every kernel is tested against it."""

from __future__ import annotations

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


@dataclass(frozen=True)
class Recorded:
    """What one call leaves in the recorder's buffers: float64 copies of them, written.

    mass: [slots, steps, layers, heads, regions]; entropy: [slots, steps, layers, heads], NaN if not written.
    """

    mass: torch.Tensor
    entropy: torch.Tensor

    def write(self, slot: int, step: int, layer: int, seen: Attended, bounds: torch.Tensor) -> None:
        self.entropy[slot, step, layer] = seen.entropy()
        for region, (start, end) in enumerate(bounds[slot].tolist()):
            self.mass[slot, step, layer, :, region] = seen.mass(start, end)


@dataclass(frozen=True)
class Decoded(Recorded):
    """As `Recorded`, and output [tokens, heads, head_dim]: NaN for tokens that another kernel attends for."""

    output: torch.Tensor


def _nan(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=torch.float64)


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
    query_start_loc: torch.Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    **how: Any,
) -> Decoded:
    """Return the attention of rows of one token, and the masses and entropy of every row's last token.

    Args:
        mass: [slots, steps, layers, heads, regions].
        layer: index in `mass`.
        query: [tokens, heads, head_dim].
        key_cache: [blocks, page, kv_heads, head_dim], multiplied by k_scale.
        value_cache: as key_cache, multiplied by v_scale.
        block_table: [rows, pages].
        seq_lens: [rows], this step's tokens included. A row without keys has output 0.
        row_slot: [rows], -1 if the row is not probed.
        prompt_len: [slots]. The step of a query at position p is p - (prompt_len - 1).
        n_rows: [slots]; only steps 0..min(n_rows, steps)-1 are written.
        bounds: [slots, regions, 2].
        query_start_loc: [rows + 1], the first token of each row (None: one each).
        how: as `attend` takes it.
    """
    rows = seq_lens.shape[0]
    starts = list(range(rows + 1)) if query_start_loc is None else query_start_loc.tolist()
    result = Decoded(mass.double().clone(), _nan(mass.shape[:4]), _nan(query.shape))
    for row in range(rows):
        n, slot, tokens, token = (
            int(seq_lens[row]),
            int(row_slot[row]),
            starts[row + 1] - starts[row],
            starts[row + 1] - 1,
        )
        if tokens == 1:
            result.output[token] = 0
        if tokens == 0 or n == 0:
            continue
        keys = paged_keys(key_cache, block_table[row], n).float().double() * k_scale
        values = paged_keys(value_cache, block_table[row], n).float().double() * v_scale
        seen = attend(query[token], keys, values, **how)
        if tokens == 1:
            result.output[token] = seen.output
        step = n - int(prompt_len[slot])
        if slot >= 0 and 0 <= step < min(int(n_rows[slot]), mass.shape[1]):
            result.write(slot, step, layer, seen, bounds)
    return result


def replay_mass(
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
    *,
    k_scale: float = 1.0,
    **how: Any,
) -> Recorded:
    """Return the masses and entropy of every measured query but each row's last; arguments as in `decode_mass`."""
    result = Recorded(mass.double().clone(), _nan(mass.shape[:4]))
    for row, slot in enumerate(row_slot.tolist()):
        first, last = query_start_loc[row : row + 2].tolist()
        for token in range(first, last - 1):
            position = int(seq_lens[row]) - (last - token)
            step = position - (int(prompt_len[slot]) - 1)
            if slot >= 0 and 0 <= step < min(int(n_rows[slot]), mass.shape[1]):
                keys = paged_keys(key_cache, block_table[row], position + 1).float().double() * k_scale
                result.write(slot, step, layer, attend(query[token], keys, keys, **how), bounds)
    return result


def logit_statistics(logits: torch.Tensor) -> torch.Tensor:
    """[rows, 3] float64 of next-token entropy (nats), top-1 probability, and margin (top-1 minus top-2 probability).

    logits: [rows, vocab]; a logit of -inf has probability 0 and adds nothing to the entropy.
    """
    x = logits.double()
    p = torch.softmax(x, -1)
    entropy = -(p * torch.log(p.clamp_min(1e-300))).sum(-1)
    top = p.topk(2, -1).values
    return torch.stack([entropy, top[:, 0], top[:, 0] - top[:, 1]], -1)
