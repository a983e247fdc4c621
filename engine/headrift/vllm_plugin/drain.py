"""The drain, on each rank: finished requests' numbers leave the device as bytes, copied while the engine runs on.

`headrift.ranks` puts the answers of all ranks together, on the engine's side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.numpy import save

from headrift.vllm_plugin import hidden_states, logit_stats
from headrift.vllm_plugin.recorder import Recorder

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True, slots=True)
class Place:
    """The part of the model that a rank holds: its layers and query heads, by the model's own numbers.

    logits: whether the next-token statistics are taken from this rank.
    """

    layers: range
    heads: range
    logits: bool

    @classmethod
    def of(cls, config: VllmConfig) -> Place:
        """The place of the worker whose configuration this is.

        vLLM numbers ranks by pipeline stage, then within the stage. QKVParallelLinear gives each rank of a stage a
        run of neighbouring query heads, in order, and the KV heads that these read: where there are fewer KV heads
        than ranks, several ranks hold the same one.
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
        )


class Drain:
    """Takes finished requests' numbers off one rank's device, in two calls with engine steps between them.

    `collect` enqueues everything and waits for nothing; `fetch` waits for the copies of its own ticket alone.
    """

    def __init__(self, recorder: Recorder, place: Place):
        self.recorder = recorder
        self.place = place
        self._under_way: dict[int, tuple[dict[str, np.ndarray], torch.cuda.Event | None]] = {}

    def collect(
        self,
        ticket: int,
        tenants: Sequence[tuple[int, int]],
        n_rows: int,
        system: int,
        prompt: int,
        want_mass: bool,
    ) -> None:
        """Start copying what `Recorder.gather` gives, under a ticket that the caller has not used before.

        The slots are free when this returns. A rank admits requests and runs steps on the thread that answers this
        call, so that the tenants it checks are those whose numbers lie in the slots; and whatever that thread does
        with the slots afterwards, the next tenant's wipe first, comes later on the same stream than this gathering.
        """
        gathered = self.recorder.gather(tenants, n_rows, system, prompt, want_mass)
        if not self.place.logits:
            del gathered["stats"]
            gathered.pop("divergence", None)
        on_host, copied = _start_copying(gathered)
        arrays: dict[str, np.ndarray] = {
            "tenants": np.array([tenant for _, tenant in tenants], np.int64),
            "layers": np.array(self.place.layers, np.int32),
            "heads": np.array(self.place.heads, np.int32),
        }
        arrays |= {name: value.numpy() for name, value in on_host.items()}
        self._under_way[ticket] = (arrays, copied)

    def fetch(self, ticket: int) -> bytes:
        """The arrays of a ticket in safetensors form, once. KeyError where there is no such ticket (any more).

        With those of `Recorder.gather` (stats and divergence from one rank only) go tenants [n] int64, and layers and
        heads, int32: the model's own numbers of the layers and heads along the axes.
        """
        arrays, copied = self._under_way.pop(ticket)
        if copied is not None:
            copied.synchronize()
        return save(arrays)

    def forget(self) -> None:
        """Drop every ticket that has not been fetched."""
        self._under_way.clear()


def _start_copying(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.cuda.Event | None]:
    """The tensors in host memory, and the event with which they have arrived (None: they are there)."""
    if all(tensor.device.type == "cpu" for tensor in tensors.values()):
        return tensors, None
    # Only into pinned memory does a copy run while the host goes on. torch keeps such blocks and hands them out again.
    on_host = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
        for name, tensor in tensors.items()
    }
    copied = torch.cuda.Event()
    copied.record()
    return on_host, copied


class WorkerExtension:
    """Methods that `collective_rpc` reaches on each worker. Arrays leave as bytes (vLLM drops arrays)."""

    vllm_config: VllmConfig
    _headrift_drain: Drain | None = None

    def headrift_describe(self) -> dict[str, Any]:
        """This rank's part of the model, and its recorder."""
        recorder, place = Recorder.required(self.vllm_config), Place.of(self.vllm_config)
        return {
            "layers": list(place.layers),
            "heads": list(place.heads),
            "windows": recorder.windows,
            "sinks": recorder.sinks,
            "recorder_bytes": recorder.nbytes,
            "dtype": str(self.vllm_config.model_config.dtype).removeprefix("torch."),
        }

    def headrift_warm_up(self) -> None:
        """Launch once every kernel that steps may launch, so that no request waits for a compilation."""
        recorder = Recorder.required(self.vllm_config)
        recorder.warm_up()
        if recorder.settings.logit_stats:
            logit_stats.warm_up(recorder, self.vllm_config.model_config.get_vocab_size())

    def headrift_collect(
        self,
        ticket: int,
        tenants: Sequence[tuple[int, int]],
        n_rows: int,
        system: int,
        prompt: int,
        want_mass: bool,
    ) -> None:
        """`Drain.collect`."""
        if self._headrift_drain is None:
            self._headrift_drain = Drain(Recorder.required(self.vllm_config), Place.of(self.vllm_config))
        self._headrift_drain.collect(ticket, tenants, n_rows, system, prompt, want_mass)

    def headrift_fetch(self, ticket: int) -> bytes:
        """`Drain.fetch`."""
        if self._headrift_drain is None:
            raise KeyError(ticket)
        return self._headrift_drain.fetch(ticket)

    def headrift_forget(self) -> None:
        """`Drain.forget`."""
        if self._headrift_drain is not None:
            self._headrift_drain.forget()

    def headrift_keep_hidden_states(self) -> None:
        """`hidden_states.install`, once, when the model is there."""
        model: Any = self.get_model()  # type: ignore[attr-defined]
        hidden_states.install(model, Recorder.required(self.vllm_config))

    def headrift_turned(self, clean: list[int], ablated: list[list[int]], r_main: int) -> list[list[float]]:
        """`hidden_states.turned`."""
        return hidden_states.turned(Recorder.required(self.vllm_config), clean, ablated, r_main)
