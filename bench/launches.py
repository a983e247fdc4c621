"""What a launch of a decode kernel costs the host: Triton's own, and the same launched directly.

    python bench/launches.py [--rounds 400] [--rows 256]

No GPU: Triton's launcher runs over a CUDA library that does nothing, on CPU tensors. So what the GPU's driver takes to
launch a kernel, which is the same either way, is not in it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import _fake_cuda
import numpy as np

# What changes from step to step, of either kernel.
VARYING = ("output_ptr", "query_ptr", "block_table_ptr", "seq_lens_ptr", "row_slot_ptr", "part_acc_ptr")
VARYING += ("part_stat_ptr", "part_mass_ptr", "stride_ot", "stride_oh", "stride_qt", "stride_qh", "stride_table")


def launches_of(call: Callable[[], None]) -> list[tuple[Any, tuple[int, ...], dict[str, Any], dict[str, Any]]]:
    """The kernel, grid, arguments and options of each launch that a function makes."""
    from triton.runtime.jit import JITFunction

    launches = []
    run = JITFunction.run

    def recording_run(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> Any:
        names = [parameter.name for parameter in kernel.params]
        arguments = dict(zip(names, args, strict=False)) | {name: kwargs[name] for name in names if name in kwargs}
        options = {name: value for name, value in kwargs.items() if name not in names}
        launches.append((kernel, (*grid, 1, 1)[:3], arguments, options))
        return run(kernel, *args, grid=grid, warmup=warmup, **kwargs)

    JITFunction.run = recording_run
    try:
        call()
    finally:
        JITFunction.run = run
    return launches


def microseconds(functions: dict[str, Callable[[], Any]], rounds: int, calls: int = 50) -> dict[str, np.ndarray]:
    """Quartiles of a call's time, the functions in turns."""
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(calls):
                function()
            samples[name].append((time.perf_counter() - start) / calls * 1e6)
    return {name: np.percentile(times, [25, 50, 75]) for name, times in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=400)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        _fake_cuda.activate(Path(folder))
        import torch

        from headrift_kernels.cases import decode_case
        from headrift_kernels.triton.decode_mass import SplitScratch, decode_mass
        from headrift_kernels.triton.launch import launch

        sizes = {"kv_heads": 8, "group": 4, "head_dim": 128, "dtype": torch.bfloat16}
        case = decode_case(np.random.default_rng(0), seq_lens=np.full(args.rows, 100), **sizes)
        scratch = SplitScratch.allocate(args.rows, 32, 128, 3, 4, "cpu")
        output, mass = torch.empty_like(case.query), case.empty_mass()

        def decode() -> None:
            decode_mass(output, mass, 1, *case.batch, scratch=scratch, **case.how)

        functions: dict[str, Callable[[], Any]] = {"decode_mass": decode}
        for kernel, grid, arguments, options in launches_of(decode):
            varying = [name for name in VARYING if name in arguments]
            values = [arguments[name] for name in varying]
            values = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in values]
            direct = launch(kernel, grid, arguments, varying, **options)
            assert direct is not None
            assert direct(grid, *values)
            tritons = partial(kernel[grid], *arguments.values(), **options)
            functions[f"{kernel.__name__}, Triton's"] = tritons
            functions[f"{kernel.__name__}, direct"] = partial(direct, grid, *values)
        for name, (low, middle, high) in microseconds(functions, args.rounds).items():
            print(f"{name:26} {middle:6.1f} us (middle half {low:.1f} to {high:.1f})")


if __name__ == "__main__":
    main()
