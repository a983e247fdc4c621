"""vLLM's CPU attention backend; in a step with measured queries, decode rows go through headrift's own kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends import cpu_attn

from headrift.errors import RefusedError
from headrift.vllm_plugin.backends import MeasuringBackend, MeasuringBuilder, MeasuringImpl, rows_from
from headrift.vllm_plugin.recorder import Recorder
from headrift_kernels.cpu.paged_attention import PagedAttention, body_for
from headrift_kernels.cpu.queries import SLOT, Queries, measured_queries

# The instruction-set variants of vLLM's CPU kernels whose K cache is packed as [head_dim, block_size].
PACKED_ISAS = ("vec", "vec16")
# Prefill rows are neighbours in nearly every batch; if they are scattered more than this, vLLM attends for all rows.
_MOST_RUNS = 4


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """How a step with measured queries is attended, decided once for all layers of a KV cache group."""

    # Neighbouring requests that vLLM attends for: their tokens, and its metadata for them alone.
    runs: list[tuple[slice, cpu_attn.CPUAttentionMetadata]]
    # Queries that headrift's kernel measures, and whether it attends for them too, or vLLM does.
    measured: list[tuple[Queries, bool]]


class CPUMassBuilder(MeasuringBuilder, cpu_attn.CPUAttentionMetadataBuilder):
    """Plans the steps in which a query of a probed row is measured."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.recorder is None:
            return
        if self.isa not in PACKED_ISAS:
            raise RefusedError([f"vLLM chose the CPU kernels '{self.isa}', whose KV layout headrift does not read"])
        body_for(self.dtype)

    def plan(
        self, recorder: Recorder, common: CommonAttentionMetadata, build: Callable[[CommonAttentionMetadata], Any]
    ) -> tuple[cpu_attn.CPUAttentionMetadata, MeasuredStep | None]:
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
        runs = bounds.reshape(-1, 2).tolist() if few else [(0, rows)]
        alone = (lengths[table[:, 0]] == 1) & few
        parts = [(np.ascontiguousarray(table[some]), attends) for some, attends in ((alone, True), (~alone, False))]
        return metadata, MeasuredStep(
            [(slice(starts[first], starts[end]), build(rows_from(common, first, end))) for first, end in runs],
            [(Queries.from_table(part, self.block_size), attends) for part, attends in parts if len(part)],
        )


class CPUMassImpl(MeasuringImpl, cpu_attn.CPUAttentionBackendImpl):
    """The parent, but in a step with measured queries: then decode rows are attended and measured in one pass."""

    _attention: PagedAttention | None = None

    def forget_cache(self) -> None:
        self._attention = None

    def attend(
        self, step: MeasuredStep, layer: Any, qkv: Sequence[Tensor], kv_cache: Tensor, metadata: Any, output: Tensor
    ) -> None:
        for tokens, run in step.runs:
            self.attend_as_parent(layer, *(tensor[tokens] for tensor in qkv), kv_cache, run, output[tokens])
        attention = self._attention_over(kv_cache)
        for queries, attends in step.measured:
            attention.attend(qkv[0], metadata.block_table, queries, output=output if attends else None)

    def gathered_keys(self, layer: Any, kv_cache: Tensor, blocks: Tensor) -> Tensor:
        """Keys [m, KV heads, head_dim, pages * page] of blocks [m, pages]."""
        kv_heads, page, width = kv_cache.shape[1:]
        # In a block the keys come first, packed as [head_dim, page].
        packed = kv_cache.view(-1, kv_heads, 2, width // 2, page)[:, :, 0]
        keys = packed.index_select(0, blocks.flatten()).view(*blocks.shape, kv_heads, width // 2, page)
        return keys.permute(0, 2, 3, 1, 4).flatten(3)

    def _attention_over(self, kv_cache: Tensor) -> PagedAttention:
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


class CPUMassBackend(MeasuringBackend, cpu_attn.CPUAttentionBackend):
    """CPU_ATTN for an engine that may be probed."""

    impl, builder = CPUMassImpl, CPUMassBuilder
