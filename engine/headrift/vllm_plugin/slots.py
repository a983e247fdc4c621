"""What an engine records, what one of its requests records, and the slots that requests are recorded in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Programs that may share one request's keys on a GPU, as headrift_kernels.triton.decode_mass has it (which a CPU does
# not import).
MOST_SPLITS = 32


@dataclass(frozen=True, slots=True)
class RecorderConfig:
    """What one engine records."""

    slots: int  # requests in flight
    steps: int  # N; steps 0..N are recorded
    regions: int = 3  # key ranges per request
    system_region: int = 0  # index of the region whose share of the prompt's mass is reported
    prompt_region: int = -1  # index of the region that is [0, prompt_len) in every request
    splits: int = 0  # programs that share a request's keys in a decode step on a GPU; 0: as many as fill it
    options: Mapping[str, int] = field(default_factory=dict)  # of the instruments, see `Instrument.options`
    layers: int | None = None  # of the model; None: not known yet
    heads: int | None = None  # query heads per layer of the whole model; None: not known yet
    ranks: int = 1  # ranks that share the heads

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
    """One request's `extra_args["headrift"]`, see `parse_probe`."""

    slot: int  # where the request is recorded, below `RecorderConfig.slots`
    request_id: int  # a number that no other request of this engine has
    prompt_len: int  # tokens of the prompt
    regions: Sequence[Sequence[int]]  # token ranges [start, end), in the order of the engine's regions
    steps: int  # N; steps 0..N are recorded
    # What the instruments do with the request, by field of `ProbeRequest`; a field left out has its default.
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Place:
    """The part of the model that a rank holds: layers and query heads by the model's own numbers."""

    layers: range
    heads: range
    logits: bool = True  # whether what is made of logits is taken from this rank
    vocab: int = 0
    width: int = 0  # of a hidden state

    @classmethod
    def from_config(cls, config: VllmConfig) -> Place:
        """The place of the worker whose configuration this is.

        vLLM numbers ranks by pipeline stage, then within the stage. QKVParallelLinear gives each rank of a stage a run
        of neighbouring query heads, in order.
        """
        model, parallel = config.model_config, config.parallel_config
        rank = parallel.rank % parallel.tensor_parallel_size
        heads = model.get_num_attention_heads(parallel)
        first, end = model.get_layers_start_end_indices(parallel)
        return cls(
            layers=range(first, end),
            heads=range(rank * heads, (rank + 1) * heads),
            # The last stage has the logits. Most platforms gather them on all of its ranks, some on the first alone.
            logits=end == model.get_total_num_hidden_layers() and rank == 0,
            vocab=model.get_vocab_size(),
            width=model.get_hidden_size(),
        )


class SlotTable:
    """S slots with R regions each, and the running batch of at most B requests.

    Device tensors, int32, which keep their address so that captured CUDA graphs may read them:
        bounds: [S, R, 2] token ranges; prompt_len: [S]; step_limit: [S], steps below it are recorded.
        row_slot: [B] slot of each request of the batch, -1: not probed; row_step: [B] step of its last query, if an
        instrument reads steps.

    On the host, for planning a step:
        slots: [requests of the batch] as row_slot; prompt_lens, step_limits: [S] as prompt_len and step_limit.
        runner_rows: slot by the model runner's own number of a request, see `worker`.
        step_is_real: the running step is of requests, not made up; probed: some of its requests are probed.
    """

    def __init__(self, config: RecorderConfig, batch_size: int, device: torch.device):
        self.config, self.device = config, device

        def int32(value: int, *shape: int) -> torch.Tensor:
            return torch.full(shape, value, dtype=torch.int32, device=device)

        self.bounds = int32(0, config.slots, config.regions, 2)
        self.prompt_len, self.step_limit = int32(1, config.slots), int32(0, config.slots)
        self.row_slot, self.row_step = int32(-1, batch_size), int32(-1, batch_size)
        self.slots = np.empty(0, np.int32)
        self.prompt_lens, self.step_limits = np.ones(config.slots, np.int32), np.zeros(config.slots, np.int32)
        self.runner_rows = np.full(batch_size, -1, np.int32)
        self.step_is_real = self.probed = False

    def index(self, array: np.ndarray) -> torch.Tensor:
        """`array` as an int64 index on the device; waits for nothing."""
        return self.on_device(array.astype(np.int64))

    def on_device(self, array: np.ndarray) -> torch.Tensor:
        """`array` on the device, copied while the host goes on to the next step."""
        return self.pinned(array).to(self.device, non_blocking=True)

    def pinned(self, array: np.ndarray) -> torch.Tensor:
        """`array` in memory that a copy to the device reads while the host goes on. It is fresh: torch hands pinned
        memory out again only after the copies from it are done."""
        tensor = torch.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.pin_memory()
