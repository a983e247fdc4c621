"""vLLM's GPU attention code on CPU tensors, in Triton's interpreter.

Everything that makes that work has to be in place before vLLM is imported, so these tests run in processes of their
own, which tests/engine/test_interpreted.py starts; any other pytest process passes this folder by. What is patched is
vLLM's and Triton's idea of the machine, nothing of headrift:

- Triton is told of a CPU "driver", so that vLLM takes its Triton code at all;
- a kernel of vLLM's asks for the GPU's compute capability;
- vLLM's kernel for top-k sampling does not interpret; greedy decoding does not need it.
"""

import os
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from headrift.probed_engine import ProbedEngine
from headrift_kernels import reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not INTERPRETED:
    collect_ignore_glob = ["test_*.py"]
else:
    runpy.run_path(str(Path(__file__).with_name("patches.py")))

    import vllm.v1.attention.backends.triton_attn as triton_attn
    import vllm.v1.sample.ops.topk_topp_sampler as topk_topp_sampler

    topk_topp_sampler.HAS_TRITON = False
    # vLLM's own kernel in one pass: split, as it would be for these small batches, it takes three times as long here.
    triton_attn.MIN_LAUNCH_GRID_SIZE_2D = 0


# KV blocks of 32 tokens: so few that requests are preempted (see test_parity.py).
BLOCKS = {"llama-3to1": 8, "llama-4to1": 8, "qwen3": 8, "mistral": 7, "gemma3": 14}


@pytest.fixture(scope="session")
def case() -> dict[str, str]:
    """What this process is to test: backend, runner, model and splits, from tests/engine/test_interpreted.py."""
    return dict(zip(("backend", "runner", "model", "splits"), os.environ["HEADRIFT_TEST_CASE"].split(), strict=True))


@pytest.fixture(scope="session")
def only_once(case) -> None:
    """For tests of what no model changes: one case of each runner takes them."""
    if (case["backend"], case["runner"], case["model"]) not in {
        ("triton", "v1", "gemma3"),
        ("flash", "v2", "llama-3to1"),
    }:
        pytest.skip("tested in another case")


@pytest.fixture(autouse=True, scope="session")
def _mended_interpreter():
    from tools.traffic import mended

    with mended():
        yield


@pytest.fixture(autouse=True, scope="session")
def _chunks_of_one_tile():
    """Rows of these tests are shorter than a chunk, and would never be split."""
    from headrift_kernels.triton import decode_mass

    tiles_for = decode_mass.tiles_for
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_mass, "tiles_for", lambda *sizes: replace(tiles_for(*sizes), chunk=1))
        yield


def flash_attention(q, k, v, *, out, cu_seqlens_q, seqused_k, softmax_scale, causal, window_size, block_table, **rest):
    """Stands in for `flash_attn_varlen_func`, which is compiled for GPUs only: what the oracle computes."""
    assert causal
    tensors = (q, k, v, out, cu_seqlens_q, seqused_k, block_table)  # a kernel reads what the host may not
    q, k, v, out, cu_seqlens_q, seqused_k, block_table = (tensor.as_subclass(torch.Tensor) for tensor in tensors)
    window = None if window_size is None or window_size[0] < 0 else window_size[0] + 1
    for row, keys in enumerate(seqused_k.tolist()):
        first, end = cu_seqlens_q[row : row + 2].tolist()
        for token in range(first, end):
            n = keys - (end - token) + 1
            k_row, v_row = (reference.paged_keys(half, block_table[row], n) for half in (k, v))
            how = {"scale": softmax_scale, "window": window, "softcap": rest["softcap"]}
            out[token] = reference.attend(q[token], k_row, v_row, **how).output.float()
    return out


@pytest.fixture(scope="session", autouse=True)
def _flash_attention_without_a_gpu(case):
    """FlashAttention itself, and for the other CUDA operation of its backend vLLM's own Triton kernel of that name."""
    if case["backend"] != "flash":
        yield
        return
    from vllm.v1.attention.backends import flash_attn
    from vllm.v1.attention.ops.triton_reshape_and_cache_flash import triton_reshape_and_cache_flash

    from headrift.vllm_plugin.backends.gpu import FlashMassImpl

    real_init = FlashMassImpl.__init__

    def init_as_version_3(self, *args, **kwargs):
        real_init(self, *args, **kwargs)
        self.vllm_flash_attn_version = 3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FlashMassImpl, "__init__", init_as_version_3)
        patch.setattr(flash_attn, "flash_attn_varlen_func", flash_attention, raising=False)
        patch.setattr(flash_attn, "reshape_and_cache_flash", triton_reshape_and_cache_flash, raising=False)
        yield


@pytest.fixture(scope="session")
def tiny(case, tiny_model, oracle, settings_of_tests):
    """An engine with a KV cache too small for its batch, and its oracle."""
    settings = {
        **settings_of_tests,
        "skip_tokenizer_init": True,
        "max_num_seqs": 4,
        "max_model_len": 160,
        "num_gpu_blocks_override": BLOCKS[case["model"]],
        "additional_config": {"headrift": {"splits": int(case["splits"])}},
    }
    backend = case["backend"]
    options = {"steps": 8, "slots": 4, "logit_stats": True, "attention_backend": backend}
    options |= {"ablation": True, "references": 2, "hidden_states": 4}
    options |= {"row_references": 2, "row_keys": 64, "row_entropy": True}
    with ProbedEngine(tiny_model(case["model"]), **options, engine_args=settings) as engine:
        yield engine, oracle(case["model"])
