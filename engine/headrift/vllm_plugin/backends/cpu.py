"""vLLM's CPU attention backend, with masses taken for probed rows after it has attended."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionLayer, AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from headrift.vllm_plugin.plugin import RefusedError
from headrift.vllm_plugin.recorder import Recorder
from headrift.vllm_plugin.rows import batch_rows
from headrift_kernels.cpu.span_mass import measured_queries, span_mass

# The instruction-set variants of vLLM's CPU kernels whose K cache is packed as [head_dim, block_size].
PACKED_ISAS = ("vec", "vec16")


class CPUMassBackend(CPUAttentionBackend):
    """CPU_ATTN for an engine that may be probed; without `additional_config["headrift"]` it is the parent."""

    @staticmethod
    def get_impl_cls() -> type[CPUMassImpl]:
        return CPUMassImpl

    @staticmethod
    def get_builder_cls() -> type[CPUMassBuilder]:
        return CPUMassBuilder


class CPUMassBuilder(CPUAttentionMetadataBuilder):
    """Publishes, before each step, which rows are probed."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.recorder = Recorder.of(vllm_config)
        if self.recorder is None:
            return
        if self.isa not in PACKED_ISAS:
            raise RefusedError([f"vLLM chose the CPU kernels '{self.isa}', whose KV layout headrift does not read"])
        layers = vllm_config.compilation_config.static_forward_context
        for name in layer_names:
            index, impl = extract_layer_index(name), layers[name].impl
            impl.layer_index = index
            self.recorder.windows[index] = impl.sliding_window if impl.sliding_window > 0 else None

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        metadata: Any = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata.measured = None
        if self.recorder is not None and self.recorder.publish(
            batch_rows(common_attn_metadata), common_attn_metadata.seq_lens
        ):
            measured = measured_queries(
                metadata.query_start_loc.numpy(),
                metadata.seq_lens.numpy(),
                self.recorder.row_slot[: common_attn_metadata.num_reqs].numpy(),
                self.recorder.prompt_len.numpy(),
                self.recorder.n_rows.numpy(),
                self.recorder.settings.rows,
            )
            metadata.measured = measured if len(measured) else None
        return metadata


class CPUMassImpl(CPUAttentionBackendImpl):
    """Attends as the parent does; where rows are probed, their masses are then read off the same K cache."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.layer_index = -1
        self.recorder = Recorder.of(get_current_vllm_config())
        if self.recorder is None:
            return
        reasons = []
        if self.attn_type != AttentionType.DECODER:
            reasons.append(f"a layer attends as '{self.attn_type}', not as a causal decoder")
        if self.num_heads != self.recorder.mass.shape[3]:
            reasons.append(f"a layer has {self.num_heads} heads where the model has {self.recorder.mass.shape[3]}")
        if reasons:
            raise RefusedError(reasons)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        super().forward(layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
        measured: np.ndarray | None = getattr(attn_metadata, "measured", None)
        if attn_metadata is not None and measured is not None and self.recorder is not None:
            span_mass(
                self.recorder.mass,
                self.layer_index,
                query,
                packed_keys(kv_cache),
                attn_metadata.block_table,
                measured,
                self.recorder.bounds,
                scale=self.scale,
                window=self.sliding_window if self.sliding_window > 0 else None,
                softcap=self.logits_soft_cap,
                alibi_slopes=self.alibi_slopes,
                sinks=None if self.sinks is None else self.sinks.float(),
            )
        return output


def packed_keys(kv_cache: torch.Tensor) -> torch.Tensor:
    """[blocks, kv_heads, head_dim, block_size] view of the keys in vLLM's [blocks, kv_heads, block_size, 2 * head_dim].

    Per (block, KV head) the first half of the memory holds K, packed as [head_dim, block_size].
    """
    blocks, kv_heads, block_size, width = kv_cache.shape
    return kv_cache.view(blocks, kv_heads, 2, width // 2, block_size)[:, :, 0]
