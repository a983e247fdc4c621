"""Is an idle headrift engine as fast as plain vLLM, and what does probing cost, with all else the same?

    python bench/idle.py [--turns 150] [--processes 3] [--short] [--model DIR]

`bench/overhead.py` has one process an arm, and two processes of one kind differ by some per cent. Here:

In one process. One engine answers as plain vLLM, idle and probing, in turns that are mirrored every other time. For
plain vLLM all that headrift adds to its steps is taken out (attention layers, metadata builders, logits processor), and
that no function of headrift's is called then is checked. Ratios as in overhead.py.

In several. Plain vLLM, with no plugin loaded, and headrift's engine without a measured request each get several
processes, which take turns. A process's pace is its median CPU time over the turns, on a log scale; kinds are compared
by Welch's t over processes.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _measure
import overhead
from _children import Child
from _model_math import Shapes

KINDS = (overhead.PLAIN, "idle")
ARMS = ("idle", overhead.PLAIN, "probing")
TIMES = ("seconds", "cpu_seconds")
CASES = (overhead.BASE, next(case for case in overhead.CASES if case.batch == overhead.MOST_BATCH))


def in_one_process(settings: dict[str, Any], model: Path, turns: int) -> list[dict[str, Any]]:
    """The cases' samples of one engine's arms, and their ratios to plain."""
    found = []
    environment = overhead.environments()[1]
    with Child("_one_process.py", environment=environment) as engine:
        steps = max(case.steps for case in CASES)
        engine.ask("start", kind="probing", settings=settings, attention="auto", regions=overhead.REGIONS, steps=steps)
        for case in CASES:
            prompts = case.prompts(Shapes.of(model).vocabulary)
            engine.ask("prepare", case=case.name, prompts=prompts, steps=case.steps)
            calls = {arm: engine.ask("calls", case=case.name, arm=arm)["calls"] for arm in ARMS}
            if calls[overhead.PLAIN] or not all(calls[arm] for arm in ARMS if arm != overhead.PLAIN):
                raise SystemExit(f"{case.name}: calls of headrift's functions by arm: {calls}")
            runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
            for order in overhead.turns(list(ARMS), turns):
                for arm in order:
                    runs[arm].append(engine.ask("run", case=case.name, arm=arm))
            work = {(run["tokens"], run["cached_tokens"]) for of in runs.values() for run in of}
            if len(work) > 1:
                raise SystemExit(f"{case.name}: the arms do not do the same work: {work}")
            samples = {arm: {of: [run[of] for run in some] for of in TIMES} for arm, some in runs.items()}
            plain = samples[overhead.PLAIN]
            over = {
                arm: {of: _measure.median_ratio(plain[of], samples[arm][of]) for of in TIMES}
                for arm in ARMS
                if arm != overhead.PLAIN
            }
            found.append({"name": case.name, "calls": calls, "over": over, "samples": samples})
            for arm, of in over.items():
                print(f"one process, {case.name}: {arm}: {_measure.figures(of['seconds'], 3)}", flush=True)
    return found


def compared(seconds: dict[str, list[list[float]]]) -> dict[str, Any]:
    """By kind each process's seconds: paces over plain's mean, and idle's throughput over plain's with its interval."""
    from scipy.stats import ttest_ind

    paces = {kind: np.log([np.median(of) for of in processes]) for kind, processes in seconds.items()}
    plain, idle = (paces[kind] for kind in KINDS)
    interval = ttest_ind(plain, idle, equal_var=False).confidence_interval(0.95)
    return {
        "of_plain": {kind: np.exp(plain.mean() - of).tolist() for kind, of in paces.items()},
        "ratio": {
            "median": float(np.exp(plain.mean() - idle.mean())),
            "low": float(np.exp(interval.low)),
            "high": float(np.exp(interval.high)),
        },
    }


def table(report: dict[str, Any]) -> str:
    machine = report["machine"]
    lines = [
        f"# An idle engine and plain vLLM: {machine['cpu']}, {machine['cores']} cores, {report['model']}",
        "",
        f"Made by `bench/idle.py`. In one process, {report['turns']} turns: throughput over that of the same engine",
        "with headrift's parts taken out; below 1 is slower. Medians with 95% bootstrap intervals over the turns.",
        "",
        "| case | arm | wall time | CPU time | calls of headrift's functions; without its parts |",
        "|---|---|---|---|---|",
    ]
    for case in report["one_process"]:
        for arm, over in case["over"].items():
            ratios = " | ".join(_measure.figures(over[of], 3) for of in TIMES)
            lines.append(f"| {case['name']} | {arm} | {ratios} | {case['calls'][arm]:,}; {case['calls']['plain']} |")
    lines += [
        "",
        f"{report['processes']} processes of each kind, {report['turns_of_processes']} turns: throughput over the mean",
        "of plain vLLM's processes, by CPU time. Idle / plain: 95% interval by Welch's t over processes.",
        "",
        "| case | plain vLLM's processes | idle headrift's | idle / plain |",
        "|---|---|---|---|",
    ]
    for case in report["cases"]:
        cells = [", ".join(f"{pace:.3f}" for pace in case["of_plain"][kind]) for kind in KINDS]
        lines.append(f"| {case['name']} | {cells[0]} | {cells[1]} | {_measure.figures(case['ratio'], 3)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    options = _measure.parser(__doc__, "idle")
    options.add_argument("--processes", type=int, help="of each kind (3; 2 with --short)")
    options.add_argument("--turns", type=int, help="in one process, of each case (150; 2 with --short)")
    args = options.parse_args()
    n, turns = args.processes or (2 if args.short else 3), args.turns or (2 if args.short else 150)
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    turns_of_processes = 2 if args.short else 8
    settings = overhead.engine_settings(args.model, CASES)
    report: dict[str, Any] = {
        "machine": _measure.machine(),
        "versions": _measure.versions(),
        "model": args.model.name,
        "processes": n,
        "turns": turns,
        "turns_of_processes": turns_of_processes,
        "one_process": in_one_process(settings, args.model, turns),
        "cases": [],
    }
    with ExitStack() as processes:
        names = [(kind, i) for i in range(n) for kind in KINDS]
        longest = max(case.steps for case in CASES)
        engines = {name: overhead.start(overhead.CPU_ARMS[name[0]], settings, longest, processes)[0] for name in names}
        for case in CASES:
            prompts = case.prompts(Shapes.of(args.model).vocabulary)
            for engine in engines.values():
                engine.ask("prepare", case=case.name, prompts=prompts, steps=case.steps)
            samples: dict[str, list[list[float]]] = {kind: [[] for _ in range(n)] for kind in KINDS}
            for order in overhead.turns(names, turns_of_processes):
                for kind, i in order:
                    samples[kind][i].append(engines[kind, i].ask("run", case=case.name)["cpu_seconds"])
            report["cases"].append({"name": case.name, "samples": samples, **compared(samples)})
            print(f"{case.name}: {_measure.figures(report['cases'][-1]['ratio'], 3)}", flush=True)
    _measure.write(report, table(report), _measure.out_of(args))


if __name__ == "__main__":
    main()
