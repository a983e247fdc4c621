"""What probing costs the host at each step on a GPU's backend: publishing the rows and planning the step.

    python bench/host_cost.py [--rounds 400] [--out bench/results/host_cost.json]

The metadata builder of headrift's Triton backend builds the metadata of decode steps of 1 to 256 rows, all probed, and
vLLM's own builder that of the same steps, in turns. This is all the Python that probing adds to a step: the layers'
forward passes launch one kernel each (two where rows are split), as vLLM's do, or are replayed from a CUDA graph. The
tensors lie on the CPU here, so that what a copy to a GPU costs the host (two small asynchronous ones) is not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def decode_step(rows: int) -> Any:
    """vLLM's description of a step in which `rows` requests decode a token each."""
    import torch
    from vllm.v1.attention.backend import CommonAttentionMetadata

    starts = torch.arange(rows + 1, dtype=torch.int32)
    lengths = torch.full((rows,), 300, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        seq_lens_cpu_upper_bound=lengths,
        num_reqs=rows,
        num_actual_tokens=rows,
        max_query_len=1,
        max_seq_len=300,
        block_table_tensor=torch.zeros((rows, 32), dtype=torch.int32),
        slot_mapping=torch.zeros(rows, dtype=torch.int64),
        req_idx=np.arange(rows),
    )


def times_in_turns(recorder: Any, rows: int, rounds: int) -> dict[str, list[float]]:
    """Microseconds of each round: ours, with all rows probed, and the stock builder's."""
    from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadataBuilder

    builder, step = recorder.publisher, decode_step(rows)
    recorder.runner_rows[:rows] = np.arange(rows)
    samples: dict[str, list[float]] = {"stock": [], "probed": []}
    for _ in range(rounds):
        start = time.perf_counter()
        TritonAttentionMetadataBuilder.build(builder, 0, step)
        middle = time.perf_counter()
        recorder.begin_step()
        builder.build(0, step)
        end = time.perf_counter()
        samples["stock"].append((middle - start) * 1e6)
        samples["probed"].append((end - middle) * 1e6)
    assert recorder.probed
    return samples


def table(report: dict[str, Any]) -> str:
    lines = [
        f"# Host cost of a probed step, microseconds: {report['machine']['cpu']}",
        "",
        "Made by `bench/host_cost.py`: medians (and middle halves) of building a decode step's attention metadata, on",
        "CPU tensors; not run on a GPU.",
        "",
        "| rows | vLLM's builder | ours, all rows probed | added |",
        "|---|---|---|---|",
    ]
    for row in report["rows"]:
        spread = {name: f"{q[1]:.1f} ({q[0]:.1f}-{q[2]:.1f})" for name, q in row["quartiles"].items()}
        lines.append(f"| {row['rows']} | {spread['stock']} | {spread['probed']} | {row['added']:.1f} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models/smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/host_cost.json")
    args = parser.parse_args()
    # The Triton backend can be built without a GPU where its kernels would be interpreted; none is launched here.
    os.environ["TRITON_INTERPRET"] = "1"

    from headrift.machine import processor
    from headrift.probed_engine import ProbedEngine
    from headrift.vllm_plugin.recorder import Recorder

    settings = {"max_num_seqs": max(BATCHES), "max_model_len": 1024, "max_num_batched_tokens": 1024}
    with ProbedEngine(
        args.model, steps=12, slots=max(BATCHES), attention_backend="triton", engine_args=settings
    ) as engine:
        rows = engine.llm_engine.collective_rpc(
            lambda worker: [
                {"rows": n, "samples": times_in_turns(Recorder.required(worker.vllm_config), n, args.rounds)}
                for n in BATCHES
            ]
        )[0]
    for row in rows:
        row["quartiles"] = {name: np.percentile(x, [25, 50, 75]).tolist() for name, x in row.pop("samples").items()}
        row["added"] = row["quartiles"]["probed"][1] - row["quartiles"]["stock"][1]
        print(f"{row['rows']:4} rows: stock {row['quartiles']['stock'][1]:6.1f}  probed added {row['added']:6.1f} us")
    report = {"machine": {"cpu": processor()[0], "cores": os.cpu_count()}, "unit": "microseconds", "rows": rows}
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(table(report))


if __name__ == "__main__":
    main()
