"""What probing costs over decoding without it: plain vLLM, headrift idle, probing, with logit statistics or entropy.

    python bench/overhead.py [--pairs 20] [--short] [--model DIR]
    python bench/overhead.py --case "attention entropy" --out bench/results/entropy.json

Each arm is an engine in a process of its own, with identical settings, stopped while another works: `plain`, vLLM with
no plugin loaded; `idle`, headrift's engine with requests that are not measured; `probing`, `logits`, `entropy`,
measured, also with next-token statistics or the entropy of each head's attention. `headrift, default settings` has one
other setting, the norms. All answer the same token ids with as many tokens. The prompts are in the prefix cache, so
that decoding, each prompt's last tokens and the drains are timed: where probing weighs most.

Arms take turns, mirrored every other time. A ratio is throughput over plain's in the same turn: above 1 the arm is
faster. Medians have 95% bootstrap intervals over the turns; two processes of one kind can differ by some per cent,
which no interval contains (see idle.py). CPU time is of the whole process; other processes disturb it less.
"""

import hashlib
import json
import os
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

import utils
from utils import Child, Shapes, Stopwatch

PLAIN = "plain"
REGIONS = ("system", "user", "prompt")
PAGE = 32
MOST_BATCH = 64
TIMES = ("seconds", "cpu_seconds", "decode_seconds")


@dataclass(frozen=True, slots=True)
class Arm:
    """An engine to start. kind: plain, idle, probing, logits or entropy."""

    kind: str
    regions: tuple[str, ...] = REGIONS  # that the engine records
    default_settings: bool = False  # headrift's, if these are faster than vLLM's

    @property
    def measures(self) -> dict[str, bool]:
        """What each request measures, see HeadriftEngine.answer."""
        return {} if self.kind == PLAIN else {"probed": self.kind != "idle", "row_entropy": self.kind == "entropy"}


@dataclass(frozen=True, slots=True)
class Case:
    """A batch of prompts."""

    name: str
    batch: int = 8  # prompts, all in flight at once
    context: int = 1000  # tokens of each prompt
    steps: int = 10  # that are recorded; each answer has one token more
    shared: bool = False  # whether the prompts have all but their last page in common
    arms: tuple[str, ...] = (PLAIN, "probing")
    more: int = 1  # times the turns of the other cases

    @property
    def request(self) -> dict:
        """Arguments of Engine.run."""
        shared = (self.context - 1) // PAGE * PAGE if self.shared else 0
        prompts = {"prompts": self.batch, "context": self.context, "shared": shared, "tokens": self.steps + 1}
        return {**prompts, "seed": [self.batch, self.context]}

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache must hold."""
        own = self.steps + 1 + (PAGE if self.shared else self.context)
        return self.batch * (own + PAGE) + (self.context if self.shared else 0)


ALL = ("idle", PLAIN, "probing", "logits", "headrift, default settings")
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
ARMS = {kind: Arm(kind) for kind in (PLAIN, "idle", "probing", "logits", "entropy")} | {
    "headrift, default settings": Arm("probing", default_settings=True),
    # A share needs the system prompt's mass and the prompt's: no engine records fewer.
    "probing, 2 regions": Arm("probing", regions=("system", "prompt")),
}


@lru_cache(maxsize=4)
def make_prompts(vocabulary: int, prompts: int, context: int, shared: int, seed: tuple[int, ...]) -> list[list[int]]:
    """Return prompts of random token ids, with their first `shared` tokens in common; the same for the same seed."""
    ids = np.random.default_rng(seed).integers(min(100, vocabulary - 1), vocabulary, (prompts, context))
    ids[:, :shared] = ids[0, :shared]
    return ids.tolist()


class PlainEngine:
    """vLLM without headrift, driven as headrift drives it."""

    bytes_out = recorder_bytes = 0

    def __init__(self, llm_engine):
        self.llm_engine, self._submitted = llm_engine, 0

    @classmethod
    def start(cls, settings: dict):
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        return cls(LLMEngine.from_engine_args(EngineArgs(**settings)))

    def answer(self, prompts: list[list[int]], tokens: int, at_once: int) -> list[tuple[list[int], int, None]]:
        """Answer prompts with `tokens` tokens each: token ids and number of cached prompt tokens, in order."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        how = {"ignore_eos": True, "detokenize": False, "output_kind": RequestOutputKind.FINAL_ONLY}
        params = SamplingParams(temperature=0.0, max_tokens=tokens, **how)
        first, finished = self._submitted, {}
        while len(finished) < len(prompts):
            while (n := self._submitted - first) < min(len(prompts), len(finished) + at_once):
                self.llm_engine.add_request(str(self._submitted), TokensPrompt(prompt_token_ids=prompts[n]), params)
                self._submitted += 1
            finished |= {output.request_id: output for output in self.llm_engine.step() if output.finished}
        done = [finished[str(first + i)] for i in range(len(prompts))]
        return [(list(output.outputs[0].token_ids), output.num_cached_tokens or 0, None) for output in done]


class HeadriftEngine:
    """headrift's engine; bytes_out: recordings that left the workers so far."""

    def __init__(self, settings: dict, **options):
        from headrift.probed_engine import ProbedEngine

        settings = dict(settings)
        self.engine = ProbedEngine(settings.pop("model"), engine_args=settings, **options)
        self.llm_engine, self.recorder_bytes, self.bytes_out = self.engine.llm_engine, self.engine.recorder_bytes, 0

        def count(answers: list) -> None:
            self.bytes_out += sum(len(answer) for answer in answers if isinstance(answer, bytes))

        utils.after(self.llm_engine, "collective_rpc", count)

    def answer(
        self, prompts: list[list[int]], tokens: int, at_once: int, *, replay: bool = False, **measures: bool
    ) -> list[tuple[list[int], int, np.ndarray | None]]:
        """Answer prompts as PlainEngine does, with the recorded shares [steps, layers, heads] of each.

        40% of a prompt are the system prompt's, all but the last few of the rest the user's; with `replay` its last
        `tokens` tokens are a given answer, and nothing is decoded. measures: fields of ProbeRequest.
        """
        from headrift.requests import ProbeRequest

        def request(ids: list[int]) -> ProbeRequest:
            n = len(ids) - tokens if replay else len(ids)
            system = n * 2 // 5
            regions = {"system": (0, system), "user": (system, n - 4), "prompt": (0, n)}
            regions = {name: span for name, span in regions.items() if name in self.engine.regions}
            answer = ids[n:] if replay else None
            return ProbeRequest(ids[:n], regions, tokens - 1, answer_ids=answer, ignore_eos=True, **measures)

        runs = self.engine.run(((i, request(ids)) for i, ids in enumerate(prompts)), at_once=at_once)
        done = {
            i: (finished.answer_ids, finished.cached_tokens, None if recording is None else recording.share)
            for i, finished, recording in runs
        }
        return [done[i] for i in range(len(prompts))]


_SECTIONS = {
    "model_config": ("dtype", "max_model_len", "enforce_eager", "seed"),
    "cache_config": ("block_size", "kv_cache_memory_bytes", "enable_prefix_caching", "cache_dtype"),
    "scheduler_config": ("max_num_seqs", "max_num_batched_tokens", "enable_chunked_prefill", "async_scheduling"),
    "compilation_config": ("mode", "cudagraph_mode"),
    "kernel_config": ("ir_op_priority",),
}


class Engine:
    """A child process with one engine."""

    _last_turn = 0.0  # CPU seconds of this process at its end

    def start(self, kind: str, settings: dict, **options) -> dict:
        """Start vLLM by itself (`plain`), where nothing of headrift may be loaded, or headrift's engine."""
        with Stopwatch() as clock:
            self.engine = PlainEngine.start(settings) if kind == PLAIN else HeadriftEngine(settings, **options)
        loaded = sorted(name for name in sys.modules if is_headrift(name))
        if kind == PLAIN and loaded:
            raise RuntimeError(f"vLLM without headrift was to run here, and {loaded[0]} is loaded")
        config = self.engine.llm_engine.vllm_config
        return {
            "seconds": clock.seconds,
            "resolved": {
                name: str(getattr(getattr(config, part), name)) for part, names in _SECTIONS.items() for name in names
            },
            "recorder_bytes": self.engine.recorder_bytes,
            "attention_backend": str(config.attention_config.backend),
            "model_runner_v2": bool(config.use_v2_model_runner),
        }

    def run(
        self, prompts: int, context: int, tokens: int, seed: list[int], shared: int = 0, at_once: int = 0, **how
    ) -> dict:
        """Answer random prompts once, with `shared` first tokens in common; how: see HeadriftEngine.answer."""
        vocabulary = self.engine.llm_engine.vllm_config.model_config.get_vocab_size()
        idle = time.process_time() - self._last_turn
        ids = make_prompts(vocabulary, prompts, context, shared, tuple(seed))
        before = self.engine.bytes_out
        with Stopwatch() as clock, count_steps(self.engine.llm_engine) as counted:
            done = self.engine.answer(ids, tokens, at_once or prompts, **how)
        self._last_turn = time.process_time()
        share = [np.asarray(share) for _, _, share in done if share is not None]
        return {
            "seconds": clock.seconds,
            "cpu_seconds": clock.cpu_seconds,
            "idle_cpu_seconds": idle,  # while the others had their turns
            **vars(counted),
            "prompt_tokens": prompts * context,
            "tokens": sum(len(answer) for answer, *_ in done),
            "answers": [hashlib.sha256(repr(answer).encode()).hexdigest()[:12] for answer, *_ in done],
            "cached_tokens": sum(cached for _, cached, _ in done),
            "bytes_out": self.engine.bytes_out - before,
            "values": sum(values.size for values in share),
            # NaN fails both comparisons. A share is a quotient of float32 sums: 1e-3 is far above their rounding.
            "bad_values": sum(int((~((values >= 0) & (values <= 1 + 1e-3))).sum()) for values in share),
        }


@contextmanager
def count_steps(llm_engine):
    """Count engine steps, and time those after the first tokens of all requests, if all run at once."""
    step, states = llm_engine.step, llm_engine.output_processor.request_states
    counted, prefilling = SimpleNamespace(steps=0, decode_seconds=0.0, decode_steps=0), True

    def timed():
        nonlocal prefilling
        start = time.perf_counter()
        outputs = step()
        counted.steps += 1
        if not prefilling:
            counted.decode_seconds += time.perf_counter() - start
            counted.decode_steps += 1
        prefilling = prefilling and any(state.is_prefilling for state in states.values())
        return outputs

    llm_engine.step = timed
    try:
        yield counted
    finally:
        del llm_engine.step


def is_headrift(module: str) -> bool:
    return module.partition(".")[0] in ("headrift", "headrift_kernels")


def engine_settings(model: Path, cases: tuple[Case, ...]) -> dict:
    """Return the settings of every arm, with nothing left open that an arm could choose differently."""
    from headrift.vllm_engine import machine_defaults

    tokens = sum(case.kv_tokens for case in {(c.batch, c.context): c for c in cases}.values())
    room = int(1.25 * Shapes.read(model).kv_bytes(tokens, 4))
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
    """Return the variables of a process without headrift, and of one with it; otherwise the same."""
    from headrift.vllm_engine import prepare_environment
    from headrift.vllm_plugin import plugin

    prepare_environment(verbose=False)
    ours = dict(os.environ) | ({} if gpu else {"VLLM_CPU_OMP_THREADS_BIND": "nobind"})
    # An empty list of plugins: as if headrift were not installed.
    plain = {name: value for name, value in ours.items() if name not in (plugin.SWITCH, plugin.BACKEND)}
    return plain | {"VLLM_PLUGINS": ""}, ours


def start(arm: Arm, settings: dict, steps: int, processes: ExitStack) -> tuple[Child, dict]:
    """Start the arm's engine; the process and its description."""
    plain, ours = environments()
    child = processes.enter_context(Child("overhead.py", "engine", environment=plain if arm.kind == PLAIN else ours))
    if arm.kind == PLAIN:
        return child, child.call("start", kind=PLAIN, settings=settings)
    options = {"logit_stats": arm.kind == "logits", "row_entropy": arm.kind == "entropy"}
    if arm.default_settings:
        settings = {name: value for name, value in settings.items() if name != "ir_op_priority"}
    return child, child.call("start", kind=arm.kind, settings=settings, regions=arm.regions, steps=steps, **options)


def check_same(engines: dict[str, dict]) -> None:
    """SystemExit if the arms do not run with the same settings."""
    # Which graphs can be captured depends on the attention backend. It is in the report.
    resolved = [
        {**about["resolved"], "cudagraph_mode": None} for about in engines.values() if not about["default_settings"]
    ]
    if any(settings != resolved[0] for settings in resolved):
        raise SystemExit(f"the arms' settings differ: {json.dumps(resolved, indent=1)}")


def check_work(case: str, runs: dict[str, dict]) -> tuple[int, int]:
    """Return the answer tokens and cached prompt tokens of a case; SystemExit if they are not those of every arm."""
    work = {(run["tokens"], run["cached_tokens"]) for run in runs.values()}
    if len(work) > 1:
        raise SystemExit(f"{case}: the arms do not do the same work: {runs}")
    return work.pop()


def measure(case: Case, engines: dict[str, Child], pairs: int) -> dict:
    """Return the case's samples by arm."""
    arms = {name: partial(engines[name].call, "run", **case.request, **ARMS[name].measures) for name in case.arms}
    for arm in arms.values():  # the prompts into the prefix cache
        arm()
    first = {name: arm() for name, arm in arms.items()}
    tokens, cached = check_work(case.name, first)
    runs = utils.run_in_turns(arms, pairs * case.more)
    expected = np.array(first[PLAIN]["answers"])
    return {
        **asdict(case),
        "tokens": tokens,
        "prompt_tokens_computed": case.batch * case.context - cached,
        "answers_equal": {name: float((np.array(run["answers"]) == expected).mean()) for name, run in first.items()},
        "peak_bytes": {name: of_arm[-1]["peak_bytes"] for name, of_arm in runs.items()},
        "samples": utils.columns(runs, (*TIMES, "idle_cpu_seconds", "bytes_out")),
    }


def evaluate(case: dict, shapes: Shapes) -> dict:
    """Return rates, ratios to plain and bytes per prompt of each arm, and the bound on those bytes."""
    arms = {}
    for name, samples in case["samples"].items():
        seconds, plain = float(np.median(samples["seconds"])), case["samples"][PLAIN]
        arms[name] = {
            "tokens_per_second": case["tokens"] / seconds,
            "prompts_per_second": case["batch"] / seconds,
            "bytes_per_prompt": max(samples["bytes_out"]) / case["batch"],
            "peak_bytes": case["peak_bytes"][name],
            "over": {} if name == PLAIN else {PLAIN: utils.median_ratios(plain, samples, TIMES)},
        }
    bound = utils.recorded_bytes_bound(case["steps"], shapes.layers, shapes.heads, entropy="entropy" in arms)
    return {"arms": arms, "bytes_bound": bound}


def table(report: dict) -> str:
    rows = []
    for case in report["cases"]:
        for name, arm in case["arms"].items():
            ratios = arm["over"].get(PLAIN)
            compared = [PLAIN, *(utils.cell(ratios[kind], 3) for kind in TIMES)] if ratios else [""] * 4
            rates = [f"{arm['tokens_per_second']:,.0f}", f"{arm['prompts_per_second']:.1f}"]
            out = f"{arm['bytes_per_prompt']:,.0f}" + (f" (at most {case['bytes_bound']:,})" if ratios else "")
            rows.append([case["name"], name, *compared, *rates, f"{arm['peak_bytes'] / 1e9:.2f}", out])
    head = ["case", "arm", "over", "wall", "CPU", "decode steps", "tokens/s", "prompts/s", "peak GB"]
    worst = min(min(case["answers_equal"].values()) for case in report["cases"])
    idle = max(max(arm["idle_cpu_seconds"]) for case in report["cases"] for arm in case["samples"].values())
    return utils.page(
        utils.title(report, "What probing costs"),
        "Made by `bench/overhead.py`. Ratios are throughput over plain vLLM's, above 1 is faster: medians with 95%\n"
        f"bootstrap intervals over at least {report['pairs']} ABBA turns. The prompts are in the prefix cache, so "
        "that\ndecoding is timed. Wall time; CPU time of the process; wall time of the steps that only decode.",
        utils.markdown([*head, "bytes out a prompt"], rows),
        f"Answers equal to plain vLLM's, token for token: {worst:.0%} of a case's prompts or more.\n"
        f"CPU time that an engine took while the others had their turns: {1e3 * idle:.0f} ms at most.",
    )


def main() -> None:
    options = utils.Options(__doc__, "overhead")
    options.amount("pairs", 20, 4, "turns of each case")
    options.add_argument("--case", help="only the case of this name")
    args = options.parse()
    cases = tuple(c for c in (SHORT_CASES if args.short else CASES) if args.case in (None, c.name))
    if not cases:
        raise SystemExit(f"there is no case '{args.case}'; there are: {', '.join(c.name for c in CASES)}")
    settings, shapes = engine_settings(args.model, cases), Shapes.read(args.model)
    about = {"pairs": args.pairs, "settings": settings | {"model": args.model.name}}
    report = utils.new_report(args, **about, engines={}, cases=[])
    with ExitStack() as processes:
        engines = {}
        for name in dict.fromkeys(name for case in cases for name in case.arms):
            engines[name], about = start(ARMS[name], settings, max(case.steps for case in cases), processes)
            report["engines"][name] = {**asdict(ARMS[name]), **about}
            print(f"{name}: started in {about['seconds']:.1f} s", flush=True)
        check_same(report["engines"])
        for case in cases:
            measured = measure(case, engines, args.pairs)
            measured |= evaluate(measured, shapes)
            report["cases"].append(measured)
            for name, arm in measured["arms"].items():
                if arm["over"]:
                    print(f"{case.name}: {name}: {utils.cell(arm['over'][PLAIN]['seconds'], 3)}", flush=True)
    utils.write(report, table(report), args.out)


if __name__ == "__main__":
    utils.run_script(main, engine=Engine)
