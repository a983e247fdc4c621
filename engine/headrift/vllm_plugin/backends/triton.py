"""vLLM's Triton attention backend; in a step with measured rows, decode rows go through headrift's fused kernel."""

from __future__ import annotations

from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from headrift.vllm_plugin.backends.fused import FusedBuilder, FusedImpl
from headrift.vllm_plugin.recorder import Recorder


class TritonMassBackend(TritonAttentionBackend):
    """TRITON_ATTN for an engine that may be probed; without `additional_config["headrift"]` it is the parent."""

    @staticmethod
    def get_impl_cls() -> type[TritonMassImpl]:
        return TritonMassImpl

    @staticmethod
    def get_builder_cls() -> type[TritonMassBuilder]:
        return TritonMassBuilder


class TritonMassBuilder(FusedBuilder, TritonAttentionMetadataBuilder):
    """Leaves the prefill rows of a measured step to vLLM's Triton kernel."""


class TritonMassImpl(FusedImpl, TritonAttentionImpl):
    """Decode rows by the fused kernel, prefill rows by vLLM's Triton kernel."""

    def layer_refusals(self, recorder: Recorder) -> list[str]:
        conditions = (
            (self._is_per_token_head_quant, f"a {self.kv_cache_dtype} KV cache, scaled per token and head"),
            (self.use_alibi_sqrt, "a layer bends distances by a square root (ALiBi sqrt)"),
            (self.chunk_lookback != -1, "a layer attends in chunks with a look-back"),
        )
        return super().layer_refusals(recorder) + [reason for is_so, reason in conditions if is_so]
