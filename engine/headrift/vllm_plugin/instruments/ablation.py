"""Ablated heads: per slot, layer and head a factor and a flag that change the query or the output of attention.

Which tokens of the batch a layer changes is decided once a step, on the host, for all layers; a step or layer without
any ablated head does nothing at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from headrift import ablation
from headrift.ablation import MEANS, SIDES, HeadAblation
from headrift.requests import ProbeRequest
from headrift.vllm_plugin.instruments.base import Attended, Instrument, StepBatch
from headrift.vllm_plugin.probe import Probe, RecorderConfig
from headrift.vllm_plugin.slots import Place, SlotTable


class Side:
    """The queries, or the outputs, of all heads of this rank: S slots, L layers, H heads.

    On the device: factor [S, L, H] float32, 1 if nothing is ablated; mean [S, L, H] bool, whether the mean over the
    heads takes the head's place. On the host: touched [S, L], layers in which a slot ablates any head; has_mean [S],
    whether it does so by the mean anywhere.
    """

    def __init__(self, shape: tuple[int, int, int], device: torch.device):
        self.factor = torch.ones(shape, dtype=torch.float32, device=device)
        self.mean = torch.zeros(shape, dtype=torch.bool, device=device)
        self.touched = np.zeros(shape[:2], bool)
        self.has_mean = np.zeros(shape[0], bool)

    def ablated(self, values: torch.Tensor, slots: torch.Tensor, layer: int, with_mean: bool) -> torch.Tensor:
        """The queries or outputs [n, H, D] of a layer, changed as their slots [n] ablate them."""
        factor = self.factor[:, layer].index_select(0, slots).unsqueeze(-1)
        changed = values.float() * factor
        if with_mean:
            mean = self.mean[:, layer].index_select(0, slots).unsqueeze(-1)
            changed = torch.where(mean, values.float().mean(1, keepdim=True), changed)
        return changed.to(values.dtype)


@dataclass(frozen=True, slots=True)
class AblatedTokens:
    """Tokens of the running step whose query, or output, some layer changes.

    Attributes:
        tokens, slots: [n] int64 on the device; those of layer l are starts[l] to starts[l + 1].
        with_mean: Whether any of them is changed to a mean over heads.
    """

    side: Side
    tokens: torch.Tensor
    slots: torch.Tensor
    starts: list[int]
    with_mean: bool

    def changed(self, layer: int, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The tokens that this layer changes [n] and what they become [n, H, D]; None for none."""
        start, end = self.starts[layer], self.starts[layer + 1]
        if start == end:
            return None
        tokens = self.tokens[start:end]
        return tokens, self.side.ablated(values.index_select(0, tokens), self.slots[start:end], layer, self.with_mean)


class Ablation(Instrument):
    """Ablates the heads that each request names, see `headrift.ablation`."""

    options = {"ablation": False}
    fields = {"ablate": (), "epsilon": ablation.EPSILON}
    in_layers = True

    def __init__(self, table: SlotTable, place: Place):
        super().__init__(table, place)
        shape = (table.config.slots, len(place.layers), len(place.heads))
        self.sides = {"query": Side(shape, table.device), "output": Side(shape, table.device)}
        self._shape = shape
        self._new: dict[int, tuple[Sequence[HeadAblation], float]] = {}

    @property
    def nbytes(self) -> int:
        return sum(side.factor.nbytes + side.mean.nbytes for side in self.sides.values())

    @classmethod
    def ask(cls, request: ProbeRequest, memory: Mapping[int, int]) -> dict[str, Any]:
        if not request.ablate:
            return {}
        return {"ablate": [list(entry) for entry in request.ablate], "epsilon": request.epsilon}

    @classmethod
    def check(cls, probe: Probe, config: RecorderConfig) -> None:
        ablate = probe.fields.get("ablate", ())
        ablation.check(ablate, probe.fields.get("epsilon", ablation.EPSILON))
        if config.layers is not None and config.heads is not None:
            ablation.check_heads(ablate, config.layers, config.heads)
        if config.ranks > 1 and any(kind in MEANS for *_, kind in ablate):
            kinds = ", ".join(kind for kind in SIDES if kind not in MEANS)
            raise ValueError(f"the mean over heads needs tensor_parallel_size=1; ablate by {kinds} instead")

    @classmethod
    def cache_salt(cls, request: ProbeRequest) -> str | None:
        return ablation.salt(request.ablate, request.epsilon)

    def admit(self, slot: int, probe: Probe) -> None:
        own = self.place.heads
        ablate = [
            (layer, head - own.start, kind) for layer, head, kind in probe.fields.get("ablate", ()) if head in own
        ]
        self._new[slot] = ablate, probe.fields.get("epsilon", ablation.EPSILON)
        for name, side in self.sides.items():
            side.touched[slot] = False
            side.touched[slot, [layer for layer, _, kind in ablate if SIDES[kind] == name]] = True
            side.has_mean[slot] = any(SIDES[kind] == name and kind in MEANS for *_, kind in ablate)

    def install(self, slots: np.ndarray, index: torch.Tensor) -> None:
        shape = (len(slots), *self._shape[1:])
        new = [self._new.pop(slot) for slot in slots.tolist()]
        for name, side in self.sides.items():
            factor, mean = np.ones(shape, np.float32), np.zeros(shape, bool)
            for i, (ablate, epsilon) in enumerate(new):
                for layer, head, kind in ablate:
                    if SIDES[kind] == name and kind in MEANS:
                        mean[i, layer, head] = True
                    elif SIDES[kind] == name:
                        factor[i, layer, head] = epsilon
            side.factor.index_copy_(0, index, self.table.on_device(factor))
            side.mean.index_copy_(0, index, self.table.on_device(mean))

    def plan(self, batch: StepBatch) -> dict[str, AblatedTokens] | None:
        """The tokens that change by side, "query" or "output"; None if none does."""
        plan = {name: tokens for name, side in self.sides.items() if (tokens := self._tokens(side, batch))}
        return plan or None

    def _tokens(self, side: Side, batch: StepBatch) -> AblatedTokens | None:
        probed = batch.slots >= 0
        layers, rows = np.nonzero((side.touched[batch.slots] & probed[:, None]).T)
        if not len(rows):
            return None
        starts = batch.query_start
        lengths = np.diff(starts)[rows]
        ends = np.cumsum(lengths)
        # Token i of all is the (i - begin of its run)-th of its request.
        tokens = np.arange(ends[-1]) + np.repeat(starts[rows] - (ends - lengths), lengths)
        slots = np.repeat(batch.slots[rows], lengths)
        per_layer = np.bincount(layers, weights=lengths, minlength=self._shape[1]).astype(np.int64)
        with_mean = bool(side.has_mean[batch.slots[probed]].any())
        on_device = self.table.index(np.stack([tokens, slots]))
        return AblatedTokens(side, on_device[0], on_device[1], [0, *np.cumsum(per_layer).tolist()], with_mean)

    def before_attention(self, plan: dict[str, AblatedTokens], layer: int, query: torch.Tensor) -> torch.Tensor:
        changed = plan["query"].changed(layer, query) if "query" in plan else None
        # A copy: the query is a view of others' memory.
        return query if changed is None else query.clone().index_copy_(0, *changed)

    def after_attention(self, plan: dict[str, AblatedTokens], attended: Attended) -> None:
        output = attended.output
        changed = plan["output"].changed(attended.impl.layer_index, output) if "output" in plan else None
        if changed is not None:
            output.index_copy_(0, *changed)
