"""The recorder of an engine's worker: the masses that kernels write, the instruments, and what a drain copies."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from headrift.errors import RefusedError
from headrift.vllm_plugin.instruments import instrument_types, parse_config, parse_probe
from headrift.vllm_plugin.instruments.base import Instrument, StepBatch
from headrift.vllm_plugin.plugin import refusals, settings_of
from headrift.vllm_plugin.probe import Probe, RecorderConfig
from headrift.vllm_plugin.slots import Place, SlotTable

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams
    from vllm.v1.attention.backend import CommonAttentionMetadata

# Recorders by vLLM's instance id: backend, builder and logits processor of one engine must use the same one.
_RECORDERS: weakref.WeakValueDictionary[str, Recorder] = weakref.WeakValueDictionary()


class Recorder(SlotTable):
    """The masses of one rank's probed requests, and the instruments that measure more.

    Attributes:
        mass: [slots, steps, layers, heads, regions] float32, NaN if never written; keeps its address.
        instruments: Those that are on; `logit_readers`, `hidden_readers` and `in_layers` are the ones with that hook.
        kernel_options: Further arguments of the attention kernels.
        layer_plans: (instrument, plan) of the running step, for `before_attention` and `after_attention`.
        scratch: Memory that kernels of all layers use in turn, by name.
        windows: Sliding window of each layer, None for none.
        sinks: Whether any layer has attention sinks, so that the keys' masses sum to less than 1.
        publisher: The metadata builder that publishes each step; builders: all of them, by the layers they serve.
    """

    def __init__(self, config: RecorderConfig, place: Place, batch_size: int, device: torch.device):
        super().__init__(config, batch_size, device)
        self.place = place
        shape = (config.slots, config.steps + 1, len(place.layers), len(place.heads), config.regions)
        self.mass = torch.full(shape, torch.nan, dtype=torch.float32, device=device)
        self.instruments = [kind(self, place) for kind in instrument_types() if kind.is_on(config.options)]
        self.logit_readers = [i for i in self.instruments if i.reads_logits]
        self.hidden_readers = [i for i in self.instruments if i.reads_hidden_states]
        self.in_layers = [i for i in self.instruments if i.in_layers]
        self.kernel_options = {name: value for i in self.instruments for name, value in i.kernel_options().items()}
        self.layer_plans: list[tuple[Instrument, Any]] = []
        self.scratch: dict[str, torch.Tensor] = {}
        self.windows: list[int | None] = [None] * len(place.layers)
        self.sinks = False
        self.publisher: Any = None
        self.builders: dict[str, Any] = {}
        self._request_ids = np.full(config.slots, -1, np.int64)
        self._new: dict[int, Probe] = {}
        self._rows_are_real = False

    @staticmethod
    def for_engine(config: VllmConfig) -> Recorder | None:
        """The recorder of this engine, made at the first call; None if probing was not asked for.

        Raises:
            RefusedError: the engine cannot be measured; the message has every reason.
        """
        settings = settings_of(config)
        if settings is None:
            return None
        recorder = _RECORDERS.get(config.instance_id)
        if recorder is None:
            reasons = refusals(config)
            if reasons:
                raise RefusedError(reasons)
            model, parallel, scheduler = config.model_config, config.parallel_config, config.scheduler_config
            known = {
                "layers": model.get_total_num_hidden_layers(),
                "heads": model.get_num_attention_heads(parallel) * parallel.tensor_parallel_size,
                "ranks": parallel.tensor_parallel_size,
            }
            # A captured graph's batch is padded to the size it was captured for.
            largest = max(scheduler.max_num_seqs, config.compilation_config.max_cudagraph_capture_size or 0)
            device = torch.device(config.device_config.device_type)
            recorder = Recorder(replace(parse_config(settings), **known), Place.from_config(config), largest, device)
            _RECORDERS[config.instance_id] = recorder
        return recorder

    @staticmethod
    def required(config: VllmConfig) -> Recorder:
        """The recorder of an engine that must have one; RuntimeError if probing was not asked for."""
        recorder = Recorder.for_engine(config)
        if recorder is None:
            raise RuntimeError('this engine was started without additional_config={"headrift": {...}}')
        return recorder

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        tensors = [*vars(self).values(), *self.scratch.values()]
        own = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
        return own + sum(instrument.nbytes for instrument in self.instruments)

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

        vLLM makes the builders twice on a GPU: once to profile the memory of graphs, which it throws away, and once to
        keep. A builder for layers that have one already begins a new set, and the old set is forgotten.
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
        for builder in {id(builder): builder for builder in self.builders.values()}.values():
            builder.warm_up()
        for instrument in self.instruments:
            instrument.warm_up()
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
            self._request_ids[slot] = probe.request_id
            self.prompt_lens[slot] = probe.prompt_len
            self.step_limits[slot] = probe.steps + 1
            for instrument in self.instruments:
                instrument.admit(slot, probe)
            self._new[slot] = probe
        return slot

    def begin_step(self) -> None:
        """Note that the runner has brought its rows up to date for a step with requests in it (`row_map`).

        A batch that is published without is made up (profiling, warm-up, graph capture): its row numbers mean nothing.
        """
        self._rows_are_real = True

    def publish(self, rows: np.ndarray, seq_lens: torch.Tensor) -> None:
        """Publish which slot each request of the step about to run has. Enqueues copies and waits for nothing.

        Args:
            rows: The runner's own numbers of the requests, in batch order.
            seq_lens: [requests] lengths after this step, on the device.
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
        for tensor, values in (
            (self.bounds, bounds),
            (self.prompt_len, self.prompt_lens[slots]),
            (self.step_limit, self.step_limits[slots]),
        ):
            tensor.index_copy_(0, index, self.on_device(values))
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
        for instrument in self.in_layers:
            if (plan := instrument.plan(batch)) is not None:
                self.layer_plans.append((instrument, plan))

    def read_logits(self, logits: torch.Tensor) -> None:
        """Let the instruments read the running step's logits; a row of them is a request's of the batch."""
        if self.probed:
            for instrument in self.logit_readers:
                instrument.read_logits(logits)

    def gather(self, requests: Sequence[tuple[int, int]], n_steps: int, want_mass: bool) -> dict[str, torch.Tensor]:
        """Copy what finished requests recorded, on the device; enqueued and not waited for.

        Args:
            requests: n pairs of slot and request id.
            n_steps: Steps 0..n_steps-1 are copied.
            want_mass: Give `mass` too.

        Returns:
            share [n, steps, layers, heads], mass[system] / mass[prompt], 0 if the prompt's mass is below 1e-9, NaN if
            never written; first [n, layers, heads, regions], the masses of step 0; mass [n, steps, layers, heads,
            regions]; and the outputs of the instruments.

        Raises:
            KeyError: a slot has another request by now.
        """
        gone = [(slot, number) for slot, number in requests if self._request_ids[slot] != number]
        if gone:
            raise KeyError(f"slots were given to other requests before they were drained: {gone}")
        system, prompt = self.config.system_region, self.config.prompt_region
        assert system is not None
        assert prompt is not None
        slots = [slot for slot, _ in requests]
        # By slices: an index tensor would be copied to the device and waited for.
        mass = torch.stack([self.mass[slot, :n_steps] for slot in slots])
        whole = mass[..., prompt]
        share = (mass[..., system] / whole).masked_fill_(whole < 1e-9, 0.0)
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
    return parse_probe(extra, config)
