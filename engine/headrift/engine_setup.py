"""How vLLM is configured and started on this machine: environment, engine arguments, refusals."""

from __future__ import annotations

import gc
import logging
import mmap
import os
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from headrift.errors import EngineError, RefusedError
from headrift.vllm_plugin import plugin

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_CPU_KV_CACHE_LIMIT = 4 << 30
# In the environment: how many engines share this machine's memory; one where it is not set.
ENGINES_PER_MACHINE = "HEADRIFT_ENGINES_PER_MACHINE"
_FINALIZE = "finalize_loading"


def engine_config(args: dict[str, Any], requested_backend: str = "auto") -> VllmConfig:
    """vLLM's configuration for these engine arguments, with headrift in it.

    Args:
        args: vLLM's, those of `attention_args` among them.
        requested_backend: as `attention_args` was given it; with auto, Triton attends what FlashAttention cannot.

    Raises:
        EngineError: vLLM cannot load the model or does not take these settings.
        RefusedError: the engine cannot be measured.
    """
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
    reasons = plugin.refusals(config)
    if reasons:
        raise RefusedError(reasons)
    processors = list(config.model_config.logits_processors or [])
    config.model_config.logits_processors = [*processors, plugin.rows_processor(config.use_v2_model_runner)]
    config.additional_config = plugin.AdditionalConfig(config.additional_config)
    return config


def _fall_back_to_triton(config: VllmConfig) -> None:
    """Attend with Triton if FlashAttention cannot for this model on this GPU."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    misfits = plugin.flash_misfits(config)
    if misfits:
        logging.getLogger("headrift").info("attention by Triton, not FlashAttention: %s", "; ".join(misfits))
        os.environ[plugin.BACKEND] = "triton"
        config.attention_config.backend = AttentionBackendEnum[plugin.STOCK_BACKENDS["triton"]]


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
    prepare_environment(verbose=False)
    args = {"model": os.fspath(model), **machine_defaults(), **attention_args("auto")}
    config = engine_config(args).model_config
    dtype = str(config.dtype).removeprefix("torch.")
    return EnginePlan(dtype, config.max_model_len, 2 * args["max_num_seqs"], args.get("kv_cache_memory_bytes"))


def attention_args(requested: str) -> dict[str, Any]:
    """Engine arguments for the requested attention backend; the environment names it to every process of the engine."""
    gpu = has_gpu()
    try:
        backend = plugin.backend_for(requested, gpu)
    except ValueError as error:
        raise EngineError(str(error)) from error
    os.environ[plugin.BACKEND] = backend
    if backend == "cpu":
        from headrift.vllm_plugin import cpu_ops

        # Cached prefixes may end with any token: see vllm_plugin.prefix_tails.
        return {"ir_op_priority": cpu_ops.PRIORITY, "prefix_match_unit": 1}
    if not gpu:
        return {}
    from vllm.platforms import current_platform

    notice = plugin.replaces_flashinfer(current_platform.get_device_capability())
    if notice:
        logging.getLogger("headrift").warning(notice)
    return {"attention_backend": plugin.STOCK_BACKENDS[backend]}


def lora_args(folder: str) -> dict[str, Any]:
    """Engine arguments for requests that are answered with the adapter in a folder. EngineError where vLLM cannot."""
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
    """Set what vLLM reads from the environment, before it is imported, unless the user has set it."""
    os.environ[plugin.SWITCH] = "1"
    prepare_torch(verbose)
    defaults = {"VLLM_LOGGING_LEVEL": "INFO" if verbose else "ERROR", "TOKENIZERS_PARALLELISM": "false"}
    # vLLM would report model type, machine and settings to its makers.
    defaults |= {"VLLM_NO_USAGE_STATS": "1"}
    if not verbose:
        # While it is imported vLLM has warnings to print and no logging configuration yet.
        logging.getLogger("vllm").setLevel(logging.ERROR)
        # What it logs comes as an error as well. A level would be undone when vLLM sets its logging up.
        logging.getLogger("vllm.transformers_utils.repo_utils").disabled = True
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
    if not has_gpu():
        # One process, or one for each rank: the front end has little to do.
        defaults |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def prepare_torch(verbose: bool = False) -> None:
    """Set what torch reads from the environment, before anything imports it (`has_gpu` and transformers do), unless the
    user has set it."""
    # Read once, when torch loads OpenMP. Threads that wait spin; where another process wants the core they spin on,
    # every wait costs a time slice, and a step takes ten times as long. A short spin costs nothing when they are
    # alone.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # Read once, at torch's first large tensor on a CPU. Weights and KV cache go into huge pages.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if not verbose:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


@contextmanager
def llvmlite_out_of_sight() -> Iterator[None]:
    """vLLM's CPU platform looks through the attributes of all loaded modules and trips over llvmlite's library object.

    numba brings that module, so without this a second engine, or a first one after `import numba`, would not start.
    """
    hidden = {name: sys.modules.pop(name) for name in ["llvmlite.binding.ffi"] if name in sys.modules}
    try:
        yield
    finally:
        sys.modules.update(hidden)


@contextmanager
def garbage_left() -> Iterator[None]:
    """Nothing is looked through for garbage while an engine starts: what torch and vLLM import is all kept, and going
    through it again and again takes a fifth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def memory_taken_on_use() -> Iterator[None]:
    """vLLM's CPU build fills the KV cache, gigabytes, with zeros at the start; here the kernel does, page by page, when
    a page is first written. Holds for an engine in this very process."""
    if has_gpu():
        yield
        return
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    fills = GPUModelRunner.initialize_kv_cache_tensors

    def leaves_it(self: Any, *args: Any, **kwargs: Any) -> Any:
        with zeros_on_use():
            return fills(self, *args, **kwargs)

    GPUModelRunner.initialize_kv_cache_tensors = leaves_it
    try:
        yield
    finally:
        GPUModelRunner.initialize_kv_cache_tensors = fills


def zeros_on_use() -> AbstractContextManager[Any]:
    """Under it torch.zeros of plain bytes takes its memory when that is written."""
    import torch
    from torch.overrides import TorchFunctionMode

    class OnUse(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func is torch.zeros and kwargs.get("dtype") == torch.int8 and isinstance(args[0], int):
                memory = mmap.mmap(-1, args[0], flags=mmap.MAP_PRIVATE)
                with suppress(OSError):  # a kernel without huge pages
                    memory.madvise(mmap.MADV_HUGEPAGE)
                return torch.frombuffer(memory, dtype=torch.int8)
            return func(*args, **kwargs)

    return OnUse()


def check_compiler(verbose: bool = False) -> None:
    """EngineError where torch.compile would find nothing to compile a model for this CPU with."""
    prepare_torch(verbose)
    if has_gpu():
        return
    compiler, header = os.environ.get("CXX", "g++"), Path(sysconfig.get_path("include"), "Python.h")
    missing = [] if shutil.which(compiler) else [f"the C++ compiler {compiler}"]
    missing += [] if header.exists() else [f"Python's header {header}"]
    if missing:
        raise EngineError(
            f"--compile needs {' and '.join(missing)}, which this machine does not have: install it (g++ and "
            "python3-dev on Debian and Ubuntu; another compiler is named in CXX), or leave --compile out"
        )


@contextmanager
def compiled_model_found(compiled: bool) -> Iterator[None]:
    """vLLM keeps a compiled model on disk. On a CPU it cannot load it again, for want of a method that is there to
    prepare what only GPUs have, and compiles for most of a minute at each start; here the method does nothing. Holds
    for an engine in this very process. compiled: whether the engine's model is compiled at all."""
    if has_gpu() or not compiled:
        yield
        return
    from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable as Loaded

    if hasattr(Loaded, _FINALIZE):  # a later torch may have one of its own
        yield
        return
    setattr(Loaded, _FINALIZE, lambda self, config: None)
    try:
        yield
    finally:
        delattr(Loaded, _FINALIZE)


@contextmanager
def cores_divided(ranks: int) -> Iterator[None]:
    """Each rank's threads on cores of its own, unless the user has bound them; one rank's are left unbound.

    vLLM's `auto` would keep a core for the front end, and unbound the threads of several ranks spin on each other's.
    """
    import vllm.envs

    name = "VLLM_CPU_OMP_THREADS_BIND"
    if has_gpu() or name in os.environ:
        yield
        return
    cores = sorted(os.sched_getaffinity(0))
    bounds = [len(cores) * rank // ranks for rank in range(ranks + 1)]
    own = [",".join(map(str, cores[start:end])) for start, end in pairwise(bounds)]
    os.environ[name] = "|".join(own) if ranks > 1 and all(own) else "nobind"
    # An engine that ran in this process has had vLLM keep the environment as it was.
    vllm.envs.disable_envs_cache()
    try:
        yield
    finally:
        del os.environ[name]


def has_gpu() -> bool:
    """Whether torch is a build for GPUs."""
    import torch

    return torch.version.cuda is not None or torch.version.hip is not None


def instructions() -> dict[str, str]:
    """What a model on a CPU is compiled for. As a part of vLLM's `additional_config` it goes into the name that the
    compiled model is kept by: where a home directory is shared, each kind of machine has its own."""
    import torch

    return {} if has_gpu() else {"instructions": torch.backends.cpu.get_cpu_capability()}


def machine_defaults(ranks: int = 1) -> dict[str, Any]:
    """Engine arguments for an engine of so many ranks on this machine; `engine_args` overrides each."""
    if has_gpu():
        return {"max_num_seqs": 256, "use_tqdm_on_load": False}
    import psutil

    sharers = ranks * int(os.environ.get(ENGINES_PER_MACHINE, "1"))
    return {
        "max_num_seqs": 128,
        "use_tqdm_on_load": False,
        # Small blocks let short system prompts be shared; vLLM's CPU default of 128 tokens seldom does.
        "block_size": 32,
        "dtype": "float32",
        "enforce_eager": True,
        # Of each rank.
        "kv_cache_memory_bytes": int(min(_CPU_KV_CACHE_LIMIT, psutil.virtual_memory().available * 0.4) / sharers),
    }
