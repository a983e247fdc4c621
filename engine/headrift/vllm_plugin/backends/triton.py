"""vLLM's Triton backend with masses, and what FlashAttention's shares with it: `FusedBuilder` and `FusedImpl`.

One fused kernel attends for decode rows and measures them; vLLM's backend attends for prefill rows.

In a mixed step each prompt's last token is one more row of that kernel, measured and not attended, so a streaming job
needs one launch more a layer than stock vLLM (two if rows are split). Only replayed answers, and requests that are
prefilled again after preemption, have measured queries before a row's last; a second kernel takes those.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
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
    TritonAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from headrift.vllm_plugin.backends.base import MeasuringBuilder, MeasuringImpl
from headrift.vllm_plugin.recorder import Recorder
from headrift_kernels.triton.decode_mass import Batch, DecodeAgain, SplitScratch, decode_mass, splits_for
from headrift_kernels.triton.replay_mass import ReplayScratch, replay_mass, replay_splits

# Keys up to which the rows of a mixed step are not split: prefill takes most of its time, and the host saves the second
# kernel's launch in every layer.
UNSPLIT_KEYS = 2048
# Of a step's replayed queries: taken when it runs, past vLLM's memory profiling.
REPLAY_SCRATCH_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """How a step with probed rows is attended, worked out once for all layers of a KV cache group.

    Attributes:
        batch: all rows.
        prefill: the rows, and tokens, that the parent attends for; None: it attends for none.
        replayed: the most measured queries of any row before its last one.
        replay_scratch: where the kernel that measures these splits rows; None: it does not.
    """

    batch: Batch
    prefill: slice | None = None
    replayed: int = 0
    replay_scratch: ReplayScratch | None = None


class FusedBuilder(MeasuringBuilder):
    """Mixin before a GPU backend's builder: the parent's metadata is of the prefill rows alone in a measured step."""

    num_heads_q: int

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if self.recorder is not None:
            # Model runner V1 then puts decode rows first; V2 always does.
            self._init_reorder_batch_threshold(1)
            self.head_size, self.kv_heads = kv_cache_spec.head_size, kv_cache_spec.num_kv_heads
            # The most keys that any layer attends, None without a limit: a sliding window in all layers of the group.
            windows = [layer.impl.window for layer in self.layers]
            self.most_keys = None if None in windows else max(windows)
            self.is_warm = False
            self._scratches: dict[tuple[int, int], SplitScratch] = {}

    def plan(
        self,
        recorder: Recorder,
        common: CommonAttentionMetadata,
        build: Callable[[CommonAttentionMetadata], Any],
    ) -> tuple[Any, MeasuredStep | None]:
        rows = (common.block_table_tensor, common.seq_lens, common.query_start_loc)
        if common.max_query_len <= 1:
            return build(common), MeasuredStep(
                Batch(*rows, self._scratch(recorder, common.num_reqs, self._longest(common)))
            )
        lengths = np.diff(common.query_start_loc_cpu.numpy()[: common.num_reqs + 1])
        measured, replayed, replaying_rows = count_measured(recorder, common, lengths)
        if not measured:
            return build(common), None
        decode_rows = int(np.argmax(lengths > 1))
        scratch = replay_scratch = None
        if self._longest(common) > UNSPLIT_KEYS or recorder.config.splits:
            scratch = self._scratch(recorder, common.num_reqs, self._longest(common))
        if replayed:
            group, regions = self.num_heads_q // self.kv_heads, recorder.config.regions
            longest = self._longest(common) + replayed
            splits = replay_splits(replaying_rows, self.kv_heads, group, replayed, longest, _processors())
            # Every row of the batch has room for its parts, whether it replays or not.
            of_one_split = 4 * common.num_reqs * replayed * self.num_heads_q * (3 + regions)
            splits = min(splits, max(REPLAY_SCRATCH_BYTES // of_one_split, 1))
            if splits > 1:
                replay_scratch = ReplayScratch.allocate(
                    common.num_reqs, replayed, self.num_heads_q, regions, splits, self.device
                )
        step = MeasuredStep(Batch(*rows, scratch), slice(decode_rows, None), replayed, replay_scratch)
        return build(rows_from(common, decode_rows)), step

    def _scratch(self, recorder: Recorder, rows: int, longest: int) -> SplitScratch | None:
        splits = recorder.config.splits or splits_for(rows, self.kv_heads, longest, _processors())
        if splits == 1:
            return None
        if (rows, splits) not in self._scratches:
            sizes = _scratch_sizes(rows * splits, self.num_heads_q, self.head_size, recorder.config.regions)
            parts = (
                recorder.scratch[name][:size].view(rows, self.num_heads_q, splits, -1) for name, size in sizes.items()
            )
            self._scratches[rows, splits] = SplitScratch(*parts)
        return self._scratches[rows, splits]

    def _longest(self, common: CommonAttentionMetadata) -> int:
        """The most keys that a row of the batch attends."""
        return common.max_seq_len if self.most_keys is None else min(common.max_seq_len, self.most_keys)

    def warm_up(self) -> None:
        if self.recorder is None or self.is_warm or not self.layers[0].kv_cache.numel():
            return
        steps = self._warm_up_steps(self.recorder)
        for layer in self.layers:
            layer.impl.warm_up(layer, steps)
        self.is_warm = True

    def _warm_up_steps(self, recorder: Recorder) -> list[MeasuredStep]:
        """Steps of one row that is not probed, which launch every variant of every kernel and record nothing."""
        row = torch.zeros((1, 1), dtype=torch.int32, device=self.device)
        start = torch.tensor([0, 1], dtype=torch.int32, device=self.device)
        length = torch.ones(1, dtype=torch.int32, device=self.device)
        heads, regions, most = self.num_heads_q, recorder.config.regions, recorder.config.steps + 1
        split = SplitScratch.allocate(1, heads, self.head_size, regions, 2, self.device)
        steps = [MeasuredStep(Batch(row, length, start, split))]
        # As many queries as make a larger tile each time.
        group = heads // self.kv_heads
        for replayed in sorted({min(max(rows // group, 1), most) for rows in (16, 32, 64)}):
            for scratch in (None, ReplayScratch.allocate(1, replayed, heads, regions, 2, self.device)):
                steps.append(MeasuredStep(Batch(row, length, start), None, replayed, scratch))
        return steps


def rows_from(common: CommonAttentionMetadata, first: int) -> CommonAttentionMetadata:
    """The batch without its first rows, of one token each: what the parent attends for.

    What the device reads are copies: at an odd offset into the batch's own tensors Triton would compile vLLM's kernel
    again. What only the host would read is left out.
    """
    if first == 0:
        return common
    part = copy(common)
    part.query_start_loc = common.query_start_loc[first:] - first
    part.seq_lens = common.seq_lens[first:].clone()
    part.block_table_tensor = common.block_table_tensor[first:].clone()
    part.slot_mapping = common.slot_mapping[first:]
    part.num_reqs -= first
    part.num_actual_tokens -= first
    part.query_start_loc_cpu = part.seq_lens_cpu_upper_bound = part.is_prefilling = part.req_idx = None
    part._num_computed_tokens_cache = part._token_to_req_indices_cache = None
    return part


def count_measured(recorder: Recorder, common: CommonAttentionMetadata, lengths: np.ndarray) -> tuple[bool, int, int]:
    """Count the measured queries of a step without waiting for the device.

    Args:
        lengths: [rows] queries of each row.

    Returns:
        Whether any query is measured; the most of a row before its last query; the rows that have such.
    """
    slots = recorder.slots
    assert common.seq_lens_cpu_upper_bound is not None  # exact: speculative decoding is refused
    last = common.seq_lens_cpu_upper_bound.numpy()[: len(slots)] - recorder.prompt_lens[slots]
    first = np.maximum(last - lengths[: len(slots)] + 1, 0)  # rows past these are padding
    end = np.where(slots >= 0, np.minimum(last + 1, recorder.step_limits[slots]), 0)
    earlier = np.minimum(end, last) - first
    return bool((end > first).any()), int(earlier.max(initial=0)), int((earlier > 0).sum())


class FusedImpl(MeasuringImpl):
    """Mixin before a GPU backend's implementation: in a measured step the fused kernel attends for the decode rows."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # Calls of `decode_mass` to repeat, by number of splits, and the address of the KV cache that they read.
        self._again: dict[int, DecodeAgain | None] = {}
        self._cache_address = 0
        if self.recorder is None:
            return
        # Our kernel takes the query in the model's own type, whatever the cache's.
        self.supports_quant_query_input = False
        longest, config = get_current_vllm_config().model_config.max_model_len, self.recorder.config
        parts = max(
            n * (config.splits or splits_for(n, self.num_kv_heads, longest, _processors()))
            for n in range(1, len(self.recorder.row_slot) + 1)
        )
        for name, size in _scratch_sizes(parts, self.num_heads, self.head_size, config.regions).items():
            self.recorder.reserve(name, size)

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        return self.recorder is None and super().fused_output_quant_supported(quant_key)

    def forget_cache(self) -> None:
        self._again.clear()

    def _keys_and_values(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of a layer's KV cache, [blocks, page, KV heads, head_dim] each."""
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        if is_quantized_kv_cache(self.kv_cache_dtype):
            fp8 = current_platform.fp8_dtype()
            keys, values = keys.view(fp8), values.view(fp8)
        return keys, values

    def gathered_keys(self, layer: AttentionLayer, kv_cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """Keys [m, KV heads, head_dim, pages * page] of blocks [m, pages]."""
        picked = self._keys_and_values(kv_cache)[0].index_select(0, blocks.flatten())
        if is_quantized_kv_cache(self.kv_cache_dtype):
            picked = picked.float() * layer._k_scale
        return picked.view(len(blocks), -1, *picked.shape[2:]).permute(0, 2, 3, 1)

    def attend(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        step: MeasuredStep | None = getattr(attn_metadata, "measured", None)
        if step is None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        self.measure(layer, query, kv_cache, step, output)
        rest = step.prefill
        if rest is not None:
            super().forward(layer, query[rest], key, value, kv_cache, attn_metadata, output[rest])
        return output

    forward = MeasuringImpl.instrumented

    def measure(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        step: MeasuredStep,
        output: torch.Tensor,
    ) -> None:
        """Attend for the decode rows and write the masses of all measured queries of the step."""
        batch, address = step.batch, kv_cache.data_ptr()
        if address != self._cache_address:
            self._again.clear()
            self._cache_address = address
        again = self._again.get(batch.splits)
        if again is not None and not step.replayed and again(output, query, batch):
            return
        recorder = self.recorder
        assert recorder is not None
        keys, values = self._keys_and_values(kv_cache)
        quantized = is_quantized_kv_cache(self.kv_cache_dtype)
        options = {
            **self.attention_options(),
            **recorder.kernel_options,
            "k_scale": layer._k_scale if quantized else None,
        }
        self._again[batch.splits] = decode_mass(
            output,
            recorder.mass,
            self.layer_index,
            query,
            keys,
            values,
            batch.block_table,
            batch.seq_lens,
            recorder.row_slot,
            recorder.prompt_len,
            recorder.step_limit,
            recorder.bounds,
            query_start_loc=batch.query_start_loc,
            v_scale=layer._v_scale if quantized else None,
            scratch=batch.scratch,
            **options,
        )
        if step.replayed:
            replay_mass(
                recorder.mass,
                self.layer_index,
                query,
                keys,
                batch.block_table,
                batch.query_start_loc,
                batch.seq_lens,
                recorder.row_slot,
                recorder.prompt_len,
                recorder.step_limit,
                recorder.bounds,
                most_queries=step.replayed,
                scratch=step.replay_scratch,
                **options,
            )

    def warm_up(self, layer: Any, steps: list[MeasuredStep]) -> None:
        """Attend for steps that record nothing."""
        cache = layer.kv_cache
        query = torch.zeros((1, self.num_heads, self.head_size), dtype=layer.dtype, device=cache.device)
        for step in steps:
            self.measure(layer, query, cache, step, torch.empty_like(query))


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


def _processors() -> int:
    return current_platform.num_compute_units()


def _scratch_sizes(parts: int, heads: int, head_dim: int, regions: int) -> dict[str, int]:
    """Floats that `parts` splits of rows leave, in the order of SplitScratch."""
    return {"acc": parts * heads * head_dim, "stat": parts * heads * 3, "mass": parts * heads * regions}
