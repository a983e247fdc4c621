"""vLLM's Triton attention backend; in a step with measured rows, decode rows go through headrift's fused kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.platforms import current_platform
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backend import AttentionLayer, CommonAttentionMetadata
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadata,
    TritonAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from headrift.vllm_plugin.ablation import ablating
from headrift.vllm_plugin.attention_rows import keeping_rows
from headrift.vllm_plugin.measure import MeasuringBuilder, MeasuringImpl
from headrift.vllm_plugin.recorder import Recorder
from headrift_kernels.triton.decode_mass import SplitScratch, decode_mass, splits_for
from headrift_kernels.triton.query_lse import query_lse
from headrift_kernels.triton.span_mass import span_mass


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """How a step with measured rows is attended, worked out once for all layers of a KV cache group.

    decode_rows: so many rows from the first, of one token each, are attended and measured in one pass; scratch: where
    they are split. rest: vLLM's metadata for the rows after them; rest_measured: whether any of their queries is.
    """

    decode_rows: int
    scratch: SplitScratch | None
    rest: TritonAttentionMetadata | None
    rest_measured: bool


class TritonMassBackend(TritonAttentionBackend):
    """TRITON_ATTN for an engine that may be probed; without `additional_config["headrift"]` it is the parent."""

    @staticmethod
    def get_impl_cls() -> type[TritonMassImpl]:
        return TritonMassImpl

    @staticmethod
    def get_builder_cls() -> type[TritonMassBuilder]:
        return TritonMassBuilder


class TritonMassBuilder(MeasuringBuilder, TritonAttentionMetadataBuilder):
    """Parts the steps in which a row is measured into decode rows and the rest."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if self.recorder is not None:
            # Model runner V1 then puts decode rows first; V2 always does.
            self._init_reorder_batch_threshold(1)

    def plan(
        self, recorder: Recorder, metadata: TritonAttentionMetadata, common: CommonAttentionMetadata
    ) -> MeasuredStep | None:
        """Which rows our kernel attends for; None where no row of the step is measured."""
        if common.max_query_len <= 1:
            return MeasuredStep(common.num_reqs, self._scratch(recorder, common.num_reqs, metadata), None, False)
        lengths = np.diff(common.query_start_loc_cpu.numpy()[: common.num_reqs + 1])
        decode_rows = int(np.argmax(lengths > 1))
        rest_measured = self.any_measured(recorder, common, decode_rows)
        if not (recorder.slots[:decode_rows] >= 0).any():
            return MeasuredStep(0, None, metadata, True) if rest_measured else None
        rest = replace(
            metadata,
            num_actual_tokens=metadata.num_actual_tokens - decode_rows,
            query_start_loc=metadata.query_start_loc[decode_rows:] - decode_rows,
            seq_lens=metadata.seq_lens[decode_rows:],
            block_table=metadata.block_table[decode_rows:],
        )
        return MeasuredStep(decode_rows, self._scratch(recorder, decode_rows, metadata), rest, rest_measured)

    def _scratch(self, recorder: Recorder, rows: int, metadata: TritonAttentionMetadata) -> SplitScratch | None:
        splits = recorder.settings.splits or _splits(rows, self.num_heads_kv, metadata.max_seq_len)
        if splits == 1:
            return None
        sizes = _scratch_sizes(rows * splits, self.num_heads_q, self.headdim, recorder.settings.regions)
        parts = (recorder.rooms[name][:size].view(rows, self.num_heads_q, splits, -1) for name, size in sizes.items())
        return SplitScratch(*parts)


class TritonMassImpl(MeasuringImpl, TritonAttentionImpl):
    """The parent, but in a step with measured rows: then decode rows are attended and measured in one pass."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.recorder is None:
            return
        # Our kernel takes the query in the model's own type, whatever the cache's.
        self.supports_quant_query_input = False
        config = get_current_vllm_config()
        rows, longest = len(self.recorder.row_slot), config.model_config.max_model_len
        parts = max(
            n * (self.recorder.settings.splits or _splits(n, self.num_kv_heads, longest)) for n in range(1, rows + 1)
        )
        sizes = _scratch_sizes(parts, self.num_heads, self.head_size, self.recorder.settings.regions)
        sizes["lse"] = self.num_heads * config.scheduler_config.max_num_batched_tokens
        for name, size in sizes.items():
            self.recorder.reserve(name, size)

    def layer_refusals(self, recorder: Recorder) -> list[str]:
        found = (
            (self._is_per_token_head_quant, f"a {self.kv_cache_dtype} KV cache, scaled per token and head"),
            (self.use_alibi_sqrt, "a layer bends distances by a square root (ALiBi sqrt)"),
            (self.chunk_lookback != -1, "a layer attends in chunks with a look-back"),
        )
        return super().layer_refusals(recorder) + [reason for is_so, reason in found if is_so]

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        return self.recorder is None and super().fused_output_quant_supported(quant_key)

    def gathered_keys(self, layer: AttentionLayer, kv_cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """Keys [m, KV heads, head_dim, pages * page] of blocks [m, pages]."""
        keys = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)[0]
        found = keys.index_select(0, blocks.flatten())
        if is_quantized_kv_cache(self.kv_cache_dtype):
            found = found.view(current_platform.fp8_dtype()).float() * layer._k_scale
        return found.view(len(blocks), -1, *found.shape[2:]).permute(0, 2, 3, 1)

    @ablating
    @keeping_rows
    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: TritonAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        step: MeasuredStep | None = getattr(attn_metadata, "measured", None)
        if attn_metadata is None or step is None or self.recorder is None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        recorder, rows = self.recorder, step.decode_rows
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        options = self.attention_options()
        quantized = is_quantized_kv_cache(self.kv_cache_dtype)
        if quantized:
            keys, values = keys.view(current_platform.fp8_dtype()), values.view(current_platform.fp8_dtype())
            options["k_scale"] = layer._k_scale
        if rows:
            decode_mass(
                output[:rows],
                recorder.mass,
                self.layer_index,
                query[:rows],
                keys,
                values,
                attn_metadata.block_table,
                attn_metadata.seq_lens,
                recorder.row_slot,
                recorder.prompt_len,
                recorder.n_rows,
                recorder.bounds,
                v_scale=layer._v_scale if quantized else None,
                scratch=step.scratch,
                **options,
            )
        if step.rest is not None:
            super().forward(layer, query[rows:], key, value, kv_cache, step.rest, output[rows:])
            if step.rest_measured:
                self._measure(query[rows:], keys, step.rest, recorder.row_slot[rows:], options)
        return output

    def _measure(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        metadata: TritonAttentionMetadata,
        row_slot: torch.Tensor,
        options: dict[str, Any],
    ) -> None:
        """The masses of rows that vLLM has attended for, whose kernel leaves no LSE: that is taken first."""
        assert self.recorder is not None
        recorder, rows = self.recorder, metadata.seq_lens.shape[0]
        tokens = metadata.num_actual_tokens
        lse = recorder.rooms["lse"][: self.num_heads * tokens].view(self.num_heads, tokens)
        batch = (metadata.block_table, metadata.query_start_loc, metadata.seq_lens, row_slot[:rows])
        limits = (recorder.prompt_len, recorder.n_rows)
        longest = metadata.max_query_len
        query_lse(lse, query, keys, *batch, *limits, recorder.settings.rows, max_query_len=longest, **options)
        span_mass(
            recorder.mass,
            self.layer_index,
            query,
            keys,
            lse,
            *batch,
            *limits,
            recorder.bounds,
            max_query_len=longest,
            **options,
        )


def _splits(rows: int, kv_heads: int, longest: int) -> int:
    return splits_for(rows, kv_heads, longest, current_platform.num_compute_units())


def _scratch_sizes(parts: int, heads: int, head_dim: int, regions: int) -> dict[str, int]:
    """Floats that `parts` splits of rows leave, in the order of SplitScratch."""
    return {"acc": parts * heads * head_dim, "stat": parts * heads * 3, "mass": parts * heads * regions}
