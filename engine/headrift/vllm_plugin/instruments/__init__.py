"""The instruments of a probed engine: what probed requests can be measured with, or changed by, besides the masses.

Every subclass of `Instrument` in a module of this package is one.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module
from typing import Any, ClassVar

import numpy as np
import torch

from headrift.requests import ProbeRequest
from headrift.vllm_plugin.slots import Place, Probe, RecorderConfig, SlotTable


@dataclass(frozen=True, slots=True)
class Output:
    """An array of a recording; its axes begin with steps if `per_step`, then layers and heads if `per_head`; if not, it
    is taken from the one rank that has the logits."""

    name: str
    per_step: bool = True
    per_head: bool = True


MASS_OUTPUTS = (Output("share"), Output("first", per_step=False), Output("mass"))


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The running step's n requests, in batch order, on the host."""

    slots: np.ndarray  # [n], -1 if not probed
    query_start: np.ndarray  # [n + 1], each request's first token in the batch
    seq_lens: np.ndarray  # [n], this step's tokens included


@dataclass(frozen=True, slots=True)
class Attended:
    """A layer's attention of the running step: vLLM's own arguments, of all tokens of the batch."""

    impl: Any  # the backend's implementation, with `layer_index`, `attention_options()` and `gathered_keys(...)`
    layer: Any
    query: torch.Tensor  # [tokens, heads, head_dim]
    kv_cache: torch.Tensor
    block_table: torch.Tensor  # [requests, pages] of the whole batch
    output: torch.Tensor  # [tokens, heads, head_dim]


class Instrument:
    """A device-side measure or intervention of one engine's worker.

    Its options become options of `ProbedEngine`, its outputs arrive in `Recording.measures`, and the recorder calls the
    methods below. What has to be written is little: `__init__` allocates with `per_slot` a tensor named as each output,
    and one of `read_logits`, `read_hidden_states` or `before_attention` and `after_attention` fills it.
    """

    # Engine options with their defaults: the instrument is on if all of them are set. None: it is always on.
    options: ClassVar[Mapping[str, int]] = {}
    # Fields of ProbeRequest that it obeys, with their defaults.
    fields: ClassVar[Mapping[str, Any]] = {}
    # Those fields that number what is kept for other requests, each with the option that says how many are kept.
    references: ClassVar[Mapping[str, str]] = {}
    outputs: ClassVar[tuple[Output, ...]] = ()
    # Which of the hooks below are called, so that a step pays for no other.
    reads_logits: ClassVar[bool] = False
    reads_hidden_states: ClassVar[bool] = False
    in_layers: ClassVar[bool] = False

    def __init__(self, table: SlotTable, place: Place):
        """Allocate what it needs on the device, once, before vLLM sizes the KV cache."""
        self.table, self.place = table, place
        # By field: the number that each slot's request gives, -1 for none.
        self.numbers = {name: np.full(table.config.slots, -1) for name in self.references}
        self._per_slot: list[torch.Tensor] = []
        self._kept: dict[str, torch.Tensor] = {}

    # On the engine's side: what a request says.

    @classmethod
    def is_on(cls, options: Mapping[str, int]) -> bool:
        """Whether an engine with these options has it."""
        return all(options.get(name) for name in cls.options)

    @classmethod
    def ask(cls, request: ProbeRequest, memory: Mapping[int, int]) -> dict[str, Any]:
        """What the worker is told of a request (`Probe.fields`); `memory`: what `remember` gave for earlier ones."""
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
        self._per_slot.append(self._nan(self.table.config.slots, *shape))
        return self._per_slot[-1]

    def kept_as(self, name: str, *shape: int) -> torch.Tensor:
        """Allocate [n, *shape] float32 for what requests keep under the numbers of a field of `references`; wiped to
        NaN when a new request is about to keep it."""
        self._kept[name] = self._nan(self.table.config.options[self.references[name]], *shape)
        return self._kept[name]

    def _nan(self, *shape: int) -> torch.Tensor:
        return torch.full(shape, torch.nan, dtype=torch.float32, device=self.table.device)

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
        for name, numbers in self.numbers.items():
            number = probe.fields.get(name)
            numbers[slot] = -1 if number is None else number

    def install(self, slots: np.ndarray, index: torch.Tensor) -> None:
        """Set the slots [n] up on the device, before the first step of their new requests; `index`: `slots` there."""
        for tensor in self._per_slot:
            tensor.index_fill_(0, index, torch.nan)
        for name, tensor in self._kept.items():
            numbers = self.numbers[name][slots]
            if (numbers >= 0).any():
                tensor.index_fill_(0, self.table.index(numbers[numbers >= 0]), torch.nan)

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

    def rows_with(self, name: str) -> np.ndarray:
        """Requests of the running batch that give a number for a field of `references`."""
        slots = self.table.slots
        return np.flatnonzero((slots >= 0) & (self.numbers[name][slots] >= 0))

    def keep_at_step_0(self, name: str, rows: np.ndarray, values: torch.Tensor) -> None:
        """Keep `values` [requests of the batch, size] of these rows, under the numbers of a field, if at step 0, which
        earlier chunks of a prompt are not: the device tells them apart."""
        kept, table = self._kept[name], self.table
        row, number = table.index(np.stack([rows, self.numbers[name][table.slots[rows]]]))
        at_step_0 = table.row_step.index_select(0, row).unsqueeze(1) == 0
        before = kept.index_select(0, number)
        kept.index_copy_(0, number, torch.where(at_step_0, values.index_select(0, row).float(), before))

    def gather(self, slots: Sequence[int], n_steps: int) -> dict[str, torch.Tensor]:
        """Copy the outputs of finished requests into fresh tensors [len(slots), ...], steps 0..n_steps-1."""

        def rows(output: Output) -> list[torch.Tensor]:
            # By slices: an index tensor would be copied to the device and waited for.
            tensor = getattr(self, output.name)
            return [tensor[slot, :n_steps] if output.per_step else tensor[slot] for slot in slots]

        return {output.name: torch.stack(rows(output)) for output in self.outputs}


def instrument_types() -> list[type[Instrument]]:
    """Every instrument there is, by module: the order in which a step calls them."""
    _import_modules()
    return sorted(Instrument.__subclasses__(), key=lambda kind: kind.__module__)


@cache
def _import_modules() -> None:
    for module in pkgutil.iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")


def _option_defaults() -> dict[str, int]:
    """The engine options of all instruments, with their defaults."""
    return {name: value for kind in instrument_types() for name, value in kind.options.items()}


def recording_outputs() -> dict[str, Output]:
    """Every array that a recording may have, by name."""
    outputs = (*MASS_OUTPUTS, *(output for kind in instrument_types() for output in kind.outputs))
    return {output.name: output for output in outputs}


def parse_config(values: Mapping[str, Any]) -> RecorderConfig:
    """What an engine records, from the flat `additional_config["headrift"]`; ValueError if it cannot be."""
    # The model's shape and the ranks are not settings: the engine and its workers fill them in.
    core = {field.name for field in fields(RecorderConfig)} - {"options", "layers", "heads", "ranks"}
    options = _option_defaults()
    known = core | options.keys()
    unknown = sorted(values.keys() - known)
    if unknown:
        raise ValueError(f"headrift has no setting {unknown[0]!r}; it has {', '.join(sorted(known))}")
    chosen = {name: values.get(name, default) for name, default in options.items()}
    return RecorderConfig(**{name: values[name] for name in values.keys() & core}, options=chosen)


def unlimited_config() -> RecorderConfig:
    """A config that every well-formed probe fits, for checks where the engine's own is not known."""
    most = 2**31
    return RecorderConfig(slots=most, steps=most, regions=8, options=dict.fromkeys(_option_defaults(), most))


def parse_probe(extra: Mapping[str, Any], config: RecorderConfig) -> Probe:
    """One request's `extra_args["headrift"]`, all of it checked; ValueError if this engine cannot record it."""
    core = [field.name for field in fields(Probe) if field.name != "fields"]
    missing = [name for name in core if name not in extra]
    if missing:
        raise ValueError(f'extra_args["headrift"] lacks {", ".join(missing)}')
    own = {name: value for name, value in extra.items() if name not in core}
    probe, kinds = Probe(**{name: extra[name] for name in core}, fields=own), instrument_types()
    no_ranges = any(len(r) != 2 or not 0 <= r[0] <= r[1] for r in probe.regions)
    unknown = sorted(own.keys() - {name for kind in kinds for name in kind.fields})
    for is_wrong, message in (
        (not 0 <= probe.slot < config.slots, f"headrift slot {probe.slot} is outside 0..{config.slots - 1}"),
        (not 0 <= probe.steps <= config.steps, f"steps={probe.steps}: this engine records steps 0..{config.steps}"),
        (probe.prompt_len < 1, f"prompt_len={probe.prompt_len}: a prompt has at least one token"),
        (len(probe.regions) > config.regions, f"{len(probe.regions)} regions: this engine records {config.regions}"),
        (no_ranges, f"regions are [start, end) with 0 <= start <= end, not {probe.regions}"),
        (bool(unknown), f'extra_args["headrift"] has {", ".join(unknown)}, which headrift does not take'),
    ):
        if is_wrong:
            raise ValueError(message)
    for kind in kinds:
        if named := sorted(own.keys() & kind.fields.keys()):
            _check_fields(kind, named, probe, config)
    return probe


def _check_fields(kind: type[Instrument], named: Sequence[str], probe: Probe, config: RecorderConfig) -> None:
    """Raise ValueError if an instrument cannot obey the fields that a probe names."""
    if not kind.is_on(config.options):
        missing = " and ".join(f"{name}={True if value is False else '...'}" for name, value in kind.options.items())
        raise ValueError(f"{', '.join(named)} is off in this engine: set {missing}")
    for name, option in kind.references.items():
        number, kept = probe.fields.get(name), config.options[option]
        if number is not None and not 0 <= number < kept:
            raise ValueError(f"{name}={number}: this engine keeps {kept}, counted from 0; set {option} for more")
    kind.check(probe, config)
