"""What measuring costs the host at each step on a GPU's backend, without a GPU.

    python bench/host_cost.py [--rounds 400] [--out bench/results/host_cost.json]

Two kinds of step of 1 to 256 rows, all probed, 32 layers with the heads of Llama-3-8B. `decode`: the layers are
replayed from a CUDA graph, so what measuring adds is the step's plan, compared with what vLLM's own builder makes.
`streaming`: one row in 13 is a prompt of 300 tokens that ends in this step, as in most steps of a job of 12 steps a
prompt: added are the plan and what a layer's `forward` does besides vLLM's own. Rows have 2,048 keys at most; in
`streaming, long rows` some are split, which takes a second launch in each layer. Triton's launcher runs over a CUDA
library that does nothing, on CPU tensors: the GPU driver's launches and small copies are not in it.
"""

import gc
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

import utils

from tools import fake_cuda

BATCHES = (1, 4, 16, 64, 256)
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 32, 32, 8, 128
PROMPT, ANSWER = 300, 13


def times_in_turns(worker, rows: int, prefills: int, longest: int, rounds: int) -> dict[str, list[float]]:
    """Microseconds of each round: vLLM's builder, ours with all rows probed, and what all layers' `forward` add."""
    import torch
    from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl, TritonAttentionMetadataBuilder

    from headrift.vllm_plugin.recorder import Recorder
    from helpers.steps import describe_step

    TritonAttentionImpl.forward = lambda self, *args: args[6]
    recorder = Recorder.required(worker.vllm_config)
    tokens, table = [1] * (rows - prefills) + [PROMPT] * prefills, torch.zeros((rows, 128), dtype=torch.int32)
    builder, step = recorder.publisher, describe_step(tokens, [PROMPT] * rows, longest, table)
    recorder.runner_rows[:rows] = np.arange(rows)
    recorder.prompt_lens[:], recorder.step_limits[:] = PROMPT, ANSWER
    query = torch.zeros(step.num_actual_tokens, HEADS, HEAD_DIM)
    output = torch.empty_like(query)
    samples: dict[str, list[float]] = {"stock": [], "plan": [], "layers": []}
    gc.collect()
    gc.freeze()  # as vLLM's engine does once it has started
    with torch.inference_mode():  # as vLLM runs a step
        for _ in range(rounds):
            start = time.perf_counter()
            TritonAttentionMetadataBuilder.build(builder, 0, step)
            stock = time.perf_counter()
            recorder.begin_step()
            metadata = builder.build(0, step)
            plan = time.perf_counter()
            for layer in builder.layers:
                layer.impl.forward(layer, query, query, query, layer.kv_cache, metadata, output)
            ours = time.perf_counter()
            for layer in builder.layers:
                TritonAttentionImpl.forward(layer.impl, layer, query, query, query, layer.kv_cache, metadata, output)
            end = time.perf_counter()
            seconds = {"stock": stock - start, "plan": plan - stock, "layers": (ours - plan) - (end - ours)}
            for name, of_round in samples.items():
                of_round.append(seconds[name] * 1e6)
    assert recorder.probed
    assert (metadata.measured.prefill is not None) == bool(prefills)
    return samples


def table(report: dict) -> str:
    rows = []
    for row in report["rows"]:
        stock, plan, layers = (f"{q[1]:.1f} ({q[0]:.1f}-{q[2]:.1f})" for q in row["quartiles"].values())
        layers = layers if row["step"] != "decode" else "in the graph"
        rows.append([row["step"], row["rows"], stock, plan, layers, f"{row['added']:.1f}"])
    head = ["step", "rows", "vLLM's builder", "ours", "all layers' forward, vLLM's own left out", "added"]
    return utils.page(
        f"# Host cost of a probed step, microseconds: {report['machine']['cpu']}",
        f"Made by `bench/host_cost.py`: medians (and middle halves), {LAYERS} layers, the heads of Llama-3-8B, CPU\n"
        "tensors, Triton's launcher over a CUDA library that does nothing; not run on a GPU.",
        utils.markdown(head, rows),
    )


def main() -> None:
    options = utils.Options(__doc__, "host_cost", short=False)
    options.add_argument("--rounds", type=int, default=400)
    args = options.parse()
    with tempfile.TemporaryDirectory() as folder:
        fake_cuda.activate(Path(folder))
        # Kernels that were imported before this are compiled; vLLM's backend for GPUs is then taken on a CPU.
        from headrift_kernels.triton import decode_mass, replay_mass  # noqa: F401

        os.environ["TRITON_INTERPRET"] = "1"
        from transformers import LlamaConfig

        from headrift.probed_engine import ProbedEngine

        heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM}
        sizes = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 512, "max_position_embeddings": 4096}
        config = LlamaConfig(num_hidden_layers=LAYERS, architectures=["LlamaForCausalLM"], **heads, **sizes)
        config.save_pretrained(folder)
        settings = {
            "load_format": "dummy", "skip_tokenizer_init": True, "dtype": "float32", "max_num_seqs": max(BATCHES),
            "max_model_len": 4096, "max_num_batched_tokens": 8192, "kv_cache_memory_bytes": 2 << 30,
        }  # fmt: skip
        with ProbedEngine(
            Path(folder), steps=12, slots=max(BATCHES), attention_backend="triton", engine_args=settings
        ) as engine:
            kinds = [("decode", n, 0, 2048) for n in BATCHES]
            for step, longest in (("streaming", 2048), ("streaming, long rows", 4096)):
                kinds += [(step, n, -(-n // ANSWER), longest) for n in BATCHES if n > 1]
            rows = engine.llm_engine.collective_rpc(
                lambda worker: [
                    {"step": step, "rows": n, "samples": times_in_turns(worker, n, prefills, longest, args.rounds)}
                    for step, n, prefills, longest in kinds
                ]
            )[0]
    for row in rows:
        row["quartiles"] = {name: np.percentile(x, [25, 50, 75]).tolist() for name, x in row.pop("samples").items()}
        median = {name: q[1] for name, q in row["quartiles"].items()}
        layers = median["layers"] if row["step"] != "decode" else 0.0
        row["added"] = median["plan"] - median["stock"] + layers
        print(f"{row['step']:20} {row['rows']:4} rows: {row['added']:6.1f} us added, {layers:6.1f} of them in layers")
    report = {"machine": utils.host(), "unit": "microseconds", "rows": rows}
    utils.write(report, table(report), args.out)


if __name__ == "__main__":
    main()
