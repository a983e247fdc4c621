"""vLLM's backends for GPUs, Triton's and FlashAttention's, with masses.

One fused kernel attends for decode rows and measures them; vLLM's backend attends for prefill rows. In a mixed step
each prompt's last token is one more row of that kernel, measured and not attended: one launch more a layer than stock
vLLM (two if rows are split). Only replayed answers, and requests that are prefilled again after preemption, have
measured queries before a row's last; a second kernel takes those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.platforms import current_platform
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends import flash_attn, triton_attn
from vllm.v1.kv_cache_interface import AttentionSpec

from headrift.vllm_plugin.backends import MeasuringBackend, MeasuringBuilder, MeasuringImpl, rows_from
from headrift.vllm_plugin.plugin import flash_conditions
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
    """How a step with probed rows is attended, worked out once for all layers of a KV cache group."""

    batch: Batch  # all rows
    prefill: slice | None = None  # the rows, and tokens, that the parent attends for
    replayed: int = 0  # the most measured queries of any row before its last one
    replay_scratch: ReplayScratch | None = None  # where the kernel that measures these splits rows, if it does


class FusedBuilder(MeasuringBuilder):
    """Mixin before a GPU backend's builder: the parent's metadata is of the prefill rows alone in a measured step."""

    num_heads_q: int

    def __init__(self, kv_cache_spec: AttentionSpec, *args: Any, **kwargs: Any):
        super().__init__(kv_cache_spec, *args, **kwargs)
        if self.recorder is not None:
            # Model runner V1 then puts decode rows first; V2 always does.
            self._init_reorder_batch_threshold(1)
            self.head_size, self.kv_heads = kv_cache_spec.head_size, kv_cache_spec.num_kv_heads
            # The most keys that any layer attends; None: without a limit.
            windows = [layer.impl.window for layer in self.layers]
            self.most_keys = None if None in windows else max(windows)
            self.is_warm = False
            self._scratches: dict[tuple[int, int], SplitScratch] = {}

    def plan(
        self, recorder: Recorder, common: CommonAttentionMetadata, build: Callable[[CommonAttentionMetadata], Any]
    ) -> tuple[Any, MeasuredStep | None]:
        rows = (common.block_table_tensor, common.seq_lens, common.query_start_loc)
        # The most keys that a row of the batch attends.
        longest = common.max_seq_len if self.most_keys is None else min(common.max_seq_len, self.most_keys)
        if common.max_query_len <= 1:
            return build(common), MeasuredStep(Batch(*rows, self._scratch(recorder, common.num_reqs, longest)))
        lengths = np.diff(common.query_start_loc_cpu.numpy()[: common.num_reqs + 1])
        measured, replayed, replaying_rows = count_measured(recorder, common, lengths)
        if not measured:
            return build(common), None
        decode_rows = int(np.argmax(lengths > 1))
        scratch = replay_scratch = None
        if longest > UNSPLIT_KEYS or recorder.config.splits:
            scratch = self._scratch(recorder, common.num_reqs, longest)
        if replayed:
            group, regions = self.num_heads_q // self.kv_heads, recorder.config.regions
            splits = replay_splits(replaying_rows, self.kv_heads, group, replayed, longest + replayed, _processors())
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

    def warm_up(self) -> None:
        if self.recorder is None or self.is_warm or not self.layers[0].kv_cache.numel():
            return
        steps = self._warm_up_steps(self.recorder)
        for layer in self.layers:
            query = torch.zeros((1, self.num_heads_q, self.head_size), dtype=layer.dtype, device=self.device)
            for step in steps:
                layer.impl.measure(layer, query, layer.kv_cache, step, torch.empty_like(query))
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
        for replayed in sorted({min(max(rows * self.kv_heads // heads, 1), most) for rows in (16, 32, 64)}):
            for scratch in (None, ReplayScratch.allocate(1, replayed, heads, regions, 2, self.device)):
                steps.append(MeasuredStep(Batch(row, length, start), None, replayed, scratch))
        return steps


def count_measured(recorder: Recorder, common: CommonAttentionMetadata, lengths: np.ndarray) -> tuple[bool, int, int]:
    """Whether a step measures any query, the most of a row before its last one, and how many rows have such; `lengths`
    are the rows' queries. Does not wait for the device."""
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
        self._is_quantized = is_quantized_kv_cache(self.kv_cache_dtype)
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

    def _keys_and_values(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Views of a layer's KV cache, [blocks, page, KV heads, head_dim] each."""
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        if self._is_quantized:
            fp8 = current_platform.fp8_dtype()
            keys, values = keys.view(fp8), values.view(fp8)
        return keys, values

    def gathered_keys(self, layer: Any, kv_cache: Tensor, blocks: Tensor) -> Tensor:
        """Keys [m, KV heads, head_dim, pages * page] of blocks [m, pages]."""
        picked = self._keys_and_values(kv_cache)[0].index_select(0, blocks.flatten())
        if self._is_quantized:
            picked = picked.float() * layer._k_scale
        return picked.view(len(blocks), -1, *picked.shape[2:]).permute(0, 2, 3, 1)

    def attend(
        self, step: MeasuredStep, layer: Any, qkv: Sequence[Tensor], kv_cache: Tensor, metadata: Any, output: Tensor
    ) -> None:
        query, key, value = qkv
        self.measure(layer, query, kv_cache, step, output)
        rows = step.prefill
        if rows is not None:
            self.attend_as_parent(layer, query[rows], key, value, kv_cache, metadata, output[rows])

    def measure(self, layer: Any, query: Tensor, kv_cache: Tensor, step: MeasuredStep, output: Tensor) -> None:
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
        requests = (recorder.row_slot, recorder.prompt_len, recorder.step_limit, recorder.bounds)
        k_scale, v_scale = (layer._k_scale, layer._v_scale) if self._is_quantized else (None, None)
        options = {**self.attention_options(), **recorder.kernel_options, "k_scale": k_scale}
        self._again[batch.splits] = decode_mass(
            output,
            recorder.mass,
            self.layer_index,
            query,
            keys,
            values,
            batch.block_table,
            batch.seq_lens,
            *requests,
            query_start_loc=batch.query_start_loc,
            v_scale=v_scale,
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
                *requests,
                most_queries=step.replayed,
                scratch=step.replay_scratch,
                **options,
            )


class TritonMassBuilder(FusedBuilder, triton_attn.TritonAttentionMetadataBuilder):
    """Leaves the prefill rows of a measured step to vLLM's Triton kernel."""


class TritonMassImpl(FusedImpl, triton_attn.TritonAttentionImpl):
    """Decode rows by the fused kernel, prefill rows by vLLM's Triton kernel."""

    def refusals(self) -> tuple[tuple[bool, str], ...]:
        return (
            (self._is_per_token_head_quant, f"a {self.kv_cache_dtype} KV cache, scaled per token and head"),
            (self.use_alibi_sqrt, "a layer bends distances by a square root (ALiBi sqrt)"),
            (self.chunk_lookback != -1, "a layer attends in chunks with a look-back"),
        )


class TritonMassBackend(MeasuringBackend, triton_attn.TritonAttentionBackend):
    """TRITON_ATTN for an engine that may be probed."""

    impl, builder = TritonMassImpl, TritonMassBuilder


class FlashMassBuilder(FusedBuilder, flash_attn.FlashAttentionMetadataBuilder):
    """Leaves the prefill rows of a measured step to FlashAttention."""

    def _get_scheduler_metadata(self, *, max_query_len: int, **batch: Any) -> Tensor | None:
        if self.recorder is not None and max_query_len <= 1 and (self.capturing or self.recorder.probed):
            return None  # the fused kernel attends for these rows
        return super()._get_scheduler_metadata(max_query_len=max_query_len, **batch)


class FlashMassImpl(FusedImpl, flash_attn.FlashAttentionImpl):
    """Decode rows by the fused kernel, prefill rows by FlashAttention."""

    def refusals(self) -> tuple[tuple[bool, str], ...]:
        conditions = flash_conditions(self.vllm_flash_attn_version, self.kv_cache_dtype)
        return tuple((is_so, f"{reason}; use the attention backend 'triton'") for is_so, reason in conditions)


class FlashMassBackend(MeasuringBackend, flash_attn.FlashAttentionBackend):
    """FLASH_ATTN for an engine that may be probed."""

    impl, builder = FlashMassImpl, FlashMassBuilder


def _processors() -> int:
    return current_platform.num_compute_units()


def _scratch_sizes(parts: int, heads: int, head_dim: int, regions: int) -> dict[str, int]:
    """Floats that `parts` splits of rows leave, in the order of SplitScratch."""
    return {"acc": parts * heads * head_dim, "stat": parts * heads * 3, "mass": parts * heads * regions}
