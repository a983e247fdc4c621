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
from headrift.vllm_plugin.instruments import Attended, Instrument, StepBatch
from headrift.vllm_plugin.slots import Place, Probe, RecorderConfig, SlotTable


class Side:
    """The queries, or the outputs, of all heads of this rank: S slots, L layers, H heads."""

    def __init__(self, shape: tuple[int, int, int], device: torch.device):
        # On the device [S, L, H]: 1 if nothing is ablated; whether the mean over the heads takes the head's place.
        self.factor = torch.ones(shape, dtype=torch.float32, device=device)
        self.mean = torch.zeros(shape, dtype=torch.bool, device=device)
        # On the host: layers in which a slot ablates any head [S, L]; whether it does so by the mean anywhere [S].
        self.touched = np.zeros(shape[:2], bool)
        self.has_mean = np.zeros(shape[0], bool)


@dataclass(frozen=True, slots=True)
class AblatedTokens:
    """Tokens of the running step whose query, or output, some layer changes."""

    side: Side
    tokens: torch.Tensor  # [n] int64 on the device, as slots; those of layer l are starts[l] to starts[l + 1]
    slots: torch.Tensor
    starts: list[int]
    with_mean: bool  # whether any of them is changed to a mean over heads

    def changed(self, layer: int, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The tokens [n] whose queries or outputs `values` this layer changes, and what these become [n, H, D]."""
        start, end = self.starts[layer], self.starts[layer + 1]
        if start == end:
            return None
        tokens, slots = self.tokens[start:end], self.slots[start:end]
        picked = values.index_select(0, tokens)
        changed = picked.float() * self.side.factor[:, layer].index_select(0, slots).unsqueeze(-1)
        if self.with_mean:
            mean = self.side.mean[:, layer].index_select(0, slots).unsqueeze(-1)
            changed = torch.where(mean, picked.float().mean(1, keepdim=True), changed)
        return tokens, changed.to(values.dtype)


class Ablation(Instrument):
    """Ablates the heads that each request names, see `headrift.ablation`."""

    options = {"ablation": False}
    fields = {"ablate": (), "epsilon": ablation.EPSILON}
    in_layers = True

    def __init__(self, table: SlotTable, place: Place):
        super().__init__(table, place)
        self._shape = (table.config.slots, len(place.layers), len(place.heads))
        self.sides = {name: Side(self._shape, table.device) for name in ("query", "output")}
        self._new: dict[int, tuple[Sequence[HeadAblation], float]] = {}

    @property
    def nbytes(self) -> int:
        return sum(side.factor.nbytes + side.mean.nbytes for side in self.sides.values())

    @classmethod
    def ask(cls, request: ProbeRequest, memory: Mapping[int, int]) -> dict[str, Any]:
        return super().ask(request, memory) if request.ablate else {}

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
            entries = [(layer, kind) for layer, _, kind in ablate if SIDES[kind] == name]
            side.touched[slot] = False
            side.touched[slot, [layer for layer, _ in entries]] = True
            side.has_mean[slot] = any(kind in MEANS for _, kind in entries)

    def install(self, slots: np.ndarray, index: torch.Tensor) -> None:
        shape = (len(slots), *self._shape[1:])
        factors = {name: np.ones(shape, np.float32) for name in self.sides}
        means = {name: np.zeros(shape, bool) for name in self.sides}
        for i, slot in enumerate(slots.tolist()):
            ablate, epsilon = self._new.pop(slot)
            for layer, head, kind in ablate:
                if kind in MEANS:
                    means[SIDES[kind]][i, layer, head] = True
                else:
                    factors[SIDES[kind]][i, layer, head] = epsilon
        for name, side in self.sides.items():
            side.factor.index_copy_(0, index, self.table.on_device(factors[name]))
            side.mean.index_copy_(0, index, self.table.on_device(means[name]))

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
