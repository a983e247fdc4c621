"""Launch a compiled Triton kernel again without Triton's binding, which takes some 20 microseconds of Python.

`launch` runs a kernel as Triton does and returns a `DirectLaunch`, the compiled kernel with its arguments:

    if direct is None or not direct(grid, query.data_ptr()):
        direct = launch(kernel, grid, {"query_ptr": query, ...}, varying=["query_ptr"], num_warps=4)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import and_
from typing import Any

import torch
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction, KernelParam

Grid = tuple[int, int, int]


class DirectLaunch:
    """A compiled kernel with its arguments, of which some vary; it keeps addresses, but no tensor alive.

    A call compares, of each value that varies, the bits on which the compiled kernel depends. It cannot compare what an
    address points to: the type, device and layout stay as they were when `launch` made this.
    """

    def __init__(
        self, kernel: JITFunction, compiled: CompiledKernel, arguments: Mapping[str, Any], varying: Sequence[str]
    ):
        first = kernel.params[: len(varying)]
        if [parameter.name for parameter in first] != [*varying]:
            raise ValueError(f"what varies of {kernel.__name__} is not its first parameters: {list(varying)}")
        self._kernel = kernel
        self._rest = tuple(_value(arguments[parameter.name]) for parameter in kernel.params[len(varying) :])
        self._masks = [_mask(parameter, arguments[parameter.name]) for parameter in first]
        values = (_value(arguments[name]) or 0 for name in varying)
        self._bits = [value & mask for value, mask in zip(values, self._masks)]
        self._compiled = compiled  # its code is unloaded with it
        self._run = compiled.run
        # no launch metadata, and no hooks before and after
        self._code = (compiled.function, compiled.packed_metadata, None, None, None)
        self._device = driver.active.get_current_device()
        self._stream_of = driver.active.get_current_stream

    def __call__(self, grid: Grid, *values: int) -> bool:
        """Launch on the current stream of the device, if Triton would choose the same compiled kernel.

        Args:
            grid: programs along the three axes.
            values: of the arguments that vary, in the order of `launch`'s `varying`: an integer, of a tensor its
                `data_ptr()`, and 0 for None.

        Returns:
            Whether the kernel was launched. If not, a value needs another compiled kernel, or a hook of Triton's is to
            see each launch: call `launch`.
        """
        if [*map(and_, values, self._masks)] != self._bits or _watched(self._kernel):
            return False
        self._run(*grid, self._stream_of(self._device), *self._code, *values, *self._rest)
        return True


def launch(
    kernel: Any, grid: Grid, arguments: Mapping[str, Any], varying: Sequence[str], **options: int
) -> DirectLaunch | None:
    """Launch a kernel as Triton does, compiling it if it must.

    Args:
        kernel: a function with `triton.jit`.
        grid: programs along the three axes.
        arguments: all of the kernel's arguments by name, constants included.
        varying: names of the kernel's first parameters, which later launches may change: tensors and integers, no
            constants. A tensor that is None stays None.
        options: num_warps and num_stages.

    Returns:
        What launches the same compiled kernel directly; None in Triton's interpreter.
    """
    if not isinstance(kernel, JITFunction):
        kernel[grid](**arguments, **options)
        return None
    if driver.active.get_current_target().backend == "hip":
        tensors = {name: arguments[name] for name in varying if isinstance(arguments[name], torch.Tensor)}
        arguments = {**arguments, **{name: WidePointer(tensor) for name, tensor in tensors.items()}}
    compiled = kernel[grid](**arguments, **options)
    return DirectLaunch(kernel, compiled, arguments, varying) if isinstance(compiled, CompiledKernel) else None


@contextmanager
def record_compilations() -> Iterator[list[str]]:
    """Collect the names of the kernels that Triton compiles, or loads from its cache on disk, for the first time."""
    names: list[str] = []
    earlier = knobs.runtime.jit_post_compile_hook

    def hook(**compilation: Any) -> Any:
        names.append(compilation["fn"].jit_function.__name__)
        return earlier(**compilation) if earlier else None

    knobs.runtime.jit_post_compile_hook = hook
    try:
        yield names
    finally:
        knobs.runtime.jit_post_compile_hook = earlier


@dataclass(frozen=True, slots=True)
class WidePointer:
    """A tensor that Triton takes for larger than 2 GiB.

    For AMD, Triton compiles 32-bit offsets into a kernel whose tensor is smaller, and the next one's size is not
    compared.
    """

    tensor: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def data_ptr(self) -> int:
        return self.tensor.data_ptr()

    def ptr_range(self) -> int:
        return 1 << 62


def _value(argument: Any) -> Any:
    """What Triton's launcher reads of an argument: it takes an address faster than a tensor."""
    return argument.data_ptr() if hasattr(argument, "data_ptr") else argument


def _mask(parameter: KernelParam, argument: Any) -> int:
    """The bits of an argument that its compiled kernel depends on."""
    if isinstance(argument, int):
        # An integer that is not specialised is still compiled as one of 32 bits.
        return ~0x7FFFFFFF if parameter.do_not_specialize else ~0
    if argument is None:
        return ~0
    return 0 if parameter.do_not_specialize or parameter.do_not_specialize_on_alignment else 15


def _watched(kernel: JITFunction) -> Any:
    """Whether a hook is to see every launch, with the tensors."""
    runtime = knobs.runtime
    return runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls or kernel.pre_run_hooks
