"""A program, not a test file: an engine on a CUDA library that does nothing, where every kernel is really compiled.

    python compilations.py FOLDER

prints, as JSON, which of headrift's kernels Triton compiled while the engine started, and which during a job of
streamed and replayed requests. FOLDER: for a model with made-up weights and Triton's cache. What the kernels would
compute is not there; vLLM's own prefill attention and cache writes are left out, since they would not run either.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

from tools import fake_cuda

MODEL = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 512, "max_position_embeddings": 4096,
    "sliding_window": 1024, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    "torch_dtype": "float32",
}  # fmt: skip


def run_job(engine) -> None:
    """Requests of many lengths, answered and replayed, more than fit at once."""
    from headrift.requests import ProbeRequest

    rng = np.random.default_rng(0)
    todo = []
    for i in range(40):
        ids = rng.integers(3, 500, int(rng.choice([20, 90, 700, 1500]))).tolist()
        answer = rng.integers(3, 500, int(rng.integers(1, 14))).tolist() if i % 3 == 0 else None
        regions = {"system": (1, 9), "user": (9, 15), "prompt": (0, len(ids))}
        todo.append(ProbeRequest(ids, regions, 12, ignore_eos=True, answer_ids=answer))
    while todo or engine.running:
        while todo and engine.free_slots:
            engine.submit(todo.pop())
        engine.drain(engine.step())


def main() -> None:
    folder = Path(sys.argv[1])
    (folder / "config.json").write_text(json.dumps(MODEL))
    fake_cuda.activate(folder)
    from headrift_kernels.triton import decode_mass, logit_stats, replay_mass  # noqa: F401  (compiled, not interpreted)
    from headrift_kernels.triton.launch import record_compilations

    os.environ["TRITON_INTERPRET"] = "1"  # vLLM's backend for GPUs may then be taken on a CPU
    from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

    from headrift.probed_engine import ProbedEngine

    TritonAttentionImpl.forward = lambda self, layer, query, key, value, cache, metadata, output, **scales: output
    TritonAttentionImpl.do_kv_cache_update = lambda *_: None
    settings = {
        "load_format": "dummy", "skip_tokenizer_init": True, "dtype": "float32", "max_num_seqs": 16,
        "max_model_len": 2048, "max_num_batched_tokens": 512, "num_gpu_blocks_override": 400,
        "kv_cache_memory_bytes": 1 << 30,
    }  # fmt: skip
    with record_compilations() as at_start:
        options = {"steps": 12, "slots": 16, "logit_stats": True, "attention_backend": "triton"}
        engine = ProbedEngine(folder, **options, engine_args=settings)
    with engine, record_compilations() as later:
        run_job(engine)
    print("COMPILED" + json.dumps({"at_start": at_start, "later": later}))


if __name__ == "__main__":
    main()
