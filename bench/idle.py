"""Is an idle headrift engine as fast as plain vLLM, and what does probing cost, with all else the same?

    python bench/idle.py [--turns 150] [--processes 3] [--short] [--model DIR]

`bench/overhead.py` has one process an arm, and two processes of one kind differ by some per cent. Here one engine
answers as plain vLLM, idle and probing in turns: for plain vLLM all that headrift adds to its steps is taken out, and
it is checked that no function of headrift's is called then. Then plain vLLM, with no plugin loaded, and headrift's
engine without a measured request get several processes each, which take turns. A process's pace is its median CPU time
over the turns, on a log scale; kinds are compared by Welch's t over processes.
"""

import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

import overhead
import utils
from overhead import PLAIN
from utils import Child

KINDS = (PLAIN, "idle")
ARMS = ("idle", PLAIN, "probing")
TIMES = ("seconds", "cpu_seconds")
CASES = (overhead.BASE, next(case for case in overhead.CASES if case.batch == overhead.MOST_BATCH))


STEPS = max(case.steps for case in CASES)


class Parts:
    """What headrift adds to an engine's steps: attention layers, metadata builders, and the logits processor."""

    def __init__(self, llm_engine):
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadataBuilder
        from vllm.v1.sample.logits_processor import validate_logits_processors_parameters as validate

        runner = llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        impls = [layer.impl for layer in runner.compilation_config.static_forward_context.values()]
        builders = [builder for groups in runner.attn_groups for group in groups for builder in group.metadata_builders]
        self._classes = [(impl, type(impl), CPUAttentionBackendImpl) for impl in impls]
        self._classes += [(builder, type(builder), CPUAttentionMetadataBuilder) for builder in builders]
        # A layer with nothing to do before or after attention has its method as an attribute.
        self._forward = {impl: vars(impl)["forward"] for impl in impls if "forward" in vars(impl)}
        self._batch, self._front = runner.input_batch, llm_engine.input_processor
        self._lists = [
            (items, list(items), [each for each in items if not overhead.is_headrift(type(each).__module__)])
            for items in (self._batch.logitsprocs.argmax_invariant, self._batch.logitsprocs.non_argmax_invariant)
        ]
        self._needs_ids = self._batch.logitsprocs_need_output_token_ids
        self._checks = {
            name: check for name, check in vars(self._front).items() if getattr(check, "func", None) is validate
        }
        unchanged = [part for part, ours, plain in self._classes if ours is plain]
        if unchanged or not builders or all(ours == plain for _, ours, plain in self._lists) or not self._checks:
            raise RuntimeError("headrift's parts of this engine are not where this script looks for them")

    def put(self, present: bool) -> None:
        """Put them into the engine or take them out."""
        for part, ours, plain in self._classes:
            part.__class__ = ours if present else plain
        for impl, forward in self._forward.items():
            vars(impl).pop("forward", None)
            vars(impl).update({"forward": forward} if present else {})
        for items, ours, plain in self._lists:
            items[:] = ours if present else plain
        self._batch.logitsprocs_need_output_token_ids = self._needs_ids and present
        for name, check in self._checks.items():
            setattr(self._front, name, check if present else lambda params: None)


class OneEngine(overhead.Engine):
    """A child process whose engine answers with and without headrift's parts."""

    def start(self, kind: str, settings: dict, **options) -> dict:
        about = super().start(kind, settings, **options)
        self._engines = {True: self.engine, False: overhead.PlainEngine(self.engine.llm_engine)}
        self._parts = Parts(self.engine.llm_engine)
        return about

    def run_arm(self, arm: str, **case) -> dict:
        """Answer the case's prompts once, as this arm."""
        self.engine = self._engines[arm != PLAIN]
        self._parts.put(arm != PLAIN)
        return self.run(**case, **overhead.ARMS[arm].measures)

    def count_calls(self, arm: str, **case) -> dict:
        """Count the calls of headrift's functions in an answer."""
        calls = 0

        def count(frame, event: str, _) -> None:
            nonlocal calls
            calls += event == "call" and overhead.is_headrift(frame.f_globals.get("__name__", ""))

        sys.setprofile(count)
        try:
            self.run_arm(arm, **case)
        finally:
            sys.setprofile(None)
        return {"calls": calls}


def in_one_process(settings: dict, turns: int) -> list[dict]:
    """Return the cases' samples of one engine's arms, and their ratios to plain."""
    results = []
    with Child("idle.py", "engine", environment=overhead.environments()[1]) as engine:
        engine.call("start", kind="probing", settings=settings, regions=overhead.REGIONS, steps=STEPS)
        for case in CASES:
            arms = {arm: partial(engine.call, "run_arm", arm=arm, **case.request) for arm in ARMS}
            arms["probing"](), arms["probing"]()  # the prompts into the prefix cache
            calls = {arm: engine.call("count_calls", arm=arm, **case.request)["calls"] for arm in ARMS}
            if calls[PLAIN] or not all(calls[arm] for arm in ARMS if arm != PLAIN):
                raise SystemExit(f"{case.name}: calls of headrift's functions by arm: {calls}")
            runs = utils.run_in_turns(arms, turns)
            overhead.check_work(case.name, {f"{arm} {i}": run for arm in runs for i, run in enumerate(runs[arm])})
            samples = utils.columns(runs, TIMES)
            over = {arm: utils.median_ratios(samples[PLAIN], samples[arm], TIMES) for arm in ARMS if arm != PLAIN}
            results.append({"name": case.name, "calls": calls, "over": over, "samples": samples})
            for arm, ratios in over.items():
                print(f"one process, {case.name}: {arm}: {utils.cell(ratios['seconds'], 3)}", flush=True)
    return results


def in_several(settings: dict, n: int, turns: int) -> list[dict]:
    """Return the cases' samples of `n` processes of each kind, and the kinds compared."""
    results = []
    with ExitStack() as processes:
        names = [(kind, i) for i in range(n) for kind in KINDS]
        engines = {name: overhead.start(overhead.ARMS[name[0]], settings, STEPS, processes)[0] for name in names}
        for case in CASES:
            arms = {
                name: partial(engines[name].call, "run", **case.request, **overhead.ARMS[name[0]].measures)
                for name in names
            }
            utils.run_in_turns(arms, 2)  # the prompts into the prefix cache
            runs = utils.run_in_turns(arms, turns)
            samples = {kind: [[run["cpu_seconds"] for run in runs[kind, i]] for i in range(n)] for kind in KINDS}
            results.append({"name": case.name, "samples": samples, **compare(samples)})
            print(f"{case.name}: {utils.cell(results[-1]['ratio'], 3)}", flush=True)
    return results


def compare(seconds: dict[str, list[list[float]]]) -> dict:
    """Return each process's pace over plain's mean by kind, and idle's throughput over plain's with its interval."""
    from scipy.stats import ttest_ind

    paces = {kind: np.log([np.median(samples) for samples in processes]) for kind, processes in seconds.items()}
    plain, idle = (paces[kind] for kind in KINDS)
    interval = ttest_ind(plain, idle, equal_var=False).confidence_interval(0.95)
    ratio = {"median": plain.mean() - idle.mean(), "low": interval.low, "high": interval.high}
    return {
        "of_plain": {kind: np.exp(plain.mean() - pace).tolist() for kind, pace in paces.items()},
        "ratio": {name: float(np.exp(value)) for name, value in ratio.items()},
    }


def table(report: dict) -> str:
    one = [
        [case["name"], arm, *(utils.cell(over[kind], 3) for kind in TIMES)]
        + [f"{case['calls'][arm]:,}; {case['calls'][PLAIN]}"]
        for case in report["one_process"]
        for arm, over in case["over"].items()
    ]
    several = [
        [case["name"], *(", ".join(f"{pace:.3f}" for pace in case["of_plain"][kind]) for kind in KINDS)]
        + [utils.cell(case["ratio"], 3)]
        for case in report["cases"]
    ]
    calls = "calls of headrift's functions; without its parts"
    return utils.page(
        utils.title(report, "An idle engine and plain vLLM"),
        f"Made by `bench/idle.py`. In one process, {report['turns']} turns: throughput over that of the same engine\n"
        "with headrift's parts taken out; below 1 is slower. Medians with 95% bootstrap intervals over the turns.",
        utils.markdown(["case", "arm", "wall time", "CPU time", calls], one),
        f"{report['processes']} processes of each kind, {report['turns_of_processes']} turns: throughput over the "
        "mean\nof plain vLLM's processes, by CPU time. Idle / plain: 95% interval by Welch's t over processes.",
        utils.markdown(["case", "plain vLLM's processes", "idle headrift's", "idle / plain"], several),
    )


def main() -> None:
    options = utils.Options(__doc__, "idle")
    options.amount("processes", 3, 2, "of each kind")
    options.amount("turns", 150, 2, "in one process, of each case")
    args = options.parse()
    settings, turns = overhead.engine_settings(args.model, CASES), 2 if args.short else 8
    report = utils.new_report(args, processes=args.processes, turns=args.turns, turns_of_processes=turns)
    report["one_process"] = in_one_process(settings, args.turns)
    report["cases"] = in_several(settings, args.processes, turns)
    utils.write(report, table(report), args.out)


if __name__ == "__main__":
    utils.run_script(main, engine=OneEngine)
