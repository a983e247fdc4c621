"""The tables of README.md and docs/results/measured.md, from the JSON files in bench/results and from nothing else.

    python bench/readme_table.py

Results that do not exist have no rows. A test fails if a page and the committed results differ.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import utils
from peers import BATCHED, COMPILED, EAGER, GENERATE, NNSIGHT, REPLAY
from utils import cell

README, ALL = utils.ROOT / "README.md", utils.ROOT / "docs/results/measured.md"
# How the rows begin that the README has; the other page has all of them.
BRIEF = (
    "headrift, generating, prompts/s",
    "headrift, replaying",
    "transformers, eager attention, one prompt",
    "transformers, eager attention, in batches",
    "headrift generate / transformers one at a time",
    "difference of a mass",
    "probing / plain vLLM, base",
    "probing / plain vLLM, batch 64",
    "vLLM's CPU attention / ours with masses, AVX-512",
    "transformers, a pass a head / headrift",
)
Report = Mapping[str, Any]
Rows = list[tuple[str, str]]  # what was measured, and the result


def peers(report: Report) -> Rows:
    ways = report["ways"]
    shown = {
        GENERATE: "headrift, generating",
        COMPILED: "headrift, generating, with --compile",
        REPLAY: "headrift, replaying logged answers",
        EAGER: "transformers, eager attention, one prompt at a time",
        BATCHED: "transformers, eager attention, in batches",
        NNSIGHT: "nnsight, one prompt at a time",
    }
    rows = [(f"{shown[n]}, prompts/s", cell(ways[n]["prompts_per_second"], 2)) for n in shown if n in ways]
    rows += [
        (f"headrift {name} / transformers one at a time, warm", cell(ways[name]["ratio"]))
        for name in (GENERATE, COMPILED, REPLAY)
        if name in ways
    ]
    columns = {GENERATE: "headrift", COMPILED: "with --compile", EAGER: "transformers one at a time"}
    columns = {name: shown for name, shown in columns.items() if name in ways}
    for what, value in (
        (f"cold, start-up and {report['prompts']['cold']} prompts, seconds", lambda way: way["cold"]["seconds"]),
        ("start-up alone, seconds", lambda way: way["cold"]["start_s"]),
        ("peak memory with a KV cache of 1 GiB, GB", lambda way: way["peak_bytes"] / 1e9),
    ):
        rows.append((f"{what}: {'; '.join(columns.values())}", "; ".join(f"{value(ways[n]):.1f}" for n in columns)))
    same = report["agreement"][GENERATE]
    differences = f"{same['largest_difference']:.1e}; {same['mean_difference']:.1e}"
    return [
        *rows,
        (f"difference of a mass, of {same['masses_compared']:,}: largest; mean", differences),
        ("rank correlation of their scores", f"{same['spearman_of_scores']:.4f}"),
        ("AUROC on these prompts: headrift; transformers", f"{same['auroc']:.3f}; {same['auroc_expected']:.3f}"),
        ("share of the best measured matrix product, generating", cell(report["peak"]["share"][GENERATE], 2)),
    ]


def overhead(report: Report) -> Rows:
    rows = [
        (f"{arm} / {plain} vLLM, {case['name']}: wall; CPU time", wall_and_cpu(over))
        for case in report["cases"]
        # Idle engines are compared with plain vLLM by idle.py: processes differ by more.
        for arm, result in case["arms"].items()
        if arm != "idle"
        for plain, over in result["over"].items()
    ]
    case = report["cases"][0]
    if "probing" in case["arms"]:
        out = f"{case['arms']['probing']['bytes_per_prompt']:,.0f}; {case['bytes_bound']:,}"
        rows.append((f"bytes that leave the engine a prompt, {case['steps']} steps; at most", out))
    return rows


def wall_and_cpu(over: Mapping[str, Any]) -> str:
    return f"{cell(over['seconds'], 3)}; {cell(over['cpu_seconds'], 3)}"


def idle(report: Report) -> Rows:
    same = "the same engine without headrift's parts, in one process"
    return [
        *(
            (f"{arm} / {same}, {case['name']}: wall; CPU time", wall_and_cpu(over))
            for case in report["one_process"]
            for arm, over in case["over"].items()
        ),
        *(
            (
                f"idle / plain vLLM, {report['processes']} processes of each, {case['name']}: CPU time",
                cell(case["ratio"], 3),
            )
            for case in report["cases"]
        ),
    ]


def kernels(report: Report) -> Rows:
    means, wide = report["geometric_means"], report["machine"]["instructions"]
    shapes = f"{len(report['cases'])} shapes of decode rows, geometric mean"
    return [
        (f"vLLM's CPU attention / ours with masses, {wide}, {shapes}", f"{means['speedup']:.2f}"),
        (f"our kernel with masses / without, {wide}", f"{means['mass_over_plain']:.3f}"),
    ]


def host_cost(report: Report) -> Rows:
    rows = []
    for step in ("decode", "streaming"):
        steps = [row for row in report["rows"] if row["step"] == step]
        batches, added = f"{steps[0]['rows']} to {steps[-1]['rows']} rows", [row["added"] for row in steps]
        what = f"microseconds a {step} step, {batches}, 32 layers (CPU tensors)"
        rows.append((f"host cost of probing on a GPU's backend, {what}", f"{min(added):.0f} to {max(added):.0f}"))
    return rows


def safety_heads(report: Report) -> Rows:
    s = report["settings"]
    passes = f"transformers, a pass a head / headrift, SHIPS of {s['heads']} heads, {s['queries']} queries"
    return [
        (passes, cell(report["loop_over_headrift"])),
        ("rank correlation of their heads", f"{report['spearman_of_the_means']:.6f}"),
    ]


def sahara(report: Report) -> Rows:
    s = report["settings"]
    passes = f"transformers, a pass a row / headrift, Sahara, {s['steps']} steps, {s['queries']} queries"
    return [(passes, cell(report["loop_over_headrift"]))]


# Result file: its rows, and the name of its page in the table.
TABLES: dict[str, tuple[Callable[[Report], Rows], str]] = {
    "peers": (peers, "peers"),
    "overhead": (overhead, "overhead"),
    "entropy": (overhead, "entropy"),
    "idle": (idle, "idle"),
    "kernels_cpu": (kernels, "kernels"),
    "kernels_cpu_avx2": (kernels, "kernels"),
    "host_cost": (host_cost, "host cost"),
    "safety_heads": (safety_heads, "safety heads"),
    "sahara": (sahara, "Sahara"),
}


def measured(reports: Mapping[str, Report], results: str, brief: bool = False) -> str:
    """Return the main table, with what was measured on which machine.

    Args:
        reports: Contents of the JSON files, by name.
        results: bench/results, as seen from the page.
        brief: Only the rows that BRIEF names.
    """
    host, rows, lines = next(iter(reports.values()))["machine"], [], []
    if "peers" in reports:
        prompts, turns = reports["peers"]["prompts"], len(reports["peers"]["turns"])
        lines += [
            f"One machine: {host['cpu']}, {host['cores']} cores, float32, the demonstration model.",
            f"Against other ways: {prompts['n']} prompts, a system prompt of {prompts['system_tokens']:.0f} tokens,",
            f"{prompts['steps']} steps, over all of {turns} turns (least to most).",
        ]
    if "overhead" in reports:
        lines += [
            f"Against plain vLLM, above 1 is faster: medians, 95% intervals, at least {reports['overhead']['pairs']} "
            "ABBA turns each, prompts",
            "in the prefix cache: decoding is timed, where probing weighs most and a faster kernel pays most.",
        ]
    for name, (rows_of, page) in TABLES.items():
        if name in reports:
            cpu = reports[name]["machine"]["cpu"]
            elsewhere = "" if cpu == host["cpu"] or name in ("idle", "kernels_cpu", "kernels_cpu_avx2") else f" [{cpu}]"
            link = f"[{page}]({results}/{name}.md)"
            rows += [
                (what + elsewhere, result, link)
                for what, result in rows_of(reports[name])
                if not brief or what.startswith(BRIEF)
            ]
    lines += ["", *utils.markdown(["", "measured", "all of it"], rows)]
    if "scaling" in reports:
        lines += ["", f"![Prompts/s by work and settings, and where the time goes]({results}/scaling.png)"]
    return "\n".join(lines)


def separation(sets: Sequence[Report]) -> str:
    """Return the table of what the score and prompt length separate, by prompt set."""
    rows = []
    for result in sets:
        measures, cells = result["comparisons"][0]["measures"], []
        for name in ("score (no score: lowest)", "prompt length"):
            low, high = measures[name]["auroc_interval"]
            cells.append(f"{measures[name]['auroc']:.3f} ({low:.3f} to {high:.3f})")
        rows.append([result["set"], *cells])
    return "\n".join(utils.markdown(["set", "score", "prompt length"], rows))


def page(text: str, results: Path = utils.RESULTS) -> str:
    """Return the README with its tables made of the results."""
    table = measured(read_reports(results), "bench/results", brief=True)
    parts = {"measured": table, "separation": separation(utils.read_json(results / "sets.json"))}
    return utils.fill(text, "bench/readme_table.py", parts)


def page_of_all(text: str, results: Path = utils.RESULTS) -> str:
    """Return docs/results/measured.md with its table made of the results."""
    table = measured(read_reports(results), "../../bench/results")
    return utils.fill(text, "bench/readme_table.py", {"measured": table})


def read_reports(results: Path) -> dict[str, Report]:
    """Return the contents of the JSON files that exist, by name."""
    paths = {name: results / f"{name}.json" for name in (*TABLES, "scaling")}
    return {name: utils.read_json(path) for name, path in paths.items() if path.exists()}


def main() -> None:
    for path, make in ((README, page), (ALL, page_of_all)):
        path.write_text(make(path.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"{path.name} written")


if __name__ == "__main__":
    main()
