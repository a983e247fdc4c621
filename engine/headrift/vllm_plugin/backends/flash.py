"""vLLM's FlashAttention backend with its LSE kept, by which the masses of measured rows are taken afterwards."""

from __future__ import annotations

from typing import Any

import torch
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides, is_quantized_kv_cache
from vllm.v1.attention.backend import AttentionLayer, CommonAttentionMetadata
from vllm.v1.attention.backends import flash_attn as stock
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)

from headrift.vllm_plugin.measure import MeasuringBuilder, MeasuringImpl
from headrift.vllm_plugin.recorder import Recorder
from headrift_kernels.triton.span_mass import span_mass


class FlashMassBackend(FlashAttentionBackend):
    """FLASH_ATTN for an engine that may be probed; without `additional_config["headrift"]` it is the parent."""

    @staticmethod
    def get_impl_cls() -> type[FlashMassImpl]:
        return FlashMassImpl

    @staticmethod
    def get_builder_cls() -> type[FlashMassBuilder]:
        return FlashMassBuilder


class FlashMassBuilder(MeasuringBuilder, FlashAttentionMetadataBuilder):
    """Says in which steps the LSE is wanted."""

    def plan(self, recorder: Recorder, metadata: FlashAttentionMetadata, common: CommonAttentionMetadata) -> bool:
        """Whether a query of the step is measured."""
        return self.capturing or self.any_measured(recorder, common)


class FlashMassImpl(MeasuringImpl, FlashAttentionImpl):
    """The parent; in a step with measured queries the same call, but for its LSE, and then the spans' masses."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.recorder is not None:
            # The span kernel takes the query in the model's own type, whatever the cache's.
            self.supports_quant_query_input = False

    def layer_refusals(self, recorder: Recorder) -> list[str]:
        found = (
            (self.vllm_flash_attn_version == 4, "FlashAttention 4, whose LSE is not proved"),
            (self.sinks is not None, "attention sinks with FlashAttention, whose LSE with them is not proved"),
            (
                is_quantized_kv_cache(self.kv_cache_dtype),
                "an fp8 KV cache with FlashAttention, which takes fp8 queries with it",
            ),
        )
        refused = [f"{reason}; use the attention backend 'triton'" for is_so, reason in found if is_so]
        return super().layer_refusals(recorder) + refused

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: FlashAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attn_metadata is None or not getattr(attn_metadata, "measured", None) or self.recorder is None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        recorder, tokens = self.recorder, attn_metadata.num_actual_tokens
        keys, values = (
            canonicalize_singleton_dim_strides(half) for half in kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        )
        window = stock._maybe_symmetrize_window(self.sliding_window, attn_metadata.causal)
        _, lse = stock.flash_attn_varlen_func(
            q=query[:tokens],
            k=keys,
            v=values,
            out=output[:tokens],
            cu_seqlens_q=attn_metadata.query_start_loc,
            max_seqlen_q=attn_metadata.max_query_len,
            seqused_k=attn_metadata.seq_lens,
            max_seqlen_k=attn_metadata.max_seq_len,
            softmax_scale=self.scale,
            causal=attn_metadata.causal,
            alibi_slopes=self.alibi_slopes,
            window_size=None if window is None else list(window),
            block_table=attn_metadata.block_table,
            softcap=self.logits_soft_cap,
            scheduler_metadata=attn_metadata.scheduler_metadata,
            fa_version=self.vllm_flash_attn_version,
            num_splits=attn_metadata.max_num_splits,
            return_softmax_lse=True,
        )
        span_mass(
            recorder.mass,
            self.layer_index,
            query,
            keys,
            lse,
            attn_metadata.block_table,
            attn_metadata.query_start_loc,
            attn_metadata.seq_lens,
            recorder.row_slot[: attn_metadata.seq_lens.shape[0]],
            recorder.prompt_len,
            recorder.n_rows,
            recorder.bounds,
            max_query_len=attn_metadata.max_query_len,
            prompt_region=recorder.settings.prompt_region,
            **self.attention_options(),
        )
        return output
