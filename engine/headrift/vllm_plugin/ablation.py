"""Ablated heads inside the engine: a factor and a flag for each slot, layer and head, laid on the step's rows.

What a layer does to its query and its output is worked out once a step, on the host, for all layers: which tokens of
the batch belong to a request that ablates a head there. A step or layer without any does nothing at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import numpy as np
import torch

from headrift.ablation import MEANS, SIDES, HeadAblation, check_heads

F = TypeVar("F", bound=Callable[..., torch.Tensor])
# A tensor of this array that the device can copy while the host goes on.
Staged = Callable[[np.ndarray], torch.Tensor]


class Side:
    """The queries or the outputs of all heads: S slots, L layers, H heads of this rank.

    factor: [S, L, H] float32, 1 where nothing is ablated. mean: [S, L, H] bool, where the mean over the heads stands
    in. touched, has_mean: [S, L] and [S] bool, on the host: the layers in which a slot ablates any head, and whether
    any by the mean.
    """

    def __init__(self, slots: int, layers: int, heads: int, device: torch.device):
        self.factor = torch.ones((slots, layers, heads), dtype=torch.float32, device=device)
        self.mean = torch.zeros((slots, layers, heads), dtype=torch.bool, device=device)
        self.touched = np.zeros((slots, layers), bool)
        self.has_mean = np.zeros(slots, bool)

    def ablated(self, values: torch.Tensor, slots: torch.Tensor, layer: int, with_mean: bool) -> torch.Tensor:
        """[n, H, D] queries or outputs of a layer as those of their slots [n] are to be."""
        factor = self.factor[:, layer].index_select(0, slots).unsqueeze(-1)
        changed = values.float() * factor
        if with_mean:
            mean = self.mean[:, layer].index_select(0, slots).unsqueeze(-1)
            changed = torch.where(mean, values.float().mean(1, keepdim=True), changed)
        return changed.to(values.dtype)


@dataclass(frozen=True, slots=True)
class AblatedTokens:
    """Tokens of the running step whose query or output some layer changes, layer by layer.

    tokens, slots: [n] int64 on the device, those of layer l at starts[l]..starts[l + 1]. with_mean: whether a mean over
    heads is among what is to be done.
    """

    side: Side
    tokens: torch.Tensor
    slots: torch.Tensor
    starts: list[int]
    with_mean: bool

    def of_layer(self, layer: int, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The tokens that this layer changes [n] and what they become [n, H, D]; None where it changes none."""
        start, end = self.starts[layer], self.starts[layer + 1]
        if start == end:
            return None
        tokens = self.tokens[start:end]
        return tokens, self.side.ablated(values.index_select(0, tokens), self.slots[start:end], layer, self.with_mean)


@dataclass(frozen=True, slots=True)
class AblatedStep:
    """What the layers of one step change."""

    query: AblatedTokens | None
    output: AblatedTokens | None

    def queries(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """The layer's queries [tokens, H, D]; a copy where any is changed, since they are a view of others' memory."""
        changed = self.query.of_layer(layer, query) if self.query is not None else None
        return query if changed is None else query.clone().index_copy_(0, *changed)

    def outputs(self, layer: int, output: torch.Tensor) -> None:
        """Change the layer's outputs [tokens, H, D] in place."""
        changed = self.output.of_layer(layer, output) if self.output is not None else None
        if changed is not None:
            output.index_copy_(0, *changed)


class Ablations:
    """What each slot's request ablates, of the layers and heads of this rank; first_head: its first in the model."""

    def __init__(self, slots: int, layers: int, heads: int, device: torch.device, first_head: int = 0):
        self.query = Side(slots, layers, heads, device)
        self.output = Side(slots, layers, heads, device)
        self._layers, self._heads, self._first_head = layers, heads, first_head
        self._asked: dict[int, tuple[Sequence[HeadAblation], float]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return sum(side.factor.nbytes + side.mean.nbytes for side in (self.query, self.output))

    def admit(self, slot: int, ablate: Sequence[HeadAblation], epsilon: float) -> None:
        """Take down what a slot's new tenant ablates. ValueError where the model has no such layer."""
        check_heads([(layer, 0) for layer, *_ in ablate], self._layers, 1)
        own = range(self._first_head, self._first_head + self._heads)
        ablate = [(layer, head - self._first_head, kind) for layer, head, kind in ablate if head in own]
        self._asked[slot] = ablate, epsilon
        for name, side in (("query", self.query), ("output", self.output)):
            side.touched[slot] = False
            side.touched[slot, [layer for layer, _, kind in ablate if SIDES[kind] == name]] = True
            side.has_mean[slot] = any(SIDES[kind] == name and kind in MEANS for *_, kind in ablate)

    def install(self, slots: Sequence[int], on_device: torch.Tensor, staged: Staged) -> None:
        """Set the factors and flags of new tenants; on_device: their slots as an index."""
        device, shape = on_device.device, (len(slots), self._layers, self._heads)
        for name, side in (("query", self.query), ("output", self.output)):
            factor, mean = np.ones(shape, np.float32), np.zeros(shape, bool)
            for row, slot in enumerate(slots):
                ablate, epsilon = self._asked[slot]
                for layer, head, kind in ablate:
                    if SIDES[kind] == name and kind in MEANS:
                        mean[row, layer, head] = True
                    elif SIDES[kind] == name:
                        factor[row, layer, head] = epsilon
            side.factor.index_copy_(0, on_device, staged(factor).to(device, non_blocking=True))
            side.mean.index_copy_(0, on_device, staged(mean).to(device, non_blocking=True))
        for slot in slots:
            del self._asked[slot]

    def plan(self, row_slots: np.ndarray, query_start: np.ndarray, staged: Staged) -> AblatedStep | None:
        """What a step changes; None for nothing.

        row_slots: [rows] slots of the batch (-1: not probed). query_start: [rows + 1] the rows' first tokens.
        """
        query, output = (self._tokens(side, row_slots, query_start, staged) for side in (self.query, self.output))
        return None if query is None and output is None else AblatedStep(query, output)

    def _tokens(
        self, side: Side, row_slots: np.ndarray, query_start: np.ndarray, staged: Staged
    ) -> AblatedTokens | None:
        """The tokens of the step that some layer changes on this side; None for none."""
        probed = row_slots >= 0
        touched = side.touched[row_slots] & probed[:, None]
        layers, rows = np.nonzero(touched.T)
        if not len(rows):
            return None
        lengths = (query_start[1:] - query_start[:-1])[rows]
        ends = np.cumsum(lengths)
        # Token i of all is the (i - begin of its row's run)-th of its row.
        tokens = np.arange(ends[-1]) + np.repeat(query_start[rows] - (ends - lengths), lengths)
        slots = np.repeat(row_slots[rows], lengths)
        of_layer = np.bincount(layers, weights=lengths, minlength=self._layers).astype(np.int64)
        device = side.factor.device
        both = staged(np.stack([tokens, slots]).astype(np.int64)).to(device, non_blocking=True)
        starts = [0, *np.cumsum(of_layer).tolist()]
        with_mean = bool(side.has_mean[row_slots[probed]].any())
        return AblatedTokens(side, both[0], both[1], starts, with_mean)


def ablating(forward: F) -> F:
    """An attention implementation's `forward` that takes ablated queries and leaves ablated outputs."""

    @wraps(forward)
    def ablated(
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
        step: AblatedStep | None = getattr(attn_metadata, "ablated", None)
        scales = output_scale, output_block_scale
        if step is None:
            return forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *scales)
        query = step.queries(self.layer_index, query)
        forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *scales)
        step.outputs(self.layer_index, output)
        return output

    return ablated  # type: ignore[return-value]
