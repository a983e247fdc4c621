"""What every backend of ours shares: which rows of a step are measured, and where their numbers go.

A backend file mixes these two classes in before vLLM's own builder and implementation, and adds what is particular to
it. All layers of an engine share one recorder; if a model has several KV cache groups (full and sliding layers), the
first group's builder publishes the step's rows for all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from headrift.errors import RefusedError
from headrift.vllm_plugin.ablation import AblatedStep
from headrift.vllm_plugin.attention_rows import Queries
from headrift.vllm_plugin.plugin import settings_of
from headrift.vllm_plugin.recorder import Recorder
from headrift.vllm_plugin.rows import batch_rows


class MeasuringImpl(AttentionImpl):
    """Mixin before an `AttentionImpl`: the layer's place in the recorder. Without probing it is the parent."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.layer_index = -1
        self.sinks_float32: torch.Tensor | None = None
        self.recorder = Recorder.of(get_current_vllm_config())
        if self.recorder is None:
            return
        self.recorder.sinks |= self.sinks is not None
        reasons = self.layer_refusals(self.recorder)
        if reasons:
            raise RefusedError(reasons)
        if self.recorder.ablations is None and self.recorder.bank is None:
            self.forward = self.attend  # nothing goes before or after it

    def attend(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The backend's `forward`, without ablations and attention rows."""
        raise NotImplementedError

    def forget_cache(self) -> None:
        """Drop what is kept of the layer's KV cache: vLLM is about to allocate another."""

    def layer_refusals(self, recorder: Recorder) -> list[str]:
        """Every reason why this layer cannot be measured."""
        reasons = []
        if self.attn_type != AttentionType.DECODER:
            reasons.append(f"a layer attends as '{self.attn_type}', not as a causal decoder")
        if self.num_heads != recorder.mass.shape[3]:
            reasons.append(f"a layer has {self.num_heads} heads where the model has {recorder.mass.shape[3]}")
        return reasons

    @property
    def window(self) -> int | None:
        """The keys a query sees at most, itself included; None for all of them."""
        window = self.sliding_window
        size = window[0] + 1 if isinstance(window, tuple) else window
        return size if size > 0 else None

    def attention_options(self) -> dict[str, Any]:
        """What headrift's kernels take of this layer, whichever of them is called."""
        return {
            "scale": self.scale,
            "window": self.window,
            "softcap": self.logits_soft_cap,
            "alibi_slopes": self.alibi_slopes,
            "sinks": self.sinks_float32,
        }


class MeasuringBuilder(AttentionMetadataBuilder):
    """Mixin before an `AttentionMetadataBuilder`: `metadata.measured` is what the step's forward passes measure.

    A subclass says what that is in `plan`; None stands for a step that the parent attends as if nothing were measured.
    """

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.recorder = Recorder.of(vllm_config)
        self.capturing = False
        if self.recorder is None:
            return
        self.recorder.add_builder(self, layer_names)
        # One group's metadata is not another's with the block table exchanged: what is measured depends on the group.
        self.supports_update_block_table = False
        layers = vllm_config.compilation_config.static_forward_context
        self.layers = [layers[name] for name in layer_names]
        for name, layer in zip(layer_names, self.layers):
            index, impl = extract_layer_index(name), layer.impl
            impl.layer_index = index
            impl.sinks_float32 = None if impl.sinks is None else impl.sinks.float()
            impl.forget_cache()
            self.recorder.windows[index] = impl.window

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        def build(common: CommonAttentionMetadata) -> Any:
            return parent(common_prefix_len, common, fast_build)

        parent, recorder, common = super().build, self.recorder, common_attn_metadata
        measured = ablated = row_queries = None
        if recorder is None:
            metadata = build(common)
        else:
            if recorder.publisher is self:
                recorder.publish(batch_rows(common), common.seq_lens)
            if not recorder.step_is_real:
                # A made-up batch precedes every capture of a graph, in which a kernel's first launch is not permitted.
                self.warm_up()
            if self.capturing or recorder.probed:
                metadata, measured = self.plan(recorder, common, build)
            else:
                metadata = build(common)
            ablated = self._ablated(recorder, common)
            row_queries = self._row_queries(recorder, common)
        metadata.measured, metadata.ablated, metadata.row_queries = measured, ablated, row_queries
        # The whole batch's: the parent's own may be of a part of it.
        metadata.batch_block_table = common.block_table_tensor
        return metadata

    def _ablated(self, recorder: Recorder, common: CommonAttentionMetadata) -> AblatedStep | None:
        """What the requests of the step ablate; one answer for all KV cache groups."""
        if recorder.publisher is self and recorder.ablations is not None:
            starts = common.query_start_loc_cpu.numpy()[: common.num_reqs + 1]
            recorder.ablated = recorder.ablations.plan(recorder.slots, starts, recorder.staged)
        return recorder.ablated

    def _row_queries(self, recorder: Recorder, common: CommonAttentionMetadata) -> list[Queries] | None:
        """The queries of the step whose attention rows are wanted; one answer for all KV cache groups."""
        if recorder.publisher is self and recorder.bank is not None:
            n = len(recorder.slots)
            assert common.seq_lens_cpu_upper_bound is not None  # exact: speculative decoding is refused
            recorder.row_queries = recorder.bank.plan(
                recorder.slots,
                common.query_start_loc_cpu.numpy()[: n + 1],
                common.seq_lens_cpu_upper_bound.numpy()[:n],
                recorder.prompt_lens,
                recorder.rows_wanted,
                recorder.staged,
            )
        return recorder.row_queries

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        # A graph is captured with our kernels in it; which rows they measure is read from the device at each replay.
        self.capturing = True
        try:
            return super().build_for_cudagraph_capture(common_attn_metadata)
        finally:
            self.capturing = False

    def warm_up(self) -> None:
        """Launch every kernel that steps of this builder's layers may launch, so that none is compiled during a job.

        Nothing happens before the KV cache is there, the second time, and in a builder whose kernels are not compiled
        at their first launch.
        """

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: AttentionSpec) -> AttentionCGSupport:
        """Whole-step graphs for decode steps only: how a mixed step is split is decided on the host, and so is, in
        every step, what is ablated and which attention rows are taken."""
        support = super().get_cudagraph_support(vllm_config, kv_cache_spec)
        settings = settings_of(vllm_config)
        if settings is None:
            return support
        if any(settings.get(name) for name in ("ablation", "row_references")):
            return AttentionCGSupport.NEVER
        return min(support, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE, key=lambda s: s.value)

    def plan(
        self,
        recorder: Recorder,
        common: CommonAttentionMetadata,
        build: Callable[[CommonAttentionMetadata], Any],
    ) -> tuple[Any, Any]:
        """Metadata of a step with probed rows, and what its forward passes measure and how.

        Args:
            common: vLLM's description of the whole batch.
            build: makes the parent's metadata of a batch, or of a part of one that the parent is to attend for.

        Returns:
            The parent's metadata, and the plan that `forward` finds as `metadata.measured` (None: nothing is measured).
        """
        raise NotImplementedError
