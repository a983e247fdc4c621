"""The CPU attention kernel against vLLM's own CPU operation, side by side in one run, on the cache that vLLM keeps.

    python bench/kernels.py [--rounds 60] [--instructions avx2] [--out bench/results/kernels_cpu.json]

Two head shapes, 1 to 64 decode rows of 64 to 4,096 keys (float32, 32-token blocks, three regions): vLLM's operation,
ours without masses, ours with masses, and masses alone, in turns. Ratios are of the lower quartiles of the times, since
a busy machine only ever adds to a time. `--instructions avx2` holds both to AVX2: vLLM carries an operation for either.
"""

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

import utils
from utils import Stopwatch

SHAPES = {"9 heads, 3 of keys, 64 wide": (9, 3, 64), "32 heads, 8 of keys, 128 wide": (32, 8, 128)}
BATCHES = (1, 8, 32, 64)
CONTEXTS = (64, 300, 1024, 4096)
PAGE = 32
# The largest K and V of one layer that is measured, in bytes: more needs more memory than a small machine has.
MOST_BYTES = 1 << 30


def make_arms(batch: int, context: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, Callable[[], None]]:
    import torch
    from vllm import _custom_ops as ops

    from headrift_kernels.cpu.paged_attention import PagedAttention
    from headrift_kernels.cpu.queries import SLOT, Queries, measured_queries

    generator = torch.Generator().manual_seed(0)
    pages = -(-context // PAGE)
    blocks = batch * pages + 1
    table = torch.randperm(blocks, generator=generator)[: batch * pages].int().view(batch, pages)
    cache = torch.randn(blocks, kv_heads, PAGE, 2 * head_dim, generator=generator)
    query = torch.randn(batch, heads, head_dim, generator=generator)
    seq_lens = torch.full((batch,), context, dtype=torch.int32)
    starts = torch.arange(batch + 1, dtype=torch.int32)
    keys, values = cache.view(blocks, kv_heads, 2 * PAGE, head_dim).chunk(2, dim=2)
    scale = head_dim**-0.5
    expected, output = torch.empty_like(query), torch.empty_like(query)
    plan = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=batch, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, seq_lens=seq_lens,
        dtype=torch.float32, query_start_loc=starts, causal=True, sliding_window_size=-1, isa="vec",
        enable_kv_split=True, dynamic_causal=None, kv_cache_dtype="auto",
    )  # fmt: skip

    def vllm() -> None:
        ops.cpu_attention_with_kv_cache(
            query=query, key_cache=keys, value_cache=values, output=expected, query_start_loc=starts,
            seq_lens=seq_lens, scale=scale, causal=True, alibi_slopes=None, sliding_window=-1, block_table=table,
            softcap=0.0, scheduler_metadata=plan, s_aux=None, dynamic_causal=None, k_scale=1.0, v_scale=1.0,
            kv_cache_dtype="auto",
        )  # fmt: skip

    system, prompt = (min(5, context), context // 3), (0, max(1, context - 6))
    user = (system[1], max(system[1], prompt[1] - 6))
    bounds = torch.tensor([[system, user, prompt]] * batch, dtype=torch.int32)
    mass = torch.full((batch, 13, 1, heads, 3), torch.nan)
    slots, prompt_len = np.arange(batch, dtype=np.int32), np.full(batch, prompt[1], np.int32)
    rows = np.full(batch, 13, np.int32)
    measured = measured_queries(starts.numpy(), seq_lens.numpy(), slots, prompt_len, rows, 13, True)
    unmeasured = measured.copy()
    unmeasured[:, SLOT] = -1
    attention = PagedAttention(mass, 0, cache, bounds, scale=scale)
    with_mass, without = Queries.from_table(measured, PAGE), Queries.from_table(unmeasured, PAGE)

    def ours(queries: Queries, into: torch.Tensor | None) -> Callable[[], None]:
        return lambda: attention.attend(query, table, queries, output=into)

    arms = {"vllm": vllm, "plain": ours(without, output), "mass": ours(with_mass, output)}
    arms["mass_only"] = ours(with_mass, None)
    for arm in arms.values():
        arm()
    difference = float((output - expected).abs().max())
    if difference > 1e-4:
        raise SystemExit(f"our output differs from vLLM's by {difference}")
    return arms


def microseconds(call: Callable[[], None]) -> float:
    with Stopwatch() as clock:
        call()
    return clock.seconds * 1e6


def table(report: dict) -> str:
    means, host, rows = report["geometric_means"], report["machine"], []
    for case in report["cases"]:
        us = case["microseconds"]
        times = [us["vllm"], us["plain"], us["mass"], us["vllm"] + us["mass_only"]]
        ratios = [f"{case['speedup']:.2f}", f"{case['mass_over_plain']:.3f}"]
        rows.append([case["shape"], case["batch"], f"{case['context']:,}", *(f"{us:,.0f}" for us in times), *ratios])
    head = ["heads", "batch", "keys", "vLLM", "ours, no masses", "ours", "apart", "vLLM / ours", "masses on / off"]
    return utils.page(
        f"# The CPU kernel and vLLM's own operation: {host['cpu']}, {host['cores']} cores, {host['instructions']}",
        "Made by `bench/kernels.py`; microseconds a call, lower quartiles. **apart**: vLLM's operation, then a pass\n"
        "over K for the masses, as a backend would do that kept vLLM's operation.",
        f"Geometric means: with masses ours is {means['speedup']:.2f} times as fast as vLLM's operation, which takes\n"
        f"none; masses on / off is {means['mass_over_plain']:.3f}. Ours is slower than `apart` in "
        f"{report['slower_than_apart']} of {len(report['cases'])} shapes.",
        utils.markdown(head, rows),
    )


def measure(shape: str, batch: int, context: int, rounds: int) -> dict:
    """Time the arms of a case in turns; lower quartiles, their ratios, and the samples."""
    calls = make_arms(batch, context, *SHAPES[shape])
    samples = utils.run_in_turns({name: partial(microseconds, call) for name, call in calls.items()}, rounds)
    low = {name: float(np.percentile(times, 25)) for name, times in samples.items()}
    case = {"shape": shape, "batch": batch, "context": context, "microseconds": low}
    case |= {"speedup": low["vllm"] / low["mass"], "mass_over_plain": low["mass"] / low["plain"]}
    times = "  ".join(f"{name} {us:8.0f}" for name, us in low.items())
    print(f"{shape:30} batch {batch:3} x {context:5}: {times}  speedup {case['speedup']:.2f}", flush=True)
    return {**case, "samples": {name: [round(t, 1) for t in times] for name, times in samples.items()}}


def main() -> None:
    options = utils.Options(__doc__, "kernels_cpu", short=False)
    options.add_argument("--rounds", type=int, default=60)
    options.add_argument("--instructions", choices=("avx2",), help="hold both kernels to AVX2 (default: the widest)")
    args = options.parse()
    if args.instructions == "avx2":  # before vLLM loads its operations, and numba compiles
        import torch

        os.environ["NUMBA_CPU_NAME"] = "haswell"
        features = ("avx", "avx2", "fma", "bmi", "bmi2", "f16c", "lzcnt", "movbe", "popcnt", "sse4.1", "sse4.2")
        os.environ["NUMBA_CPU_FEATURES"] = ",".join(f"+{feature}" for feature in features)
        torch.cpu._is_avx512_supported = lambda: False
    cases = [
        measure(shape, batch, context, args.rounds)
        for shape, (_, kv_heads, head_dim) in SHAPES.items()
        for batch in BATCHES
        for context in CONTEXTS
        if batch * context * kv_heads * head_dim * 8 <= MOST_BYTES
    ]
    from headrift_kernels.cpu import simd

    logs = {name: np.log([case[name] for case in cases]) for name in ("speedup", "mass_over_plain")}
    slower = sum(us["mass"] > us["vllm"] + us["mass_only"] for us in (case["microseconds"] for case in cases))
    report = {
        "machine": {**utils.host(), "instructions": "AVX-512" if simd._AVX512 else "AVX2"},
        "versions": utils.versions(),
        "geometric_means": {name: float(np.exp(values.mean())) for name, values in logs.items()},
        "slower_than_apart": slower,
        "cases": cases,
    }
    utils.write(report, table(report), args.out)


if __name__ == "__main__":
    main()
