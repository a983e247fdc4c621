"""The recorder: which request owns which slot, the device tensors the kernels read and write, what a drain takes."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from headrift import ablation
from headrift.aligned_keys import Run
from headrift.errors import RefusedError
from headrift.vllm_plugin import attention_rows
from headrift.vllm_plugin.ablation import AblatedStep, Ablations
from headrift.vllm_plugin.attention_rows import Queries, RowBank
from headrift.vllm_plugin.plugin import refusals, settings_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

# Of a row's keys on a GPU, as headrift_kernels.triton.decode_mass has it (which is not imported on a CPU).
MOST_SPLITS = 32
LOGIT_STATISTICS = ("entropy", "top1", "margin")
# Recorders by vLLM's instance id: backend, builder and logits processor of one engine must find the same one.
_RECORDERS: weakref.WeakValueDictionary[str, Recorder] = weakref.WeakValueDictionary()


@dataclass(frozen=True, slots=True)
class Settings:
    """What one engine records. slots: requests in flight; steps: N of steps 0..N; regions: key ranges per request.

    prompt_region: the region that is [0, prompt_len) in every request, if there is one. splits: programs that share a
    decode row's keys on a GPU; 0: as many as fill it. ablation: requests may ablate heads. references: how many
    requests' logits at step 0 are kept for others to be compared with. hidden_states: how many requests' last hidden
    states at step 0 are kept. row_references, row_keys: of so many requests the attention rows, over so many keys at
    most, are kept for others' to be compared with. row_entropy: the entropy of every
    probed request's attention rows is recorded.
    """

    slots: int
    steps: int
    regions: int = 3
    prompt_region: int | None = None
    splits: int = 0
    logit_stats: bool = False
    ablation: bool = False
    references: int = 0
    hidden_states: int = 0
    row_references: int = 0
    row_keys: int = 0
    row_entropy: bool = False

    def __post_init__(self) -> None:
        if self.slots < 1 or self.steps < 0 or not 1 <= self.regions <= 8:
            raise ValueError(f"headrift settings: slots >= 1, steps >= 0 and 1..8 regions are needed, not {self}")
        if not 0 <= self.splits <= MOST_SPLITS:
            raise ValueError(f"headrift settings: splits are 0 to {MOST_SPLITS}, not {self.splits}")
        if self.references < 0:
            raise ValueError(f"headrift settings: references are 0 or more, not {self.references}")
        if self.hidden_states < 0:
            raise ValueError(f"headrift settings: hidden_states are 0 or more, not {self.hidden_states}")
        if self.row_references < 0 or self.row_keys < 0:
            raise ValueError(f"headrift settings: row_references and row_keys are 0 or more, not {self}")

    @property
    def rows(self) -> int:
        return self.steps + 1

    @property
    def reads_logits(self) -> bool:
        """Whether anything is taken from the rows' logits."""
        return self.logit_stats or self.references > 0


@dataclass(frozen=True, slots=True)
class Probe:
    """One request's `extra_args["headrift"]`, checked. tenant: a number no other request of this engine has.

    ablate, epsilon: see `headrift.ablation`. keep: the reference that the logits of step 0 become; compare: the one
    that they are compared with. hidden: the row that the last hidden state of step 0 becomes. rows_as: the reference
    that the attention rows become; rows_against: the one that they are compared with, whose prompt has other_len
    tokens; aligned: the tokens that both prompts have, see `headrift.aligned_keys`.
    """

    slot: int
    tenant: int
    prompt_len: int
    regions: list[list[int]]
    steps: int
    ablate: Sequence[ablation.HeadAblation] = ()
    epsilon: float = ablation.EPSILON
    keep: int | None = None
    compare: int | None = None
    hidden: int | None = None
    rows_as: int | None = None
    rows_against: int | None = None
    other_len: int = 0
    aligned: Sequence[Run] = ()

    @classmethod
    def of(cls, params: SamplingParams | None, settings: Settings) -> Probe | None:
        """The probe of a request, or None where it asks for none. ValueError where it cannot be recorded."""
        asked = ((params.extra_args if params is not None else None) or {}).get("headrift")
        if asked is None:
            return None
        try:
            probe = cls(**asked)
        except TypeError as error:
            raise ValueError(f'extra_args["headrift"] is not what headrift takes: {error}') from error
        if params is not None and params.n != 1:
            raise ValueError(f"headrift records one answer per request; n={params.n} was asked for")
        if not 0 <= probe.slot < settings.slots:
            raise ValueError(f"headrift slot {probe.slot} is outside 0..{settings.slots - 1}")
        if not 0 <= probe.steps <= settings.steps:
            raise ValueError(f"{probe.steps} steps were asked for; this engine records steps 0..{settings.steps}")
        if probe.prompt_len < 1:
            raise ValueError(f"prompt_len is {probe.prompt_len}; a prompt has at least one token")
        if len(probe.regions) > settings.regions:
            raise ValueError(f"{len(probe.regions)} regions were asked for; this engine records {settings.regions}")
        if any(len(r) != 2 or not 0 <= r[0] <= r[1] for r in probe.regions):
            raise ValueError(f"regions are [start, end) with 0 <= start <= end, not {probe.regions}")
        ablation.check(probe.ablate, probe.epsilon)
        if probe.ablate and not settings.ablation:
            raise ValueError("heads are to be ablated, and this engine was not started for that: set ablation=True")
        for reference in (probe.keep, probe.compare):
            if reference is not None and not 0 <= reference < settings.references:
                raise ValueError(f"there is no reference {reference}; this engine keeps {settings.references}")
        if probe.hidden is not None and not 0 <= probe.hidden < settings.hidden_states:
            raise ValueError(f"there is no hidden state {probe.hidden}; this engine keeps {settings.hidden_states}")
        attention_rows.check(probe, settings)
        return probe


class Recorder:
    """Device tensors of one engine's probes; S slots, N+1 steps, L layers, H heads of this rank, R regions.

    mass: [S, N+1, L, H, R] float32, NaN where unwritten. entropy: [S, N+1, L, H] float32, -sum p ln p over the keys of
    a head's attention row in nats, NaN where unwritten: the kernels write it beside `mass`; None where the engine was
    not started for that. stats: [S, N+1, 3] float32 (entropy, top-1, margin), NaN where
    unwritten. bounds: [S, R, 2], prompt_len, n_rows: [S] int32. row_slot: [rows] int32, the slot of each batch row of
    the running step, -1 where the row is not probed; row_step: [rows] int32, the step of the row's last query. All of
    them keep their address, so that a captured CUDA graph may read and write them.

    ablations: what the slots' requests ablate, None where the engine was not started for that. kept: [references,
    vocab] float32, logits at step 0; divergence: [S] float32, NaN where unwritten. hidden: [hidden_states, width]
    float32, last hidden states at step 0, NaN where unwritten. bank: attention rows that are kept, and what is found
    of rows, None where the engine was not started for that.

    On the host, where a step is planned: slots, [rows of the running step] int32, as row_slot; prompt_lens and
    rows_wanted, [S] int32, as prompt_len and n_rows; keeps and compares, [S], the slots' references, and hiddens, [S],
    their rows of `hidden`, -1 for none.
    """

    def __init__(
        self,
        settings: Settings,
        layers: int,
        heads: int,
        batch_rows: int,
        device: torch.device,
        vocab: int = 0,
        first_head: int = 0,
        width: int = 0,
    ):
        self.settings = settings
        shape = (settings.slots, settings.rows, layers, heads, settings.regions)
        on_device: dict[str, Any] = {"device": device}
        self.mass = torch.full(shape, torch.nan, dtype=torch.float32, **on_device)
        self.entropy: torch.Tensor | None = None
        if settings.row_entropy:
            self.entropy = torch.full(shape[:4], torch.nan, dtype=torch.float32, **on_device)
        self.stats = torch.full((*shape[:2], len(LOGIT_STATISTICS)), torch.nan, dtype=torch.float32, **on_device)
        self.bounds = torch.zeros((settings.slots, settings.regions, 2), dtype=torch.int32, **on_device)
        self.prompt_len = torch.ones(settings.slots, dtype=torch.int32, **on_device)
        self.n_rows = torch.zeros(settings.slots, dtype=torch.int32, **on_device)
        self.row_slot = torch.full((batch_rows,), -1, dtype=torch.int32, **on_device)
        self.row_step = torch.full((batch_rows,), -1, dtype=torch.int32, **on_device)
        self.kept = torch.full((settings.references, vocab), torch.nan, dtype=torch.float32, **on_device)
        self.divergence = torch.full((settings.slots,), torch.nan, dtype=torch.float32, **on_device)
        self.hidden = torch.full((settings.hidden_states, width), torch.nan, dtype=torch.float32, **on_device)
        self.ablations = Ablations(settings.slots, layers, heads, device, first_head) if settings.ablation else None
        shape = (settings.row_references, settings.steps, layers, heads, settings.row_keys)
        self.bank = None
        if settings.row_references:
            self.bank = RowBank(settings.slots, *shape, device)
        self.windows: list[int | None] = [None] * layers
        # Attention sinks take a part of every head's mass, so that the keys' masses sum to less than 1.
        self.sinks = False
        # Written by rows.py: the slot of each row the model runner knows (V1: batch rows, V2: req_idx).
        self.runner_rows = np.full(batch_rows, -1, np.int32)
        self.slots = np.empty(0, np.int32)
        # Of the running step.
        self.ablated: AblatedStep | None = None
        self.row_queries: list[Queries] | None = None
        self.prompt_lens = np.ones(settings.slots, np.int32)
        self.rows_wanted = np.zeros(settings.slots, np.int32)
        self.keeps = np.full(settings.slots, -1, np.int32)
        self.compares = np.full(settings.slots, -1, np.int32)
        self.hiddens = np.full(settings.slots, -1, np.int32)
        self.rooms: dict[str, torch.Tensor] = {}
        # The metadata builder that publishes the rows of each step, and all builders by the layers they serve.
        self.publisher: Any = None
        self.builders: dict[str, Any] = {}
        self._tenants = np.full(settings.slots, -1, np.int64)
        self._newcomers: dict[int, Probe] = {}
        self._rows_are_real = False
        # Whether the running step is of requests, and not made up, and whether any of its rows is probed.
        self.step_is_real = False
        self.probed = False

    @staticmethod
    def of(config: VllmConfig) -> Recorder | None:
        """The recorder of this engine, made at the first call; None where probing was not asked for.

        RefusedError with every reason where the engine cannot be measured.
        """
        asked = settings_of(config)
        if asked is None:
            return None
        recorder = _RECORDERS.get(config.instance_id)
        if recorder is None:
            reasons = refusals(config)
            if reasons:
                raise RefusedError(reasons)
            model, parallel = config.model_config, config.parallel_config
            heads = model.get_num_attention_heads(parallel)
            recorder = Recorder(
                Settings(**asked),
                layers=model.get_num_layers(parallel),
                heads=heads,
                batch_rows=_most_rows(config),
                device=torch.device(config.device_config.device_type),
                vocab=model.get_vocab_size(),
                first_head=parallel.rank % parallel.tensor_parallel_size * heads,
                width=model.get_hidden_size(),
            )
            _RECORDERS[config.instance_id] = recorder
        return recorder

    @staticmethod
    def required(config: VllmConfig) -> Recorder:
        """The recorder of an engine that must have one; RuntimeError where probing was not asked for."""
        recorder = Recorder.of(config)
        if recorder is None:
            raise RuntimeError('this engine was started without additional_config={"headrift": {...}}')
        return recorder

    @property
    def nbytes(self) -> int:
        """Bytes of device memory the recorder holds."""
        tensors = [v for v in vars(self).values() if isinstance(v, torch.Tensor)]
        parts = sum(part.nbytes for part in (self.ablations, self.bank) if part is not None)
        return parts + sum(tensor.nbytes for tensor in [*tensors, *self.rooms.values()])

    def reserve(self, name: str, floats: int) -> None:
        """Room of at least so many float32 in `rooms`, for kernels of all layers in turn; at start-up only."""
        if name not in self.rooms or self.rooms[name].numel() < floats:
            self.rooms[name] = torch.empty(floats, dtype=torch.float32, device=self.mass.device)

    def add_builder(self, builder: Any, layer_names: Sequence[str]) -> None:
        """Register a metadata builder for its layers; the first one publishes the rows of each step.

        vLLM makes the builders twice on a GPU: once to profile the memory of graphs, which it throws away, and once to
        keep. A builder for layers that have one already begins a new set, and the old set is forgotten.
        """
        if self.publisher is None or any(name in self.builders for name in layer_names):
            self.publisher = builder
            self.builders.clear()
        self.builders.update(dict.fromkeys(layer_names, builder))

    def warm_up(self) -> None:
        """Launch every kernel once that steps may launch, so that no request waits for a compilation."""
        for builder in {id(builder): builder for builder in self.builders.values()}.values():
            builder.warm_up()

    def admit(self, params: SamplingParams | None) -> int:
        """Give a request its slot: -1 where it is not probed. A new tenant's step begins with an empty slot.

        A request that comes back after preemption is the same tenant: what it has recorded stays.
        """
        probe = Probe.of(params, self.settings)
        if probe is None:
            return -1
        if self._tenants[probe.slot] != probe.tenant:
            self._tenants[probe.slot] = probe.tenant
            self.prompt_lens[probe.slot] = probe.prompt_len
            self.rows_wanted[probe.slot] = probe.steps + 1
            self.keeps[probe.slot] = -1 if probe.keep is None else probe.keep
            self.compares[probe.slot] = -1 if probe.compare is None else probe.compare
            self.hiddens[probe.slot] = -1 if probe.hidden is None else probe.hidden
            if self.ablations is not None:
                self.ablations.admit(probe.slot, probe.ablate, probe.epsilon)
            if self.bank is not None:
                self.bank.admit(probe.slot, probe)
            self._newcomers[probe.slot] = probe
        return probe.slot

    def begin_step(self) -> None:
        """Called by rows.py when the runner has brought its rows up to date for a step with requests in it.

        A batch that is published without is made up (profiling, warm-up, graph capture): its row numbers mean nothing.
        """
        self._rows_are_real = True

    def publish(self, rows: np.ndarray, seq_lens: torch.Tensor) -> None:
        """Say which slot each row of the step about to run carries. Enqueues copies and waits for nothing.

        rows: the runner's own row numbers, in batch order. seq_lens: [rows] lengths after this step, on the device.
        """
        n = len(rows)
        slots = np.full(len(self.row_slot), -1, np.int32)
        self.step_is_real, self._rows_are_real = self._rows_are_real, False
        if self.step_is_real:
            slots[:n] = self.runner_rows[rows]
        was_probed, self.probed = self.probed, bool((slots >= 0).any())
        self.slots = slots[:n]
        self._install_newcomers()
        if was_probed or self.probed:
            self.row_slot.copy_(self.staged(slots), non_blocking=True)
        if self.probed and (self.settings.reads_logits or self.settings.hidden_states):
            prompt_len = self.prompt_len[self.row_slot[:n].clamp(min=0).long()]
            self.row_step[:n] = seq_lens[:n] - prompt_len

    def index(self, array: np.ndarray) -> torch.Tensor:
        """`array` as an int64 index on the device; waits for nothing."""
        return self.staged(array.astype(np.int64)).to(self.mass.device, non_blocking=True)

    def staged(self, array: np.ndarray) -> torch.Tensor:
        """`array` as a tensor that the device can copy while the host goes on to the next step.

        The pinned memory is fresh: torch hands it out again only after the copies from it are done.
        """
        tensor = torch.from_numpy(array)
        return tensor if self.mass.device.type == "cpu" else tensor.pin_memory()

    def _install_newcomers(self) -> None:
        """Wipe the slots of new tenants and set their bounds, before their first step in the order of the stream."""
        if not self._newcomers:
            return
        probes = list(self._newcomers.values())
        self._newcomers.clear()
        bounds = np.zeros((len(probes), self.settings.regions, 2), np.int32)
        for row, probe in zip(bounds, probes, strict=True):
            row[: len(probe.regions)] = np.reshape(probe.regions, (-1, 2))
        taken = np.array([p.slot for p in probes], np.int64)
        device = self.mass.device
        slots = self.index(taken)
        for tensor, values in (
            (self.bounds, bounds),
            (self.prompt_len, self.prompt_lens[taken]),
            (self.n_rows, self.rows_wanted[taken]),
        ):
            tensor.index_copy_(0, slots, self.staged(values).to(device, non_blocking=True))
        for written in (self.mass, self.entropy, self.stats, self.divergence):
            if written is not None:
                written.index_fill_(0, slots, torch.nan)
        for kept, tensor in ((self.keeps[taken], self.kept), (self.hiddens[taken], self.hidden)):
            if (kept >= 0).any():
                tensor.index_fill_(0, self.index(kept[kept >= 0]), torch.nan)
        if self.ablations is not None:
            self.ablations.install(taken.tolist(), slots, self.staged)
        if self.bank is not None:
            self.bank.install(taken, slots, self.staged)

    def gather(
        self, tenants: Sequence[tuple[int, int]], n_rows: int, system: int, prompt: int, want_mass: bool
    ) -> dict[str, torch.Tensor]:
        """Steps 0..n_rows-1 of finished requests, one entry per (slot, tenant), in fresh tensors on the device.

        share: [n, n_rows, layers, heads] mass[system] / mass[prompt], 0 where the prompt's mass is below 1e-9, NaN
        where unwritten. first: [n, layers, heads, regions - 1] masses of step 0 of all regions but the prompt, and
        astray: [n], how far from 1 any head's mass on that is, NaN left out. stats: [n, n_rows, 3]. mass: [n, n_rows,
        layers, heads, regions], only when asked for. divergence: [n], only where references are kept; distance: [n,
        n_rows, layers, heads, 2], only where attention rows are; row_entropy: [n, n_rows, layers, heads], only where
        the engine takes it. The work is enqueued and not waited for. KeyError
        where a slot has another tenant by now.
        """
        gone = [(slot, tenant) for slot, tenant in tenants if self._tenants[slot] != tenant]
        if gone:
            raise KeyError(f"slots were given to other requests before they were drained: {gone}")
        # By slices: an index tensor would be copied to the device and waited for.
        mass = torch.stack([self.mass[slot, :n_rows] for slot, _ in tenants])
        stats = torch.stack([self.stats[slot, :n_rows] for slot, _ in tenants])
        whole = mass[..., prompt]
        share = (mass[..., system] / whole).masked_fill_(whole < 1e-9, 0.0)
        first = torch.cat([mass[:, 0, ..., :prompt], mass[:, 0, ..., prompt + 1 :]], dim=-1)
        astray = (whole[:, 0] - 1.0).abs().nan_to_num_(0.0).amax(dim=(1, 2))
        out = {"share": share, "first": first, "astray": astray, "stats": stats}
        if want_mass:
            out["mass"] = mass
        if self.settings.references:
            out["divergence"] = torch.stack([self.divergence[slot] for slot, _ in tenants])
        if self.bank is not None:
            out["distance"] = torch.stack([self.bank.distance[slot, :n_rows] for slot, _ in tenants])
        if self.entropy is not None:
            out["row_entropy"] = torch.stack([self.entropy[slot, :n_rows] for slot, _ in tenants])
        return out


def _most_rows(config: VllmConfig) -> int:
    """The most rows a batch can have: a captured graph's batch is padded to the size it was captured for."""
    return max(config.scheduler_config.max_num_seqs, config.compilation_config.max_cudagraph_capture_size or 0)
