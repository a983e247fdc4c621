"""RMS norms by vLLM's CPU kernels are those of vLLM's own definition, and are left to it where they cannot be taken."""

import pytest
import torch
from vllm import ir

from headrift.vllm_plugin import cpu_patches


@pytest.fixture(autouse=True)
def registered() -> None:
    cpu_patches.register()
    cpu_patches.register()  # a process may start several engines


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (7, 576), (130, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_is_vllms_own(rows, width, dtype):
    torch.manual_seed(rows)
    x, residual, weight = (torch.randn(*shape).to(dtype) for shape in ((rows, width), (rows, width), (width,)))
    # Of each number, in units of its type. float32: sums of a row's squares in another order. bfloat16: four roundings
    # may set the two apart, by half a unit each: of the sum with the residual, of vLLM's norm and weighted norm, and of
    # the kernel's result. Which of them a kernel makes depends on the processor.
    units = 16 if dtype == torch.float32 else 2
    bounds = {"rtol": units * torch.finfo(dtype).eps, "atol": 0}
    ours, native = (ir.ops.rms_norm.impls[name].impl_fn for name in (cpu_patches.PROVIDER, "native"))
    torch.testing.assert_close(ours(x, weight, 1e-5), native(x, weight, 1e-5), **bounds)
    ours, native = (ir.ops.fused_add_rms_norm.impls[name].impl_fn for name in (cpu_patches.PROVIDER, "native"))
    expected = native(x, residual, weight, 1e-5)
    result = ours(x.clone(), residual.clone(), weight, 1e-5)
    torch.testing.assert_close(result[1], expected[1], **bounds)
    torch.testing.assert_close(result[0], expected[0], **bounds)


def test_what_the_kernel_cannot_take_is_left_to_vllm():
    x, weight = torch.randn(4, 32), torch.randn(16)
    supports = ir.ops.rms_norm.impls[cpu_patches.PROVIDER].supports_args
    assert supports(x[:, :16].contiguous(), weight, 1e-5)
    assert not supports(x[:, :16], weight, 1e-5)  # as a part of a fused projection
    assert not supports(x[:, :16].contiguous(), weight.bfloat16(), 1e-5)
    assert not supports(x[:, :16].contiguous(), None, 1e-5)
    assert not supports(x[:, :10].contiguous(), weight[:10], 1e-5)
    assert not supports(x[:, :16].contiguous(), weight, 1e-5, 4)
    supports = ir.ops.fused_add_rms_norm.impls[cpu_patches.PROVIDER].supports_args
    assert not supports(x[:, :16].contiguous(), x[:, 16:], weight, 1e-5)
