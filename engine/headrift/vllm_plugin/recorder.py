"""The recorder of a rank: the masses that kernels write, the instruments, and finished requests' way off the device.

A drain is two calls with engine steps between them: `collect` enqueues everything and waits for nothing; `fetch` waits
for the copies of its own ticket alone. `vllm_engine.merge_recordings` puts the ranks' answers together.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.numpy import save

from headrift.errors import RefusedError
from headrift.vllm_plugin import instruments
from headrift.vllm_plugin.instruments import Instrument, StepBatch
from headrift.vllm_plugin.plugin import refusals, settings_of
from headrift.vllm_plugin.slots import Place, Probe, RecorderConfig, SlotTable

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams
    from vllm.v1.attention.backend import CommonAttentionMetadata

# Recorders by vLLM's instance id: backend, builder and logits processor of one engine must use the same one.
_RECORDERS: weakref.WeakValueDictionary[str, Recorder] = weakref.WeakValueDictionary()


class Recorder(SlotTable):
    """The masses of one rank's probed requests, and the instruments that measure more."""

    def __init__(self, config: RecorderConfig, place: Place, batch_size: int, device: torch.device):
        super().__init__(config, batch_size, device)
        self.place = place
        # [slots, steps, layers, heads, regions], NaN if never written; keeps its address.
        shape = (config.slots, config.steps + 1, len(place.layers), len(place.heads), config.regions)
        self.mass = torch.full(shape, torch.nan, dtype=torch.float32, device=device)
        kinds = instruments.instrument_types()
        self.instruments = [kind(self, place) for kind in kinds if kind.is_on(config.options)]
        self.logit_readers = [i for i in self.instruments if i.reads_logits]
        self.hidden_readers = [i for i in self.instruments if i.reads_hidden_states]
        self.in_layers = [i for i in self.instruments if i.in_layers]
        # Further arguments of the attention kernels.
        self.kernel_options = {name: value for i in self.instruments for name, value in i.kernel_options().items()}
        # Of the running step, for `before_attention` and `after_attention`.
        self.layer_plans: list[tuple[Instrument, Any]] = []
        # Memory that kernels of all layers use in turn, by name.
        self.scratch: dict[str, torch.Tensor] = {}
        self.windows: list[int | None] = [None] * len(place.layers)  # sliding windows, None for none
        self.sinks = False  # whether any layer has attention sinks, so that the keys' masses sum to less than 1
        # The metadata builder that publishes each step, and all of them by the layers they serve.
        self.publisher: Any = None
        self.builders: dict[str, Any] = {}
        self._request_ids = np.full(config.slots, -1, np.int64)
        self._new: dict[int, Probe] = {}
        self._rows_are_real = False
        # By ticket: arrays in host memory, and the event with which they have arrived (None: they are there).
        self._in_flight: dict[int, tuple[dict[str, np.ndarray], torch.cuda.Event | None]] = {}

    @staticmethod
    def for_engine(config: VllmConfig) -> Recorder | None:
        """The recorder of this engine, made at the first call; None if probing was not asked for; RefusedError if it
        cannot be measured."""
        settings = settings_of(config)
        if settings is None:
            return None
        recorder = _RECORDERS.get(config.instance_id)
        if recorder is None:
            if reasons := refusals(config):
                raise RefusedError(reasons)
            place, ranks = Place.from_config(config), config.parallel_config.tensor_parallel_size
            layers = config.model_config.get_total_num_hidden_layers()
            shape = {"layers": layers, "heads": len(place.heads) * ranks, "ranks": ranks}
            known = replace(instruments.parse_config(settings), **shape)
            # A captured graph's batch is padded to the size it was captured for.
            captured = config.compilation_config.max_cudagraph_capture_size or 0
            largest = max(config.scheduler_config.max_num_seqs, captured)
            recorder = Recorder(known, place, largest, torch.device(config.device_config.device_type))
            _RECORDERS[config.instance_id] = recorder
        return recorder

    @staticmethod
    def required(config: VllmConfig) -> Recorder:
        """The recorder of an engine that must have one; RuntimeError if probing was not asked for."""
        recorder = Recorder.for_engine(config)
        if recorder is None:
            raise RuntimeError('this engine was started without additional_config={"headrift": {...}}')
        return recorder

    def describe(self) -> dict[str, Any]:
        """This rank's part of the model, and the bytes of its recorder on the device."""
        tensors = [*vars(self).values(), *self.scratch.values()]
        own = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
        return {
            "layers": list(self.place.layers),
            "heads": list(self.place.heads),
            "windows": self.windows,
            "sinks": self.sinks,
            "recorder_bytes": own + sum(instrument.nbytes for instrument in self.instruments),
        }

    def instrument(self, name: str) -> Instrument:
        """The instrument of the class with this name; KeyError if it is off."""
        return {type(instrument).__name__: instrument for instrument in self.instruments}[name]

    # At start-up.

    def reserve(self, name: str, floats: int) -> None:
        """Make `scratch[name]` at least this many float32."""
        if name not in self.scratch or self.scratch[name].numel() < floats:
            self.scratch[name] = torch.empty(floats, dtype=torch.float32, device=self.device)

    def add_builder(self, builder: Any, layer_names: Sequence[str]) -> None:
        """Register a metadata builder for its layers; the first one publishes each step.

        vLLM makes the builders twice on a GPU, and throws away those with which it profiled the memory of graphs: a
        builder for layers that have one already begins a new set.
        """
        if self.publisher is None or any(name in self.builders for name in layer_names):
            self.publisher = builder
            self.builders.clear()
        self.builders.update(dict.fromkeys(layer_names, builder))

    def start(self, model: Any) -> None:
        """Launch every kernel once that steps may launch, so that no request waits for a compilation; read the model.

        Both of vLLM's runners call the model's `compute_logits`, outside any captured graph, once a step with the last
        hidden state of each request, after the final norm; later calls of a step are for prompt log-probabilities.
        """
        for part in (*self.builders.values(), *self.instruments):
            part.warm_up()
        if not self.hidden_readers:
            return
        compute_logits = model.compute_logits
        read: np.ndarray | None = None

        @wraps(compute_logits)
        def reading(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal read
            if self.slots is not read:  # every published step has an array of its own
                read = self.slots
                if self.probed:
                    for instrument in self.hidden_readers:
                        instrument.read_hidden_states(hidden)
            return compute_logits(hidden, *args, **kwargs)

        model.compute_logits = reading

    # At every step.

    def admit(self, params: SamplingParams | None) -> int:
        """Give a request its slot, -1 if it is not probed. A new request finds an empty slot at its first step.

        A request that comes back after preemption has the same id: what it has recorded stays.
        """
        probe = probe_of(params, self.config)
        if probe is None:
            return -1
        slot = probe.slot
        if self._request_ids[slot] != probe.request_id:
            self._request_ids[slot], self._new[slot] = probe.request_id, probe
            self.prompt_lens[slot], self.step_limits[slot] = probe.prompt_len, probe.steps + 1
            for instrument in self.instruments:
                instrument.admit(slot, probe)
        return slot

    def begin_step(self) -> None:
        """Note that the runner has brought its rows up to date for a step of requests. A batch published without this
        is made up (profiling, warm-up, graph capture): its row numbers mean nothing."""
        self._rows_are_real = True

    def publish(self, rows: np.ndarray, seq_lens: torch.Tensor) -> None:
        """Publish which slot each request of the step about to run has. Enqueues copies and waits for nothing.

        `rows` are the runner's own numbers of the requests in batch order, `seq_lens` their lengths after this step.
        """
        n = len(rows)
        slots = np.full(len(self.row_slot), -1, np.int32)
        self.step_is_real, self._rows_are_real = self._rows_are_real, False
        if self.step_is_real:
            slots[:n] = self.runner_rows[rows]
        was_probed, self.probed = self.probed, bool((slots >= 0).any())
        self.slots = slots[:n]
        if self._new:
            self._install_new()
        if was_probed or self.probed:
            self.row_slot.copy_(self.pinned(slots), non_blocking=True)
        if self.probed and (self.logit_readers or self.hidden_readers):
            prompt_len = self.prompt_len[self.row_slot[:n].clamp(min=0).long()]
            self.row_step[:n] = seq_lens[:n] - prompt_len

    def _install_new(self) -> None:
        """Wipe the slots of new requests and set their bounds, before their first step in the order of the stream."""
        slots = np.array(list(self._new), np.int64)
        bounds = np.zeros((len(slots), self.config.regions, 2), np.int32)
        for own, probe in zip(bounds, self._new.values(), strict=True):
            own[: len(probe.regions)] = np.reshape(probe.regions, (-1, 2))
        self._new.clear()
        index = self.index(slots)
        self.bounds.index_copy_(0, index, self.on_device(bounds))
        self.prompt_len.index_copy_(0, index, self.on_device(self.prompt_lens[slots]))
        self.step_limit.index_copy_(0, index, self.on_device(self.step_limits[slots]))
        self.mass.index_fill_(0, index, torch.nan)
        for instrument in self.instruments:
            instrument.install(slots, index)

    def plan_layers(self, common: CommonAttentionMetadata) -> None:
        """Decide what the instruments do in the layers of the published step."""
        self.layer_plans = []
        if not self.probed or not self.in_layers:
            return
        n = len(self.slots)
        assert common.seq_lens_cpu_upper_bound is not None  # exact: speculative decoding is refused
        starts, lengths = common.query_start_loc_cpu.numpy(), common.seq_lens_cpu_upper_bound.numpy()
        batch = StepBatch(self.slots, starts[: n + 1], lengths[:n])
        plans = [(instrument, instrument.plan(batch)) for instrument in self.in_layers]
        self.layer_plans = [(instrument, plan) for instrument, plan in plans if plan is not None]

    def read_logits(self, logits: torch.Tensor) -> None:
        """Let the instruments read the running step's logits; a row of them is a request's of the batch."""
        if self.probed:
            for instrument in self.logit_readers:
                instrument.read_logits(logits)

    # When requests have finished.

    def collect(self, ticket: int, requests: Sequence[tuple[int, int]], n_steps: int, want_mass: bool) -> None:
        """Start copying what `gather` gives, under a new ticket. The slots are free when this returns: whatever this
        thread does with them afterwards, the next request's wipe first, comes later on the same stream."""
        tensors, outputs, copied = self.gather(requests, n_steps, want_mass), instruments.recording_outputs(), None
        tensors = {name: tensor for name, tensor in tensors.items() if self.place.logits or outputs[name].per_head}
        if self.device.type != "cpu":
            # Only into pinned memory does a copy run while the host goes on. torch hands such blocks out again.
            tensors = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
                for name, tensor in tensors.items()
            }
            copied = torch.cuda.Event()
            copied.record()
        place, arrays = self.place, {name: tensor.numpy() for name, tensor in tensors.items()}
        arrays["requests"] = np.array([request_id for _, request_id in requests], np.int64)
        # The model's own numbers of the layers and heads along the axes.
        arrays["layers"], arrays["heads"] = np.array(place.layers, np.int32), np.array(place.heads, np.int32)
        arrays["logits"] = np.array([place.logits])  # whether what is not per head is from this rank
        self._in_flight[ticket] = arrays, copied

    def fetch(self, ticket: int) -> bytes:
        """The arrays of a ticket in safetensors form, once; KeyError if there is no such ticket (any more)."""
        arrays, copied = self._in_flight.pop(ticket)
        if copied is not None:
            copied.synchronize()
        return save(arrays)

    def forget(self) -> None:
        """Drop every ticket that has not been fetched."""
        self._in_flight.clear()

    def gather(self, requests: Sequence[tuple[int, int]], n_steps: int, want_mass: bool) -> dict[str, torch.Tensor]:
        """Copy what requests (slot and id) recorded in steps 0..n_steps-1, on the device; enqueued and not waited for.

        Returns:
            share [n, steps, layers, heads], mass[system] / mass[prompt], 0 if the prompt's mass is below 1e-9, NaN if
            never written; first [n, layers, heads, regions], the masses of step 0; if `want_mass`, mass [n, steps,
            layers, heads, regions]; and the outputs of the instruments.

        Raises:
            KeyError: a slot has another request by now.
        """
        gone = [(slot, number) for slot, number in requests if self._request_ids[slot] != number]
        if gone:
            raise KeyError(f"slots were given to other requests before they were drained: {gone}")
        slots = [slot for slot, _ in requests]
        # By slices: an index tensor would be copied to the device and waited for.
        mass = torch.stack([self.mass[slot, :n_steps] for slot in slots])
        whole = mass[..., self.config.prompt_region]
        share = (mass[..., self.config.system_region] / whole).masked_fill_(whole < 1e-9, 0.0)
        # A copy: as a view it would keep the masses of all steps.
        arrays = {"share": share, "first": mass[:, 0].clone()} | ({"mass": mass} if want_mass else {})
        for instrument in self.instruments:
            arrays |= instrument.gather(slots, n_steps)
        return arrays


def probe_of(params: SamplingParams | None, config: RecorderConfig) -> Probe | None:
    """The checked probe of a request, None if it asks for none; ValueError if it cannot be recorded."""
    extra = ((params.extra_args if params is not None else None) or {}).get("headrift")
    if extra is None:
        return None
    if params is not None and params.n != 1:
        raise ValueError(f"n={params.n}: headrift records one answer per request")
    return instruments.parse_probe(extra, config)
