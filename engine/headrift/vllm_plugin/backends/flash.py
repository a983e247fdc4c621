"""vLLM's FlashAttention backend for prefill rows; in a measured step decode rows go through headrift's fused kernel."""

from __future__ import annotations

from typing import Any

import torch
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from headrift.vllm_plugin.backends.fused import FusedBuilder, FusedImpl
from headrift.vllm_plugin.recorder import Recorder


class FlashMassBackend(FlashAttentionBackend):
    """FLASH_ATTN for an engine that may be probed; without `additional_config["headrift"]` it is the parent."""

    @staticmethod
    def get_impl_cls() -> type[FlashMassImpl]:
        return FlashMassImpl

    @staticmethod
    def get_builder_cls() -> type[FlashMassBuilder]:
        return FlashMassBuilder


class FlashMassBuilder(FusedBuilder, FlashAttentionMetadataBuilder):
    """Leaves the prefill rows of a measured step to FlashAttention."""

    def _get_scheduler_metadata(self, *, max_query_len: int, **batch: Any) -> torch.Tensor | None:
        if self.recorder is not None and max_query_len <= 1 and (self.capturing or self.recorder.probed):
            return None  # the fused kernel attends for these rows
        return super()._get_scheduler_metadata(max_query_len=max_query_len, **batch)


class FlashMassImpl(FusedImpl, FlashAttentionImpl):
    """Decode rows by the fused kernel, prefill rows by FlashAttention."""

    def layer_refusals(self, recorder: Recorder) -> list[str]:
        conditions = (
            (self.vllm_flash_attn_version == 4, "FlashAttention 4, whose KV layout headrift has not been tried with"),
            (
                is_quantized_kv_cache(self.kv_cache_dtype),
                "an fp8 KV cache with FlashAttention, which takes fp8 queries with it",
            ),
        )
        refused = [f"{reason}; use the attention backend 'triton'" for is_so, reason in conditions if is_so]
        return super().layer_refusals(recorder) + refused
