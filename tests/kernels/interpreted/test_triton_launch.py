"""In the interpreter a launch is Triton's, and nothing is compiled."""

import torch
import triton
import triton.language as tl

from headrift_kernels.triton.launch import launch, record_compilations


@triton.jit
def double_kernel(x_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + at, tl.load(x_ptr + at) * 2)


def test_interpreted():
    x = torch.arange(8)
    with record_compilations() as names:
        assert launch(double_kernel, (2, 1, 1), {"x_ptr": x, "BLOCK": 4}, ["x_ptr"], num_warps=4) is None
    assert x.tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
    assert names == []
