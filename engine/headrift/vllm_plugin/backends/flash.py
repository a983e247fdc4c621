"""vLLM's FlashAttention backend for prefill rows; in a measured step decode rows go through headrift's fused kernel."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from headrift.vllm_plugin.backends.triton import FusedBuilder, FusedImpl
from headrift.vllm_plugin.plugin import flash_reasons
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
        reasons = flash_reasons(self.vllm_flash_attn_version, self.kv_cache_dtype)
        refused = [f"{reason}; use the attention backend 'triton'" for reason in reasons]
        return super().layer_refusals(recorder) + refused
