"""vLLM's attention backends, subclassed: which requests of a step are measured, and where their numbers go.

A module of this package mixes these classes in before vLLM's own backend, builder and implementation, and adds what is
particular to it. All layers of an engine share one recorder; if a model has several KV cache groups (full and sliding
layers), the first group's builder publishes the step for all.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention import backend as vllm_backend
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec

from headrift.errors import RefusedError
from headrift.vllm_plugin.instruments import Attended, instrument_types, parse_config
from headrift.vllm_plugin.plugin import reasons_of, settings_of
from headrift.vllm_plugin.recorder import Recorder
from headrift.vllm_plugin.worker import batch_rows


class MeasuringBackend(vllm_backend.AttentionBackend):
    """Mixin before an `AttentionBackend`; without `additional_config["headrift"]` an engine has the parent."""

    impl: ClassVar[type[vllm_backend.AttentionImpl]]
    builder: ClassVar[type[vllm_backend.AttentionMetadataBuilder]]

    @classmethod
    def get_impl_cls(cls) -> type[vllm_backend.AttentionImpl]:
        return cls.impl

    @classmethod
    def get_builder_cls(cls) -> type[vllm_backend.AttentionMetadataBuilder]:
        return cls.builder


class MeasuringImpl(vllm_backend.AttentionImpl):
    """Mixin before an `AttentionImpl`: attention that is measured, and that instruments may read or change.

    A backend writes `attend`, its attention in a measured step; in all others the parent attends.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.layer_index = -1
        self.sinks_float32: Tensor | None = None
        self.recorder = Recorder.for_engine(get_current_vllm_config())
        if self.recorder is None:
            return
        self.recorder.sinks |= self.sinks is not None
        kind, heads = self.attn_type, len(self.recorder.place.heads)
        causal = kind == vllm_backend.AttentionType.DECODER
        conditions = (
            (not causal, f"a layer attends as '{kind}', not as a causal decoder"),
            (self.num_heads != heads, f"a layer has {self.num_heads} heads and the model {heads}"),
        )
        if reasons := reasons_of(*conditions, *self.refusals()):
            raise RefusedError(reasons)

    def refusals(self) -> tuple[tuple[bool, str], ...]:
        """Further reasons not to measure this layer, and whether each applies."""
        return ()

    def forward(
        self,
        layer: vllm_backend.AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        **scales: Any,
    ) -> Tensor:
        """Attend, with what the instruments planned for this step before and after it."""
        plans, step = getattr(attn_metadata, "layer_plans", ()), getattr(attn_metadata, "measured", None)
        for instrument, plan in plans:
            query = instrument.before_attention(plan, self.layer_index, query)
        if step is None:
            super().forward(layer, query, key, value, kv_cache, attn_metadata, output, **scales)
        else:
            self.attend(step, layer, (query, key, value), kv_cache, attn_metadata, output)
        if plans:
            attended = Attended(self, layer, query, kv_cache, attn_metadata.batch_block_table, output)
            for instrument, plan in plans:
                instrument.after_attention(plan, attended)
        return output

    def attend(self, step: Any, *args: Any) -> None:
        """Attend as `forward` does, in a step whose `plan` is this, and write its masses."""
        raise NotImplementedError

    def attend_as_parent(self, *args: Any) -> None:
        super().forward(*args)

    def forget_cache(self) -> None:
        """Drop what is kept of the layer's KV cache: vLLM is about to allocate another."""

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


class MeasuringBuilder(vllm_backend.AttentionMetadataBuilder):
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
        build = partial(super().build, common_prefix_len, fast_build=fast_build)
        recorder, common = self.recorder, common_attn_metadata
        if recorder is not None and recorder.publisher is self:
            recorder.publish(batch_rows(common), common.seq_lens)
            recorder.plan_layers(common)
        if recorder is not None and not recorder.step_is_real:
            # A made-up batch precedes every capture of a graph, in which a kernel's first launch is not permitted.
            self.warm_up()
        if recorder is not None and (self.capturing or recorder.probed):
            metadata, measured = self.plan(recorder, common, build)
        else:
            metadata, measured = build(common), None
        metadata.measured = measured
        metadata.layer_plans = () if recorder is None else recorder.layer_plans
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
        """Launch every kernel that steps of this builder's layers may launch, so that none is compiled during a job;
        does nothing before the KV cache exists and the second time."""

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: AttentionSpec
    ) -> vllm_backend.AttentionCGSupport:
        """Whole-step graphs for decode steps only: how a mixed step is split is decided on the host, and so is, in
        every step, what instruments do in the layers."""
        support = super().get_cudagraph_support(vllm_config, kv_cache_spec)
        settings = settings_of(vllm_config)
        if settings is None:
            return support
        options = parse_config(settings).options
        if any(kind.in_layers and kind.is_on(options) for kind in instrument_types()):
            return vllm_backend.AttentionCGSupport.NEVER
        return min(support, vllm_backend.AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE, key=lambda s: s.value)

    def plan(
        self, recorder: Recorder, common: CommonAttentionMetadata, build: Callable[[CommonAttentionMetadata], Any]
    ) -> tuple[Any, Any]:
        """The parent's metadata of a step with probed requests, and what `forward` measures and how (None: nothing).

        `build` makes the parent's metadata of a batch, or of a part of one that the parent is to attend for.
        """
        raise NotImplementedError


def rows_from(common: CommonAttentionMetadata, first: int, end: int | None = None) -> CommonAttentionMetadata:
    """The rows first..end-1 of a batch (default: to its last): what the parent attends for.

    What the device reads are copies: at an odd offset into the batch's own tensors Triton would compile vLLM's kernel
    again. What only the host would read is left out.
    """
    if first == 0 and end in (None, common.num_reqs):
        return common
    part, starts = copy(common), common.query_start_loc_cpu
    start, stop = int(starts[first]), None if end is None else int(starts[end])
    part.query_start_loc = common.query_start_loc[first : None if end is None else end + 1] - start
    part.seq_lens = common.seq_lens[first:end].clone()
    part.block_table_tensor = common.block_table_tensor[first:end].clone()
    part.slot_mapping = common.slot_mapping[start:stop]
    part.num_reqs = (common.num_reqs if end is None else end) - first
    part.num_actual_tokens = (common.num_actual_tokens if stop is None else stop) - start
    part.query_start_loc_cpu = part.seq_lens_cpu_upper_bound = part.is_prefilling = part.req_idx = None
    part._num_computed_tokens_cache = part._token_to_req_indices_cache = None
    return part
