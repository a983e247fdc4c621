"""A vLLM engine with the recorder in it: token ids and named spans in, finished answers and recorded masses out."""

from __future__ import annotations

import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from headrift import signal
from headrift.vllm_plugin import plugin

if TYPE_CHECKING:
    from vllm.config import VllmConfig

REGIONS = ("system", "user", "prompt")
_CPU_KV_CACHE_LIMIT = 4 << 30


class EngineError(RuntimeError):
    """The engine could not be started with these settings; the message says why and what to change."""


@dataclass(frozen=True, slots=True)
class ProbeRequest:
    """One request. Without `answer_ids` the model answers greedily; with them they are replayed, nothing is decoded.

    prompt_ids: P token ids. regions: token ranges [start, end) by name, of the engine's region names. steps: N, steps
    0..N are recorded. ignore_eos: answer on past the end-of-text token. reread: compute every prompt token anew instead
    of taking cached ones. probed: False for a request that is to be answered and not measured.
    """

    prompt_ids: Sequence[int]
    regions: Mapping[str, tuple[int, int]]
    steps: int
    answer_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    reread: bool = False
    probed: bool = True


@dataclass(frozen=True, slots=True)
class Finished:
    """A request that has run. answer_ids: the model's answer, or the replayed one; its last token was never fed."""

    tenant: int
    request: ProbeRequest
    answer_ids: list[int]
    finish_reason: str | None
    cached_tokens: int

    @property
    def n_steps(self) -> int:
        """The last recorded step: n answer tokens have steps 0..n-1, of which the first N+1 are kept."""
        return signal.n_steps(len(self.answer_ids), self.request.steps)


@dataclass(frozen=True, slots=True)
class Recording:
    """What was recorded of one request: T = n_steps + 1 rows, NaN where a step was never computed.

    share: [T, layers, heads]; first: [layers, heads, regions], the masses of step 0; stats: [T, 3] next-token entropy
    (nats), top-1 probability and margin, NaN unless asked for; mass: [T, layers, heads, regions] or None.
    """

    share: np.ndarray
    first: np.ndarray
    stats: np.ndarray
    mass: np.ndarray | None

    @property
    def unwritten(self) -> list[int]:
        """Steps that were never computed, because a cached prefix block covered them."""
        return np.flatnonzero(np.isnan(self.share).any(axis=(1, 2))).tolist()


class ProbedEngine:
    """vLLM, started with headrift's plugin. A context manager; not to be shared between threads.

    model: a folder or name vLLM can load. steps: N, the most steps (0..N) a request may record. regions: names of the
    key ranges, `system` and `prompt` among them. slots: the most requests in flight (twice max_num_seqs by default).
    logit_stats: record next-token statistics too. engine_args: passed to vLLM as they are, over the defaults chosen
    for this machine. verbose: let vLLM log.
    """

    # The engine that runs in this very process, where there is one.
    _in_process: ClassVar[ProbedEngine | None] = None

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        steps: int,
        regions: Sequence[str] = REGIONS,
        slots: int | None = None,
        logit_stats: bool = False,
        engine_args: Mapping[str, Any] | None = None,
        verbose: bool = False,
    ):
        if not {"system", "prompt"} <= set(regions) or len(set(regions)) != len(regions):
            raise ValueError(
                f"regions must be distinct names with 'system' and 'prompt' among them, not {list(regions)}"
            )
        _prepare_environment(verbose)
        args = {"model": os.fspath(model), "disable_log_stats": True, **_machine_defaults(), **(engine_args or {})}
        self.regions = tuple(regions)
        self.steps = steps
        self.slots = slots or 2 * args["max_num_seqs"]
        recorder = {"slots": self.slots, "steps": steps, "regions": len(regions), "logit_stats": logit_stats}
        args["additional_config"] = {**args.get("additional_config", {}), "headrift": recorder}
        args["worker_extension_cls"] = plugin.WORKER_EXTENSION
        config = _engine_config(args)
        self.max_model_len: int = config.model_config.max_model_len
        self.vocabulary: int = config.model_config.get_vocab_size()
        self._start(config)
        (described,) = self.llm_engine.collective_rpc("headrift_describe")
        self.layers: int = described["layers"]
        self.heads: int = described["heads"]
        self.windows: list[int | None] = described["windows"]
        self._sinks: bool = described["sinks"]
        self.dtype: str = described["dtype"]
        self.recorder_bytes: int = described["recorder_bytes"]
        self._free = list(range(self.slots))[::-1]
        self._tenants = 0
        self._running: dict[str, tuple[int, int, ProbeRequest]] = {}
        self._slot_of: dict[int, int] = {}

    def _start(self, config: VllmConfig) -> None:
        from vllm.v1.engine.llm_engine import LLMEngine

        self._claim_process()
        try:
            with _llvmlite_out_of_sight():
                self.llm_engine = LLMEngine.from_vllm_config(config, disable_log_stats=True)
        except BaseException as error:
            self.close()
            if isinstance(error, plugin.RefusedError) or not isinstance(error, (RuntimeError, ValueError, OSError)):
                raise
            raise EngineError(f"vLLM could not start with {config.model_config.model}: {error}") from error

    def __enter__(self) -> ProbedEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the engine and give its memory back."""
        engine = self.__dict__.pop("llm_engine", None)
        if engine is not None:
            engine.engine_core.shutdown()
            del engine
            gc.collect()
        if ProbedEngine._in_process is self:
            ProbedEngine._in_process = None

    def _claim_process(self) -> None:
        """vLLM's parallel state belongs to the process: closing one engine would pull it from under another."""
        import vllm.envs

        if vllm.envs.VLLM_ENABLE_V1_MULTIPROCESSING:
            return
        if ProbedEngine._in_process is not None:
            raise EngineError(
                "another engine runs in this process; close it first, or start this one in a process of its own"
            )
        ProbedEngine._in_process = self

    @property
    def free_slots(self) -> int:
        """How many more requests can be submitted now; a slot comes back when its request is drained."""
        return len(self._free)

    @property
    def running(self) -> int:
        """How many submitted requests have not finished."""
        return len(self._running)

    def most_prompt_tokens(self, steps: int) -> int:
        """The longest prompt that leaves room for `steps` recorded steps in the model's context."""
        return self.max_model_len - steps - 1

    def submit(self, request: ProbeRequest) -> int:
        """Queue a request; returns its tenant number.

        RuntimeError without a free slot; ValueError where prompt and steps do not fit the context.
        """
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        if not self._free:
            raise RuntimeError("every slot is taken; drain finished requests first")
        fed = list(request.prompt_ids)
        tokens = request.steps + 1
        if request.answer_ids is not None:
            fed += list(request.answer_ids)[: signal.n_steps(len(request.answer_ids), request.steps)]
            tokens = 1
        if len(fed) + tokens > self.max_model_len:
            raise ValueError(f"{len(fed)} tokens and {tokens} more do not fit the context of {self.max_model_len}")
        slot, tenant = self._free[-1], self._tenants
        extra: dict[str, Any] = {
            "slot": slot,
            "tenant": tenant,
            "prompt_len": len(request.prompt_ids),
            "regions": [list(request.regions.get(name, (0, 0))) for name in self.regions],
            "steps": request.steps,
        }
        params = SamplingParams(
            temperature=0.0,
            max_tokens=tokens,
            ignore_eos=request.ignore_eos,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_reading_prefix_cache=True if request.reread else None,
            extra_args={"headrift": extra} if request.probed else None,
        )
        name = str(tenant)
        self.llm_engine.add_request(name, TokensPrompt(prompt_token_ids=fed), params)
        self._free.pop()
        self._tenants += 1
        self._running[name] = (slot, tenant, request)
        return tenant

    def step(self) -> list[Finished]:
        """Run the engine once; the requests that finished in it."""
        done = []
        for output in self.llm_engine.step():
            if not output.finished:
                continue
            slot, tenant, request = self._running.pop(output.request_id)
            completion = output.outputs[0]
            answer = list(completion.token_ids) if request.answer_ids is None else list(request.answer_ids)
            self._slot_of[tenant] = slot
            done.append(Finished(tenant, request, answer, completion.finish_reason, output.num_cached_tokens or 0))
        return done

    def drain(self, finished: Sequence[Finished], want_mass: bool = False) -> list[Recording]:
        """The recordings of finished requests, in one round trip; their slots are free afterwards.

        RuntimeError where a recording contradicts itself: the engine is then not to be trusted.
        """
        from safetensors.numpy import load

        probed = [f for f in finished if f.request.probed]
        recordings: dict[int, Recording] = {}
        if probed:
            rows = max(f.n_steps for f in probed) + 1
            tenants = [(self._slot_of[f.tenant], f.tenant) for f in probed]
            system, prompt = self.regions.index("system"), self.regions.index("prompt")
            (raw,) = self.llm_engine.collective_rpc("headrift_drain", args=(tenants, rows, system, prompt, want_mass))
            arrays = load(raw)
            for i, f in enumerate(probed):
                n = f.n_steps + 1
                mass = arrays["mass"][i, :n] if want_mass else None
                recordings[f.tenant] = Recording(
                    arrays["share"][i, :n], arrays["first"][i], arrays["stats"][i, :n], mass
                )
                self._check(f, recordings[f.tenant])
        for f in finished:
            self._free.append(self._slot_of.pop(f.tenant))
        return [recordings[f.tenant] for f in finished if f.request.probed]

    def abort(self) -> None:
        """Drop every request in flight and free its slot."""
        self.llm_engine.abort_request(list(self._running))
        for slot, _, _ in self._running.values():
            self._free.append(slot)
        self._running.clear()
        for slot in self._slot_of.values():
            self._free.append(slot)
        self._slot_of.clear()

    def _check(self, finished: Finished, recording: Recording) -> None:
        """Step 0 sees the prompt and nothing else, so its prompt mass is 1 (less with sinks, never more)."""
        prompt = recording.first[..., self.regions.index("prompt")]
        whole = finished.request.regions.get("prompt") == (0, len(finished.request.prompt_ids))
        if whole and not self._sinks and (np.abs(prompt - 1.0) > 1e-3).any():
            raise RuntimeError(
                f"request {finished.tenant}: the heads' mass on the whole prompt at step 0 is "
                f"{np.nanmin(prompt):.6f}..{np.nanmax(prompt):.6f}, not 1; the recording cannot be trusted"
            )


def _engine_config(args: dict[str, Any]) -> VllmConfig:
    """vLLM's configuration for these engine arguments; EngineError or RefusedError where there is none to be had."""
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    try:
        config = EngineArgs(**args).create_engine_config()
    except TypeError as error:
        raise EngineError(f"vLLM does not take these engine settings: {error}") from error
    except (ValueError, OSError) as error:
        raise EngineError(f"vLLM cannot load {args['model']}: {error}") from error
    reasons = plugin.refusals(config)
    if reasons:
        raise plugin.RefusedError(reasons)
    processors = list(config.model_config.logits_processors or [])
    config.model_config.logits_processors = [*processors, plugin.rows_processor(config.use_v2_model_runner)]
    return config


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """What an engine would be like. max_model_len: tokens; kv_bytes: of the KV cache, None where vLLM takes what the
    device has left."""

    dtype: str
    max_model_len: int
    slots: int
    kv_bytes: int | None


def plan_engine(model: str | os.PathLike[str]) -> EnginePlan:
    """The engine that a ProbedEngine would start on this machine, from the model's config: nothing is loaded.

    EngineError or RefusedError where it would not start.
    """
    _prepare_environment(verbose=False)
    args = {"model": os.fspath(model), **_machine_defaults()}
    config = _engine_config(args).model_config
    dtype = str(config.dtype).removeprefix("torch.")
    return EnginePlan(dtype, config.max_model_len, 2 * args["max_num_seqs"], args.get("kv_cache_memory_bytes"))


def _prepare_environment(verbose: bool) -> None:
    """Set what vLLM reads from the environment, before it is imported, unless the user has set it."""
    os.environ[plugin.SWITCH] = "1"
    # Read once, when torch loads OpenMP. Threads that wait spin; where another process wants the core they spin on,
    # every wait costs a time slice, and a step takes ten times as long. A short spin costs nothing when they are
    # alone.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    defaults = {"VLLM_LOGGING_LEVEL": "INFO" if verbose else "ERROR", "TOKENIZERS_PARALLELISM": "false"}
    if not verbose:
        # torch reads this once, when it is imported, and `_has_gpu` imports it.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        # While it is imported vLLM has warnings to print and no logging configuration yet.
        logging.getLogger("vllm").setLevel(logging.ERROR)
        # What it logs comes as an error as well. A level would be undone when vLLM sets its logging up.
        logging.getLogger("vllm.transformers_utils.repo_utils").disabled = True
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
    if not _has_gpu():
        # One process, all cores: `auto` would keep a core for a front end that has little to do.
        defaults |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


@contextmanager
def _llvmlite_out_of_sight() -> Iterator[None]:
    """vLLM's CPU platform looks through the attributes of all loaded modules and trips over llvmlite's library object.

    numba brings that module, so without this a second engine, or a first one after `import numba`, would not start.
    """
    hidden = {name: sys.modules.pop(name) for name in ["llvmlite.binding.ffi"] if name in sys.modules}
    try:
        yield
    finally:
        sys.modules.update(hidden)


def _has_gpu() -> bool:
    import torch

    return torch.version.cuda is not None or torch.version.hip is not None


def _machine_defaults() -> dict[str, Any]:
    """Engine arguments for this machine; `engine_args` overrides each."""
    if _has_gpu():
        return {"max_num_seqs": 256, "use_tqdm_on_load": False}
    import psutil

    return {
        "max_num_seqs": 64,
        "use_tqdm_on_load": False,
        # Small blocks let short system prompts be shared; vLLM's CPU default of 128 tokens seldom does.
        "block_size": 32,
        "dtype": "float32",
        "enforce_eager": True,
        "kv_cache_memory_bytes": int(min(_CPU_KV_CACHE_LIMIT, psutil.virtual_memory().available * 0.4)),
    }
