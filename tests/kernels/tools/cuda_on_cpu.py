"""Run code written for a GPU on CPU tensors, with Triton's interpreter: the dry run of `scripts/gpu_check.py`.

Import it before anything else uses torch.cuda, with TRITON_INTERPRET=1 (or as a pytest plugin: `-p tools.cuda_on_cpu`).
After that "cuda" means the CPU, a CUDA graph replays the Triton launches of its capture, and an event is a wall-clock
time. Nothing of headrift is replaced, and the times that come out mean nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import triton.backends
from torch.overrides import TorchFunctionMode
from triton.runtime.interpreter import GridExecutor

from tools.traffic import mended


class _OnCpu(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.cuda:
            return args[0]
        swap: Callable[[Any], Any] = lambda x: torch.device("cpu") if _is_cuda(x) else x  # noqa: E731
        return function(*map(swap, args), **{name: swap(value) for name, value in (kwargs or {}).items()})


def _is_cuda(x: Any) -> bool:
    return (isinstance(x, str) and x.startswith("cuda")) or (isinstance(x, torch.device) and x.type == "cuda")


class _Graph:
    """The Triton launches of a capture; a capture itself launches nothing."""

    def __init__(self) -> None:
        self.launches: list[Callable[[], Any]] = []

    def replay(self) -> None:
        for launch in self.launches:
            launch()


@contextmanager
def _graph(graph: _Graph) -> Iterator[None]:
    launch = GridExecutor.__call__

    def capture(executor: Any, *args: Any, **kwargs: Any) -> None:
        graph.launches.append(lambda: launch(executor, *args, **kwargs))

    GridExecutor.__call__ = capture
    try:
        yield
    finally:
        GridExecutor.__call__ = launch


class _Event:
    def __init__(self, enable_timing: bool = False):
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * (end.at - self.at)


class _NoDriver:
    @staticmethod
    def is_active() -> bool:
        return False


# What makes vLLM take its Triton code on a CPU (see tests/engine/interpreted).
triton.backends.backends["cpu"] = triton.backends.Backend(compiler=None, driver=_NoDriver)
for _name, _replacement in {
    "is_available": lambda: True,
    "synchronize": lambda *_: None,
    "empty_cache": lambda: None,
    "get_device_name": lambda *_: "a CPU in place of a GPU",
    "get_device_capability": lambda *_, **__: (9, 0),
    "get_device_properties": lambda *_: SimpleNamespace(multi_processor_count=4),
    "mem_get_info": lambda *_: (8 << 30, 8 << 30),
    "CUDAGraph": _Graph,
    "graph": _graph,
    "Event": _Event,
}.items():
    setattr(torch.cuda, _name, _replacement)
# Both last as long as the process.
_mended = mended()
_mended.__enter__()
_mode = _OnCpu()
_mode.__enter__()
