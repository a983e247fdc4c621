"""The README's tables of measured results, from the JSON files in bench/results and from nothing else.

    python bench/readme_table.py

Results that are not there have no rows. A test fails where the README and the committed results differ.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _generated import filled
from _measure import figures

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "bench/results"
EAGER, GENERATE, REPLAY = "transformers, one at a time", "generate", "replay"
COMPILED = "generate, compiled"
COLUMNS = {GENERATE: "headrift", COMPILED: "with --compile", EAGER: "transformers one at a time"}
Row = tuple[str, str, str]


def of_peers(report: dict[str, Any]) -> list[Row]:
    ways, peak, prompts = report["ways"], report["peak"], report["prompts"]
    page = "[peers](bench/results/peers.md)"
    rows = [
        (f"{shown}, prompts/s", figures(ways[name]["prompts_per_second"], 2), page)
        for name, shown in (
            (GENERATE, "headrift, generating"),
            (COMPILED, "headrift, generating, with --compile"),
            (REPLAY, "headrift, replaying logged answers"),
            (EAGER, "transformers, eager attention, one prompt at a time"),
            ("transformers, batched", "transformers, eager attention, in batches"),
            ("nnsight", "nnsight, one prompt at a time"),
        )
        if name in ways
    ]
    rows += [
        (f"headrift {name} / transformers one at a time, warm", figures(ways[name]["ratio"]), page)
        for name in (GENERATE, COMPILED, REPLAY)
        if name in ways
    ]
    cold = {name: f"{way['cold']['seconds']:.1f}" for name, way in ways.items()}
    starts = {name: f"{way['cold']['start_s']:.1f}" for name, way in ways.items()}
    memory = {name: f"{way['peak_bytes'] / 1e9:.1f}" for name, way in ways.items()}
    shown = [name for name in (GENERATE, COMPILED, EAGER) if name in ways]
    rows += [
        (f"{what}: {'; '.join(COLUMNS[name] for name in shown)}", "; ".join(of[name] for name in shown), page)
        for what, of in (
            (f"cold, start-up and {prompts['cold']} prompts, seconds", cold),
            ("start-up alone, seconds", starts),
            ("peak memory with a KV cache of 1 GiB, GB", memory),
        )
    ]
    same = report["agreement"][GENERATE]
    cells = f"{same['masses_compared']:,}"
    rows += [
        (f"difference of a mass, of {cells}: largest; mean", _powers(same), page),
        ("rank correlation of their scores", f"{same['spearman_of_scores']:.4f}", page),
        (
            "AUROC on these prompts: headrift; transformers",
            f"{same['auroc']:.3f}; {same['auroc_expected']:.3f}",
            page,
        ),
        ("share of the best measured matrix product, generating", figures(peak["share"][GENERATE], 2), page),
    ]
    return rows


def _powers(found: dict[str, float]) -> str:
    return f"{found['largest_difference']:.1e}; {found['mean_difference']:.1e}"


def of_overhead(report: dict[str, Any], name: str = "overhead") -> list[Row]:
    page = f"[{name}](bench/results/{name}.md)"
    rows = []
    for case in report["cases"]:
        # Idle engines are told from plain vLLM by idle.py: processes differ by more.
        for name, arm in ((name, arm) for name, arm in case["arms"].items() if name != "idle"):
            for plain, over in arm["over"].items():
                wall, cpu = figures(over["seconds"], 3), figures(over["cpu_seconds"], 3)
                rows.append((f"{name} / {plain} vLLM, {case['name']}: wall; CPU time", f"{wall}; {cpu}", page))
    case = report["cases"][0]
    if "probing" in case["arms"]:
        held = f"{case['arms']['probing']['bytes_per_prompt']:,.0f}; {case['bytes_bound']:,}"
        rows.append((f"bytes that leave the engine a prompt, {case['steps']} steps; at most", held, page))
    return rows


def of_idle(report: dict[str, Any]) -> list[Row]:
    page, n = "[idle](bench/results/idle.md)", report["processes"]
    rows = []
    for case in report["one_process"]:
        for arm, over in case["over"].items():
            ratios = f"{figures(over['seconds'], 3)}; {figures(over['cpu_seconds'], 3)}"
            what = f"{arm} / the same engine without headrift's parts, in one process, {case['name']}: wall; CPU time"
            rows.append((what, ratios, page))
    for case in report["cases"]:
        ratio = figures(case["ratio"], 3)
        rows.append((f"idle / plain vLLM, {n} processes of each, {case['name']}: CPU time", ratio, page))
    return rows


def of_kernels(report: dict[str, Any], name: str) -> list[Row]:
    page, means = f"[kernels](bench/results/{name}.md)", report["geometric_means"]
    machine = report["machine"]["instructions"]
    what = f"{len(report['cases'])} shapes of decode rows, geometric mean"
    return [
        (f"vLLM's CPU attention / ours with masses, {machine}, {what}", f"{means['speedup']:.2f}", page),
        (f"our kernel with masses / without, {machine}", f"{means['mass_over_plain']:.3f}", page),
    ]


def of_host(report: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for step in ("decode", "streaming"):
        of_step = [row for row in report["rows"] if row["step"] == step]
        added = [row["added"] for row in of_step]
        batches = f"{of_step[0]['rows']} to {of_step[-1]['rows']} rows"
        what = (
            f"host cost of probing on a GPU's backend, microseconds a {step} step, {batches}, 32 layers (CPU tensors)"
        )
        rows.append((what, f"{min(added):.0f} to {max(added):.0f}", "[host cost](bench/results/host_cost.md)"))
    return rows


def of_ships(report: dict[str, Any]) -> list[Row]:
    s, page = report["settings"], "[safety heads](bench/results/safety_heads.md)"
    return [
        (
            f"transformers, a pass a head / headrift, SHIPS of {s['heads']} heads, {s['queries']} queries",
            figures(report["loop_over_headrift"]),
            page,
        ),
        ("rank correlation of their heads", f"{report['spearman_of_the_means']:.6f}", page),
    ]


def of_sahara(report: dict[str, Any]) -> list[Row]:
    s, page = report["settings"], "[Sahara](bench/results/sahara.md)"
    what = f"transformers, a pass a row / headrift, Sahara, {s['steps']} steps, {s['queries']} queries"
    return [(what, figures(report["loop_over_headrift"]), page)]


def elsewhere(rows: list[Row], report: dict[str, Any], machine: dict[str, Any]) -> list[Row]:
    """Rows of another machine than most, which is named."""
    cpu = report["machine"]["cpu"]
    return rows if cpu == machine["cpu"] else [(f"{what} [{cpu}]", figure, page) for what, figure, page in rows]


def measured(reports: dict[str, Any]) -> str:
    """The main table, with what was measured on what."""
    rows: list[Row] = []
    lines: list[str] = []
    machine = next(iter(reports.values()))["machine"]
    if "peers" in reports:
        peers = reports["peers"]
        prompts = peers["prompts"]
        lines += [
            f"One machine: {machine['cpu']}, {machine['cores']} cores, float32, the demonstration model.",
            f"Against other ways: {prompts['n']} prompts, a system prompt of {prompts['system_tokens']:.0f} tokens,",
            f"{prompts['steps']} steps, over all of {len(peers['turns'])} turns (least to most).",
        ]
        rows += of_peers(peers)
    if "overhead" in reports:
        pairs = reports["overhead"]["pairs"]
        lines += [
            f"Against plain vLLM, above 1 is faster: medians, 95% intervals, at least {pairs} ABBA turns each, prompts",
            "in the prefix cache: decoding is timed, where probing weighs most and a faster kernel pays most.",
        ]
        rows += of_overhead(reports["overhead"])
    if "entropy" in reports:
        rows += elsewhere(of_overhead(reports["entropy"], "entropy"), reports["entropy"], machine)
    if "idle" in reports:
        rows += of_idle(reports["idle"])
    for name in ("kernels_cpu", "kernels_cpu_avx2"):
        if name in reports:
            rows += of_kernels(reports[name], name)
    for name, rows_of in (("host_cost", of_host), ("safety_heads", of_ships), ("sahara", of_sahara)):
        if name in reports:
            rows += elsewhere(rows_of(reports[name]), reports[name], machine)
    lines += ["", "| | measured | all of it |", "|---|---|---|"]
    lines += [f"| {what} | {figure} | {where} |" for what, figure, where in rows]
    if "scaling" in reports:
        lines += ["", "![Prompts/s by what is asked, and where the time goes](bench/results/scaling.png)"]
    return "\n".join(lines)


def separation(sets: list[dict[str, Any]]) -> str:
    """What the score and prompt length separate, by prompt set."""
    lines = ["| set | score | prompt length |", "|---|---|---|"]
    for of in sets:
        measures = of["comparisons"][0]["measures"]
        cells = []
        for name in ("score (no score: lowest)", "prompt length"):
            low, high = measures[name]["auroc_interval"]
            cells.append(f"{measures[name]['auroc']:.3f} ({low:.3f} to {high:.3f})")
        lines.append(f"| {of['set']} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def page(text: str, results: Path = RESULTS) -> str:
    """The README with its tables as the results have them."""
    names = (
        "peers",
        "overhead",
        "entropy",
        "idle",
        "scaling",
        "kernels_cpu",
        "kernels_cpu_avx2",
        "host_cost",
        "safety_heads",
        "sahara",
    )
    paths = {name: results / f"{name}.json" for name in names}
    reports = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}
    sets = json.loads((results / "sets.json").read_text(encoding="utf-8"))
    return filled(text, "bench/readme_table.py", {"measured": measured(reports), "separation": separation(sets)})


def main() -> None:
    README.write_text(page(README.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{README.name} written")


if __name__ == "__main__":
    main()
