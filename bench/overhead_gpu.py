"""What probing costs on a GPU at the size of Llama-3-8B, with random weights: nothing is downloaded.

    python bench/overhead_gpu.py overhead|step0_replay|profile [--seconds 600] [--attention auto] [--dry-run]

`overhead`: first, an engine that sizes its KV cache by vLLM's memory profiling must record finite masses. Then plain
vLLM and headrift's engine run with the same KV cache, both at once if the GPU holds them: `plain`, `idle` (requests
that are not measured) and `probing` in turns. `decode`: the prompts are in the prefix cache; `streaming`: new prompts
arrive as others finish. `step0_replay`: prompts per second measured at the last prompt token only, and with given
answers, and without measuring. `profile`: kernels of probed steps by their time, from torch's profiler (8 layers).

A case that does not fit the GPU's free memory is listed as too large, which is no failure; if none fits with 32 layers,
the model has 16 or 8. Exit status 1: an engine failed, a recorded share is missing or outside 0..1, or no case fits.
What no longer fits --seconds is listed as left out. --out is written after each case; cases that it has are kept.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

import overhead
import utils
from utils import Child, Shapes

ENGINE_OF = {"idle": "headrift", "plain": "plain", "probing": "headrift"}
ARMS = tuple(ENGINE_OF)
PROFILED = "KV cache sized by memory profiling"
_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_KEYS += ("vocab_size", "max_position_embeddings")
LLAMA_3_8B = dict(zip(_KEYS, (4096, 14336, 32, 32, 8, 128256, 8192)))
TINY = dict(zip(_KEYS, (128, 96, 2, 4, 2, 211, 512)))
LAYERS = {"overhead": (32, 16, 8), "step0_replay": (32, 16, 8), "profile": (8, 4)}
PAGE = 16  # tokens of a block of the KV cache
# KV cache of prompts that are never decoded: those of two steps of 8,192 tokens, with the prefixes that they share.
PREFILL_TOKENS = 32768
CAPTURE_SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256]
# Of an engine besides weights and KV cache: CUDA context, activations of 8,192 tokens, logits, graphs and recorder.
ENGINE_BYTES = 5 << 30
USABLE = 0.95  # of what is free: allocators round up
GB = 1e9


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

    @property
    def streaming(self) -> bool:
        return self.kind == "streaming"

    @property
    def prompts(self) -> int:
        return 2 * self.batch if self.streaming else self.batch

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, those in common once."""
        return self.shared + self.prompts * (self.context - self.shared)

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache must hold, so that no prompt leaves the prefix cache between turns."""
        own = self.context - self.shared + self.tokens + 2 * PAGE
        return max(self.shared + self.batch * own, PREFILL_TOKENS)

    def request(self, seed: int) -> dict:
        """Arguments of Engine.run. The same seed gives the same prompts."""
        request = {"prompts": self.prompts, "at_once": self.batch, "context": self.context, "tokens": self.tokens}
        return {**request, "shared": self.shared, "seed": [self.batch, self.context, self.shared, seed]}


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
# Those without which a part is incomplete; a slow GPU has time for no more.
REQUIRED = {
    "overhead": (PROFILED, "decode 64 x 1024"),
    "step0_replay": ("steps=0, measured", "replay, measured"),
    "profile": ("probed decode steps",),
}


def rates_cases(dry_run: bool) -> dict[str, dict]:
    """Return the arguments of Engine.run by name. Prompts share their first 40%, as behind one system prompt."""
    prompts, context, answer, at_once = (4, 48, 4, 4) if dry_run else (256, 1024, 64, 256)
    common = {"prompts": prompts, "at_once": at_once, "context": context, "shared": context * 2 // 5}
    step0, replay = {**common, "tokens": 1}, {**common, "tokens": answer, "replay": True}
    return {
        "steps=0, measured": {**step0, "probed": True},
        "replay, measured": {**replay, "probed": True},
        "steps=0, not measured": step0,
        "replay, not measured": replay,
        "decoding the answers, measured": {**common, "tokens": answer, "probed": True},
    }


def profile_case(dry_run: bool) -> Case:
    return Case("decode", 2, 40, 4) if dry_run else Case("decode", 64, 1024, 16)


def kv_tokens(part: str, dry_run: bool) -> dict[str, int]:
    """Tokens that the KV cache must hold for each case of a part, in the order of the cases."""
    if part == "overhead":
        return {case.name: case.kv_tokens for case in (TINY_CASES if dry_run else CASES)}
    if part == "profile":
        return {"probed decode steps": profile_case(dry_run).kv_tokens}
    needs = {}
    for name, case in rates_cases(dry_run).items():
        decoded = Case("decode", case["at_once"], case["context"], case["tokens"], case["shared"])
        needs[name] = PREFILL_TOKENS if case["tokens"] == 1 or "replay" in case else decoded.kv_tokens
    return needs


class Memory(NamedTuple):
    """What fits a GPU: engines at once, the KV cache of each, and the cases that do not fit with the reason."""

    engines: int
    kv_bytes: int
    too_large: dict[str, str]


def share_memory(total: float, weights: int, cases: dict[str, int], engines: int = 1) -> Memory | None:
    """Return what fits `total` free bytes, with the most engines at once that hold any case.

    weights: bytes of each engine's; cases: bytes of KV cache by name; engines: the most that are of use at once.
    """
    for at_once in range(engines, 0, -1):
        room = USABLE * total / at_once - weights - ENGINE_BYTES
        fitting = [need for need in cases.values() if need <= room]
        if fitting:
            reason = f"needs {{:.1f}} GB of KV cache, and {room / GB:.1f} GB are left"
            too_large = {name: reason.format(need / GB) for name, need in cases.items() if need > room}
            return Memory(at_once, max(fitting), too_large)
    return None


def choose_sizes(part: str, free: float, dry_run: bool) -> tuple[Shapes, Memory]:
    """Return the model, with the most layers with which a case of the part fits, and what fits; else ValueError."""
    full, element = Shapes.from_config(TINY if dry_run else LLAMA_3_8B), 4 if dry_run else 2
    for layers in (full.layers,) if dry_run else LAYERS[part]:
        shape = replace(full, layers=layers)
        needs = {name: shape.kv_bytes(n, element) for name, n in kv_tokens(part, dry_run).items()}
        weights = element * shape.parameters
        memory = share_memory(free, weights, needs, engines=2 if part == "overhead" else 1)
        if memory is not None:
            return shape, memory
    need = (weights + ENGINE_BYTES + min(needs.values())) / USABLE / GB
    raise ValueError(f"{free / GB:.1f} GB of GPU memory are free, and the smallest case needs {need:.1f} GB")


def free_bytes() -> tuple[int, int]:
    """Free and total bytes of the GPU. In a process of its own: this one's CUDA context would take some of them."""
    program = "import json, torch; print(json.dumps(torch.cuda.mem_get_info()))"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    free, total = json.loads(done.stdout.splitlines()[-1])
    return free, total


class Engine(overhead.Engine):
    """A child process with one engine."""

    def profile(self, **case) -> dict:
        """Run as `run` does, under torch's profiler; the kernels by their time. The engine must be in this process."""
        import torch
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as profiler

        gpu = torch.cuda.is_available()
        with profiler(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profile:
            result = self.run(**case)
        events = [
            (event.key, event.count, event.self_device_time_total if gpu else event.self_cpu_time_total)
            for event in profile.key_averages()
        ]
        kernels = [{"kernel": key, "calls": n, "microseconds": round(us, 1)} for key, n, us in events if us > 0]
        return result | {"kernels": sorted(kernels, key=lambda kernel: -kernel["microseconds"])[:60]}


class Part(utils.Progress):
    """A part's results, and its engines. folder: for the model's configuration; vLLM makes the weights up."""

    def __init__(self, args, folder: Path, free: float, total: float):
        from transformers import LlamaConfig

        from headrift.vllm_engine import machine_defaults

        shape, self.memory = choose_sizes(args.part, free, args.dry_run)
        names = ([PROFILED] if args.part == "overhead" else []) + list(kv_tokens(args.part, args.dry_run))
        required = names if args.dry_run else REQUIRED[args.part]
        earlier = utils.read_json(args.out) if args.out.exists() else {}
        super().__init__(args.out, args.seconds, names, required, self.memory.too_large, earlier.get("cases", {}))
        self.engines, self.table = earlier.get("engines", {}), earlier.get("table", [])
        self.sizes = {"layers": shape.layers, "free_bytes": int(free), "kv_cache_bytes": self.memory.kv_bytes}
        self.sizes["engines_at_once"] = self.memory.engines
        self.dry_run, self.attention, self.free = args.dry_run, args.attention, free / total
        self.plain, self.ours = overhead.environments(gpu=not args.dry_run)
        sizes = {**(TINY if args.dry_run else LLAMA_3_8B), "num_hidden_layers": shape.layers}
        LlamaConfig(architectures=["LlamaForCausalLM"], dtype="bfloat16", **sizes).save_pretrained(folder)
        self.settings = {
            **machine_defaults(),
            "model": str(folder),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": "bfloat16",
            "max_model_len": 4608,
            "max_num_seqs": 256,
            "max_num_batched_tokens": 8192,
            "kv_cache_memory_bytes": self.memory.kv_bytes,
            "gpu_memory_utilization": 0.05,  # vLLM only checks that this much is free
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            "seed": 0,
        }
        if args.dry_run:
            self.settings |= {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 8}
            self.settings |= {"max_num_batched_tokens": 64, "prefix_match_unit": None}
        else:
            self.settings["compilation_config"] = {"cudagraph_capture_sizes": CAPTURE_SIZES}

    def child(self, kind: str, processes: ExitStack, **environment: str) -> Child:
        """A process for an engine: plain vLLM's without headrift's variables."""
        variables = self.plain if kind == "plain" else self.ours
        return processes.enter_context(Child("overhead_gpu.py", "engine", environment={**variables, **environment}))

    def start(self, child: Child, kind: str, steps: int, **settings) -> dict:
        """Start an engine in a process; its description."""
        options = {"steps": steps, "attention_backend": self.attention, "regions": overhead.REGIONS}
        settings = {**self.settings, **settings}
        return child.call("start", kind=kind, settings=settings, **(options if kind != "plain" else {}))

    def save(self) -> None:
        self.write({"sizes": self.sizes, "engines": self.engines, "cases": self.cases, "table": self.table})

    def add(self, name: str, case: dict) -> None:
        self.done(name, case)
        self.save()


def run_case(child: Child, name: str, probed: bool | None = None, method: str = "run", **case) -> dict:
    """Run a case, measured or not (None: by plain vLLM); RuntimeError without the shares that it is to record."""
    run = child.call(method, **case, **({} if probed is None else {"probed": probed}))
    if probed and (run["bad_values"] or not run["values"]):
        raise RuntimeError(f"{name}: {run['bad_values']} of {run['values']} recorded shares are not in 0..1")
    return run


def measure_overhead(part: Part) -> None:
    failure: RuntimeError | None = None
    if PROFILED in part.todo:
        try:
            part.add(PROFILED, profiled_engine(part))
        except RuntimeError as error:  # the times are still worth having
            failure = error
    todo = [case for case in (TINY_CASES if part.dry_run else CASES) if case.name in part.todo]
    groups = [("plain", "headrift")] if part.memory.engines > 1 else [("plain",), ("headrift",)]
    samples: dict[str, dict[str, list]] = {case.name: {} for case in todo}
    for number, kinds in enumerate(groups):
        if todo:
            stop = time.monotonic() + (part.stop - time.monotonic()) / (len(groups) - number)
            sample_group(part, kinds, todo, samples, stop)
            todo = [case for case in todo if samples[case.name]]
    if failure is not None:
        raise failure


def sample_group(part: Part, kinds: tuple[str, ...], todo: list[Case], samples: dict[str, dict], stop: float) -> None:
    """Time the arms of these kinds of engine in each case, until the time is over; report cases with all arms."""
    with ExitStack() as processes:
        # Made in this thread: a child ends with the thread that made it.
        children = {kind: part.child(kind, processes) for kind in kinds}
        with ThreadPoolExecutor() as pool:
            steps = max(case.tokens for case in todo) - 1
            starts = {kind: pool.submit(part.start, children[kind], kind, steps) for kind in kinds}
            part.engines |= {kind: started.result() for kind, started in starts.items()}
        part.save()
        pace = 0.0  # seconds of a first turn for each prompt token
        for case in todo:
            # Later decode turns take a fraction of the first, whose prompts are not in the prefix cache.
            first_turns = 3 if case.streaming else 2
            if time.monotonic() + first_turns * pace * case.prompt_tokens >= stop:
                continue
            runs, seconds = sample(case, children, stop, turns=2 if part.dry_run or case.streaming else 6)
            pace = max(pace, seconds / case.prompt_tokens)
            arms = samples[case.name]
            arms |= runs
            if runs and len(arms) == len(ARMS):
                summaries = {arm: summary(case, arms[arm], arms["plain"]) for arm in ARMS}
                result = {**asdict(case), "engines_at_once": part.memory.engines, "arms": summaries}
                part.done(case.name, result)
                rows = [
                    [name, arm, f"{figures['ms_per_step']:.2f}", f"{figures['tokens_per_second']:,.0f}"]
                    + [utils.cell(figures[speed], 3) for speed in ("speed_over_plain", "steps_over_plain")]
                    for name, kept in part.cases.items()
                    for arm, figures in kept.get("arms", {}).items()
                ]
                head = ["case", "arm", "ms/step", "tokens/s", "speed over plain", "of its steps"]
                part.table = utils.markdown(head, rows).splitlines()
                part.save()


def sample(case: Case, children: dict[str, Child], stop: float, turns: int) -> tuple[dict[str, list], float]:
    """Runs of each arm of these engines, empty without the time for two turns; and the seconds of a first turn."""
    seeds = count(1)

    def run(arm: str, seed: int | None = None) -> dict:
        # Streaming computes its prompts: each turn of each arm has new ones, which no prefix cache holds.
        seed = (next(seeds) if case.streaming else 0) if seed is None else seed
        probed = {"plain": None, "idle": False, "probing": True}[arm]
        return run_case(children[ENGINE_OF[arm]], f"{case.name}, {arm}", probed, **case.request(seed))

    arms = {arm: partial(run, arm) for arm in ARMS if ENGINE_OF[arm] in children}
    begin = time.monotonic()
    for arm in arms:  # warm; and for `decode`, the prompts into the prefix cache
        run(arm, 0)
    first = time.monotonic() - begin
    samples = utils.run_in_turns(arms, turns, stop, first)
    return (samples if all(len(runs) > 1 for runs in samples.values()) else {}), first


def summary(case: Case, runs: list[dict], plain: list[dict]) -> dict:
    """Rates of an arm, and its speed over plain's in the same turns (above 1: faster than plain)."""
    # Of decode steps alone, unless prompts are computed in between.
    seconds, steps = ("seconds", "steps") if case.streaming else ("decode_seconds", "decode_steps")
    own, other = ([run[seconds] / max(run[steps], 1) for run in of_arm] for of_arm in (runs, plain))
    rates = [(run["tokens"] + case.streaming * run["prompt_tokens"]) / run["seconds"] for run in runs]
    return {
        "ms_per_step": 1e3 * statistics.median(own),
        "tokens_per_second": statistics.median(rates),
        "speed_over_plain": utils.spread([b["seconds"] / a["seconds"] for a, b in zip(runs, plain)]),
        "steps_over_plain": utils.spread([b / a for a, b in zip(own, other)]),
        "runs": [{name: value for name, value in run.items() if name != "answers"} for run in runs],
    }


def profiled_engine(part: Part) -> dict:
    """Require finite masses of an engine that sizes its KV cache by vLLM's profiling, with a first, other cache."""
    settings = {"kv_cache_memory_bytes": None, "hf_overrides": {"num_hidden_layers": min(4, part.sizes["layers"])}}
    settings["gpu_memory_utilization"] = 0.15 if part.dry_run else part.free / 2
    case = Case("streaming", 4, 40, 4) if part.dry_run else Case("streaming", 32, 1024, 16)
    with ExitStack() as processes:
        child = part.child("headrift", processes)
        about = part.start(child, "headrift", case.tokens - 1, **settings)
        return {"engine": about, **run_case(child, PROFILED, True, **case.request(0))}


def measure_rates(part: Part) -> None:
    cases = rates_cases(part.dry_run)
    with ExitStack() as processes:
        child = part.child("headrift", processes)
        part.engines["headrift"] = part.start(child, "headrift", max(case["tokens"] for case in cases.values()) - 1)
        for i, case in enumerate(cases.values()):  # warm, with few prompts
            child.call("run", **{**case, "prompts": 2, "seed": [9, i]})
        slowest = 0.0
        for number, (name, case) in enumerate(cases.items()):
            runs: list[dict] = []
            while name in part.todo and len(runs) < 2 and time.monotonic() + slowest < part.stop:
                runs.append(run_case(child, name, **{"probed": False, **case}, seed=[len(runs), number]))
                slowest = max(slowest, runs[-1]["seconds"])
            if runs:
                seconds = [run["seconds"] for run in runs]
                rate = case["prompts"] / statistics.median(seconds)
                rates = {"prompts_per_second": rate, "tokens_per_second": rate * case["context"]}
                part.table.append(f"{name:32} {rate:9.1f} prompts/s  {rates['tokens_per_second']:11,.0f} tokens/s")
                part.add(name, {**case, "seconds": seconds, **rates})


def measure_profile(part: Part) -> None:
    case = profile_case(part.dry_run)
    with ExitStack() as processes:
        # In the process itself, so that torch's profiler sees the worker's kernels.
        child = part.child("headrift", processes, VLLM_ENABLE_V1_MULTIPROCESSING="0")
        part.engines["headrift"] = part.start(child, "headrift", case.tokens - 1)
        for method in ("run", "run", "profile"):
            profile = run_case(child, "profile", True, method, **case.request(0))
    total = sum(kernel["microseconds"] for kernel in profile["kernels"])
    for kernel in profile["kernels"][:25]:
        figures = f"{kernel['microseconds'] / total:6.1%} {kernel['microseconds']:10.0f} us {kernel['calls']:6} x "
        part.table.append(figures + kernel["kernel"][:90])
    if not total:
        raise RuntimeError("the profiler recorded no kernel")
    part.add("probed decode steps", {**asdict(case), **profile})


PARTS = {"overhead": measure_overhead, "step0_replay": measure_rates, "profile": measure_profile}


def main() -> None:
    options = utils.Options(__doc__, "{part}_gpu", short=False)
    options.add_argument("part", choices=PARTS)
    options.add_argument("--seconds", type=float, default=600)
    options.add_argument("--attention", default="auto", help="headrift's attention backend")
    options.add_argument("--memory", type=float, metavar="GB", help="use no more of the GPU (default: what is free)")
    options.add_argument("--dry-run", action="store_true", help="a tiny model on a CPU; figures mean nothing")
    args = options.parse()
    if not args.dry_run:
        from headrift.vllm_engine import has_gpu

        if not has_gpu():
            raise SystemExit("overhead_gpu: this torch is not a build for GPUs (--dry-run runs it on a CPU)")
    free, total = (64e9, 64e9) if args.dry_run else free_bytes()
    free = min(free, args.memory * GB) if args.memory else free
    with tempfile.TemporaryDirectory(prefix="headrift-model-") as folder:
        try:
            part = Part(args, Path(folder), free, total)
        except ValueError as error:
            raise SystemExit(f"overhead_gpu: {error}") from None
        print(f"{free / GB:.0f} GB are free: {part.sizes}", flush=True)
        try:
            if part.todo:
                PARTS[args.part](part)
        finally:
            part.save()
    print("\n".join([*part.table, *(f"too large: {name} {reason}" for name, reason in part.too_large.items())]))


if __name__ == "__main__":
    utils.run_script(main, engine=Engine)
