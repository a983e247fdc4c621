"""What headrift's settings are worth on this machine, one at a time; and what a start takes.

    python bench/tuning.py [--turns 8] [--short] [--model DIR]

Throughput: two engines score the same prompts in turns (ABBA), each with an empty prefix cache: one with headrift's
default settings, one with a single thing changed. A ratio below 1: the setting pays. Start-up: from the start of a
process until an engine is there, of plain vLLM, of headrift, and of headrift without what it does about it; and until
the modules that vLLM needs are imported, which is the floor. One process at a time, in turns.
"""

import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import utils
from peers import start_headrift
from utils import Stopwatch

STEPS, TIMES = 12, ("seconds", "cpu_seconds")
# What is not as headrift has it: engine arguments, and environment variables, which are in capitals.
CHANGES: dict[str, dict] = {
    "memory in small pages (headrift asks for huge ones)": {"THP_MEM_ALLOC_ENABLE": "0"},
    "malloc's memory in huge pages too (small)": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
    "the norms that vLLM takes by itself (headrift's own)": {
        "ir_op_priority": {"rms_norm": ["native"], "fused_add_rms_norm": ["native"]}
    },
    "torch.compile (without)": {"enforce_eager": False},
    "cached prefixes of whole blocks (to the token)": {"prefix_match_unit": None},
    "KV cache in blocks of 128 tokens, vLLM's default (32)": {"block_size": 128},
    "steps of at most 512 tokens (2,048, vLLM's default)": {"max_num_batched_tokens": 512},
    "steps of at most 8,192 tokens (2,048, vLLM's default)": {"max_num_batched_tokens": 8192},
    "at most 32 requests in flight (128)": {"max_num_seqs": 32},
}
# How an engine is started: code that gets the model's folder as the first argument.
_PLAIN = """
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.llm_engine import LLMEngine
settings = dict(dtype="float32", enforce_eager=True, kv_cache_memory_bytes=4 << 30, disable_log_stats=True)
LLMEngine.from_engine_args(EngineArgs(model=sys.argv[1], **settings))
"""
_HEADRIFT = """
from headrift import Scorer
Scorer(sys.argv[1], system_prompt="Be brief.", engine_args={"kv_cache_memory_bytes": 4 << 30})
"""
_COMPILED = _HEADRIFT.replace("4 << 30", '4 << 30, "enforce_eager": False')
COMPILING = "headrift, compiled, the first time"
STARTS = {
    "vLLM's modules imported without garbage collection, no engine": (
        "import gc; gc.disable(); import vllm.engine.arg_utils, vllm.v1.engine.llm_engine, vllm.v1.worker.cpu_worker"
    ),
    "plain vLLM": _PLAIN,
    "headrift": _HEADRIFT,
    "headrift, compiled, with the compiled model on disk": _COMPILED,
    COMPILING: _COMPILED,
    "headrift, garbage collected on the way": f"import gc; gc.disable = lambda: None\n{_HEADRIFT}",
    "headrift, KV cache filled with zeros": (
        "import contextlib; from headrift import vllm_engine; vllm_engine.lazy_kv_cache = contextlib.nullcontext\n"
        + _HEADRIFT
    ),
}


def compare(model: Path, changes: list[str], prompts: list[dict], turns: int) -> list[dict]:
    """Measure each change against the default settings."""
    results = []
    with start_headrift(model, STEPS) as default:
        default.call("run", rows=prompts)
        for change in changes:
            environment = {**os.environ, **{key: value for key, value in CHANGES[change].items() if key.isupper()}}
            engine_args = {key: value for key, value in CHANGES[change].items() if not key.isupper()}
            with start_headrift(model, STEPS, environment, **engine_args) as changed:
                changed.call("run", rows=prompts)
                engines = {"without": default, "with": changed}
                arms = {name: partial(child.call, "run", rows=prompts) for name, child in engines.items()}
                samples = utils.columns(utils.run_in_turns(arms, turns), TIMES)
            ratios = utils.median_ratios(samples["without"], samples["with"], TIMES)
            results.append({"change": change, "ratios": ratios, "samples": samples})
            print(f"{change}: {utils.cell(ratios['seconds'], 3)}", flush=True)
    return results


def starts(model: Path, turns: int, short: bool) -> dict[str, list[float]]:
    """Time whole processes that start an engine and end at once."""
    kinds = [name for name, code in STARTS.items() if code is not _COMPILED or not short]  # compiling takes a minute
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with tempfile.TemporaryDirectory() as folder:
        compiled = {"VLLM_CACHE_ROOT": str(Path(folder, "compiled"))}
        # What vLLM caches of a model in its first start is on disk in all starts but those of COMPILING.
        time_process(_HEADRIFT if short else _COMPILED, model, environment | compiled)
        for turn, order in enumerate(utils.orders(kinds, turns)):
            for name in order:
                more = {"VLLM_PLUGINS": ""} if STARTS[name] is _PLAIN else compiled
                if name == COMPILING:
                    more = {"VLLM_CACHE_ROOT": str(Path(folder, str(turn)))}
                seconds[name].append(time_process(STARTS[name], model, environment | more))
            print(f"starts, turn {turn}: " + ", ".join(f"{times[-1]:.1f}" for times in seconds.values()), flush=True)
    return seconds


def time_process(code: str, model: Path, environment: dict[str, str]) -> float:
    """Time a process that runs this code and ends."""
    command = [sys.executable, "-P", "-c", f"import os, sys\n{code}\nos._exit(0)", str(model)]
    with Stopwatch() as clock:
        subprocess.run(command, env=environment, check=True, capture_output=True)
    return clock.seconds


def table(report: dict) -> str:
    changes = [[row["change"], *(utils.cell(row["ratios"][kind], 3) for kind in TIMES)] for row in report["changes"]]
    starts = [[name, utils.cell(utils.spread(seconds))] for name, seconds in report["starts"].items()]
    return utils.page(
        utils.title(report, "What settings are worth"),
        f"Made by `bench/tuning.py`: {report['prompts']} prompts, {STEPS} steps; throughput with a change over that\n"
        f"without it, medians of {report['turns']} ABBA turns with 95% bootstrap intervals. Below 1, what "
        "headrift has\n(in brackets) is the faster.",
        utils.markdown(["change", "wall time", "CPU time"], changes),
        "From the start of a process until its engine is ready, seconds (least to most):",
        utils.markdown(["", "seconds"], starts),
    )


def main() -> None:
    options = utils.Options(__doc__, "tuning")
    options.amount("turns", 8, 2, "turns of each change")
    args = options.parse()
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    sets = utils.ROOT / "datasets/banned_word.jsonl", utils.ROOT / "system_prompts/banned_word.txt"
    prompts = utils.read_prompts(*sets, limit=8 if args.short else 48)
    begun = starts(args.model, 1 if args.short else 4, args.short)
    report = utils.new_report(args, turns=args.turns, prompts=len(prompts), starts=begun)
    report["changes"] = compare(args.model, list(CHANGES)[: 1 if args.short else None], prompts, args.turns)
    utils.write(report, table(report), args.out)


if __name__ == "__main__":
    main()
