"""The interface of an instrument: what probed requests can be measured with, or changed by, besides the masses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from headrift.requests import ProbeRequest
from headrift.vllm_plugin.probe import Probe, RecorderConfig
from headrift.vllm_plugin.slots import Place, SlotTable


@dataclass(frozen=True, slots=True)
class Output:
    """An array of a recording; its axes begin with steps if `per_step`, then layers and heads if `per_head`.

    What is not per head is taken from the one rank that has the logits.
    """

    name: str
    per_step: bool = True
    per_head: bool = True


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The running step's n requests, in batch order, on the host.

    Attributes:
        slots: [n], -1 if not probed.
        query_start: [n + 1], each request's first token in the batch.
        seq_lens: [n], this step's tokens included.
    """

    slots: np.ndarray
    query_start: np.ndarray
    seq_lens: np.ndarray


class Instrument:
    """A device-side measure or intervention of one engine's worker.

    Write a subclass into a module of this package and it is found: its options become options of `ProbedEngine`, its
    outputs arrive in `Recording.measures`, and the recorder calls the methods below. What has to be written is little:
    `__init__` allocates with `per_slot` a tensor named as each output, and one of `read_logits`, `read_hidden_states`
    or `before_attention` and `after_attention` fills it.
    """

    # Engine options with their defaults: the instrument is on if all of them are set. None: it is always on.
    options: ClassVar[Mapping[str, int]] = {}
    # Fields of ProbeRequest that it obeys, with their defaults.
    fields: ClassVar[Mapping[str, Any]] = {}
    outputs: ClassVar[tuple[Output, ...]] = ()
    # Which of the hooks below are called, so that a step pays for no other.
    reads_logits: ClassVar[bool] = False
    reads_hidden_states: ClassVar[bool] = False
    in_layers: ClassVar[bool] = False

    def __init__(self, table: SlotTable, place: Place):
        """Allocate what it needs on the device, once, before vLLM sizes the KV cache."""
        self.table, self.place = table, place
        self._per_slot: list[torch.Tensor] = []

    # On the engine's side: what a request says.

    @classmethod
    def is_on(cls, options: Mapping[str, int]) -> bool:
        """Whether an engine with these options has it."""
        return all(options.get(name) for name in cls.options)

    @classmethod
    def ask(cls, request: ProbeRequest, memory: Mapping[int, int]) -> dict[str, Any]:
        """What the worker is told of a request (`Probe.fields`), nothing by default.

        Args:
            request: About to be submitted.
            memory: What `remember` gave for the engine's earlier requests.
        """
        values = {name: getattr(request, name, default) for name, default in cls.fields.items()}
        return {name: value for name, value in values.items() if value != cls.fields[name]}

    @classmethod
    def remember(cls, request: ProbeRequest) -> dict[int, int]:
        """What `ask` has to know of this request when later ones are submitted."""
        return {}

    @classmethod
    def check(cls, probe: Probe, config: RecorderConfig) -> None:
        """Raise ValueError if what a probe says for this instrument cannot be done by an engine of this config."""

    @classmethod
    def is_for(cls, request: ProbeRequest) -> bool:
        """Whether its outputs are in the request's recording."""
        return not cls.fields or any(getattr(request, name, value) != value for name, value in cls.fields.items())

    @classmethod
    def cache_salt(cls, request: ProbeRequest) -> str | None:
        """What sets the request's keys and values apart in the prefix cache, if the instrument changes them."""
        return None

    # On the worker's side. All of it only enqueues work and never waits for the device.

    def per_slot(self, *shape: int) -> torch.Tensor:
        """Allocate [slots, *shape] float32, wiped to NaN whenever a slot gets a new request."""
        size = (self.table.config.slots, *shape)
        tensor = torch.full(size, torch.nan, dtype=torch.float32, device=self.table.device)
        self._per_slot.append(tensor)
        return tensor

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, torch.Tensor))

    def kernel_options(self) -> dict[str, Any]:
        """Arguments that the attention kernels take for it, in every call."""
        return {}

    def warm_up(self) -> None:
        """Launch every kernel once that steps may launch."""

    def admit(self, slot: int, probe: Probe) -> None:
        """Note on the host what a slot's new request asks for."""

    def install(self, slots: np.ndarray, index: torch.Tensor) -> None:
        """Set the slots up on the device, before the first step of their new requests.

        Args:
            slots: [n] on the host.
            index: [n] the same on the device.
        """
        for tensor in self._per_slot:
            tensor.index_fill_(0, index, torch.nan)

    def plan(self, batch: StepBatch) -> Any:
        """Decide once a step, for all layers, what `before_attention` and `after_attention` do; None for nothing."""
        return None

    def before_attention(self, plan: Any, layer: int, query: torch.Tensor) -> torch.Tensor:
        """Return the layer's queries [tokens, heads, head_dim], changed in a copy if at all."""
        return query

    def after_attention(self, plan: Any, attended: Attended) -> None:
        """Read what a layer attended, or change its output in place."""

    def read_logits(self, logits: torch.Tensor) -> None:
        """Read the logits [requests of the batch, vocab] float32 of a step with probed requests; never change them."""

    def read_hidden_states(self, hidden: torch.Tensor) -> None:
        """Read what the language-model head reads, [requests of the batch, width], in a step with probed requests."""

    def gather(self, slots: Sequence[int], n_steps: int) -> dict[str, torch.Tensor]:
        """Copy the outputs of finished requests into fresh tensors [len(slots), ...], steps 0..n_steps-1.

        By slices: an index tensor would be copied to the device and waited for.
        """
        return {
            output.name: torch.stack([getattr(self, output.name)[slot, :n_steps] for slot in slots])
            if output.per_step
            else torch.stack([getattr(self, output.name)[slot] for slot in slots])
            for output in self.outputs
        }


@dataclass(frozen=True, slots=True)
class Attended:
    """A layer's attention of the running step: vLLM's own arguments, of all tokens of the batch.

    Attributes:
        impl: The backend's implementation, with `layer_index`, `attention_options()` and `gathered_keys(...)`.
        layer: vLLM's layer.
        query: [tokens, heads, head_dim].
        kv_cache: The layer's cache, as the backend has it.
        block_table: [requests, pages] of the whole batch.
        output: [tokens, heads, head_dim].
    """

    impl: Any
    layer: Any
    query: torch.Tensor
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    output: torch.Tensor


def keep_at_step_0(
    table: SlotTable, kept: torch.Tensor, rows: np.ndarray, numbers: np.ndarray, values: torch.Tensor
) -> None:
    """Keep rows of values [requests of the batch, size] as kept[numbers], for those whose last query is at step 0.

    Earlier chunks of a prompt are told apart on the device.
    """
    row, number = table.index(np.stack([rows, numbers]))
    at_step_0 = table.row_step.index_select(0, row).unsqueeze(1) == 0
    before = kept.index_select(0, number)
    kept.index_copy_(0, number, torch.where(at_step_0, values.index_select(0, row).float(), before))


def wipe(table: SlotTable, kept: torch.Tensor, numbers: np.ndarray) -> None:
    """Make NaN what new requests are about to keep under these numbers (-1: nothing)."""
    if (numbers >= 0).any():
        kept.index_fill_(0, table.index(numbers[numbers >= 0]), torch.nan)


def check_number(number: Any, kept: int, name: str) -> None:
    """Raise ValueError if a request refers to something that the engine does not keep; None refers to nothing."""
    if number is not None and not 0 <= number < kept:
        raise ValueError(f"there is no {name} {number}; this engine keeps {kept}")


def number_or_none(number: int | None) -> int:
    """A reference number as the host's arrays have it: -1 for none."""
    return -1 if number is None else number
