"""Triton's own CUDA launcher over a CUDA library that does nothing: what a launch costs the host, without a GPU.

All of Triton's Python and C runs, down to the reading of every argument; the GPU's driver is a function that returns.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

SOURCE = """
#include <stdint.h>
#define NOTHING(name) int name() { return 0; }
#define GIVES(name, type, value) int name(type *result) { *result = (type)(value); return 0; }
NOTHING(cuInit) NOTHING(cuLaunchKernelEx) NOTHING(cuLaunchKernel) NOTHING(cuModuleUnload) NOTHING(cuGetErrorString)
NOTHING(cuCtxSetCurrent) NOTHING(cuCtxGetLimit) NOTHING(cuCtxSetLimit) NOTHING(cuDevicePrimaryCtxRetain)
NOTHING(cuFuncSetAttribute) NOTHING(cuFuncSetCacheConfig) NOTHING(cuOccupancyMaxActiveClusters)
NOTHING(cuStreamIsCapturing) NOTHING(cuTensorMapEncodeTiled) NOTHING(cuTensorMapEncodeIm2col)
GIVES(cuCtxGetCurrent, void *, 16) GIVES(cuModuleLoadData, void *, 16) GIVES(cuModuleGetFunction, void *, 16)
GIVES(cuCtxGetDevice, int, 0) GIVES(cuDeviceGet, int, 0) GIVES(cuDeviceGetCount, int, 1)
GIVES(cuDriverGetVersion, int, 13000) GIVES(cuFuncGetAttribute, int, 1024) GIVES(cuDeviceGetAttribute, int, 232448)
int cuPointerGetAttribute(uint64_t *result, int attribute, uint64_t pointer) { *result = pointer; return 0; }
"""


def activate(folder: Path) -> None:
    """Make Triton compile for an sm_90 and launch on it. To be called before triton is imported.

    Args:
        folder: where the library is built and Triton's cache goes, empty at first: no other process may use a launcher
            that is linked to this library.
    """
    library = folder / "libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-xc", "-", "-o", str(library)]
    subprocess.run(command, input=SOURCE, text=True, check=True)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    os.environ |= {"TRITON_LIBCUDA_PATH": str(folder), "TRITON_CACHE_DIR": str(folder / "cache")}

    import torch
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    torch.cuda.current_device = lambda: 0
    cuda = CudaDriver()
    cuda.get_current_stream = lambda device: 0
    cuda.get_device_capability = lambda device: (9, 0)
    cuda.get_current_target = lambda: GPUTarget("cuda", 90, 32)
    driver.set_active(cuda)
