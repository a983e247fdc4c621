"""What consistency training changes: three methods x three seeds at equal budget, held-out questions and wrappers.

    python bench/consistency.py [--steps 100] [--questions 46] [--methods attct,act,bct] [--seeds 0,1,2]

Trains and evaluates each with headrift's own commands, into runs/bench/consistency (what is done there already is not
done again), and measures the memory of a training step against the same step from eager attention's full maps. Writes
bench/results/consistency.json, .md and .png. --short: one seed, 4 steps, 6 questions.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from _measure import ROOT, machine, out_of, parser, versions, write

QUESTIONS = ROOT / "datasets/consistency_questions.jsonl"
WORK = ROOT / "runs/bench/consistency"
NAMES = {"attct": "AttCT", "act": "ACT", "bct": "BCT"}
# The first held-out questions: those of a run after which the weight of --keep was lowered, from 0.1.
LOOKED_AT = 24
# ACT and BCT: of 1e-3 and 3e-3, the one with the lower training loss after 30 steps. AttCT: by the attention distance
# in trainings that held out the hints.
LEARNING_RATES = {"attct": 3e-3, "act": 3e-3, "bct": 1e-3}
MEASURES = {
    "flipped": "answers that flip",
    "right": "right, wrapped",
    "sycophantic": "hinted wrong answer",
    "right_clean": "right, clean",
    "distance": "attention distance",
    "top_weight": "largest weight of a row",
    "alike": "loss on like content",
}
TOKENS = 512  # of the prompt whose training step's memory is measured


def headrift(*arguments: object) -> None:
    subprocess.run([sys.executable, "-P", "-m", "headrift.cli", *map(str, arguments)], check=True, cwd=ROOT)


def folder_of(method: str, seed: int, args: Any) -> Path:
    return WORK / f"{method}-{seed}-{args.steps}-{args.questions}"


def train(method: str, seed: int, args: Any) -> None:
    """Where it is done already nothing happens; where that was with other settings it is refused."""
    folder = folder_of(method, seed, args)
    begun = ["--resume"] if (folder / "training.json").exists() else []
    options = ["--model", args.model, "--out", folder, "--method", method, "--seed", seed, "--steps", args.steps]
    options += ["--lr", LEARNING_RATES[method]]
    headrift("train-consistency", QUESTIONS, *options, *begun)


def evaluate(folders: list[Path], args: Any) -> None:
    """All at once: the model as it was is asked once."""
    asked = {"questions": args.questions, "skip": LOOKED_AT}
    if any(asked.items() - _asked_before(folder).items() for folder in folders):
        options = [part for name, value in asked.items() for part in (f"--{name}", value)]
        headrift("evaluate-consistency", *folders, "--model", args.model, *options)


def _asked_before(folder: Path) -> dict[str, Any]:
    path = folder / "evaluation.json"
    asked: dict[str, Any] = json.loads(path.read_text()).get("asked", {}) if path.exists() else {}
    return asked


def result(method: str, seed: int, args: Any) -> dict[str, Any]:
    """What a training with a method and a seed changed."""
    folder = folder_of(method, seed, args)
    found = json.loads((folder / "evaluation.json").read_text())
    steps = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    seconds = json.loads((folder / "outcome.json").read_text())["seconds"]
    return {"method": method, "seed": seed, "steps": len(steps), "seconds": seconds, **found}


def over_seeds(values: list[float]) -> dict[str, float]:
    """Mean over seeds with its 95% interval by Student's t; no interval for one seed."""
    from scipy import stats

    mean = float(np.mean(values))
    if len(values) < 2:
        return {"mean": mean}
    low, high = (float(x) for x in stats.t.interval(0.95, len(values) - 1, mean, stats.sem(values) or 1e-12))
    return {"mean": mean, "low": low, "high": high}


def collected(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """By method, the figures before and after over its seeds."""
    found: dict[str, Any] = {}
    for method in dict.fromkeys(run["method"] for run in runs):
        mine = [run for run in runs if run["method"] == method]
        first = mine[0]
        measures = {
            name: {"before": first["held_out"][name]["before"]}
            | {"after": over_seeds([run["held_out"][name]["after"]["value"] for run in mine])}
            | {"by_seed": [run["held_out"][name]["after"] for run in mine]}
            for name in MEASURES
            if first["held_out"][name]["pairs"]
        }
        families = {
            name: {"held_out": figures["held_out"], "before": figures["flipped"]["before"]}
            | {"after": over_seeds([run["families"][name]["flipped"]["after"]["value"] for run in mine])}
            for name, figures in first["families"].items()
        }
        layers = {
            "before": first["distance_by_layer"]["before"],
            "after": np.mean([run["distance_by_layer"]["after"] for run in mine], 0).tolist(),
        }
        ratio = over_seeds([run["perplexity"]["ratio"]["value"] for run in mine])
        seconds = [run["seconds"] for run in mine]
        found[method] = {"held_out": measures, "families": families, "layers": layers}
        found[method] |= {"perplexity_ratio": ratio, "seconds": seconds}
    return found


def memory(args: Any) -> dict[str, float]:
    """Bytes above the weights that one training step takes at its peak, in a process of its own each."""
    found = {}
    for how in ("headrift", "eager"):
        command = [sys.executable, "-P", str(ROOT / "bench/_consistency_step.py"), how, str(args.model), str(TOKENS)]
        found[how] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["bytes"]
    return found | {"ratio": found["headrift"] / found["eager"]}


def paces(args: Any) -> dict[str, list[float]]:
    """By method, the seconds of training steps that took turns."""
    rounds = 2 if args.short else 8
    command = [
        sys.executable,
        "-P",
        str(ROOT / "bench/_consistency_pace.py"),
        str(args.model),
        str(QUESTIONS),
        str(rounds),
    ]
    found: dict[str, list[float]] = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout
    )
    return found


def table(report: dict[str, Any]) -> str:
    methods, memory_of = report["methods"], report["memory"]
    n_seeds = len(report["seeds"])
    lines = [
        "# Consistency training",
        "",
        f"Made by `python bench/consistency.py`: {report['steps']} steps of {report['batch']} pairs, {n_seeds} seeds, "
        f"{report['questions']} held-out questions; held-out families: {', '.join(report['held_out_families'])}. On "
        f"{report['machine']['cpu']} ({report['machine']['cores']} cores). Before: 95% interval from drawing questions "
        "anew. After: mean and 95% interval (Student's t) over seeds, which are asked the same "
        "questions.",
        "",
        "| held out | before | " + " | ".join(NAMES[method] for method in methods) + " |",
        "|---|" + "---|" * (1 + len(methods)),
    ]
    first = next(iter(methods.values()))
    for name, words in MEASURES.items():
        if name in first["held_out"]:
            cells = [_over(found["held_out"][name]["after"]) for found in methods.values()]
            lines.append(f"| {words} | {_before(first['held_out'][name]['before'])} | {' | '.join(cells)} |")
    ratios = [_over(found["perplexity_ratio"]) for found in methods.values()]
    lines.append(f"| perplexity of a neutral text, after / before | 1 | {' | '.join(ratios)} |")
    steps = [np.percentile(report["step_seconds"][method], [50, 25, 75]) for method in methods]
    cells = [f"{middle:.2f} ({low:.2f}-{high:.2f})" for middle, low, high in steps]
    lines.append(f"| seconds of a step: median (quartiles), in turns | | {' | '.join(cells)} |")
    seconds = [f"{np.median(found['seconds']):.0f}" for found in methods.values()]
    lines.append(f"| seconds of a training, median | | {' | '.join(seconds)} |")
    lines += ["", "Answers that flip, by family:", ""]
    lines += ["| family | before | " + " | ".join(NAMES[method] for method in methods) + " |"]
    lines += ["|---|" + "---|" * (1 + len(methods))]
    for family, figures in first["families"].items():
        cells = [_over(found["families"][family]["after"]) for found in methods.values()]
        name = f"{family}{' (held out)' if figures['held_out'] else ''}"
        lines.append(f"| {name} | {_before(figures['before'])} | {' | '.join(cells)} |")
    ours, eager = memory_of["headrift"] / 1e6, memory_of["eager"] / 1e6
    lines += [
        "",
        f"Memory above the weights of an AttCT step with a wrapped prompt of {TOKENS} tokens: {ours:.0f} MB, "
        f"{memory_of['ratio']:.2f} of the {eager:.0f} MB that it takes from eager attention's full maps.",
        "",
    ]
    return "\n".join(lines)


def _over(figure: dict[str, float]) -> str:
    if "low" not in figure:
        return f"{figure['mean']:.3f}"
    return f"{figure['mean']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def _before(figure: dict[str, Any]) -> str:
    if figure["interval"] is None:
        return f"{figure['value']:.3f}"
    return f"{figure['value']:.3f} [{figure['interval'][0]:.3f}, {figure['interval'][1]:.3f}]"


def plot(report: dict[str, Any], path: Path) -> None:
    """Distance per layer before and after; flip rate by family and method."""
    from headrift.figures import new_figure, save

    figure = new_figure(12, 4.5)
    left, right = figure.subplots(1, 2)
    methods = report["methods"]
    first = next(iter(methods.values()))
    left.plot(first["layers"]["before"], color="#000000", label="before")
    colours = dict(zip(NAMES, ("#D55E00", "#0072B2", "#009E73")))
    for method, found in methods.items():
        left.plot(found["layers"]["after"], color=colours[method], label=NAMES[method])
    left.set(xlabel="layer (0: nearest the input)", ylabel="attention distance (L2), held out", ylim=(0, None))
    left.legend()
    families = list(first["families"])
    at, width = np.arange(len(families)), 0.8 / (1 + len(methods))
    before = [first["families"][family]["before"]["value"] for family in families]
    right.bar(at, before, width, color="#595959", label="before")
    for i, (method, found) in enumerate(methods.items(), 1):
        after = [found["families"][family]["after"] for family in families]
        means = [figures["mean"] for figures in after]
        error = [
            [f["mean"] - f.get("low", f["mean"]) for f in after],
            [f.get("high", f["mean"]) - f["mean"] for f in after],
        ]
        right.bar(at + i * width, means, width, yerr=error, color=colours[method], label=NAMES[method], capsize=2)
    names = [
        f"{family.replace('_', chr(10))}{'*' if first['families'][family]['held_out'] else ''}" for family in families
    ]
    right.set_xticks(at + width * len(methods) / 2, names)
    right.set(ylabel="answers that flip (* held-out family)", ylim=(0, 1))
    right.legend()
    save(figure, path)


def main() -> None:
    options = parser(__doc__, "consistency")
    options.add_argument("--steps", type=int, default=100)
    options.add_argument("--questions", type=int, default=46)
    options.add_argument("--methods", default=",".join(NAMES))
    options.add_argument("--seeds", default="0,1,2")
    args = options.parse_args()
    methods, seeds = args.methods.split(","), [int(seed) for seed in args.seeds.split(",")]
    if args.short:
        args.steps, args.questions, seeds = 4, 6, seeds[:1]
    arms = [(method, seed) for seed in seeds for method in methods]
    for arm in arms:
        train(*arm, args)
    evaluate([folder_of(*arm, args) for arm in arms], args)
    runs = [result(*arm, args) for arm in arms]
    settings = json.loads((folder_of(*arms[0], args) / "training.json").read_text())
    report = {
        "steps": args.steps,
        "batch": settings["settings"]["batch"],
        "seeds": seeds,
        "questions": runs[0]["questions"],
        "held_out_families": runs[0]["held_out_families"],
        "settings": settings["settings"],
        "machine": machine(),
        "versions": versions(),
        "methods": collected(runs),
        "memory": memory(args),
        "step_seconds": paces(args),
        "runs": [{key: value for key, value in run.items() if key != "versions"} for run in runs],
    }
    out = out_of(args)
    write(report, table(report), out)
    plot(report, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
