"""How prompts/s change with the work and the settings, and where a job's time goes.

    python bench/scaling.py [--repeats 3] [--short] [--model DIR]

Against the number of prompts, the length of prompts and of their system prompt, and the requests in flight
(`max_num_seqs`), with the demonstration model; against depth and width with tiny random models made on the way; and the
parts of the time of a whole job (see _phases: wall clock, one process). Each engine is a process of its own, alone at
its time. Every run begins with an empty prefix cache and scores prompts that are all different.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _measure
from _children import Child
from _corpus_rows import WORDS
from _phases import PHASES
from corpus import make_tiny_model

STEPS = 12
SERIES = {
    "prompts": "prompts",
    "prompt_tokens": "words of a user (8 prompts)",
    "system_tokens": "system prompt's words (16 prompts)",
    "in_flight": "most in flight, max_num_seqs (32 prompts)",
    "layers": "layers, random, 256 wide (32 prompts)",
    "hidden": "width of 4 random layers (32 prompts)",
}
FULL = {
    "prompts": (1, 8, 64, 256),
    "prompt_tokens": (16, 64, 256, 512),
    "system_tokens": (32, 128, 512, 2048),
    "in_flight": (1, 4, 16, 64),
    "layers": (2, 4, 8, 16),
    "hidden": (128, 256, 512, 1024),
}
SHORT = {
    "prompts": (1, 8),
    "prompt_tokens": (16, 64),
    "system_tokens": (32, 128),
    "in_flight": (2, 8),
    "layers": (2, 4),
    "hidden": (128, 256),
}


def words(n: int, random: Random) -> str:
    """A text of about so many tokens."""
    return " ".join(random.choices(WORDS.split(), k=n))


def rows(n: int, user: int = 20, system: int = 100, seed: int = 0) -> list[dict[str, str]]:
    """n prompts of about so many tokens, with one system prompt."""
    random = Random(seed)
    same = words(system, random)
    return [{"prompt": f"{i}: {words(user, random)}", "system": same} for i in range(n)]


@contextmanager
def scorer(model: Path, **engine_args: Any) -> Iterator[tuple[Child, dict[str, Any]]]:
    """A Scorer's process, warm; and how it started."""
    settings = {"kv_cache_memory_bytes": _measure.KV_BYTES, "max_model_len": 4096, **engine_args}
    with Child("_peer_headrift.py") as child:
        about = child.ask("start", model=str(model), steps=STEPS, engine_args=settings)
        about["start_s"] = child.seconds_since_start
        child.ask("run", rows=rows(8, seed=1))
        yield child, about


def point(child: Child, at: int, given: list[dict[str, str]], repeats: int) -> dict[str, Any]:
    """Prompts/s of these rows, a few times over."""
    runs = [child.ask("run", rows=given) for _ in range(repeats)]
    return {
        "at": at,
        "prompts": len(given),
        "prompt_tokens": runs[0]["prompt_tokens"],
        "system_tokens": runs[0]["system_tokens"],
        "prompts_per_second": _measure.spread([len(given) / run["seconds"] for run in runs]),
        "peak_bytes": runs[-1]["peak_bytes"],
        "samples": {of: [run[of] for run in runs] for of in ("seconds", "cpu_seconds", "flops")},
    }


def of_the_work(model: Path, sizes: dict[str, tuple[int, ...]], repeats: int) -> dict[str, list[dict[str, Any]]]:
    """The series that one engine runs."""
    with scorer(model) as (child, about):
        print(f"{model.name}: started in {about['start_s']:.1f} s", flush=True)
        return {
            "prompts": [point(child, n, rows(n), repeats) for n in sizes["prompts"]],
            "prompt_tokens": [point(child, n, rows(8, user=n), repeats) for n in sizes["prompt_tokens"]],
            "system_tokens": [point(child, n, rows(16, system=n), repeats) for n in sizes["system_tokens"]],
        }


def of_the_model(model: Path, sizes: dict[str, tuple[int, ...]], repeats: int) -> dict[str, list[dict[str, Any]]]:
    """Depth and width, each model made for it and thrown away."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    found: dict[str, list[dict[str, Any]]] = {"layers": [], "hidden": []}
    shapes = [("layers", n, {"layers": n, "hidden": 256}) for n in sizes["layers"]]
    shapes += [("hidden", n, {"layers": 4, "hidden": n}) for n in sizes["hidden"]]
    for series, at, shape in shapes:
        with tempfile.TemporaryDirectory() as folder:
            tiny = make_tiny_model(Path(folder), model, **shape)
            with scorer(tiny) as (child, about):
                found[series].append(point(child, at, rows(32), repeats) | {"start_s": about["start_s"]})
    return found


def of_the_settings(model: Path, sizes: dict[str, tuple[int, ...]], repeats: int) -> dict[str, list[dict[str, Any]]]:
    """The most requests that run at once."""
    found = []
    for n in sizes["in_flight"]:
        with scorer(model, max_num_seqs=n) as (child, about):
            found.append(point(child, n, rows(32), repeats) | {"start_s": about["start_s"]})
    return {"in_flight": found}


def phases(model: Path, prompts: Path, system: str, limit: int | None, repeats: int) -> list[dict[str, Any]]:
    """Seconds of a job, by what it did."""
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "rows.jsonl"
        lines = prompts.read_text(encoding="utf-8").splitlines()[:limit]
        given.write_text("".join(json.dumps({**json.loads(line), "system": system}) + "\n" for line in lines))
        with Child("_phases.py") as child:
            settings = {"kv_cache_memory_bytes": _measure.KV_BYTES}
            child.ask("start", model=str(model), steps=STEPS, engine_args=settings)
            child.ask("run", file=str(given))
            return [child.ask("run", file=str(given)) for _ in range(repeats)]


def table(report: dict[str, Any]) -> str:
    machine = report["machine"]
    lines = [
        f"# Prompts/s by what is asked: {machine['cpu']}, {machine['cores']} cores, {report['model']}",
        "",
        f"Made by `bench/scaling.py`, {STEPS} steps; medians of {report['repeats']} runs (least to most). Where not",
        "said otherwise a prompt has 20 words and a system prompt of 100 words, shared by all.",
        "",
        "| what grows | | prompt tokens | of them system | prompts/s | start-up, s | peak GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for series, points in report["series"].items():
        for p in points:
            start = f"{p['start_s']:.1f}" if "start_s" in p else ""
            lines.append(
                f"| {SERIES[series]} | {p['at']:,} | {p['prompt_tokens']:.0f} | {p['system_tokens']:.0f} "
                f"| {_measure.figures(p['prompts_per_second'], 2)} | {start} | {p['peak_bytes'] / 1e9:.2f} |"
            )
    run = middle(report["phases"])
    lines += ["", f"Where the {run['seconds']:.1f} s of a job of {run['prompts']} prompts go:", ""]
    lines += ["| | s | |", "|---|---|---|"]
    lines += [f"| {name} | {run['phases'][name]:.2f} | {run['phases'][name] / run['seconds']:.1%} |" for name in PHASES]
    return "\n".join([*lines, ""])


def middle(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run of median length."""
    return sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2]


def plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(14, 6.5), layout="constrained")
    places = figure.add_gridspec(2, 4, width_ratios=(1, 1, 1, 0.45))
    for i, (series, points) in enumerate(report["series"].items()):
        axis = figure.add_subplot(places[i // 3, i % 3])
        rates = [p["prompts_per_second"] for p in points]
        median, low, high = ([rate[name] for rate in rates] for name in ("median", "low", "high"))
        at = [p["at"] for p in points]
        axis.plot(at, median, marker="o", color="tab:blue")
        axis.fill_between(at, low, high, color="tab:blue", alpha=0.2, linewidth=0)
        axis.set(xscale="log", xlabel=SERIES[series], ylabel="prompts/s", ylim=(0, None), xticks=at)
        axis.set_xticklabels([f"{n:,}" for n in at])
        axis.minorticks_off()
    bar, run, bottom = figure.add_subplot(places[:, 3]), middle(report["phases"]), 0.0
    for name, colour in zip(PHASES, plt.get_cmap("tab10").colors):
        share = 100 * run["phases"][name] / run["seconds"]
        bar.bar(0, share, bottom=bottom, color=colour, label=f"{name} {share:.1f}%")
        bottom += share
    bar.set(xticks=[], ylabel="% of the time", ylim=(0, 100), title=f"a job of {run['prompts']} prompts")
    handles, labels = bar.get_legend_handles_labels()
    bar.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    options = _measure.parser(__doc__, "scaling")
    options.add_argument("--repeats", type=int, help="runs of each point (3; 2 with --short)")
    options.add_argument("--prompts", type=Path, default=_measure.ROOT / "datasets/obfuscated_word.jsonl")
    options.add_argument("--system", type=Path, default=_measure.ROOT / "system_prompts/obfuscated_word.txt")
    args = options.parse_args()
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    sizes, repeats = (SHORT if args.short else FULL), args.repeats or (2 if args.short else 3)
    report: dict[str, Any] = {
        "machine": _measure.machine(),
        "versions": _measure.versions(),
        "model": args.model.name,
        "repeats": repeats,
    }
    system = args.system.read_text(encoding="utf-8").strip()
    report["phases"] = phases(args.model, args.prompts, system, 12 if args.short else None, repeats)
    report["series"] = of_the_work(args.model, sizes, repeats)
    report["series"] |= of_the_settings(args.model, sizes, repeats)
    report["series"] |= of_the_model(args.model, sizes, repeats)
    out = _measure.out_of(args)
    _measure.write(report, table(report), out)
    plot(report, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
