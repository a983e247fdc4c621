"""Time headrift's attention kernels on a GPU, with and without masses, and vLLM's Triton kernel and FlashAttention.

    python bench/kernels_gpu.py [--seconds 600] [--models Llama-3-8B,Qwen2.5-7B] [--out bench/results/kernels_gpu.json]

Cases: `uniform` (one context length), `ragged` (one row of 8,192 keys among rows of 512), `shared` (the first 3/4 of
all rows in common), `streaming` (decode rows and the last chunks of prompts, whose last token is measured) and `replay`
(answers of 64 tokens, all measured). Times are medians over replays of a CUDA graph, as an engine launches them,
through copies of the cache larger than the L2 cache. GB/s: bytes of K and V, beside the measured copy bandwidth.

An exception in headrift's kernels fails the run (exit status 1); a kernel of others that is not there has a reason.
Cases that do not fit the GPU are listed as too large, those that no longer fit --seconds as left out. `--out` is
written after each case; the cases that it already has are kept.
"""

import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import utils

if "--dry-run" in sys.argv:  # also in the processes of `compile_ahead`, which get the same arguments
    import tools.cuda_on_cpu  # noqa: F401

from headrift_kernels.triton.decode_mass import decode_mass
from tools.gpu_batches import DEVICE, Batch, Case

COLD_BYTES = 256 << 20  # several times an L2 cache
# Of the free memory, for K and V of one layer: the copies, queries and outputs need some too.
MOST_OF_FREE = 0.3
COMPILE_BYTES = 6 << 30  # of a process that compiles ahead: a CUDA context and the largest of its cases
REQUIRED = 4  # cases, of the first model


def cases() -> list[Case]:
    """The REQUIRED ones first, then the most telling ones."""
    uniform = [(64, 2048), (256, 2048), (8, 2048), (1, 2048), (64, 8192), (256, 512), (1, 8192), (64, 512), (8, 8192)]
    return [
        Case("uniform", (1024,) * 64),
        Case("streaming", (2048,) * 60, (2048,) * 4),
        Case("ragged", (8192, *(512,) * 63)),
        Case("uniform", (4096,) * 256),
        *(Case("uniform", (context,) * batch) for batch, context in uniform[:4]),
        Case("shared", (4096,) * 64, shared=3072),
        Case("replay", (), (2048,) * 16),
        *(Case("uniform", (context,) * batch) for batch, context in uniform[4:]),
        Case("streaming", (1024,) * 240, (1024,) * 16),
        Case("ragged", (8192, *(512,) * 255)),
        Case("shared", (4096,) * 256, shared=3072),
        *(Case("uniform", (context,) * batch) for batch, context in ((1, 512), (8, 512), (128, 2048), (256, 8192))),
    ]


TINY_CASES = [
    Case("uniform", (40,) * 2),
    Case("ragged", (600, 20)),
    Case("shared", (48,) * 2, shared=32),
    Case("streaming", (40,), (40,), chunk=20),
    Case("replay", (), (40,), chunk=20),
]


def plain(batch: Batch) -> Callable:
    """headrift's decode kernel without masses."""
    n = len(batch.case.decode)
    scratch, query, output = batch.scratch(n), batch.query[:n], batch.output[:n]
    caches, lengths = (batch.keys, batch.values), (batch.table[:n], batch.seq_lens[:n])
    return lambda: decode_mass(output, None, 1, query, *caches, *lengths, scale=batch.scale, scratch=scratch)


def with_masses(batch: Batch) -> Callable:
    """headrift's decode kernel with masses, for decode rows and for the last tokens of the prompts."""
    rows = len(batch.seq_lens)
    more = {"query_start_loc": batch.starts} if batch.case.prefill else {}
    arguments = (batch.query, batch.keys, batch.values, batch.table, batch.seq_lens, *batch.rows)
    scratch = batch.scratch(rows)
    return lambda: decode_mass(batch.output, batch.mass, 1, *arguments, **more, scale=batch.scale, scratch=scratch)


def replay(batch: Batch) -> Callable:
    """headrift's masses of every answer token of a chunk: the last by the decode kernel, others in a pass over K."""
    from headrift_kernels.triton.replay_mass import ReplayScratch, replay_mass, replay_splits

    rows, (_, heads, _) = len(batch.seq_lens), batch.query.shape
    queries = batch.case.answer
    shape = (rows, batch.kv_heads, heads // batch.kv_heads, queries, batch.longest)
    splits = replay_splits(*shape, torch.cuda.get_device_properties(0).multi_processor_count)
    scratch = ReplayScratch.allocate(rows, queries, heads, 3, splits, DEVICE) if splits > 1 else None
    arguments = (batch.query, batch.keys, batch.table, batch.starts, batch.seq_lens, *batch.rows)
    how = {"most_queries": queries, "scale": batch.scale, "scratch": scratch}
    last = with_masses(batch)
    return lambda: (last(), replay_mass(batch.mass, 1, *arguments, **how))


def rest_of(batch: Batch, first_row: int) -> dict:
    """The rows from first_row on, which is a decode row or the first after them, as vLLM's kernels take them."""
    return {
        "q": batch.query[first_row:],
        "k": batch.keys,
        "v": batch.values,
        "out": batch.output[first_row:],
        "cu_seqlens_q": batch.starts[first_row:] - first_row,
        "seqused_k": batch.seq_lens[first_row:],
        "max_seqlen_k": batch.longest,
        "max_seqlen_q": batch.case.chunk if batch.case.prefill else 1,
        "softmax_scale": batch.scale,
        "causal": True,
        "block_table": batch.table[first_row:],
    }


def vllm_triton(batch: Batch, first_row: int = 0) -> Callable:
    """vLLM's unified Triton kernel as its backend calls it: small decode batches are split into 16 segments."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    rows, (_, heads, head_dim) = len(batch.seq_lens) - first_row, batch.query.shape
    padded = 1 << (head_dim - 1).bit_length()
    parts = [torch.empty(rows, heads, 16, *last, device=DEVICE) for last in ((padded,), (), ())]
    how = {"window_size": (-1, -1), "softcap": 0.0, "q_descale": None, "k_descale": None, "v_descale": None}
    how |= {"seq_threshold_3D": 128 // batch.kv_heads, "num_par_softmax_segments": 16}
    how |= dict(zip(("softmax_segm_output", "softmax_segm_max", "softmax_segm_expsum"), parts))
    arguments = rest_of(batch, first_row) | how
    return lambda: unified_attention(**arguments)


def flash_attention(batch: Batch, first_row: int = 0) -> Callable:
    """FlashAttention in the version that vLLM takes on this GPU; the function's own default is 2."""
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    arguments = rest_of(batch, first_row) | {"fa_version": get_flash_attn_version()}
    return lambda: flash_attn_varlen_func(**arguments)


def hybrid(batch: Batch) -> Callable:
    """What headrift's engine runs: vLLM's kernel for the prompts' chunks, then one launch of ours for every row."""
    try:
        prompts = flash_attention(batch, len(batch.case.decode))
    except (ImportError, AttributeError):  # no FlashAttention: as the backend `triton` does
        prompts = vllm_triton(batch, len(batch.case.decode))
    measured = with_masses(batch)
    return lambda: (prompts(), measured())


OURS = {"plain": plain, "mass": with_masses, "hybrid": hybrid, "replay": replay}
PEERS = {"vllm_triton": vllm_triton, "flash_attention": flash_attention}


def kernels_for(case: Case) -> dict[str, Callable]:
    ours = {"streaming": ("mass", "hybrid"), "replay": ("replay",)}.get(case.kind, ("plain", "mass"))
    return {name: OURS[name] for name in ours} | PEERS


def milliseconds(call: Callable) -> float:
    """Time a call on the device."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def microseconds(calls: list[Callable], rounds: int) -> float:
    """Median time of one call; a round is one replay of a graph that holds all of them."""
    for call in calls:
        call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return 1e3 * statistics.median([milliseconds(graph.replay) for _ in range(rounds + 3)][3:]) / len(calls)


def copy_bandwidth(size: int) -> float:
    """GB/s of a copy on the device, bytes read plus bytes written."""
    source = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * size / min([milliseconds(lambda: target.copy_(source)) for _ in range(10)][1:]) / 1e6


def measure(case: Case, model: str, bandwidth: float, dtype: torch.dtype, rounds: int) -> dict:
    """The case's times in microseconds by kernel, bytes of K and V, and GB/s with its part of the copy bandwidth."""
    first = Batch(case, model, 0, dtype)
    copies = max(1, min(16, COLD_BYTES // first.kv_bytes)) if rounds > 3 else 1
    batches = [first, *(Batch(case, model, seed, dtype) for seed in range(1, copies))]
    row = {"model": model, "case": case.name, "kv_bytes": first.kv_bytes, "copies": copies}
    row |= {"microseconds": {}, "GB_s": {}, "of_copy_bandwidth": {}, "missing": {}, "errors": {}}
    for name, kernel in kernels_for(case).items():
        try:
            time_of_one = microseconds([kernel(batch) for batch in batches], rounds)
        except Exception as error:
            row["microseconds"][name] = None
            row["errors" if name in OURS else "missing"][name] = f"{type(error).__name__}: {error}"[:300]
            continue
        row["microseconds"][name] = round(time_of_one, 2)
        if not case.prefill:
            row["GB_s"][name] = round(first.kv_bytes / time_of_one / 1e3, 1)
            row["of_copy_bandwidth"][name] = round(row["GB_s"][name] / bandwidth, 3)
    if not row["errors"]:
        row["errors"] |= wrong_masses(first)
    return row


def wrong_masses(batch: Batch) -> dict[str, str]:
    """What is wrong with a batch's masses: missing steps, or prompt masses outside 0 to 1."""
    prompt = batch.mass[:, :, 1, :, 2]
    steps = 1 + batch.case.answer
    measured = ~torch.isnan(prompt).any(-1)
    incomplete = int((measured.sum(1) != steps).sum())
    if incomplete:
        return {"mass": f"{incomplete} of {len(prompt)} rows were not measured at {steps} steps"}
    # A sum of probabilities in float32: 1e-3 is far above its rounding, and far below what a wrong key range makes.
    written = prompt[measured]
    wrong = int(((written <= 0) | (written > 1 + 1e-3)).any(-1).sum())
    return {"mass": f"{wrong} of {len(written)} prompt masses are outside 0..1"} if wrong else {}


def compile_one(job: tuple[Case, str, torch.dtype]) -> None:
    """Launch a case's kernels once, so that what they compile to is in Triton's cache on disk."""
    batch = Batch(job[0], job[1], 0, job[2])
    for kernel in kernels_for(batch.case).values():
        try:
            kernel(batch)()
        except Exception:  # measure() meets it again, and reports it
            pass
    torch.cuda.synchronize()
    del batch
    torch.cuda.empty_cache()


def plan(models: list[str], all_cases: list[Case], free: float) -> tuple[dict[str, tuple[Case, str]], dict[str, str]]:
    """Return the cases with their models, the first model's first; and of those that do not fit, the reason."""
    jobs, too_large, room = {}, {}, MOST_OF_FREE * free
    for model in models:
        for case in all_cases:
            need, name = case.kv_bytes(model), f"{case.name} {model}"
            jobs[name] = case, model
            if need > room:
                too_large[name] = f"needs {need / 1e9:.1f} GB of K and V, and may take {room / 1e9:.1f} GB"
    return jobs, too_large


def table(rows: list[dict]) -> list[str]:
    names, cells = [*OURS, *PEERS], []
    for row in rows:
        us, mass = row["microseconds"], row["GB_s"].get("mass")
        ratio = f"{us['mass'] / us['plain']:.3f}" if us.get("mass") and us.get("plain") else "-"
        rate = [f"{mass:,.0f}", f"{row['of_copy_bandwidth']['mass']:.2f}"] if mass else ["-", "-"]
        times = [f"{us[name]:.1f}" if us.get(name) else "-" for name in names]
        cells.append([row["model"], row["case"], *times, ratio, *rate])
    return utils.markdown(["model", "case", *names, "mass / plain", "GB/s", "of copy"], cells).splitlines()


def main() -> int:
    options = utils.Options(__doc__, "kernels_gpu", short=False)
    options.add_argument("--seconds", type=float, default=600, help="cases that start later are left out")
    options.add_argument("--models", default="Llama-3-8B,Qwen2.5-7B")
    options.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU; figures mean nothing")
    args = options.parse()
    if not torch.cuda.is_available():
        raise SystemExit("kernels_gpu: no CUDA device here (--dry-run runs it on a CPU)")
    models, all_cases = (["tiny"], TINY_CASES) if args.dry_run else (args.models.split(","), cases())
    dtype, rounds = (torch.float32, 2) if args.dry_run else (torch.bfloat16, 30)
    free, _ = torch.cuda.mem_get_info()
    jobs, too_large = plan(models, all_cases, free)
    required = {f"{case.name} {models[0]}" for case in all_cases[:REQUIRED]}

    earlier = utils.read_json(args.out).get("rows", []) if args.out.exists() else []
    kept = {f"{row['case']} {row['model']}": row for row in earlier if not row["errors"]}
    progress = utils.Progress(args.out, args.seconds, jobs, required, too_large, kept)
    # In several processes: one after another it takes most of a short run.
    processes = 1 if args.dry_run else max(1, min(8, os.cpu_count() or 1, free // COMPILE_BYTES))
    first = [(*jobs[name], dtype) for name in progress.todo[: 1 if args.dry_run else 12]]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_one, first))
    bandwidth = copy_bandwidth(1 << 20 if args.dry_run else 2 << 30)
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "unit": "microseconds"}
    about["copy_GB_s"] = round(bandwidth, 1)

    def write() -> list[dict]:
        rows = list(progress.cases.values())
        progress.write({**about, "rows": rows, "table": table(rows)})
        return rows

    rows, slowest = write(), 0.0
    for name in list(progress.todo):
        begin = time.monotonic()
        if begin + slowest > progress.stop:
            break
        progress.done(name, measure(*jobs[name], bandwidth, dtype, rounds))
        torch.cuda.empty_cache()
        slowest, rows = max(slowest, time.monotonic() - begin), write()
        print(rows[-1], flush=True)
    errors = [f"{row['case']}: {name}: {error}" for row in rows for name, error in row["errors"].items()]
    print("\n".join([*table(rows), *(f"FAILED {error}" for error in errors)]))
    return 1 if errors or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
