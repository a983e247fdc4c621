"""What headrift relies on in vLLM, one test an interface, so that a new vLLM fails here, loudly and by name."""

import dataclasses
import inspect

import pytest
import torch
import vllm
from vllm import SamplingParams
from vllm import _custom_ops as ops
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.inputs import TokensPrompt
from vllm.outputs import RequestOutput
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as V1Processor
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as GPUModelRunnerV2
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as V2Processor
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from headrift.vllm_plugin import plugin
from headrift.vllm_plugin.backends.cpu import PACKED_ISAS


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_version():
    assert vllm.__version__.startswith(plugin.VLLM_VERSION)


def test_cpu_impl_forward_takes_what_ours_takes():
    expected = ["self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output", "output_scale"]
    assert parameters(cpu_attn.CPUAttentionBackendImpl.forward) == [*expected, "output_block_scale"]


def test_cpu_impl_writes_kv_before_forward_is_called():
    assert cpu_attn.CPUAttentionBackend.forward_includes_kv_cache_update is False
    assert hasattr(cpu_attn.CPUAttentionBackendImpl, "do_kv_cache_update")


def test_cpu_impl_attributes():
    source = inspect.getsource(cpu_attn.CPUAttentionBackendImpl.__init__)
    for name in ("scale", "sliding_window", "logits_soft_cap", "alibi_slopes", "sinks", "head_size", "attn_type"):
        assert f"self.{name} = " in source, name


def test_cpu_builder_build_and_metadata():
    assert parameters(cpu_attn.CPUAttentionMetadataBuilder.build) == [
        "self",
        "common_prefix_len",
        "common_attn_metadata",
        "fast_build",
    ]
    fields = {f.name for f in dataclasses.fields(cpu_attn.CPUAttentionMetadata)}
    assert {"block_table", "query_start_loc", "seq_lens"} <= fields
    common = {f.name for f in dataclasses.fields(CommonAttentionMetadata)}
    assert {"num_reqs", "seq_lens", "req_idx"} <= common


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("isa", "block_size", "head_dim"),
    [("vec", 32, 64), ("vec", 64, 128), ("vec", 128, 96), ("vec", 32, 256), ("vec16", 32, 80), ("vec16", 64, 112)],
)
def test_keys_are_packed_as_head_dim_by_block_size(isa, dtype, block_size, head_dim):
    """What vLLM writes with its own operation is read back in the layout our kernel assumes."""
    assert isa in PACKED_ISAS
    blocks, kv_heads, tokens = 3, 2, block_size + 7
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(tokens, kv_heads, head_dim, generator=generator).to(dtype) for _ in range(2))
    cache = torch.zeros(blocks, kv_heads, block_size, 2 * head_dim, dtype=dtype)
    k_half, v_half = cache.view(blocks, kv_heads, 2 * block_size, head_dim).chunk(2, dim=2)
    slots = torch.arange(block_size, block_size + tokens)
    ops.cpu_attn_reshape_and_cache(
        key, value, k_half, v_half, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
    )
    halves = cache.reshape(blocks, kv_heads, 2, head_dim * block_size)[1:]
    keys = halves[:, :, 0].reshape(-1, kv_heads, head_dim, block_size).permute(0, 3, 1, 2)
    values = halves[:, :, 1].reshape(-1, kv_heads, block_size, head_dim).permute(0, 2, 1, 3)
    assert torch.equal(keys.reshape(-1, kv_heads, head_dim)[:tokens], key)
    assert torch.equal(values.reshape(-1, kv_heads, head_dim)[:tokens], value)


def test_a_backend_can_be_replaced_by_name(monkeypatch):
    assert parameters(register_backend)[:2] == ["backend", "class_path"]
    monkeypatch.setenv(plugin.SWITCH, "1")
    plugin.register()
    assert AttentionBackendEnum.CPU_ATTN.get_class().__name__ == "CPUMassBackend"


def test_v1_logits_processor_interface():
    for method in ("validate_params", "update_state", "apply", "is_argmax_invariant"):
        assert hasattr(V1Processor, method), method
    assert parameters(V1Processor.__init__) == ["self", "vllm_config", "device", "is_pin_memory"]
    assert {f.name for f in dataclasses.fields(BatchUpdate)} == {"batch_size", "removed", "added", "moved"}
    assert {m.name for m in MoveDirectionality} == {"UNIDIRECTIONAL", "SWAP"}


def test_v2_logits_processor_interface():
    assert parameters(V2Processor.__init__) == ["self", "vllm_config", "req_states"]
    assert parameters(V2Processor.add_request) == ["self", "req_idx", "sampling_params"]
    assert parameters(V2Processor.apply) == ["self", "logits", "ctx"]
    assert {"expanded_idx_mapping", "pos"} <= {f.name for f in dataclasses.fields(LogitsContext)}


def test_both_runners_take_logits_of_the_batchs_rows_from_the_models_own_method():
    """The last hidden states that hidden_states.py keeps are what `compute_logits` is given."""
    v1, v2 = (inspect.getsource(f) for f in (GPUModelRunner.execute_model, GPUModelRunnerV2.sample))
    assert "logits = self.model.compute_logits(sample_hidden_states)" in v1
    assert "logits = self.model.compute_logits(sample_hidden_states)" in v2
    assert hasattr(Worker, "get_model")


def test_engine_settings_and_instance_id():
    fields = {f.name for f in dataclasses.fields(EngineArgs)}
    assert {"additional_config", "worker_extension_cls", "logits_processors", "kv_cache_memory_bytes"} <= fields
    assert isinstance(inspect.getattr_static(VllmConfig, "use_v2_model_runner"), property)
    assert "instance_id" in {f.name for f in dataclasses.fields(VllmConfig)}


def test_where_hits_inside_a_block_are_put_together():
    """What cpu_patches.py replaces, and the parts of vLLM's that it relies on."""
    assert "resolve_kv_cache_block_sizes(" in inspect.getsource(EngineCore.__init__)
    assert "get_kv_cache_coordinator(" in inspect.getsource(KVCacheManager.__init__)
    assert FullAttentionManager.supports_fine_grained_hash_lookup
    assert "_cache_partial_tail_block" in inspect.getsource(FullAttentionManager.cache_blocks)
    assert "copy_kv_cache_blocks_inplace(" in inspect.getsource(GPUModelRunner._update_states)
    assert "prefix_match_unit" in {f.name for f in dataclasses.fields(EngineArgs)}


def test_llm_engine_methods():
    for name in ("add_request", "step", "abort_request", "collective_rpc", "from_vllm_config", "reset_prefix_cache"):
        assert hasattr(LLMEngine, name), name
    assert "num_cached_tokens" in parameters(RequestOutput.__init__)


def test_sampling_params_carry_extra_args_and_can_skip_cached_prefixes():
    params = SamplingParams(extra_args={"headrift": {"slot": 1}}, skip_reading_prefix_cache=True)
    assert params.clone().extra_args == {"headrift": {"slot": 1}}
    assert params.skip_reading_prefix_cache is True


def test_a_prompt_can_have_a_part_of_the_prefix_cache_of_its_own():
    assert "cache_salt" in TokensPrompt.__annotations__


def test_scheduler_preempts_by_the_method_the_tests_watch():
    assert hasattr(Scheduler, "_preempt_request")


def test_cpu_attention_window_means_distance_below_it(assert_within_units):
    """Our kernel's window is vLLM's: a query attends the keys at distance < window."""
    from headrift_kernels import reference

    head_dim, block_size, n, window = 32, 32, 40, 7
    generator = torch.Generator().manual_seed(1)
    key, value = (torch.randn(n, 1, head_dim, generator=generator) for _ in range(2))
    query = torch.randn(1, 1, head_dim, generator=generator)
    cache = torch.zeros(2, 1, block_size, 2 * head_dim)
    k_half, v_half = cache.view(2, 1, 2 * block_size, head_dim).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(
        key, value, k_half, v_half, torch.arange(n), "vec", k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
    )
    seq_lens, start = torch.tensor([n], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    plan = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=head_dim,
        seq_lens=seq_lens,
        dtype=torch.float32,
        query_start_loc=start,
        causal=True,
        sliding_window_size=window,
        isa="vec",
        enable_kv_split=True,
        dynamic_causal=None,
        kv_cache_dtype="auto",
    )
    output = torch.empty(1, 1, head_dim)
    ops.cpu_attention_with_kv_cache(
        query=query,
        key_cache=k_half,
        value_cache=v_half,
        output=output,
        query_start_loc=start,
        seq_lens=seq_lens,
        scale=0.2,
        causal=True,
        alibi_slopes=None,
        sliding_window=window,
        block_table=torch.tensor([[0, 1]], dtype=torch.int32),
        softcap=0.0,
        scheduler_metadata=plan,
        s_aux=None,
        dynamic_causal=None,
        k_scale=1.0,
        v_scale=1.0,
        kv_cache_dtype="auto",
    )
    expected = reference.attend(query[0], key, value, scale=0.2, window=window).output
    # Sums of some 40 products, and of products of 32 within the exponents.
    assert_within_units(output[0], expected.float(), 64)
