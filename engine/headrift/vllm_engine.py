"""vLLM as headrift starts it: environment, engine arguments, patches for its start, and its ranks' answers merged."""

from __future__ import annotations

import gc
import logging
import mmap
import os
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args
from unittest import mock

import numpy as np
from safetensors.numpy import load

from headrift.errors import EngineError, RefusedError
from headrift.vllm_plugin import plugin

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine.llm_engine import LLMEngine

_CPU_KV_CACHE_LIMIT = 4 << 30
# Environment variable: how many engines share this machine's memory (default: one).
ENGINES_PER_MACHINE = "HEADRIFT_ENGINES_PER_MACHINE"
_CORES, _LLVMLITE = "VLLM_CPU_OMP_THREADS_BIND", "llvmlite.binding.ffi"
# The engine that runs in this very process, if any.
_engine_here: LLMEngine | None = None


class RanksError(RuntimeError):
    """The ranks' answers do not make up one model: an error in headrift or in vLLM, never in the input."""


def engine_config(args: dict[str, Any], requested_backend: str = "auto") -> VllmConfig:
    """vLLM's configuration for these engine arguments, those of `attention_args` among them, with headrift in it.

    With `requested_backend` auto, Triton attends what FlashAttention cannot.

    Raises:
        EngineError: vLLM cannot load the model or does not take these settings.
        RefusedError: the engine cannot be measured.
    """
    import torch
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    try:
        config = EngineArgs(**args).create_engine_config()
    except TypeError as error:
        raise EngineError(f"vLLM does not take these engine settings: {error}") from error
    except (ValueError, OSError) as error:
        raise EngineError(f"vLLM cannot load {args['model']}: {error}") from error
    if requested_backend == "auto" and os.environ[plugin.BACKEND] == "flash":
        _fall_back_to_triton(config)
    if reasons := plugin.refusals(config):
        raise RefusedError(reasons)
    processors = config.model_config.logits_processors or []
    ours = plugin.LOGITS_PROCESSORS[config.use_v2_model_runner]
    config.model_config.logits_processors = [*processors, ours]
    # Part of a compiled model's name, so that machines which share a home directory keep theirs apart.
    compiled_for = {} if has_gpu() else {"instructions": torch.backends.cpu.get_cpu_capability()}
    config.additional_config = plugin.AdditionalConfig({**compiled_for, **config.additional_config})
    return config


def _fall_back_to_triton(config: VllmConfig) -> None:
    """Attend with Triton if FlashAttention cannot for this model on this GPU."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if misfits := plugin.flash_misfits(config):
        logging.getLogger("headrift").info("attention by Triton, not FlashAttention: %s", "; ".join(misfits))
        os.environ[plugin.BACKEND] = "triton"
        config.attention_config.backend = AttentionBackendEnum[plugin.STOCK_BACKENDS["triton"]]


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """What an engine would be like."""

    dtype: str
    max_model_len: int  # tokens of the context
    slots: int  # requests in flight
    kv_bytes: int | None  # of the KV cache; None: vLLM takes what the device has left


def plan_engine(model: str | os.PathLike[str]) -> EnginePlan:
    """Plan the engine that ProbedEngine would start on this machine, from the model's config: nothing is loaded.
    EngineError or RefusedError if it would not start."""
    prepare_environment(verbose=False)
    args = {"model": os.fspath(model), **machine_defaults(), **attention_args("auto")}
    config = engine_config(args).model_config
    dtype = str(config.dtype).removeprefix("torch.")
    return EnginePlan(dtype, config.max_model_len, 2 * args["max_num_seqs"], args.get("kv_cache_memory_bytes"))


def attention_args(requested: str) -> dict[str, Any]:
    """Engine arguments for the requested attention backend, which the environment names to every process."""
    try:
        backend = os.environ[plugin.BACKEND] = plugin.backend_for(requested, has_gpu())
    except ValueError as error:
        raise EngineError(str(error)) from error
    if backend == "cpu":
        return dict(plugin.CPU_ARGS)
    if not has_gpu():
        return {}
    from vllm.platforms import current_platform

    if notice := plugin.replaces_flashinfer(current_platform.get_device_capability()):
        logging.getLogger("headrift").warning(notice)
    return {"attention_backend": plugin.STOCK_BACKENDS[backend]}


def lora_args(folder: str) -> dict[str, Any]:
    """Engine arguments for a LoRA adapter in a folder; EngineError if vLLM cannot load it."""
    from vllm.config.lora import LoRAConfig, MaxLoRARanks
    from vllm.lora.peft_helper import PEFTHelper

    try:
        adapter = PEFTHelper.from_local_dir(folder, None)
        rank, ranks = max([adapter.r, *adapter.rank_pattern.values()]), get_args(MaxLoRARanks)
        # A rank above the last is for `validate_legal` to refuse.
        args = {"max_lora_rank": next((most for most in ranks if most >= rank), ranks[-1]), "max_loras": 1}
        adapter.validate_legal(LoRAConfig(**args))
    except (OSError, ValueError, TypeError) as error:
        raise EngineError(f"vLLM cannot load the adapter in {folder}: {error}") from error
    return {"enable_lora": True, **args}


def prepare_environment(verbose: bool) -> None:
    """Set the environment that vLLM reads when it is imported, unless the user has set it."""
    os.environ[plugin.SWITCH] = "1"
    prepare_torch(verbose)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO" if verbose else "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # it would report model, machine and settings to its makers
    if not verbose:
        # While it is imported vLLM has warnings to print and no logging configuration yet.
        logging.getLogger("vllm").setLevel(logging.ERROR)
        # What it logs comes as an error as well. A level would be undone when vLLM sets its logging up.
        logging.getLogger("vllm.transformers_utils.repo_utils").disabled = True
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
    if not has_gpu():
        # One process, or one for each rank: the front end has little to do.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def prepare_torch(verbose: bool = False) -> None:
    """Set the environment that torch reads when it is imported (as `has_gpu` does), unless the user has set it."""
    # Read once, when torch loads OpenMP. Waiting threads spin: if another process wants their core, every wait costs a
    # time slice and a step takes ten times as long. A short spin costs nothing when they are alone.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # Read once, at torch's first large tensor on a CPU. Weights and KV cache go into huge pages.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if not verbose:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def check_compiler(verbose: bool = False) -> None:
    """Raise EngineError if this machine has nothing for torch.compile to compile a CPU's model with."""
    prepare_torch(verbose)
    if has_gpu():
        return
    compiler, header = os.environ.get("CXX", "g++"), Path(sysconfig.get_path("include"), "Python.h")
    needed = {f"the C++ compiler {compiler}": shutil.which(compiler), f"Python's header {header}": header.exists()}
    if missing := [name for name, exists in needed.items() if not exists]:
        raise EngineError(
            f"--compile needs {' and '.join(missing)}: install it (Debian, Ubuntu: g++ and python3-dev; CXX names "
            "another compiler) or leave --compile out"
        )


def has_gpu() -> bool:
    """Whether torch is a build for GPUs."""
    import torch

    return torch.version.cuda is not None or torch.version.hip is not None


def machine_defaults(ranks: int = 1) -> dict[str, Any]:
    """Default engine arguments on this machine, for an engine of this many ranks."""
    if has_gpu():
        return {"max_num_seqs": 256, "use_tqdm_on_load": False}
    import psutil

    sharers = ranks * int(os.environ.get(ENGINES_PER_MACHINE, "1"))
    kv_bytes = int(min(_CPU_KV_CACHE_LIMIT, psutil.virtual_memory().available * 0.4) / sharers)  # of each rank
    return {
        "max_num_seqs": 128,
        "use_tqdm_on_load": False,
        "block_size": 32,  # lets short system prompts be shared; vLLM's CPU default of 128 tokens seldom does
        "dtype": "float32",
        "enforce_eager": True,
        "kv_cache_memory_bytes": kv_bytes,
    }


def start_llm_engine(config: VllmConfig) -> LLMEngine:
    """Start vLLM, with patches against what makes its start fail, slow or heavy on a CPU; none changes a number.
    EngineError if it cannot start, or another engine runs in this process, with which it would share parallel state."""
    global _engine_here
    import vllm.envs
    from vllm.v1.engine.llm_engine import LLMEngine

    in_process = not vllm.envs.VLLM_ENABLE_V1_MULTIPROCESSING
    if in_process and _engine_here is not None:
        raise EngineError("another engine runs in this process: close it first, or start this one in its own process")
    gc.freeze()  # what exists by now is kept: no later collection needs to search it
    try:
        with ExitStack() as patches:
            # numba loads a module over which vLLM's CPU platform stumbles as it inspects all that are loaded.
            if _LLVMLITE in sys.modules:
                patches.callback(sys.modules.__setitem__, _LLVMLITE, sys.modules.pop(_LLVMLITE))
            if not has_gpu():
                patches.enter_context(lazy_kv_cache())
                if not config.model_config.enforce_eager:
                    patches.enter_context(loadable_compiled_model())
                if _CORES not in os.environ:
                    os.environ[_CORES] = cores_of_ranks(config.parallel_config.local_world_size)
                    patches.callback(os.environ.pop, _CORES)
                    vllm.envs.disable_envs_cache()  # it is cached once an engine has run in this process
            engine = LLMEngine.from_vllm_config(config, disable_log_stats=True)
    except RefusedError:
        raise
    except (RuntimeError, ValueError, OSError) as error:
        raise EngineError(f"vLLM could not start with {config.model_config.model}: {error}") from error
    if in_process:
        _engine_here = engine
    return engine


def stop_llm_engine(engine: LLMEngine) -> None:
    """Stop an engine and give its memory back; the caller must not refer to it any more."""
    global _engine_here
    engine.engine_core.shutdown()
    if engine is _engine_here:
        _engine_here = None
    del engine
    gc.unfreeze()
    gc.collect()


@contextmanager
def paused_garbage_collection() -> Iterator[None]:
    """Collect no garbage while an engine starts: all that torch and vLLM import is kept, and searching it again and
    again takes a fifth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def lazy_kv_cache() -> AbstractContextManager[Any]:
    """Let the kernel zero the KV cache page by page at first write; vLLM's CPU build fills gigabytes at start-up.

    For an engine in this process.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    initialize = GPUModelRunner.initialize_kv_cache_tensors

    def initialize_lazily(self: Any, *args: Any, **kwargs: Any) -> Any:
        with lazy_zeros():
            return initialize(self, *args, **kwargs)

    return mock.patch.object(GPUModelRunner, "initialize_kv_cache_tensors", initialize_lazily)


def lazy_zeros() -> AbstractContextManager[Any]:
    """Have torch.zeros of plain bytes take its memory when that is written."""
    import torch
    from torch.overrides import TorchFunctionMode

    class LazyZeros(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func is torch.zeros and kwargs.get("dtype") == torch.int8 and isinstance(args[0], int):
                memory = mmap.mmap(-1, args[0], flags=mmap.MAP_PRIVATE)
                with suppress(OSError):  # a kernel without huge pages
                    memory.madvise(mmap.MADV_HUGEPAGE)
                return torch.frombuffer(memory, dtype=torch.int8)
            return func(*args, **kwargs)

    return LazyZeros()


def loadable_compiled_model() -> AbstractContextManager[Any]:
    """Let vLLM load a compiled model from disk on a CPU, in this process.

    torch calls a method that only GPUs need and a CPU lacks, so vLLM would compile for most of a minute at each start;
    here that method does nothing.
    """
    from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable as Loaded

    own = getattr(Loaded, "finalize_loading", lambda self, config: None)  # a later torch may have one
    return mock.patch.object(Loaded, "finalize_loading", own, create=True)


def cores_of_ranks(ranks: int) -> str:
    """Cores of its own for each of several ranks; one rank is left unbound.

    vLLM's `auto` would reserve a core for the front end, and threads of several unbound ranks spin on each other's.
    """
    cores = sorted(os.sched_getaffinity(0))
    bounds = [len(cores) * rank // ranks for rank in range(ranks + 1)]
    own = [",".join(map(str, cores[start:end])) for start, end in pairwise(bounds)]
    return "|".join(own) if ranks > 1 and all(own) else "nobind"


def merge_descriptions(descriptions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge each rank's `Recorder.describe` into the whole model's, which has so many layers and heads; RanksError if
    those of the ranks do not add up."""
    layers = 1 + max(max(rank["layers"]) for rank in descriptions)
    heads = 1 + max(max(rank["heads"]) for rank in descriptions)
    _check_cover(descriptions, layers, heads)
    windows = {layer: window for rank in descriptions for layer, window in zip(rank["layers"], rank["windows"])}
    return {
        "layers": layers,
        "heads": heads,
        "windows": [windows[layer] for layer in range(layers)],
        "sinks": any(rank["sinks"] for rank in descriptions),
        "recorder_bytes": sum(rank["recorder_bytes"] for rank in descriptions),
    }


def merge_recordings(answers: Sequence[bytes], layers: int, heads: int) -> dict[str, np.ndarray]:
    """Merge all ranks' `Recorder.fetch` of one ticket into the arrays of `Recorder.gather` for the whole model;
    RanksError if they are not of the same requests, or a layer and head is missing or comes twice."""
    from headrift.vllm_plugin.instruments import recording_outputs

    parts, outputs = [load(answer) for answer in answers], recording_outputs()
    per_head = [{name for name in part if name in outputs and outputs[name].per_head} for part in parts]
    kinds = {
        (frozenset(names), *part["share"].shape[:2], part["requests"].tobytes()) for names, part in zip(per_head, parts)
    }
    if len(kinds) > 1:
        raise RanksError(f"the {len(parts)} ranks answered with different requests, steps or arrays")
    with_logits = [part for part in parts if part["logits"][0]]
    if len(with_logits) != 1:
        raise RanksError(f"{len(with_logits)} ranks have the logits; one of them has to")
    _check_cover(parts, layers, heads)
    merged = {name: array for name, array in with_logits[0].items() if name in outputs and not outputs[name].per_head}
    for name in per_head[0]:
        axis = 2 if outputs[name].per_step else 1
        shape = list(parts[0][name].shape)
        shape[axis : axis + 2] = layers, heads
        merged[name] = np.empty(shape, np.float32)
        for part in parts:
            merged[name][(*[slice(None)] * axis, *np.ix_(part["layers"], part["heads"]))] = part[name]
    return merged


def _check_cover(parts: Sequence[Mapping[str, Any]], layers: int, heads: int) -> None:
    """Check that every layer and head is in exactly one of the parts."""
    cells = [np.add.outer(np.multiply(part["layers"], heads), part["heads"]).ravel() for part in parts]
    if not np.array_equal(np.sort(np.concatenate(cells)), np.arange(layers * heads)):
        ranks = "; ".join(f"layers {[*map(int, part['layers'])]} heads {[*map(int, part['heads'])]}" for part in parts)
        raise RanksError(f"the ranks do not make up {layers} layers of {heads} heads: {ranks}")
