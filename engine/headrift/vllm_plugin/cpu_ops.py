"""RMS norms on a CPU by the kernels that vLLM's CPU build has, and leaves to torch.compile to make instead.

Uncompiled, torch takes five passes over memory for each norm, which is an eighth of the time of a small model's decode
step; vLLM's own kernel takes one.
"""

from __future__ import annotations

import torch
from torch import Tensor

PROVIDER = "headrift"
_VECTOR = 16  # numbers that the kernel takes at a time; rows are whole vectors
# For EngineArgs(ir_op_priority=...); vLLM adds its own implementation at the end, for what is not supported here.
PRIORITY = {"rms_norm": [PROVIDER], "fused_add_rms_norm": [PROVIDER]}


def register() -> None:
    """Offer the kernels to vLLM in this process, under a name that an engine has to ask for."""
    from vllm import ir
    from vllm.platforms import current_platform

    if PROVIDER in ir.ops.rms_norm.impls:
        return
    current_platform.import_kernels()
    ir.ops.rms_norm.register_impl(PROVIDER, supports_args=_plain)(_rms_norm)
    ir.ops.fused_add_rms_norm.register_impl(PROVIDER, supports_args=_plain_with_residual, inplace=True)(
        _fused_add_rms_norm
    )


def _rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    out = torch.empty_like(x)
    torch.ops._C.rms_norm(out, x, weight, epsilon)
    return out


def _fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual


def _plain(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    """Whether the kernel takes these: it goes over whole rows of contiguous memory."""
    fits = x.shape[-1] % _VECTOR == 0 and x.is_contiguous()
    return fits and variance_size is None and weight is not None and weight.dtype == x.dtype


def _plain_with_residual(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return _plain(x, weight, epsilon, variance_size) and x_residual.is_contiguous() and x_residual.dtype == x.dtype
