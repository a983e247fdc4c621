"""What an engine records, and what one of its requests records: read from plain dictionaries and checked here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

# Programs that may share one request's keys on a GPU, as headrift_kernels.triton.decode_mass has it (which a CPU does
# not import).
MOST_SPLITS = 32


@dataclass(frozen=True, slots=True)
class RecorderConfig:
    """What one engine records.

    Attributes:
        slots: Requests in flight.
        steps: N; steps 0..N are recorded.
        regions: Key ranges per request.
        system_region: Index of the region whose share of the prompt's mass is reported; None: no recording is read.
        prompt_region: Index of the region that is [0, prompt_len) in every request; None: no recording is read.
        splits: Programs that share a request's keys in a decode step on a GPU; 0: as many as fill it.
        options: The instruments' options by name, see `Instrument.options`.
        layers: Layers of the model; None: not known yet.
        heads: Query heads per layer of the whole model; None: not known yet.
        ranks: Ranks that share the heads.
    """

    slots: int
    steps: int
    regions: int = 3
    system_region: int | None = None
    prompt_region: int | None = None
    splits: int = 0
    options: Mapping[str, int] = field(default_factory=dict)
    layers: int | None = None
    heads: int | None = None
    ranks: int = 1

    def __post_init__(self) -> None:
        if self.slots < 1 or self.steps < 0 or not 1 <= self.regions <= 8:
            raise ValueError(f"headrift needs slots >= 1, steps >= 0 and 1..8 regions, not {self}")
        if not 0 <= self.splits <= MOST_SPLITS:
            raise ValueError(f"headrift takes 0 to {MOST_SPLITS} splits, not {self.splits}")
        for name, value in self.options.items():
            if value < 0:
                raise ValueError(f"headrift needs {name} to be 0 or more, not {value}")


@dataclass(frozen=True, slots=True)
class Probe:
    """One request's `extra_args["headrift"]`.

    Attributes:
        slot: Where the request is recorded, below `RecorderConfig.slots`.
        request_id: A number that no other request of this engine has.
        prompt_len: Tokens of the prompt.
        regions: Token ranges [start, end), in the order of the engine's regions.
        steps: N; steps 0..N are recorded.
        fields: What the instruments do with the request, by field of `ProbeRequest`; a field left out has its default.
    """

    slot: int
    request_id: int
    prompt_len: int
    regions: Sequence[Sequence[int]]
    steps: int
    fields: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, extra: Mapping[str, Any], config: RecorderConfig) -> Probe:
        """Read a probe, without what the instruments have to say of its `fields`.

        Raises:
            ValueError: a value is missing or cannot be recorded by this engine.
        """
        core = [f.name for f in fields(cls) if f.name != "fields"]
        missing = [name for name in core if name not in extra]
        if missing:
            raise ValueError(f'extra_args["headrift"] lacks {", ".join(missing)}')
        rest = {name: value for name, value in extra.items() if name not in core}
        probe = cls(**{name: extra[name] for name in core}, fields=rest)
        if not 0 <= probe.slot < config.slots:
            raise ValueError(f"headrift slot {probe.slot} is outside 0..{config.slots - 1}")
        if not 0 <= probe.steps <= config.steps:
            raise ValueError(f"steps={probe.steps}: this engine records steps 0..{config.steps}")
        if probe.prompt_len < 1:
            raise ValueError(f"prompt_len={probe.prompt_len}: a prompt has at least one token")
        if len(probe.regions) > config.regions:
            raise ValueError(f"{len(probe.regions)} regions: this engine records {config.regions}")
        if any(len(r) != 2 or not 0 <= r[0] <= r[1] for r in probe.regions):
            raise ValueError(f"regions are [start, end) with 0 <= start <= end, not {probe.regions}")
        return probe
