"""vLLM's CPU attention backend; in a step with measured queries, decode rows go through headrift's own kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionLayer, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from headrift.errors import RefusedError
from headrift.vllm_plugin.backends.base import MeasuringBuilder, MeasuringImpl
from headrift.vllm_plugin.recorder import Recorder
from headrift_kernels.cpu.paged_attention import PagedAttention, body_for
from headrift_kernels.cpu.queries import SLOT, Queries, measured_queries

# The instruction-set variants of vLLM's CPU kernels whose K cache is packed as [head_dim, block_size].
PACKED_ISAS = ("vec", "vec16")
# Prefill rows are neighbours in nearly every batch; if they are scattered more than this, vLLM attends for all rows.
_MOST_RUNS = 4


@dataclass(frozen=True, slots=True)
class PrefillRun:
    """Neighbouring requests with several queries: their tokens start..end-1 and vLLM's metadata for them alone."""

    start: int
    end: int
    metadata: CPUAttentionMetadata


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """How a step with measured queries is attended, decided once for all layers of a KV cache group.

    Attributes:
        runs: Requests that vLLM attends for.
        attended: Queries that headrift's kernel attends for and measures.
        measured_only: Queries of vLLM's requests whose masses are taken in a pass over K.
    """

    runs: list[PrefillRun]
    attended: Queries | None
    measured_only: Queries | None


class CPUMassBackend(CPUAttentionBackend):
    """CPU_ATTN for an engine that may be probed; without `additional_config["headrift"]` it is the parent."""

    @staticmethod
    def get_impl_cls() -> type[CPUMassImpl]:
        return CPUMassImpl

    @staticmethod
    def get_builder_cls() -> type[CPUMassBuilder]:
        return CPUMassBuilder


class CPUMassBuilder(MeasuringBuilder, CPUAttentionMetadataBuilder):
    """Plans the steps in which a query of a probed row is measured."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if self.recorder is None:
            return
        if self.isa not in PACKED_ISAS:
            raise RefusedError([f"vLLM chose the CPU kernels '{self.isa}', whose KV layout headrift does not read"])
        body_for(self.dtype)

    def plan(
        self,
        recorder: Recorder,
        common: CommonAttentionMetadata,
        build: Callable[[CommonAttentionMetadata], CPUAttentionMetadata],
    ) -> tuple[CPUAttentionMetadata, MeasuredStep | None]:
        metadata, rows = build(common), common.num_reqs
        starts = metadata.query_start_loc.numpy()
        lengths = np.diff(starts[: rows + 1])
        bounds = np.flatnonzero(np.diff(np.concatenate([[False], lengths > 1, [False]])))
        few = len(bounds) <= 2 * _MOST_RUNS
        table = measured_queries(
            starts,
            metadata.seq_lens.numpy(),
            recorder.slots,
            recorder.prompt_lens,
            recorder.step_limits,
            recorder.config.steps + 1,
            few,
        )
        if not (table[:, SLOT] >= 0).any():
            return metadata, None
        runs = [(0, rows)]
        if few:
            runs = [(int(first), int(end)) for first, end in zip(bounds[::2], bounds[1::2], strict=True)]
        alone = (lengths[table[:, 0]] == 1) & few
        step = MeasuredStep(
            [self._run(metadata, first, end) for first, end in runs],
            self._queries(table[alone]),
            self._queries(table[~alone]),
        )
        return metadata, step

    def _queries(self, table: np.ndarray) -> Queries | None:
        return Queries.from_table(np.ascontiguousarray(table), self.block_size) if len(table) else None

    def _run(self, metadata: CPUAttentionMetadata, first: int, end: int) -> PrefillRun:
        """vLLM's metadata for rows first..end-1 alone, as CPUAttentionMetadataBuilder.build makes it for a batch."""
        start, stop = int(metadata.query_start_loc[first]), int(metadata.query_start_loc[end])
        query_start_loc = metadata.query_start_loc[first : end + 1] - start
        seq_lens = metadata.seq_lens[first:end]
        plan = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=end - first,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            seq_lens=seq_lens,
            dtype=self.dtype,
            query_start_loc=query_start_loc,
            causal=metadata.causal,
            sliding_window_size=self.window_size,
            isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            dynamic_causal=None,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        alone = CPUAttentionMetadata(
            num_actual_tokens=stop - start,
            max_query_len=metadata.max_query_len,
            query_start_loc=query_start_loc,
            max_seq_len=metadata.max_seq_len,
            seq_lens=seq_lens,
            block_table=metadata.block_table[first:end],
            slot_mapping=metadata.slot_mapping[start:stop],
            scheduler_metadata=plan,
            causal=metadata.causal,
        )
        return PrefillRun(start, stop, alone)


class CPUMassImpl(MeasuringImpl, CPUAttentionBackendImpl):
    """The parent, but in a step with measured queries: then decode rows are attended and measured in one pass."""

    _attention: PagedAttention | None = None

    def forget_cache(self) -> None:
        self._attention = None

    def attend(
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
        step: MeasuredStep | None = getattr(attn_metadata, "measured", None)
        if attn_metadata is None or step is None or self.recorder is None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        for run in step.runs:
            rows = slice(run.start, run.end)
            super().forward(layer, query[rows], key[rows], value[rows], kv_cache, run.metadata, output[rows])
        attention = self._attention_over(kv_cache)
        for queries, into in ((step.attended, output), (step.measured_only, None)):
            if queries is not None:
                attention.attend(query, attn_metadata.block_table, queries, output=into)
        return output

    forward = MeasuringImpl.instrumented

    def gathered_keys(self, layer: AttentionLayer, kv_cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """Keys [m, KV heads, head_dim, pages * page] of blocks [m, pages]."""
        kv_heads, page, width = kv_cache.shape[1:]
        # In a block the keys come first, packed as [head_dim, page].
        packed = kv_cache.view(-1, kv_heads, 2, width // 2, page)[:, :, 0]
        keys = packed.index_select(0, blocks.flatten()).view(*blocks.shape, kv_heads, width // 2, page)
        return keys.permute(0, 2, 3, 1, 4).flatten(3)

    def _attention_over(self, kv_cache: torch.Tensor) -> PagedAttention:
        """Our kernel over this layer's cache, made at its first step and again if vLLM changes the cache."""
        if self._attention is None or self._attention.kv_cache is not kv_cache:
            assert self.recorder is not None
            self._attention = PagedAttention(
                self.recorder.mass,
                self.layer_index,
                kv_cache,
                self.recorder.bounds,
                **self.recorder.kernel_options,
                **self.attention_options(),
            )
        return self._attention
