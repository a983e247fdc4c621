"""Start vLLM, with patches against what makes its start fail, slow or heavy on a CPU. None changes a number."""

from __future__ import annotations

import gc
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from headrift.errors import EngineError, RefusedError
from headrift.vllm_engine.config import has_gpu

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine.llm_engine import LLMEngine

# The engine that runs in this very process, if any.
_engine_here: LLMEngine | None = None
_FINALIZE = "finalize_loading"


def start_llm_engine(config: VllmConfig) -> LLMEngine:
    """Start vLLM with all patches below.

    Raises:
        EngineError: it cannot start; or another engine runs in this process, whose parallel state is vLLM's own and
            would be pulled from under one engine when the other is closed.
    """
    global _engine_here
    import vllm.envs
    from vllm.v1.engine.llm_engine import LLMEngine

    in_process = not vllm.envs.VLLM_ENABLE_V1_MULTIPROCESSING
    if in_process and _engine_here is not None:
        raise EngineError("another engine runs in this process: close it first, or start this one in its own process")
    gc.freeze()  # what exists by now is kept: no later collection needs to search it
    ranks, compiled = config.parallel_config.local_world_size, not config.model_config.enforce_eager
    try:
        with hidden_llvmlite(), lazy_kv_cache(), loadable_compiled_model(compiled), bound_cores(ranks):
            engine = LLMEngine.from_vllm_config(config, disable_log_stats=True)
    except RefusedError:
        raise
    except (RuntimeError, ValueError, OSError) as error:
        raise EngineError(f"vLLM could not start with {config.model_config.model}: {error}") from error
    if in_process:
        _engine_here = engine
    return engine


def stop_llm_engine(engine: LLMEngine | None) -> None:
    """Stop an engine, if there is one, and give its memory back; the caller must not refer to it any more."""
    global _engine_here
    if engine is None:
        return
    engine.engine_core.shutdown()
    if engine is _engine_here:
        _engine_here = None
    del engine
    gc.unfreeze()
    gc.collect()


@contextmanager
def hidden_llvmlite() -> Iterator[None]:
    """Hide llvmlite's library object, over which vLLM's CPU platform stumbles as it inspects all loaded modules.

    numba loads that module, so without this a second engine, or a first one after `import numba`, would not start.
    """
    hidden = {name: sys.modules.pop(name) for name in ["llvmlite.binding.ffi"] if name in sys.modules}
    try:
        yield
    finally:
        sys.modules.update(hidden)


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


@contextmanager
def lazy_kv_cache() -> Iterator[None]:
    """Let the kernel zero the KV cache page by page at first write; vLLM's CPU build fills gigabytes at start-up.

    For an engine in this process.
    """
    if has_gpu():
        yield
        return
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    initialize = GPUModelRunner.initialize_kv_cache_tensors

    def initialize_lazily(self: Any, *args: Any, **kwargs: Any) -> Any:
        with lazy_zeros():
            return initialize(self, *args, **kwargs)

    GPUModelRunner.initialize_kv_cache_tensors = initialize_lazily
    try:
        yield
    finally:
        GPUModelRunner.initialize_kv_cache_tensors = initialize


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


@contextmanager
def loadable_compiled_model(compiled: bool) -> Iterator[None]:
    """Let vLLM load a compiled model from disk on a CPU, in this process.

    torch calls a method that only GPUs need and a CPU lacks, so vLLM would compile for most of a minute at each start;
    here that method does nothing.
    """
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
def bound_cores(ranks: int) -> Iterator[None]:
    """Give each of several ranks cores of its own, unless the user has bound them; leave one rank unbound.

    vLLM's `auto` would reserve a core for the front end, and threads of several unbound ranks spin on each other's.
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
    # vLLM caches the environment once an engine has run in this process.
    vllm.envs.disable_envs_cache()
    try:
        yield
    finally:
        del os.environ[name]
