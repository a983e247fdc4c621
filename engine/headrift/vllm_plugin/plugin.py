"""The vLLM plugin: what is registered, when, and what is refused.

vLLM loads this module in every process it starts, so it imports nothing but the standard library until it is asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import UserDict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SWITCH = "HEADRIFT"
VLLM_VERSION = "0.32."
# Which of our backends attends, told to every process of the engine.
BACKEND = "HEADRIFT_ATTENTION_BACKEND"
BACKENDS = {
    "cpu": "headrift.vllm_plugin.backends.cpu.CPUMassBackend",
    "triton": "headrift.vllm_plugin.backends.gpu.TritonMassBackend",
    "flash": "headrift.vllm_plugin.backends.gpu.FlashMassBackend",
}
# vLLM's names of the backends that ours take the place of on a GPU.
STOCK_BACKENDS = {"triton": "TRITON_ATTN", "flash": "FLASH_ATTN"}
# Engine arguments on a CPU, see `cpu_patches`: norms, for which vLLM adds its own implementation at the end, and cached
# prefixes that may end with any token.
CPU_ARGS = {
    "ir_op_priority": {"rms_norm": ["headrift"], "fused_add_rms_norm": ["headrift"]},
    "prefix_match_unit": 1,
}
# What vLLM calls in a worker; the logits processors are those of model runner V1 and V2.
WORKER_EXTENSION = "headrift.vllm_plugin.worker.WorkerExtension"
LOGITS_PROCESSORS = ("headrift.vllm_plugin.worker:RowsV1", "headrift.vllm_plugin.worker:RowsV2")


def register() -> None:
    """Entry point of `vllm.general_plugins`: put our backends in place when HEADRIFT=1, else do nothing at all."""
    if os.environ.get(SWITCH) != "1":
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    backend = os.environ.get(BACKEND, "cpu")
    register_backend(AttentionBackendEnum.CPU_ATTN, BACKENDS[backend])
    for ours, stock in STOCK_BACKENDS.items():
        register_backend(AttentionBackendEnum[stock], BACKENDS[ours])
    if backend == "cpu":
        from headrift.vllm_plugin import cpu_patches

        cpu_patches.register()


def backend_for(requested: str, gpu: bool) -> str:
    """Name of the backend to attend with; ValueError if there is none of the requested name on this machine.

    `auto` on a GPU is flash, which `flash_misfits` may rule out. For tests Triton's interpreter runs 'triton' and
    'flash' on a CPU, slowly.
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
    has_sink = model.hf_text_config.model_type == "gpt_oss"  # FlashAttention does not take sinks on every GPU
    # Some models have layers with larger heads than the others.
    head_sizes = {model.get_head_size(), getattr(model.hf_text_config, "global_head_dim", None)} - {None}
    with set_current_vllm_config(config):  # which may ask for another version
        # As the layers will ask.
        options = {"has_sinks": has_sink, "supports_fa4_hd256": True}
        versions = {get_flash_attn_version(head_size=size, **options) for size in head_sizes}
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
        reasons += reasons_of(*flash_conditions(version, cache.cache_dtype))
    return list(dict.fromkeys(reasons))


def flash_conditions(version: int | None, cache_dtype: str) -> tuple[tuple[bool, str], ...]:
    """Reasons not to measure with a FlashAttention version and KV cache, of a model or a layer, and which apply."""
    from vllm.utils.torch_utils import is_quantized_kv_cache

    return (
        (version not in (None, 2, 3), f"FlashAttention {version}, whose KV layout headrift has not been tried with"),
        (is_quantized_kv_cache(cache_dtype), f"an {cache_dtype} KV cache, with which FlashAttention takes fp8 queries"),
    )


def reasons_of(*conditions: tuple[bool, str]) -> list[str]:
    """The reasons that apply."""
    return [reason for is_so, reason in conditions if is_so]


def replaces_flashinfer(capability: tuple[int, int] | None) -> str | None:
    """Notice for GPUs on which vLLM by itself would attend with FlashInfer: compute capability 10 (Blackwell)."""
    if capability is None or capability[0] != 10:
        return None
    return "vLLM would attend with FlashInfer on this GPU, which keeps no masses; headrift's backend takes its place"


def refusals(config: VllmConfig) -> list[str]:
    """Every reason why this engine cannot be measured exactly; empty when it can."""
    from vllm import __version__ as version
    from vllm.platforms import current_platform

    model, parallel = config.model_config, config.parallel_config
    chunks = getattr(model.hf_text_config, "attention_chunk_size", None)
    no_attention = model.is_hybrid or model.is_attention_free or model.has_inner_state
    of_model = reasons_of(
        (model.runner_type != "generate", "it is not a text generation model"),
        (model.use_mla, "it uses multi-head latent attention (MLA), whose cache has no keys per head"),
        (model.is_encoder_decoder, "it has an encoder, whose attention is not causal"),
        (no_attention, "it has layers without attention (mamba or another state space layer)"),
        (model.is_mm_prefix_lm, "it attends parts of the prompt in both directions (prefix LM)"),
        (model.rswa_window is not None, "its sliding window spares a prefix (reference sliding window)"),
        (bool(chunks), "it attends in chunks (attention_chunk_size), neither full nor sliding-window"),
    )
    pipeline, sharded = parallel.pipeline_parallel_size, parallel.enable_batch_sharded_sampling
    executor, fast_prefill = parallel.distributed_executor_backend, config.cache_config.kv_sharing_fast_prefill
    context = max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size)
    of_engine = reasons_of(
        (config.speculative_config is not None, "speculative decoding guesses several positions in one pass; drop it"),
        (pipeline > 1, "pipeline parallelism has not run on hardware yet; use pipeline_parallel_size=1"),
        (
            executor not in ("uni", "mp"),
            f"distributed_executor_backend={executor!r} starts workers that {SWITCH}=1 of this process does not reach; "
            "use 'mp'",
        ),
        (context > 1, "context parallelism gives a rank a part of the keys only; use sizes of 1"),
        (parallel.data_parallel_size > 1, "data parallelism inside one engine; start one Scorer per device instead"),
        (parallel.enable_dbo, "dual-batch overlap runs one step as two half batches; drop enable_dbo"),
        (
            sharded,
            "batch-sharded sampling gives a rank the logits of some rows only; drop enable_batch_sharded_sampling",
        ),
        (fast_prefill, "KV-sharing fast prefill skips prompt queries in some layers; drop it"),
    )
    of_platform = _cpu_refusals(config) if current_platform.is_cpu() else _gpu_refusals(config)
    installed = f"vLLM {version} is installed and headrift is proved on {VLLM_VERSION}x; install that version"
    of_version = reasons_of((not version.startswith(VLLM_VERSION), installed))
    return [*of_version, *(f"the model {model.model}: {reason}" for reason in of_model), *of_engine, *of_platform]


def _gpu_refusals(config: VllmConfig) -> list[str]:
    from vllm.platforms import current_platform

    attention = config.attention_config
    name = "chosen by vLLM" if attention.backend is None else attention.backend.name
    return reasons_of(
        (
            not current_platform.is_cuda_alike(),
            f"{current_platform.device_name}: only NVIDIA and AMD GPUs and x86-64 CPUs are measured",
        ),
        (
            name not in STOCK_BACKENDS.values(),
            f"the attention backend is {name}: use 'triton' or 'flash', which headrift has its own of",
        ),
        (
            bool(attention.backend_per_kind),
            "attention backends by kind of layer (backend_per_kind): leave them out, one measures all layers",
        ),
    )


def _cpu_refusals(config: VllmConfig) -> list[str]:
    import torch
    from vllm.platforms import CpuArchEnum, current_platform

    dtype, cache_dtype = config.model_config.dtype, config.cache_config.cache_dtype
    if os.environ.get(BACKEND, "cpu") != "cpu":
        rounding = f"{dtype} in Triton's interpreter, which rounds it wrongly: use dtype float32"
        return reasons_of((dtype != torch.float32, rounding))
    architecture = current_platform.get_cpu_architecture()
    return reasons_of(
        (
            architecture != CpuArchEnum.X86,
            f"{architecture.name} processors keep keys in a layout headrift does not read; use an x86-64 machine",
        ),
        (dtype == torch.float16, "float16 on a CPU: use dtype float32 or bfloat16"),
        (
            dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported(),
            "bfloat16 on a processor with AMX, where vLLM packs keys in another layout: use dtype float32",
        ),
        (
            cache_dtype not in ("auto", "bfloat16", "float32"),
            f"a {cache_dtype} KV cache on a CPU: leave kv_cache_dtype at auto",
        ),
    )


class AdditionalConfig(UserDict):
    """vLLM's `additional_config` of a probed engine.

    vLLM hashes it into the name of the compiled model. What is recorded does not change the model, so that another
    number of steps or slots need not compile it again.
    """

    def compute_hash(self) -> str:
        hashed = {**self.data, "headrift": "headrift" in self.data}
        return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()


def settings_of(config: VllmConfig) -> dict[str, Any] | None:
    """The `additional_config={"headrift": {...}}` of this engine, or None if it is not to be probed."""
    additional = config.additional_config
    return additional.get("headrift") if isinstance(additional, (dict, AdditionalConfig)) else None
