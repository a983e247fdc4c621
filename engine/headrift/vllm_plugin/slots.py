"""Slots, and which slot and step each request of the running batch has: on the host and, for kernels, on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from headrift.vllm_plugin.probe import RecorderConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True, slots=True)
class Place:
    """The part of the model that a rank holds.

    Attributes:
        layers: Its layers, by the model's own numbers.
        heads: Its query heads, by the model's own numbers.
        logits: Whether what is made of logits is taken from this rank.
        vocab: Size of the vocabulary.
        width: Size of a hidden state.
    """

    layers: range
    heads: range
    logits: bool = True
    vocab: int = 0
    width: int = 0

    @classmethod
    def from_config(cls, config: VllmConfig) -> Place:
        """The place of the worker whose configuration this is.

        vLLM numbers ranks by pipeline stage, then within the stage. QKVParallelLinear gives each rank of a stage a run
        of neighbouring query heads, in order, and the KV heads that these read: if there are fewer KV heads than ranks,
        several ranks have the same one.
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
        runner_rows: slot by the model runner's own number of a request (V1: batch row, V2: req_idx), see `row_map`.
        step_is_real: the running step is of requests, not made up; probed: some of its requests are probed.
    """

    def __init__(self, config: RecorderConfig, batch_size: int, device: torch.device):
        self.config, self.device = config, device

        def int32(value: int, *shape: int) -> torch.Tensor:
            return torch.full(shape, value, dtype=torch.int32, device=device)

        self.bounds = int32(0, config.slots, config.regions, 2)
        self.prompt_len = int32(1, config.slots)
        self.step_limit = int32(0, config.slots)
        self.row_slot = int32(-1, batch_size)
        self.row_step = int32(-1, batch_size)
        self.slots = np.empty(0, np.int32)
        self.prompt_lens = np.ones(config.slots, np.int32)
        self.step_limits = np.zeros(config.slots, np.int32)
        self.runner_rows = np.full(batch_size, -1, np.int32)
        self.step_is_real = False
        self.probed = False

    def index(self, array: np.ndarray) -> torch.Tensor:
        """`array` as an int64 index on the device; waits for nothing."""
        return self.on_device(array.astype(np.int64))

    def on_device(self, array: np.ndarray) -> torch.Tensor:
        """`array` on the device, copied while the host goes on to the next step."""
        return self.pinned(array).to(self.device, non_blocking=True)

    def pinned(self, array: np.ndarray) -> torch.Tensor:
        """`array` in memory from which one copy goes to a tensor on the device, and the host does not wait.

        It is fresh: torch hands pinned memory out again only after the copies from it are done.
        """
        tensor = torch.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.pin_memory()
