"""Runs compiled kernels on the OpenMP threads that torch and vLLM use.

numba's own threading layers start a second pool of threads. Threads of either pool wait for work by spinning, so two
pools on the same cores steal each other's time: a decode step then takes up to ten times as long.
"""

from __future__ import annotations

import ctypes

import llvmlite.binding
import torch  # noqa: F401  (loads the OpenMP library that the symbols below come from)
from numba import types
from numba.core import typing
from numba.extending import intrinsic

_openmp = ctypes.CDLL(None)
_openmp.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint]
_openmp.GOMP_parallel.restype = None

for _name in ("omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier"):
    llvmlite.binding.add_symbol(_name, ctypes.cast(getattr(_openmp, _name), ctypes.c_void_p).value)

thread_number = types.ExternalFunction("omp_get_thread_num", types.int32())
thread_count = types.ExternalFunction("omp_get_num_threads", types.int32())
wait_for_all = types.ExternalFunction("GOMP_barrier", types.void())

# The type of a function that `run` takes: it finds its arguments behind the pointer and its share of the work by
# thread_number() and thread_count().
BODY = types.void(types.voidptr)


@intrinsic
def pointer(typing_context, address):
    """An integer address as a pointer, for `numba.carray`."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return typing.signature(types.voidptr, types.intp), generate


def run(address: int, arguments: bytes, threads: int = 0) -> None:
    """Call a compiled BODY on every thread of torch's pool at once (`threads`: so many) and wait for all of them.

    address: the body's. arguments: the bytes of a record of plain numbers; arrays go as addresses, and the caller keeps
    them alive.
    """
    _openmp.GOMP_parallel(address, arguments, threads, 0)
