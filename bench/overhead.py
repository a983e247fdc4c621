"""What probing costs over decoding without it: plain vLLM, headrift idle, probing, with logit statistics or entropy.

    python bench/overhead.py [--pairs 20] [--short] [--model DIR]
    python bench/overhead.py --case "attention entropy" --out bench/results/entropy.json

Each arm is an engine in a process of its own, with identical settings, stopped while another works. `plain`: vLLM
with no plugin loaded. `idle`: headrift's engine, requests that are not measured. `probing`, `logits`, `entropy`:
measured, the second with next-token statistics, the third with the entropy of each head's attention. `headrift as it
comes`: probing, with the norms that headrift takes on a CPU, the one arm with another setting. All arms answer the same
token ids with the same number of tokens (`ignore_eos`). The prompts are in the prefix cache, so that what is timed is
decoding, the last tokens of each prompt and, where there are any, the drains: the case in which probing weighs most.

Arms take turns (idle, plain, probing, logits), mirrored every other time, so that what drifts on the machine falls to
all of them as ABBA does it, and plain lies beside those that matter most. A ratio is throughput over plain's in the
same turn: above 1 the arm is the faster. Medians have 95% bootstrap intervals over the turns; two processes of one kind
can differ by some per cent, which no interval has (see idle.py). Besides wall time the
ratios are taken of CPU time of the whole process, which other processes disturb less, and of the steps that decode and
do nothing else.
On a GPU: overhead_gpu.py.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _measure
from _children import Child
from _model_math import Shapes, recorded_bytes_bound

T = TypeVar("T")
PLAIN = "plain"
REGIONS = ("system", "user", "prompt")
# A share needs the system prompt's mass and the prompt's: no engine records fewer.
FEWEST_REGIONS = ("system", "prompt")
PAGE = 32
MOST_BATCH = 64
KV_ROOM = 1.25  # of what the cases' prompts and answers take


@dataclass(frozen=True, slots=True)
class Arm:
    """An engine to start. kind: plain, idle, probing, logits or entropy. attention: for plain vLLM's backend, else
    ours. as_it_comes: with headrift's own settings where these are faster, and not with vLLM's."""

    kind: str
    attention: str = "auto"
    regions: tuple[str, ...] = REGIONS
    as_it_comes: bool = False


@dataclass(frozen=True, slots=True)
class Case:
    """A batch of prompts. shared: they have all but their last page in common. arms: of those that are started.
    more: times the turns of the other cases."""

    name: str
    batch: int = 8
    context: int = 1000
    steps: int = 10
    shared: bool = False
    arms: tuple[str, ...] = (PLAIN, "probing")
    more: int = 1

    def prompts(self, vocabulary: int) -> list[dict[str, Any]]:
        """Token ids with regions: 40% of them the system prompt's, all but the last few of the rest the user's."""
        random = np.random.default_rng([self.batch, self.context])
        ids = random.integers(min(100, vocabulary - 1), vocabulary, (self.batch, self.context))
        if self.shared:
            ids[:, : (self.context - 1) // PAGE * PAGE] = ids[0, : (self.context - 1) // PAGE * PAGE]
        system = self.context * 2 // 5
        regions = {"system": (0, system), "user": (system, self.context - 4)}
        return [{"ids": row, "regions": regions} for row in ids.tolist()]

    @property
    def tokens(self) -> int:
        """Tokens whose keys and values the engine holds."""
        own = self.steps + 1 + (PAGE if self.shared else self.context)
        return self.batch * (own + PAGE) + (self.context if self.shared else 0)


ALL = ("idle", PLAIN, "probing", "logits", "headrift as it comes")
BASE = Case("base: batch 8, context 1,000, 10 steps, 3 regions", arms=ALL, more=3)
CASES = (
    BASE,
    Case("batch 64, context 100", 64, 100, arms=ALL, more=3),
    Case("batch 1", batch=1),
    Case("context 100", context=100),
    Case("context 4,000, shared prefix", context=4000, shared=True),
    Case("40 steps", steps=40),
    Case("2 regions, the fewest there are", arms=(PLAIN, "probing, 2 regions")),
    Case("attention entropy", arms=(PLAIN, "entropy")),
)
SHORT_CASES = (
    Case("batch 4, context 200", 4, 200, 4, arms=ALL),
    Case("batch 16, context 100", 16, 100, 4),
    Case("2 regions, the fewest there are", 4, 200, 4, arms=(PLAIN, "probing, 2 regions")),
    Case("attention entropy", 4, 200, 4, arms=(PLAIN, "entropy")),
)
CPU_ARMS = {
    PLAIN: Arm(PLAIN),
    "probing": Arm("probing"),
    "logits": Arm("logits"),
    "idle": Arm("idle"),
    "headrift as it comes": Arm("probing", as_it_comes=True),
    "probing, 2 regions": Arm("probing", regions=FEWEST_REGIONS),
    "entropy": Arm("entropy"),
}


def turns(arms: list[T], n: int) -> Iterator[list[T]]:
    """The orders in which the arms run, n times: mirrored every other time."""
    for turn in range(n):
        yield arms if turn % 2 == 0 else arms[::-1]


def engine_settings(model: Path, cases: tuple[Case, ...]) -> dict[str, Any]:
    """The same for every arm, and nothing that an arm could choose otherwise left open."""
    from headrift.engine_setup import machine_defaults

    tokens = sum(case.tokens for case in {(c.batch, c.context): c for c in cases}.values())
    room = int(KV_ROOM * Shapes.of(model).kv_bytes(tokens, 4))
    longest = max(case.context + case.steps + 1 for case in cases)
    return {
        "model": str(model),
        **machine_defaults(),
        "prefix_match_unit": None,  # which vLLM by itself would refuse
        "max_num_seqs": MOST_BATCH,
        "max_model_len": -(-longest // PAGE) * PAGE,
        "max_num_batched_tokens": 2048,
        "kv_cache_memory_bytes": max(room, 64 << 20),
        "seed": 0,
        "disable_log_stats": True,
        # headrift takes other norms on a CPU, which has nothing to do with probing.
        "ir_op_priority": {"rms_norm": ["native"], "fused_add_rms_norm": ["native"]},
    }


def environments(gpu: bool = False) -> tuple[dict[str, str], dict[str, str]]:
    """Of a process without headrift, and of one with it; but for that the same."""
    from headrift.engine_setup import prepare_environment
    from headrift.vllm_plugin import plugin

    prepare_environment(verbose=False)
    ours = dict(os.environ) | ({} if gpu else {"VLLM_CPU_OMP_THREADS_BIND": "nobind"})
    # An empty list of plugins: as if headrift were not installed.
    plain = {name: value for name, value in ours.items() if name not in (plugin.SWITCH, plugin.BACKEND)}
    return plain | {"VLLM_PLUGINS": ""}, ours


def start(arm: Arm, settings: dict[str, Any], steps: int, processes: ExitStack) -> tuple[Child, dict]:
    """The arm's engine, and what it says of itself."""
    plain, ours = environments()
    child = processes.enter_context(Child("_overhead_engine.py", environment=plain if arm.kind == PLAIN else ours))
    if arm.kind == PLAIN:
        backend = {} if arm.attention == "auto" else {"attention_backend": arm.attention}
        return child, child.ask("start", kind=PLAIN, settings=settings | backend)
    wanted = {"logit_stats": arm.kind == "logits", "row_entropy": arm.kind == "entropy"}
    options = {"regions": arm.regions, "steps": steps, **wanted}
    probed = arm.kind != "idle"
    if arm.as_it_comes:
        settings = {name: value for name, value in settings.items() if name != "ir_op_priority"}
    return child, child.ask(
        "start", kind=arm.kind, settings=settings, probed=probed, attention=arm.attention, **options
    )


def check_same(engines: dict[str, dict[str, Any]]) -> None:
    """SystemExit where the arms do not run with the same settings."""
    # Which graphs can be captured is the attention backend's affair. It is in the report.
    resolved = {
        name: {**about["resolved"], "cudagraph_mode": None}
        for name, about in engines.items()
        if not about["as_it_comes"]
    }
    if any(of != next(iter(resolved.values())) for of in resolved.values()):
        raise SystemExit(f"the arms' settings differ: {json.dumps(resolved, indent=1)}")


def measure(case: Case, engines: dict[str, Child], vocabulary: int, pairs: int) -> dict[str, Any]:
    """The case's samples, by arm."""
    prompts = case.prompts(vocabulary)
    first = {
        name: engines[name].ask("prepare", case=case.name, prompts=prompts, steps=case.steps) for name in case.arms
    }
    work = {(run["tokens"], run["cached_tokens"]) for run in first.values()}
    if len(work) > 1:
        raise SystemExit(f"{case.name}: the arms do not do the same work: {first}")
    samples: dict[str, list[dict]] = {name: [] for name in case.arms}
    for order in turns(list(case.arms), pairs * case.more):
        for name in order:
            samples[name].append(engines[name].ask("run", case=case.name))
    (tokens, cached) = work.pop()
    expected = next(first[name]["answers"] for name in case.arms if name.startswith(PLAIN))
    columns = ("seconds", "cpu_seconds", "decode_seconds", "idle_cpu_seconds", "bytes_out")
    return {
        **asdict(case),
        "tokens": tokens,
        "prompt_tokens_computed": case.batch * case.context - cached,
        "answers_equal": {
            name: float(np.mean([a == b for a, b in zip(run["answers"], expected)])) for name, run in first.items()
        },
        "peak_bytes": {name: runs[-1]["peak_bytes"] for name, runs in samples.items()},
        "samples": {name: {of: [run[of] for run in runs] for of in columns} for name, runs in samples.items()},
    }


def judged(case: dict[str, Any], plain_arms: list[str], shapes: Shapes) -> dict[str, Any]:
    """What the samples say: for each arm rates, ratios to each plain arm, and bytes against their bound."""
    found: dict[str, Any] = {}
    for name, samples in case["samples"].items():
        seconds = float(np.median(samples["seconds"]))
        bytes_per_prompt = max(samples["bytes_out"]) / case["batch"]
        found[name] = {
            "tokens_per_second": case["tokens"] / seconds,
            "prompts_per_second": case["batch"] / seconds,
            "bytes_per_prompt": bytes_per_prompt,
            "peak_bytes": case["peak_bytes"][name],
            "over": {
                plain: {
                    of: _measure.median_ratio(case["samples"][plain][of], samples[of])
                    for of in ("seconds", "cpu_seconds", "decode_seconds")
                }
                for plain in plain_arms
                if plain != name and name not in plain_arms
            },
        }
    bound = recorded_bytes_bound(case["steps"], shapes.layers, shapes.heads, entropy="entropy" in found)
    return {"arms": found, "bytes_bound": bound}


def table(report: dict[str, Any]) -> str:
    machine = report["machine"]
    lines = [
        f"# What probing costs: {machine['cpu']}, {machine['cores']} cores, {report['model']}",
        "",
        "Made by `bench/overhead.py`. Ratios are throughput over plain vLLM's, above 1 is faster: medians with 95%",
        f"bootstrap intervals over at least {report['pairs']} ABBA turns. The prompts are in the prefix cache, so that",
        "decoding is timed. Wall time; CPU time of the process; wall time of the steps that only decode.",
        "",
        "| case | arm | over | wall | CPU | decode steps | tokens/s | prompts/s | peak GB | bytes out a prompt |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in report["cases"]:
        for name, arm in case["arms"].items():
            rates = f"{arm['tokens_per_second']:,.0f} | {arm['prompts_per_second']:.1f} | {arm['peak_bytes'] / 1e9:.2f}"
            out = f"{arm['bytes_per_prompt']:,.0f}" + (f" (at most {case['bytes_bound']:,})" if arm["over"] else "")
            for plain, of in arm["over"].items() or [("", None)]:
                ratios = (
                    " | ".join(_measure.figures(of[name], 3) for name in ("seconds", "cpu_seconds", "decode_seconds"))
                    if of
                    else " | | "
                )
                lines.append(f"| {case['name']} | {name} | {plain} | {ratios} | {rates} | {out} |")
    worst = min(min(case["answers_equal"].values()) for case in report["cases"])
    lines += ["", f"Answers equal to plain vLLM's, token for token: {worst:.0%} of a case's prompts or more."]
    idle = max(max(of["idle_cpu_seconds"]) for case in report["cases"] for of in case["samples"].values())
    lines += [f"CPU time that an engine took while the others had their turns: {1e3 * idle:.0f} ms at most."]
    return "\n".join([*lines, ""])


def main() -> None:
    options = _measure.parser(__doc__, "overhead")
    options.add_argument("--pairs", type=int, help="turns of each case (20; 4 with --short)")
    options.add_argument("--case", help="only the case of this name")
    args = options.parse_args()
    cases, arms = [c for c in (SHORT_CASES if args.short else CASES) if args.case in (None, c.name)], CPU_ARMS
    if not cases:
        raise SystemExit(f"there is no case '{args.case}'; there are: {', '.join(c.name for c in CASES)}")
    pairs = args.pairs or (4 if args.short else 20)
    shapes = Shapes.of(args.model)
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    settings = engine_settings(args.model, cases)
    report: dict[str, Any] = {
        "machine": _measure.machine(),
        "versions": _measure.versions(),
        "model": args.model.name,
        "pairs": pairs,
        "settings": settings | {"model": args.model.name},
        "engines": {},
        "cases": [],
    }
    with ExitStack() as processes:
        engines = {}
        for name in dict.fromkeys(name for case in cases for name in case.arms):
            engines[name], about = start(arms[name], settings, max(case.steps for case in cases), processes)
            report["engines"][name] = {**asdict(arms[name]), **about}
            print(f"{name}: started in {about['seconds']:.1f} s", flush=True)
        check_same(report["engines"])
        plain_arms = [name for name in engines if arms[name].kind == PLAIN]
        for case in cases:
            measured = measure(case, engines, shapes.vocabulary, pairs)
            measured |= judged(measured, plain_arms, shapes)
            report["cases"].append(measured)
            for name, arm in measured["arms"].items():
                for plain, of in arm["over"].items():
                    print(f"{case.name}: {name} over {plain}: {_measure.figures(of['seconds'], 3)}", flush=True)
    _measure.write(report, table(report), _measure.out_of(args))


if __name__ == "__main__":
    main()
