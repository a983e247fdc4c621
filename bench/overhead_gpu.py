"""What probing costs on a GPU at the size of Llama-3-8B, with random weights: nothing is downloaded.

    python bench/overhead_gpu.py overhead|step0_replay|profile [--seconds 600] [--attention auto] [--dry-run]

`overhead`: plain vLLM and headrift's engine side by side on one GPU with the same fixed KV cache. Arms: `plain`,
`idle` (headrift's engine, requests that are not measured) and `probing`. In `decode` the prompts are in the prefix
cache, so the steps only decode; in `streaming` new prompts arrive as others finish. Arms take turns, mirrored every
other time, so drift falls on all alike. At the end one engine sizes its KV cache by vLLM's memory profiling, and its
masses must be finite. `step0_replay`: prompts per second measured at the last prompt token only, and with given
answers, beside no measuring. `profile`: the kernels of probed steps by their time, from torch's profiler (8 of 32
layers).

Exit status 1: an engine failed, or a recorded share is missing or outside 0..1. What no longer fits --seconds is
listed as left out. --out is written after each case; the cases that it already has are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import overhead
from _children import Child

ARMS = ("idle", "plain", "probing")
PROFILED = "KV cache sized by memory profiling"
LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
TINY = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 211,
    "max_position_embeddings": 512,
}
CAPTURE_SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256]


@dataclass(frozen=True)
class Case:
    """Prompts to answer: `batch` of them at once, `shared` of their `context` tokens in common, `tokens` answered."""

    kind: str
    batch: int
    context: int
    tokens: int = 64
    shared: int = 0

    @property
    def name(self) -> str:
        shared = f", {self.shared} shared" if self.shared else ""
        return f"{self.kind} {self.batch} x {self.context}{shared}"

    def request(self, seed: int) -> dict[str, Any]:
        """Arguments of Bench.run. The same seed gives the same prompts."""
        prompts = 2 * self.batch if self.kind == "streaming" else self.batch
        request: dict[str, Any] = {"prompts": prompts, "at_once": self.batch, "context": self.context}
        request |= {"tokens": self.tokens, "shared": self.shared}
        return request | {"seed": [self.batch, self.context, self.shared, seed]}


# The most telling ones first. 256 prompts of 4,096 tokens fit a GPU only if they share most of them.
CASES = (
    Case("decode", 64, 1024),
    Case("streaming", 64, 1024),
    Case("decode", 256, 1024),
    Case("decode", 64, 4096),
    Case("decode", 256, 4096, shared=3072),
    Case("streaming", 256, 1024),
    Case("streaming", 64, 4096),
)
TINY_CASES = (Case("decode", 2, 40, 4), Case("streaming", 2, 40, 4), Case("decode", 3, 80, 4, shared=64))


class Setup:
    """What all engines of a run are started with.

    Args:
        dry_run: Whether to run a tiny model with vLLM's CPU build.
        attention: headrift's attention backend.
        folder: Where the model's configuration is written; vLLM makes the weights up.
    """

    def __init__(self, dry_run: bool, attention: str, folder: Path):
        from headrift.engine_setup import machine_defaults

        self.dry_run, self.attention, self.folder = dry_run, attention, folder
        self.plain, self.ours = overhead.environments(gpu=not dry_run)
        shape = TINY if dry_run else LLAMA_3_8B
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
        config |= {"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False, **shape}
        config |= {"bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16"}
        (folder / "config.json").write_text(json.dumps(config))
        self.layers = shape["num_hidden_layers"]
        self.settings: dict[str, Any] = {
            **machine_defaults(),
            "model": str(folder),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": "float32" if dry_run else "bfloat16",
            "max_model_len": 256 if dry_run else 4608,
            "max_num_seqs": 8 if dry_run else 256,
            "max_num_batched_tokens": 64 if dry_run else 8192,
            # Two engines of 16 GB of weights share the GPU; vLLM checks that gpu_memory_utilization is free.
            "kv_cache_memory_bytes": 16 << 20 if dry_run else 38 << 30,
            "gpu_memory_utilization": 0.05 if dry_run else 0.3,
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            "seed": 0,
        }
        if dry_run:
            self.settings["prefix_match_unit"] = None
        else:
            self.settings["compilation_config"] = {"cudagraph_capture_sizes": CAPTURE_SIZES}

    def child(self, kind: str, processes: ExitStack, **environment: str) -> Child:
        """A process for an engine: plain vLLM's without headrift's variables."""
        variables = self.plain if kind == "plain" else self.ours
        return processes.enter_context(Child("_gpu_engine.py", environment={**variables, **environment}))

    def start(self, child: Child, kind: str, steps: int, **settings: Any) -> dict[str, Any]:
        """Start an engine in a process: what it says of itself."""
        engine = {**self.settings, **settings}
        return child.ask("start", kind=kind, settings=engine, attention=self.attention, steps=steps)


class Report:
    """Results of one part, written to a file after each case. Cases of an earlier run are kept."""

    def __init__(self, out: Path, seconds: float, names: list[str]):
        self.out, self.stop = out, time.monotonic() + seconds
        earlier = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
        self.cases: dict[str, Any] = earlier.get("cases", {})
        self.todo = [name for name in names if name not in self.cases]
        self.engines: dict[str, Any] = earlier.get("engines", {})
        self.table: list[str] = earlier.get("table", [])

    @property
    def seconds_left(self) -> float:
        return self.stop - time.monotonic()

    def add(self, name: str, case: Mapping[str, Any]) -> None:
        self.cases[name] = case
        self.todo.remove(name)
        self.write()

    def write(self) -> None:
        content = {"engines": self.engines, "cases": self.cases, "left_out": self.todo, "table": self.table}
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def require_sound(name: str, found: Mapping[str, Any], probed: bool) -> None:
    """RuntimeError if measured requests left no values, or values that cannot be shares."""
    if probed and (found["bad_values"] or not found["values"]):
        raise RuntimeError(f"{name}: {found['bad_values']} of {found['values']} recorded shares are not in 0..1")


# ------------------------------------------------------------------------------------------------- overhead


def measure_overhead(setup: Setup, report: Report) -> None:
    cases = {case.name: case for case in (TINY_CASES if setup.dry_run else CASES)}
    if set(report.todo) & set(cases):
        with ExitStack() as processes:
            kinds = ("plain", "headrift")
            # Made in this thread: a child ends with the thread that made it.
            children = {kind: setup.child(kind, processes) for kind in kinds}
            steps = max(case.tokens for case in cases.values()) - 1
            with ThreadPoolExecutor() as pool:
                starts = {kind: pool.submit(setup.start, children[kind], kind, steps) for kind in kinds}
                report.engines |= {kind: started.result() for kind, started in starts.items()}
            report.write()
            for name in [name for name in report.todo if name in cases]:
                case = compare(cases[name], children, report, turns=2 if setup.dry_run else 6)
                if case is None:
                    break
                report.table = overhead_table(report.cases | {name: case})
                report.add(name, case)
    if PROFILED in report.todo and report.seconds_left > (0 if setup.dry_run else 30):
        report.add(PROFILED, profiled_engine(setup))


def compare(case: Case, children: Mapping[str, Child], report: Report, turns: int) -> dict[str, Any] | None:
    """Samples of each arm and their summary; None if there is no time for two turns."""
    engine = {"plain": children["plain"], "idle": children["headrift"], "probing": children["headrift"]}

    def run(arm: str, seed: int) -> dict[str, Any]:
        more = {} if arm == "plain" else {"probed": arm == "probing"}
        found = engine[arm].ask("run", **case.request(seed), **more)
        require_sound(f"{case.name}, {arm}", found, arm == "probing")
        return found

    begin = time.monotonic()
    for arm in ("plain", "idle", "probing"):  # warm; and for `decode`, the prompts into the prefix cache
        run(arm, 0)
    samples: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    # Streaming computes its prompts: each turn of each arm has new ones, which no prefix cache holds.
    fresh = case.kind == "streaming"
    slowest = time.monotonic() - begin
    for turn, order in enumerate(overhead.turns(list(ARMS), 2 if fresh else turns)):
        if report.seconds_left < slowest:
            break
        begin = time.monotonic()
        for arm in order:
            samples[arm].append(run(arm, 1 + len(ARMS) * turn + ARMS.index(arm) if fresh else 0))
        slowest = time.monotonic() - begin
    if len(samples["plain"]) < 2:
        return None
    return asdict(case) | {"arms": {arm: summary(case, samples[arm], samples["plain"]) for arm in ARMS}}


def summary(case: Case, runs: list[dict[str, Any]], plain: list[dict[str, Any]]) -> dict[str, Any]:
    """Rates of an arm, and its speed over plain's in the same turns (above 1: faster than plain)."""

    streaming = case.kind == "streaming"

    def seconds(run: Mapping[str, Any]) -> float:
        """Of a step; decode steps alone, unless prompts are computed in between."""
        if streaming:
            return float(run["seconds"]) / run["steps"]
        return float(run["decode_seconds"]) / max(run["decode_steps"], 1)

    def tokens(run: Mapping[str, Any]) -> float:
        return float(run["answer_tokens"]) + (run["prompt_tokens"] if streaming else 0.0)

    ratios = [other["seconds"] / own["seconds"] for own, other in zip(runs, plain)]
    steps = [seconds(other) / seconds(own) for own, other in zip(runs, plain)]
    return {
        "ms_per_step": 1e3 * statistics.median(map(seconds, runs)),
        "tokens_per_second": statistics.median(tokens(run) / run["seconds"] for run in runs),
        "speed_over_plain": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
        "steps_over_plain": {"median": statistics.median(steps), "low": min(steps), "high": max(steps)},
        "runs": runs,
    }


def overhead_table(cases: Mapping[str, Any]) -> list[str]:
    lines = ["| case | arm | ms/step | tokens/s | speed over plain | of its steps |", "|---|---|---|---|---|---|"]
    for name, case in cases.items():
        for arm, of in case.get("arms", {}).items():
            ratios = (of["speed_over_plain"], of["steps_over_plain"])
            speeds = [f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})" for ratio in ratios]
            rates = f"{of['ms_per_step']:.2f} | {of['tokens_per_second']:,.0f}"
            lines.append(f"| {name} | {arm} | {rates} | {' | '.join(speeds)} |")
    return lines


def profiled_engine(setup: Setup) -> dict[str, Any]:
    """Start an engine that sizes its KV cache by vLLM's memory profiling, and require finite masses of it.

    The profiling runs the model and captures graphs on a first KV cache that it then throws away.
    """
    overrides = {"num_hidden_layers": min(4, setup.layers)}
    settings = {"kv_cache_memory_bytes": None, "hf_overrides": overrides}
    settings |= {"gpu_memory_utilization": 0.15 if setup.dry_run else 0.5}
    tokens = 4 if setup.dry_run else 16
    case = Case("streaming", 4 if setup.dry_run else 32, 40 if setup.dry_run else 1024, tokens)
    with ExitStack() as processes:
        child = setup.child("headrift", processes)
        about = setup.start(child, "headrift", tokens - 1, **settings)
        found = child.ask("run", **case.request(0), probed=True)
    require_sound(PROFILED, found, True)
    return {"engine": about, **found}


# ------------------------------------------------------------------------------------------------- other parts


def rates_cases(dry_run: bool) -> dict[str, dict[str, Any]]:
    """Arguments of Bench.run by name. Prompts share their first 40%, as behind one system prompt."""
    prompts, context, answer, at_once = (4, 48, 4, 4) if dry_run else (256, 1024, 64, 256)
    common = {"prompts": prompts, "at_once": at_once, "context": context, "shared": context * 2 // 5}
    step0, replay = {**common, "tokens": 1}, {**common, "tokens": answer, "replay": True}
    return {
        "steps=0, measured": {**step0, "probed": True},
        "steps=0, not measured": step0,
        "replay, measured": {**replay, "probed": True},
        "replay, not measured": replay,
        "decoding the answers, measured": {**common, "tokens": answer, "probed": True},
    }


def measure_rates(setup: Setup, report: Report) -> None:
    cases = rates_cases(setup.dry_run)
    if not report.todo:
        return
    with ExitStack() as processes:
        child = setup.child("headrift", processes)
        report.engines["headrift"] = setup.start(child, "headrift", max(case["tokens"] for case in cases.values()) - 1)
        for i, case in enumerate(cases.values()):  # warm, with few prompts
            child.ask("run", **{**case, "prompts": 2, "seed": [9, i]})
        slowest = 0.0
        for name in list(report.todo):
            if report.seconds_left < 2 * slowest:
                break
            begin = time.monotonic()
            number, case = list(cases).index(name), cases[name]
            runs = [child.ask("run", **case, seed=[turn, number]) for turn in range(2)]
            slowest = max(slowest, (time.monotonic() - begin) / 2)
            for found in runs:
                require_sound(name, found, case.get("probed", False))
            seconds = [found["seconds"] for found in runs]
            rate = case["prompts"] / statistics.median(seconds)
            rates = {"prompts_per_second": rate, "tokens_per_second": rate * case["context"]}
            report.table.append(f"{name:32} {rate:9.1f} prompts/s  {rates['tokens_per_second']:11,.0f} tokens/s")
            report.add(name, {**case, "seconds": seconds, **rates})


def measure_profile(setup: Setup, report: Report) -> None:
    if not report.todo:
        return
    case = Case("decode", 2, 40, 4) if setup.dry_run else Case("decode", 64, 1024, 16)
    with ExitStack() as processes:
        # In the process itself, so that torch's profiler sees the worker's kernels.
        child = setup.child("headrift", processes, VLLM_ENABLE_V1_MULTIPROCESSING="0")
        overrides = {"num_hidden_layers": min(8, setup.layers)}
        report.engines["headrift"] = setup.start(child, "headrift", case.tokens - 1, hf_overrides=overrides)
        request = {**case.request(0), "probed": True}
        for _ in range(2):
            child.ask("run", **request)
        found = child.ask("profile", **request)
    require_sound("profile", found, True)
    total = sum(kernel["microseconds"] for kernel in found["kernels"])
    for kernel in found["kernels"][:25]:
        part = f"{kernel['microseconds'] / total:6.1%} {kernel['microseconds']:10.0f} us {kernel['calls']:6} x "
        report.table.append(part + kernel["kernel"][:90])
    if not total:
        raise RuntimeError("the profiler recorded no kernel")
    report.add("probed decode steps", {**asdict(case), **found})


def names_of(part: str, dry_run: bool) -> list[str]:
    if part == "overhead":
        return [*(case.name for case in (TINY_CASES if dry_run else CASES)), PROFILED]
    return list(rates_cases(dry_run)) if part == "step0_replay" else ["probed decode steps"]


PARTS: dict[str, Callable[[Setup, Report], None]] = {
    "overhead": measure_overhead,
    "step0_replay": measure_rates,
    "profile": measure_profile,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--attention", default="auto", help="headrift's attention backend")
    parser.add_argument("--out", type=Path, help="default: bench/results/PART_gpu.json")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on a CPU; figures mean nothing")
    args = parser.parse_args()
    if not args.dry_run:
        from headrift.engine_setup import has_gpu

        if not has_gpu():
            raise SystemExit("overhead_gpu: this torch is not a build for GPUs (--dry-run runs it on a CPU)")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    out = args.out or Path(__file__).parent / "results" / f"{args.part}_gpu.json"
    report = Report(out, args.seconds, names_of(args.part, args.dry_run))
    with tempfile.TemporaryDirectory(prefix="headrift-model-") as folder:
        try:
            PARTS[args.part](Setup(args.dry_run, args.attention, Path(folder)), report)
        finally:
            report.write()
    print("\n".join(report.table))


if __name__ == "__main__":
    main()
