"""Scalar helpers the CPU kernels share; each is inlined by numba and vectorises without a vector maths library."""

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.extending import overload

LOG2E = np.float32(1.4426950408889634)
LN2 = np.float32(0.6931471805599453)
# Relative error below 2e-7 on [-0.5, 0.5]: the Taylor series of 2**f, from the constant on.
EXP2_SERIES = (
    1.0,
    0.6931471805599453,
    0.2402265069591007,
    0.05550410866482158,
    0.009618129107628477,
    0.0013333558146428443,
    0.00015403530393381608,
)
_C0, _C1, _C2, _C3, _C4, _C5, _C6 = (np.float32(coefficient) for coefficient in EXP2_SERIES)


@njit(inline="always")
def exp2(x):
    """2**x in float32 for x <= 0; 0 below -126 (a softmax needs no more); NaN stays NaN."""
    whole = np.int32(max(x, np.float32(-126.5)) - np.float32(0.5))
    f = x - np.float32(whole)
    p = _C0 + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * _C6)))))
    scaled = p * np.int32((whole + np.int32(127)) << np.int32(23)).view(np.float32)
    return np.float32(0.0) if x < np.float32(-126.0) else scaled


def to_float32(x):
    """A cache element as float32: float32 as it is, uint16 as the bits of a bfloat16."""
    raise NotImplementedError("only inside compiled code")


@overload(to_float32, inline="always")
def _to_float32(x):
    if x == types.float32:
        return lambda x: x
    if x == types.uint16:
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return None


def from_float32(x, element):
    """A float32 as an element of the output: as it is, or rounded to the nearest bfloat16 (ties to even), its bits."""
    raise NotImplementedError("only inside compiled code")


@overload(from_float32, inline="always")
def _from_float32(x, element):
    if element.instance_type == types.float32:
        return lambda x, element: x
    if element.instance_type == types.uint16:

        def to_bfloat16(x, element):
            bits = np.float32(x).view(np.uint32)
            return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

        return to_bfloat16
    return None
