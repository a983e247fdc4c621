"""How vLLM is configured on this machine: environment, engine arguments, refusals."""

from __future__ import annotations

import logging
import os
import shutil
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from headrift.errors import EngineError, RefusedError
from headrift.vllm_plugin import plugin

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_CPU_KV_CACHE_LIMIT = 4 << 30
# Environment variable: how many engines share this machine's memory (default: one).
ENGINES_PER_MACHINE = "HEADRIFT_ENGINES_PER_MACHINE"


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
    """What an engine would be like.

    Attributes:
        max_model_len: Tokens of the context.
        slots: Requests in flight.
        kv_bytes: Of the KV cache; None: vLLM takes what the device has left.
    """

    dtype: str
    max_model_len: int
    slots: int
    kv_bytes: int | None


def plan_engine(model: str | os.PathLike[str]) -> EnginePlan:
    """Plan the engine that ProbedEngine would start on this machine, from the model's config: nothing is loaded.

    Raises:
        EngineError, RefusedError: it would not start.
    """
    prepare_environment(verbose=False)
    args = {"model": os.fspath(model), **machine_defaults(), **attention_args("auto")}
    config = engine_config(args).model_config
    dtype = str(config.dtype).removeprefix("torch.")
    return EnginePlan(dtype, config.max_model_len, 2 * args["max_num_seqs"], args.get("kv_cache_memory_bytes"))


def attention_args(requested: str) -> dict[str, Any]:
    """Engine arguments for the requested attention backend, which the environment names to every process."""
    gpu = has_gpu()
    try:
        backend = plugin.backend_for(requested, gpu)
    except ValueError as error:
        raise EngineError(str(error)) from error
    os.environ[plugin.BACKEND] = backend
    if backend == "cpu":
        return dict(plugin.CPU_ARGS)
    if not gpu:
        return {}
    from vllm.platforms import current_platform

    notice = plugin.replaces_flashinfer(current_platform.get_device_capability())
    if notice:
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
    missing = [] if shutil.which(compiler) else [f"the C++ compiler {compiler}"]
    missing += [] if header.exists() else [f"Python's header {header}"]
    if missing:
        raise EngineError(
            f"--compile needs {' and '.join(missing)}: install it (Debian, Ubuntu: g++ and python3-dev; CXX names "
            "another compiler) or leave --compile out"
        )


def has_gpu() -> bool:
    """Whether torch is a build for GPUs."""
    import torch

    return torch.version.cuda is not None or torch.version.hip is not None


def instructions() -> dict[str, str]:
    """The instruction set that a model on a CPU is compiled for, as an entry of vLLM's `additional_config`.

    It becomes part of the compiled model's name, so that machines which share a home directory keep theirs apart.
    """
    import torch

    return {} if has_gpu() else {"instructions": torch.backends.cpu.get_cpu_capability()}


def machine_defaults(ranks: int = 1) -> dict[str, Any]:
    """Default engine arguments on this machine, for an engine of this many ranks."""
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
