"""Times attention on a GPU: decode plain, with masses, vLLM's Triton kernel's and FlashAttention's; and what a prompt's
last chunk costs, its masses beside its attention. One file, two tables.

`python bench/_kernels_cuda.py [--out bench/results/kernels_cuda.json]`. Each time is the median of CUDA-event times of
launches that alternate over copies of the caches larger than the L2 cache, so that K and V come from memory. No machine
with a GPU has run it yet.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headrift_kernels.cases import DecodeCase, SpanCase, decode_case, span_case
from headrift_kernels.triton.decode_mass import SplitScratch, decode_mass, splits_for
from headrift_kernels.triton.query_lse import query_lse
from headrift_kernels.triton.span_mass import span_mass

# heads per KV head, KV heads, head_dim
MODELS = {"SmolLM2-135M": (3, 3, 64), "Llama-3-8B": (4, 8, 128), "Qwen2.5-7B": (7, 4, 128)}
BATCHES = (1, 8, 32, 128)
CONTEXTS = (512, 2048, 8192)
PREFILL_BATCHES = (1, 8)
CHUNK = 512
COLD_BYTES = 512 << 20


def on_device(case: Any) -> Any:
    return type(case)(**{name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in vars(case).items()})


def chat_case(batch: int, context: int, model: str, seed: int) -> DecodeCase:
    """Decode rows a few tokens into their answers, with the regions of a chat: system, user, prompt."""
    group, kv_heads, head_dim = MODELS[model]
    case = decode_case(
        np.random.default_rng(seed),
        seq_lens=[context] * batch,
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        dtype=torch.bfloat16,
        layout="joint",
        steps=16,
        unprobed=0.0,
        poison=False,
    )
    case.prompt_len[:], case.n_rows[:] = context - 12, 16
    case.bounds[:] = torch.tensor([[5, 100], [105, context - 32], [0, context - 12]])
    return on_device(case)


def prefill_case(batch: int, context: int, model: str, seed: int) -> SpanCase:
    """The last chunk of each row's prompt: one query of it, the first token's, is measured."""
    group, kv_heads, head_dim = MODELS[model]
    case = span_case(
        np.random.default_rng(seed),
        seq_lens=[context] * batch,
        query_lens=[CHUNK] * batch,
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        dtype=torch.bfloat16,
        steps=16,
        unprobed=0.0,
        poison=False,
    )
    case.prompt_len[:], case.n_rows[:] = context, 16
    case.bounds[:] = torch.tensor([[5, 100], [105, context - 20], [0, context]])
    case.lse = case.expected_lse().float()
    return on_device(case)


def lse_of(case: SpanCase) -> Callable[[], Any]:
    lse = torch.empty_like(case.lse)
    return lambda: query_lse(lse, *case.lse_batch, max_query_len=CHUNK, **case.how)


def span_of(case: SpanCase) -> Callable[[], Any]:
    mass = case.empty_mass()
    return lambda: span_mass(mass, 1, *case.batch, max_query_len=CHUNK, prompt_region=2, **case.how)


def ours(case: DecodeCase, with_mass: bool) -> Callable[[], Any]:
    rows, heads, head_dim = case.query.shape
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    splits = splits_for(rows, case.key_cache.shape[2], int(case.seq_lens.max()), processors)
    output, mass = torch.empty_like(case.query), case.empty_mass() if with_mass else None
    scratch = SplitScratch.allocate(rows, heads, head_dim, 3, splits, "cuda") if splits > 1 else None
    return lambda: decode_mass(output, mass, 1, *case.batch, scratch=scratch, **case.how)


def vllms(case: DecodeCase) -> Callable[[], Any]:
    """vLLM's unified Triton kernel as its backend calls it for decode: split into 16 segments for small batches."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    rows, heads, head_dim = case.query.shape
    padded = 1 << (head_dim - 1).bit_length()
    segments, threshold = 16, 128 // case.key_cache.shape[2]
    parts = [torch.empty(rows, heads, segments, *last, device="cuda") for last in ((padded,), (), ())]
    output = torch.empty_like(case.query)
    starts = torch.arange(rows + 1, dtype=torch.int32, device="cuda")
    return lambda: unified_attention(
        q=case.query,
        k=case.key_cache,
        v=case.value_cache,
        out=output,
        cu_seqlens_q=starts,
        max_seqlen_q=1,
        seqused_k=case.seq_lens,
        max_seqlen_k=case.block_table.shape[1] * case.key_cache.shape[1],
        softmax_scale=case.how["scale"],
        causal=True,
        window_size=(-1, -1),
        block_table=case.block_table,
        softcap=0.0,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        seq_threshold_3D=threshold,
        num_par_softmax_segments=segments,
        softmax_segm_output=parts[0],
        softmax_segm_max=parts[1],
        softmax_segm_expsum=parts[2],
    )


def flash(case: DecodeCase | SpanCase) -> Callable[[], Any]:
    """FlashAttention over vLLM's paged cache, as vLLM's backend calls it: of one query a row, or of a chunk."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    output = torch.empty_like(case.query)
    if isinstance(case, SpanCase):
        starts, most, values = case.query_start_loc, CHUNK, case.key_cache.clone()
    else:
        starts = torch.arange(case.query.shape[0] + 1, dtype=torch.int32, device="cuda")
        most, values = 1, case.value_cache
    longest = int(case.seq_lens.max())
    return lambda: flash_attn_varlen_func(
        q=case.query,
        k=case.key_cache,
        v=values,
        out=output,
        cu_seqlens_q=starts,
        max_seqlen_q=most,
        seqused_k=case.seq_lens,
        max_seqlen_k=longest,
        softmax_scale=case.how["scale"],
        causal=True,
        block_table=case.block_table,
    )


KERNELS: dict[str, Callable[[DecodeCase], Callable[[], Any]]] = {
    "plain": lambda case: ours(case, False),
    "mass": lambda case: ours(case, True),
    "vllm_triton": vllms,
    "flash_attention": flash,
}
PREFILL_KERNELS: dict[str, Callable[[SpanCase], Callable[[], Any]]] = {
    "query_lse": lse_of,
    "span_mass": span_of,
    "flash_attention": flash,
}


def microseconds(calls: list[Callable[[], Any]], rounds: int = 30) -> float:
    """Median over rounds of one call's time; a round goes through all the copies, so each finds a cold L2 cache."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / len(calls))
    return statistics.median(times)


def measure(make: Callable[..., Any], kernels: dict[str, Callable[..., Any]], batches: tuple[int, ...]) -> list[Any]:
    """A row of times for each model, batch and context; `make` makes their cases."""
    found = []
    for model, batch, context in itertools.product(MODELS, batches, CONTEXTS):
        first = make(batch, context, model, 0)
        bytes_read = 2 * batch * context * first.key_cache.shape[2] * first.key_cache.shape[3] * 2
        copies = max(1, min(16, COLD_BYTES // bytes_read))
        cases = [first, *(make(batch, context, model, seed) for seed in range(1, copies))]
        row: dict[str, Any] = {"model": model, "batch": batch, "context": context, "kv_bytes": bytes_read}
        for name, kernel in kernels.items():
            try:
                row[name] = microseconds([kernel(case) for case in cases])
            except Exception as error:  # a peer that is not installed, or not for this GPU
                row[name], row[f"{name}_error"] = None, f"{type(error).__name__}: {error}"
        found.append(row)
        print(row, flush=True)
    return found


def table(found: list[dict[str, Any]], kernels: dict[str, Any], ratio: str, above: list[str], below: str) -> list[str]:
    """Lines of markdown; `ratio` is the heading of the sum of the columns `above` over the column `below`."""
    header = ["model", "batch", "context", *kernels, ratio]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in found:
        times = [f"{row[name]:.1f}" if row[name] else "-" for name in kernels]
        parts = [row[name] for name in above]
        relative = f"{sum(parts) / row[below]:.3f}" if all(parts) and row[below] else "-"
        lines.append("| " + " | ".join([row["model"], str(row["batch"]), str(row["context"]), *times, relative]) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kernels_cuda.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("kernels_cuda: no CUDA device here; the kernels are compiled and interpreted, not timed")
    decode = measure(chat_case, KERNELS, BATCHES)
    prefill = measure(prefill_case, PREFILL_KERNELS, PREFILL_BATCHES)
    device = torch.cuda.get_device_name()
    result = {"device": device, "torch": torch.__version__, "unit": "microseconds", "rows": decode, "prefill": prefill}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    lines = [f"# Decode attention on {device}, microseconds", ""]
    lines += table(decode, KERNELS, "mass / plain", ["mass"], "plain")
    lines += ["", f"# The last {CHUNK} tokens of each prompt, microseconds", ""]
    lines += table(prefill, PREFILL_KERNELS, "(LSE + mass) / attention", ["query_lse", "span_mass"], "flash_attention")
    arguments.out.with_suffix(".md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
