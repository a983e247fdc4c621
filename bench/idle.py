"""Is an idle headrift engine as fast as plain vLLM? Processes of one kind differ too, so there are several of each.

    python bench/idle.py [--processes 3] [--turns 16] [--short] [--model DIR]

`bench/overhead.py` has one process an arm, and its intervals are of turns alone. Here plain vLLM and headrift's engine
without a measured request (both as there: same settings, same prompts, decoding from the prefix cache) each get
several processes, which take turns, mirrored every other time. A process's pace is its median CPU time over the turns,
on a log scale; kinds are compared by Welch's t over processes.
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
from _model_math import Shapes

KINDS = (overhead.PLAIN, "idle")
CASES = (overhead.BASE, next(case for case in overhead.CASES if case.batch == overhead.MOST_BATCH))


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
        f"Made by `bench/idle.py`: {report['processes']} processes of each kind, {report['turns']} turns. Throughput",
        "over the mean of plain vLLM's processes, by CPU time; below 1 is slower. Idle / plain: 95% interval by",
        "Welch's t over processes.",
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
    options.add_argument("--turns", type=int, help="of each case (16; 2 with --short)")
    args = options.parse_args()
    n, turns = args.processes or (2 if args.short else 3), args.turns or (2 if args.short else 16)
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    settings = overhead.engine_settings(args.model, CASES, False)
    report: dict[str, Any] = {
        "machine": _measure.machine(),
        "versions": _measure.versions(),
        "model": args.model.name,
        "processes": n,
        "turns": turns,
        "cases": [],
    }
    with ExitStack() as processes:
        names = [(kind, i) for i in range(n) for kind in KINDS]
        longest = max(case.steps for case in CASES)
        engines = {
            name: overhead.start(overhead.CPU_ARMS[name[0]], settings, longest, processes, False)[0] for name in names
        }
        for case in CASES:
            prompts = case.prompts(Shapes.of(args.model).vocabulary)
            for engine in engines.values():
                engine.ask("prepare", case=case.name, prompts=prompts, steps=case.steps)
            samples: dict[str, list[list[float]]] = {kind: [[] for _ in range(n)] for kind in KINDS}
            for order in overhead.turns(names, turns):
                for kind, i in order:
                    samples[kind][i].append(engines[kind, i].ask("run", case=case.name)["cpu_seconds"])
            report["cases"].append({"name": case.name, "samples": samples, **compared(samples)})
            print(f"{case.name}: {_measure.figures(report['cases'][-1]['ratio'], 3)}", flush=True)
    _measure.write(report, table(report), _measure.out_of(args))


if __name__ == "__main__":
    main()
