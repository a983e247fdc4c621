"""The engine on a real GPU, CUDA graphs and torch.compile on, against transformers' eager attention. Never run yet."""

import numpy as np
import pytest
import torch

from headrift.probed_engine import ProbedEngine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
# float32: cuBLAS and Triton sum in other orders than the CPU that the oracle runs on. float16: eleven bits of every
# activation and of q and k, so that a score of size 10 is off by some 5e-3, and a probability by that part of itself.
TOLERANCE = {"float32": 1e-4, "float16": 2e-2}
CASES = [
    ("triton", "llama-3to1", "float32"),
    ("triton", "gemma3", "float32"),
    ("triton", "llama-3to1", "float16"),
    ("flash", "llama-3to1", "float16"),
    ("flash", "gemma3", "float16"),
]


@pytest.mark.parametrize(("backend", "model", "dtype"), CASES)
def test_masses_on_a_gpu(backend, model, dtype, tiny_model, oracle, random_requests, run):
    settings = {
        "dtype": dtype,
        "max_num_batched_tokens": 64,
        "enable_prefix_caching": True,
        "skip_tokenizer_init": True,
        "max_num_seqs": 8,
        "max_model_len": 256,
        "gpu_memory_utilization": 0.3,
    }
    compared = 0
    with ProbedEngine(tiny_model(model), steps=8, slots=12, attention_backend=backend, engine_args=settings) as engine:
        assert engine.llm_engine.vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs()
        requests = random_requests(1, 24, ignore_eos=True)
        items = run(engine, requests) + run(engine, requests[:6:3] * 2, at_once=1)
    for item in items:
        request, n = item.done.request, item.done.n_steps
        if not request.probed:
            continue
        assert item.recording.unwritten == []
        spans = [request.regions[name] for name in ("system", "user", "prompt")]
        expected = oracle(model).masses(request.prompt_ids, item.done.answer_ids, n, spans)
        np.testing.assert_allclose(item.recording.mass, expected, rtol=0, atol=TOLERANCE[dtype])
        compared += n + 1
    assert compared > 50
