"""What every measuring backend shares: which requests of a step are measured, and where their numbers go.

A backend module mixes these two classes in before vLLM's own builder and implementation, and adds what is particular to
it. All layers of an engine share one recorder; if a model has several KV cache groups (full and sliding layers), the
first group's builder publishes the step for all.
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
    AttentionLayer,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from headrift.errors import RefusedError
from headrift.vllm_plugin.instruments import instrument_types, parse_config
from headrift.vllm_plugin.instruments.base import Attended
from headrift.vllm_plugin.plugin import settings_of
from headrift.vllm_plugin.recorder import Recorder
from headrift.vllm_plugin.row_map import batch_rows


class MeasuringImpl(AttentionImpl):
    """Mixin before an `AttentionImpl`: attention that is measured, and that instruments may read or change.

    A backend writes `attend`, its attention with masses, and sets `forward = MeasuringImpl.instrumented`. In an engine
    that is not probed both do what the parent does.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.layer_index = -1
        self.sinks_float32: torch.Tensor | None = None
        self.recorder = Recorder.for_engine(get_current_vllm_config())
        if self.recorder is None:
            return
        self.recorder.sinks |= self.sinks is not None
        reasons = self.layer_refusals(self.recorder)
        if reasons:
            raise RefusedError(reasons)
        if not self.recorder.in_layers:
            self.forward = self.attend  # nothing goes before or after it

    def attend(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Attend as `forward` does, with masses and without instruments."""
        raise NotImplementedError

    def instrumented(
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
        """`attend`, with what the instruments planned for this step before and after it."""
        plans = getattr(attn_metadata, "layer_plans", ())
        for instrument, plan in plans:
            query = instrument.before_attention(plan, self.layer_index, query)
        self.attend(layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
        if plans:
            attended = Attended(self, layer, query, kv_cache, attn_metadata.batch_block_table, output)
            for instrument, plan in plans:
                instrument.after_attention(plan, attended)
        return output

    def forget_cache(self) -> None:
        """Drop what is kept of the layer's KV cache: vLLM is about to allocate another."""

    def layer_refusals(self, recorder: Recorder) -> list[str]:
        """Every reason why this layer cannot be measured."""
        reasons = []
        if self.attn_type != AttentionType.DECODER:
            reasons.append(f"a layer attends as '{self.attn_type}', not as a causal decoder")
        if self.num_heads != recorder.mass.shape[3]:
            reasons.append(f"a layer has {self.num_heads} heads and the model {recorder.mass.shape[3]}")
        return reasons

    @property
    def window(self) -> int | None:
        """The keys a query sees at most, itself included; None for all of them."""
        window = self.sliding_window
        size = window[0] + 1 if isinstance(window, tuple) else window
        return size if size > 0 else None

    def attention_options(self) -> dict[str, Any]:
        """Arguments of headrift's kernels that are this layer's, whichever kernel is called."""
        return {
            "scale": self.scale,
            "window": self.window,
            "softcap": self.logits_soft_cap,
            "alibi_slopes": self.alibi_slopes,
            "sinks": self.sinks_float32,
        }


class MeasuringBuilder(AttentionMetadataBuilder):
    """Mixin before an `AttentionMetadataBuilder`: plans once a step what the forward passes of its layers measure.

    It adds to vLLM's metadata `measured`, the backend's own plan (None: attend as the parent does), `layer_plans`, the
    instruments' plans, and `batch_block_table`, the block table of the whole batch.
    """

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.recorder = Recorder.for_engine(vllm_config)
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

        parent, recorder, common, measured = super().build, self.recorder, common_attn_metadata, None
        if recorder is None:
            metadata = build(common)
        else:
            if recorder.publisher is self:
                recorder.publish(batch_rows(common), common.seq_lens)
                recorder.plan_layers(common)
            if not recorder.step_is_real:
                # A made-up batch precedes every capture of a graph, in which a kernel's first launch is not permitted.
                self.warm_up()
            if self.capturing or recorder.probed:
                metadata, measured = self.plan(recorder, common, build)
            else:
                metadata = build(common)
        metadata.measured = measured
        metadata.layer_plans = recorder.layer_plans if recorder is not None else ()
        # The parent's own block table may be of a part of the batch.
        metadata.batch_block_table = common.block_table_tensor
        return metadata

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        # A graph is captured with our kernels in it; which rows they measure is read from the device at each replay.
        self.capturing = True
        try:
            return super().build_for_cudagraph_capture(common_attn_metadata)
        finally:
            self.capturing = False

    def warm_up(self) -> None:
        """Launch every kernel that steps of this builder's layers may launch, so that none is compiled during a job.

        Does nothing before the KV cache exists, the second time, and if kernels are not compiled at their first launch.
        """

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: AttentionSpec) -> AttentionCGSupport:
        """Whole-step graphs for decode steps only: how a mixed step is split is decided on the host, and so is, in
        every step, what instruments do in the layers."""
        support = super().get_cudagraph_support(vllm_config, kv_cache_spec)
        settings = settings_of(vllm_config)
        if settings is None:
            return support
        options = parse_config(settings).options
        if any(kind.in_layers and kind.is_on(options) for kind in instrument_types()):
            return AttentionCGSupport.NEVER
        return min(support, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE, key=lambda s: s.value)

    def plan(
        self,
        recorder: Recorder,
        common: CommonAttentionMetadata,
        build: Callable[[CommonAttentionMetadata], Any],
    ) -> tuple[Any, Any]:
        """Metadata of a step with probed requests, and what its forward passes measure and how.

        Args:
            common: vLLM's description of the whole batch.
            build: makes the parent's metadata of a batch, or of a part of one that the parent is to attend for.

        Returns:
            The parent's metadata, and the plan that `forward` finds as `metadata.measured` (None: nothing is measured).
        """
        raise NotImplementedError
