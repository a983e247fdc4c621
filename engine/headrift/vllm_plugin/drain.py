"""The drain of each rank: finished requests' numbers leave the device as bytes, copied while the engine runs on.

`vllm_engine.tensor_parallel` puts the answers of all ranks together, on the engine's side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.numpy import save

from headrift.vllm_plugin.instruments import recording_outputs
from headrift.vllm_plugin.recorder import Recorder

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class Drain:
    """Takes finished requests' numbers off one rank's device, in two calls with engine steps between them.

    `collect` enqueues everything and waits for nothing; `fetch` waits for the copies of its own ticket alone.
    """

    def __init__(self, recorder: Recorder):
        self.recorder = recorder
        self._in_flight: dict[int, tuple[dict[str, np.ndarray], torch.cuda.Event | None]] = {}

    def collect(self, ticket: int, requests: Sequence[tuple[int, int]], n_steps: int, want_mass: bool) -> None:
        """Start copying what `Recorder.gather` gives, under a ticket that the caller has not used before.

        The slots are free when this returns. A rank admits requests and runs steps on the thread that answers this
        call, so the request ids it checks are of those whose numbers are in the slots; and whatever that thread does
        with the slots afterwards, the next request's wipe first, comes later on the same stream than this gathering.
        """
        gathered = self.recorder.gather(requests, n_steps, want_mass)
        place = self.recorder.place
        if not place.logits:
            outputs = recording_outputs()
            gathered = {name: tensor for name, tensor in gathered.items() if outputs[name].per_head}
        arrays, copied = _start_copying(gathered)
        arrays |= {
            "requests": np.array([request_id for _, request_id in requests], np.int64),
            "layers": np.array(place.layers, np.int32),
            "heads": np.array(place.heads, np.int32),
            "logits": np.array([place.logits]),
        }
        self._in_flight[ticket] = arrays, copied

    def fetch(self, ticket: int) -> bytes:
        """The arrays of a ticket in safetensors form, once; KeyError if there is no such ticket (any more).

        With those of `Recorder.gather` go requests [n] int64, layers and heads [..] int32 (the model's own numbers of
        the layers and heads along the axes) and logits [1] (whether what is not per head is from this rank).
        """
        arrays, copied = self._in_flight.pop(ticket)
        if copied is not None:
            copied.synchronize()
        return save(arrays)

    def forget(self) -> None:
        """Drop every ticket that has not been fetched."""
        self._in_flight.clear()


def _start_copying(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, np.ndarray], torch.cuda.Event | None]:
    """The tensors in host memory, and the event with which they have arrived (None: they are there)."""
    if all(tensor.device.type == "cpu" for tensor in tensors.values()):
        return {name: tensor.numpy() for name, tensor in tensors.items()}, None
    # Only into pinned memory does a copy run while the host goes on. torch keeps such blocks and hands them out again.
    on_host = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
        for name, tensor in tensors.items()
    }
    copied = torch.cuda.Event()
    copied.record()
    return {name: tensor.numpy() for name, tensor in on_host.items()}, copied


class WorkerExtension:
    """Methods that `collective_rpc` reaches on each worker. Arrays leave as bytes (vLLM drops arrays)."""

    vllm_config: VllmConfig
    _headrift_drain: Drain | None = None

    @property
    def headrift_drain(self) -> Drain:
        """This rank's drain, made at first use."""
        if self._headrift_drain is None:
            self._headrift_drain = Drain(Recorder.required(self.vllm_config))
        return self._headrift_drain

    def headrift_start(self) -> dict[str, Any]:
        """`Recorder.start`, once, when the model is loaded; this rank's part of it, and its recorder."""
        recorder = self.headrift_drain.recorder
        recorder.start(self.get_model())  # type: ignore[attr-defined]
        return self.headrift_describe()

    def headrift_describe(self) -> dict[str, Any]:
        """This rank's part of the model, and its recorder."""
        recorder = self.headrift_drain.recorder
        return {
            "layers": list(recorder.place.layers),
            "heads": list(recorder.place.heads),
            "windows": recorder.windows,
            "sinks": recorder.sinks,
            "recorder_bytes": recorder.nbytes,
            "dtype": str(self.vllm_config.model_config.dtype).removeprefix("torch."),
        }

    def headrift_collect(self, ticket: int, requests: Sequence[tuple[int, int]], n_steps: int, want_mass: bool) -> None:
        """`Drain.collect`."""
        self.headrift_drain.collect(ticket, requests, n_steps, want_mass)

    def headrift_fetch(self, ticket: int) -> bytes:
        """`Drain.fetch`."""
        return self.headrift_drain.fetch(ticket)

    def headrift_forget(self) -> None:
        """`Drain.forget`."""
        self.headrift_drain.forget()

    def headrift_call(self, instrument: str, method: str, *args: Any) -> Any:
        """Call a method of an instrument, by the name of its class; the result must survive a process border."""
        return getattr(self.headrift_drain.recorder.instrument(instrument), method)(*args)
