"""The vLLM plugin: what is registered, when, and what is refused.

vLLM loads this module in every process it starts, so it imports nothing but the standard library until it is asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SWITCH = "HEADRIFT"
VLLM_VERSION = "0.32."
# Which of our backends attends, told to every process of the engine.
BACKEND = "HEADRIFT_ATTENTION_BACKEND"
BACKENDS = {
    "cpu": "headrift.vllm_plugin.backends.cpu.CPUMassBackend",
    "triton": "headrift.vllm_plugin.backends.triton.TritonMassBackend",
    "flash": "headrift.vllm_plugin.backends.flash.FlashMassBackend",
}
# vLLM's names of the backends that ours take the place of on a GPU.
STOCK_BACKENDS = {"triton": "TRITON_ATTN", "flash": "FLASH_ATTN"}
# Model types with attention sinks, which FlashAttention does not take on every GPU.
SINK_MODELS = ("gpt_oss",)
# Engine arguments on a CPU, see `cpu_patches`: norms, for which vLLM adds its own implementation at the end, and cached
# prefixes that may end with any token.
CPU_ARGS = {
    "ir_op_priority": {"rms_norm": ["headrift"], "fused_add_rms_norm": ["headrift"]},
    "prefix_match_unit": 1,
}
WORKER_EXTENSION = "headrift.vllm_plugin.drain.WorkerExtension"


def register() -> None:
    """Entry point of `vllm.general_plugins`: put our backends in place when HEADRIFT=1, else do nothing at all."""
    if os.environ.get(SWITCH) != "1":
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CPU_ATTN, BACKENDS[os.environ.get(BACKEND, "cpu")])
    for ours, stock in STOCK_BACKENDS.items():
        register_backend(AttentionBackendEnum[stock], BACKENDS[ours])
    if os.environ.get(BACKEND, "cpu") == "cpu":
        from headrift.vllm_plugin import cpu_patches

        cpu_patches.register()


def backend_for(requested: str, gpu: bool) -> str:
    """Name of the backend to attend with.

    Args:
        requested: auto, cpu, triton or flash.
        gpu: whether vLLM is a build for GPUs. Triton's interpreter runs the backend 'triton' or 'flash' on a CPU,
            slowly; their tests use that.

    Returns:
        cpu, triton or flash. For auto on a GPU: flash, which `flash_misfits` may rule out once the model is known.

    Raises:
        ValueError: there is no backend of that name on this machine.
    """
    if requested not in ("auto", *BACKENDS):
        raise ValueError(f"there is no attention backend '{requested}'; choose auto, {', '.join(BACKENDS)}")
    if requested == "auto":
        return "flash" if gpu else "cpu"
    if gpu and requested == "cpu":
        raise ValueError("the attention backend 'cpu' is for vLLM's CPU build; choose auto, triton or flash")
    if not gpu and requested != "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"the attention backend '{requested}' needs a GPU, and this is vLLM's CPU build; choose auto")
    return requested


def flash_misfits(config: VllmConfig) -> list[str]:
    """Reasons why FlashAttention cannot attend for this model on this GPU; empty if it can."""
    from vllm.config import set_current_vllm_config
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

    if not current_platform.is_cuda():
        return ["FlashAttention in vLLM is for NVIDIA GPUs"]
    model, cache = config.model_config, config.cache_config
    has_sink = model.hf_text_config.model_type in SINK_MODELS
    # Some models have layers with larger heads than the others.
    head_sizes = {model.get_head_size(), getattr(model.hf_text_config, "global_head_dim", None)} - {None}
    with set_current_vllm_config(config):  # which may ask for another version
        # As the layers will ask.
        versions = {
            get_flash_attn_version(head_size=size, has_sinks=has_sink, supports_fa4_hd256=True) for size in head_sizes
        }
        reasons = FlashAttentionBackend.validate_configuration(
            head_size=model.get_head_size(),
            dtype=model.dtype,
            kv_cache_dtype=cache.cache_dtype,
            block_size=cache.block_size,
            use_mla=model.use_mla,
            has_sink=has_sink,
            use_sparse=False,
            use_mm_prefix=model.is_mm_prefix_lm,
            use_per_head_quant_scales=False,
            device_capability=current_platform.get_device_capability(),
            attn_type="decoder",
        )
    if None in versions:
        reasons.append("vLLM has no FlashAttention for it")
    for version in versions:
        reasons += [reason for reason in flash_reasons(version, cache.cache_dtype) if reason not in reasons]
    return reasons


def flash_reasons(version: int | None, cache_dtype: str) -> list[str]:
    """Reasons why headrift does not measure with this FlashAttention version and KV cache, for a model or a layer."""
    from vllm.utils.torch_utils import is_quantized_kv_cache

    conditions = (
        (version not in (None, 2, 3), f"FlashAttention {version}, whose KV layout headrift has not been tried with"),
        (is_quantized_kv_cache(cache_dtype), f"an {cache_dtype} KV cache, with which FlashAttention takes fp8 queries"),
    )
    return [reason for is_so, reason in conditions if is_so]


def replaces_flashinfer(capability: tuple[int, int] | None) -> str | None:
    """Notice for GPUs on which vLLM by itself would attend with FlashInfer: compute capability 10 (Blackwell)."""
    if capability is None or capability[0] != 10:
        return None
    return (
        "vLLM would attend with FlashInfer on this GPU, which keeps no masses; headrift's own attention backend takes "
        "its place"
    )


def rows_processor(vllm_config_uses_v2: bool) -> str:
    """The logits processor that learns which batch row carries which request, as vLLM wants it named."""
    return f"headrift.vllm_plugin.row_map:{'RowsV2' if vllm_config_uses_v2 else 'RowsV1'}"


def refusals(config: VllmConfig) -> list[str]:
    """Every reason why this engine cannot be measured exactly; empty when it can."""
    import vllm

    reasons = []
    if not vllm.__version__.startswith(VLLM_VERSION):
        reasons.append(
            f"vLLM {vllm.__version__} is installed and headrift is proved on {VLLM_VERSION}x; install that version"
        )
    reasons += _model_refusals(config)
    reasons += _engine_refusals(config)
    reasons += _platform_refusals(config)
    return reasons


def _model_refusals(config: VllmConfig) -> list[str]:
    model = config.model_config
    chunks = getattr(model.hf_text_config, "attention_chunk_size", None)
    conditions = (
        (model.runner_type != "generate", "it is not a text generation model"),
        (model.use_mla, "it uses multi-head latent attention (MLA), whose cache has no keys per head"),
        (model.is_encoder_decoder, "it has an encoder, whose attention is not causal"),
        (
            model.is_hybrid or model.is_attention_free or model.has_inner_state,
            "it has layers without attention (mamba or another state space layer)",
        ),
        (model.is_mm_prefix_lm, "it attends parts of the prompt in both directions (prefix LM)"),
        (model.rswa_window is not None, "its sliding window spares a prefix (reference sliding window)"),
        (bool(chunks), "it attends in chunks (attention_chunk_size), neither full nor sliding-window"),
    )
    return [f"the model {model.model}: {reason}" for is_so, reason in conditions if is_so]


def _engine_refusals(config: VllmConfig) -> list[str]:
    parallel, cache = config.parallel_config, config.cache_config
    context_parallel = max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size)
    conditions = (
        (config.speculative_config is not None, "speculative decoding guesses several positions in one pass; drop it"),
        (
            parallel.pipeline_parallel_size > 1,
            "pipeline parallelism has not run on hardware yet; use pipeline_parallel_size=1",
        ),
        (
            parallel.distributed_executor_backend not in ("uni", "mp"),
            f"distributed_executor_backend={parallel.distributed_executor_backend!r} starts workers that "
            f"{SWITCH}=1 of this process does not reach; use 'mp'",
        ),
        (context_parallel > 1, "context parallelism gives a rank a part of the keys only; use sizes of 1"),
        (parallel.data_parallel_size > 1, "data parallelism inside one engine; start one Scorer per device instead"),
        (parallel.enable_dbo, "dual-batch overlap runs one step as two half batches; drop enable_dbo"),
        (
            parallel.enable_batch_sharded_sampling,
            "batch-sharded sampling gives a rank the logits of some rows only; drop enable_batch_sharded_sampling",
        ),
        (cache.kv_sharing_fast_prefill, "KV-sharing fast prefill skips prompt queries in some layers; drop it"),
    )
    return [reason for is_so, reason in conditions if is_so]


def _platform_refusals(config: VllmConfig) -> list[str]:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return _gpu_refusals(config)
    if os.environ.get(BACKEND, "cpu") != "cpu":
        return _interpreter_refusals(config)
    return _cpu_refusals(config)


def _gpu_refusals(config: VllmConfig) -> list[str]:
    from vllm.platforms import current_platform

    attention = config.attention_config
    reasons = []
    if not current_platform.is_cuda_alike():
        reasons.append(f"{current_platform.device_name}: only NVIDIA and AMD GPUs and x86-64 CPUs are measured")
    if attention.backend is None or attention.backend.name not in STOCK_BACKENDS.values():
        name = "chosen by vLLM" if attention.backend is None else attention.backend.name
        reasons.append(f"the attention backend is {name}: use 'triton' or 'flash', which headrift has its own of")
    if attention.backend_per_kind:
        reasons.append(
            "attention backends by kind of layer (backend_per_kind): leave them out, one measures all layers"
        )
    return reasons


def _interpreter_refusals(config: VllmConfig) -> list[str]:
    import torch

    if config.model_config.dtype != torch.float32:
        return [f"{config.model_config.dtype} in Triton's interpreter, which rounds it wrongly: use dtype float32"]
    return []


def _cpu_refusals(config: VllmConfig) -> list[str]:
    import torch
    from vllm.platforms import CpuArchEnum, current_platform

    reasons = []
    architecture = current_platform.get_cpu_architecture()
    if architecture != CpuArchEnum.X86:
        reasons.append(
            f"{architecture.name} processors keep keys in a layout headrift does not read; use an x86-64 machine"
        )
    dtype = config.model_config.dtype
    if dtype == torch.float16:
        reasons.append("float16 on a CPU: use dtype float32 or bfloat16")
    if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        reasons.append("bfloat16 on a processor with AMX, where vLLM packs keys in another layout: use dtype float32")
    if config.cache_config.cache_dtype not in ("auto", "bfloat16", "float32"):
        reasons.append(f"a {config.cache_config.cache_dtype} KV cache on a CPU: leave kv_cache_dtype at auto")
    return reasons


class AdditionalConfig:
    """vLLM's `additional_config` of a probed engine.

    vLLM hashes this config into the name of the compiled model. What is recorded does not change the model, so that
    another number of steps or slots need not compile it again.
    """

    def __init__(self, values: Mapping[str, Any]):
        self.values = dict(values)

    def get(self, name: str, default: Any = None) -> Any:
        return self.values.get(name, default)

    def compute_hash(self) -> str:
        hashed = {**self.values, "headrift": "headrift" in self.values}
        return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()


def settings_of(config: VllmConfig) -> dict[str, Any] | None:
    """The `additional_config={"headrift": {...}}` of this engine, or None if it is not to be probed."""
    additional = config.additional_config
    return additional.get("headrift") if isinstance(additional, (dict, AdditionalConfig)) else None
