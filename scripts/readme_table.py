"""The tables of README.md and docs/results/measured.md, from the JSON files in bench/results and from nothing else.

    python scripts/readme_table.py

Results that do not exist have no rows. A test fails if a page and the committed results differ.
"""

import string
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import public
import utils

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
Report = dict[str, Any]
Rows = tuple[Callable[[Report], Iterator[Report]], str]


def arms(name: str) -> Callable[[Report], Iterator[Report]]:
    """Return a function that yields each case's arms, with their ratios to plain vLLM's."""

    def each(report: Report) -> Iterator[Report]:
        for case in report[name]:
            for arm, result in case["over"].items() if "over" in case else case["arms"].items():
                over = result.get("over", {"plain": result}).get("plain")
                # Of separate processes, idle.py compares idle engines with plain vLLM: they differ by more.
                if over and (arm != "idle" or "over" in case):
                    yield {"arm": arm, "case": case["name"], "over": over}

    return each


def host_steps(report: Report) -> Iterator[Report]:
    for step in ("decode", "streaming"):
        rows = [row for row in report["rows"] if row["step"] == step]
        added = [row["added"] for row in rows]
        yield {"step": step, "first": rows[0]["rows"], "last": rows[-1]["rows"], "low": min(added), "high": max(added)}


def whole(report: Report) -> Iterator[Report]:
    yield {**report, "n": len(report.get("cases", []))}


def cases(report: Report) -> Iterator[Report]:
    for case in report["cases"]:
        yield {**report, "case": case}


PEERS = """
headrift, generating, prompts/s | {ways[generate][prompts_per_second]:2}
headrift, generating, with --compile, prompts/s | {ways[generate, compiled][prompts_per_second]:2}
headrift, replaying logged answers, prompts/s | {ways[replay][prompts_per_second]:2}
transformers, eager attention, one prompt at a time, prompts/s \
 | {ways[transformers, one at a time][prompts_per_second]:2}
transformers, eager attention, in batches, prompts/s | {ways[transformers, batched][prompts_per_second]:2}
nnsight, one prompt at a time, prompts/s | {ways[nnsight][prompts_per_second]:2}
headrift generate / transformers one at a time, warm | {ways[generate][ratio]}
headrift generate, compiled / transformers one at a time, warm | {ways[generate, compiled][ratio]}
headrift replay / transformers one at a time, warm | {ways[replay][ratio]}
cold, start-up and {prompts[cold]} prompts, seconds: headrift; with --compile; transformers one at a time \
 | {ways[generate][cold][seconds]:.1f}; {ways[generate, compiled][cold][seconds]:.1f}; \
{ways[transformers, one at a time][cold][seconds]:.1f}
start-up alone, seconds: headrift; with --compile; transformers one at a time \
 | {ways[generate][cold][start_s]:.1f}; {ways[generate, compiled][cold][start_s]:.1f}; \
{ways[transformers, one at a time][cold][start_s]:.1f}
peak memory with a KV cache of 1 GiB, GB: headrift; with --compile; transformers one at a time \
 | {ways[generate][peak_bytes]:GB}; {ways[generate, compiled][peak_bytes]:GB}; \
{ways[transformers, one at a time][peak_bytes]:GB}
difference of a mass, of {agreement[generate][masses_compared]:,}: largest; mean \
 | {agreement[generate][largest_difference]:.1e}; {agreement[generate][mean_difference]:.1e}
rank correlation of their scores | {agreement[generate][spearman_of_scores]:.4f}
AUROC on these prompts: headrift; transformers \
 | {agreement[generate][auroc]:.3f}; {agreement[generate][auroc_expected]:.3f}
share of the best measured matrix product, generating | {peak[share][generate]:2}
"""
WALL_AND_CPU = "wall; CPU time | {over[seconds]:3}; {over[cpu_seconds]:3}"
OVERHEAD: list[Rows] = [
    (arms("cases"), "{arm} / plain vLLM, {case}: " + WALL_AND_CPU),
    (
        whole,
        "bytes that leave the engine a prompt, {cases[0][steps]} steps; at most "
        "| {cases[0][arms][probing][bytes_per_prompt]:,.0f}; {cases[0][bytes_bound]:,}",
    ),
]
ONE_PROCESS = "{arm} / the same engine without headrift's parts, in one process, {case}: " + WALL_AND_CPU
SEVERAL = "idle / plain vLLM, {processes} processes of each, {case[name]}: CPU time | {case[ratio]:3}"
KERNELS = """
vLLM's CPU attention / ours with masses, {machine[instructions]}, {n} shapes of decode rows, geometric mean \
 | {geometric_means[speedup]:.2f}
our kernel with masses / without, {machine[instructions]} | {geometric_means[mass_over_plain]:.3f}
"""
HOST_COST = (
    "host cost of probing on a GPU's backend, microseconds a {step} step, {first} to {last} rows, "
    "32 layers (CPU tensors) | {low:.0f} to {high:.0f}"
)
SAFETY_HEADS = """
transformers, a pass a head / headrift, SHIPS of {settings[heads]} heads, {settings[queries]} queries \
 | {loop_over_headrift}
rank correlation of their heads | {spearman_of_the_means:.6f}
"""
SAHARA = (
    "transformers, a pass a row / headrift, Sahara, {settings[steps]} steps, {settings[queries]} queries "
    "| {loop_over_headrift}"
)
# Result file: the name of its page in the table, and its rows (what was measured | the result) for each of its parts.
TABLES: dict[str, tuple[str, list[Rows]]] = {
    "peers": ("peers", [(whole, PEERS)]),
    "overhead": ("overhead", OVERHEAD),
    "entropy": ("entropy", OVERHEAD),
    "idle": ("idle", [(arms("one_process"), ONE_PROCESS), (cases, SEVERAL)]),
    "kernels_cpu": ("kernels", [(whole, KERNELS)]),
    "kernels_cpu_avx2": ("kernels", [(whole, KERNELS)]),
    "host_cost": ("host cost", [(host_steps, HOST_COST)]),
    "safety_heads": ("safety heads", [(whole, SAFETY_HEADS)]),
    "sahara": ("Sahara", [(whole, SAHARA)]),
}


class Cells(string.Formatter):
    """Formats ratios and spreads with as many digits as the format says (1), and bytes by `GB`."""

    def format_field(self, value: Any, spec: str) -> str:
        if isinstance(value, dict):
            return utils.cell(value, int(spec or 1))
        return f"{value / 1e9:.1f}" if spec == "GB" else format(value, spec)


def table_rows(name: str, report: Report) -> Iterator[list[str]]:
    """Yield what was measured and the result, without what the report does not have."""
    for each, rows in TABLES[name][1]:
        for part in each(report):
            for row in rows.strip().splitlines():
                try:
                    yield [cell.strip() for cell in Cells().vformat(row, (), part).split(" | ")]
                except KeyError:
                    continue


def measured(results: Path, link: str, brief: bool = False) -> str:
    """Return the main table, with what was measured on which machine.

    Args:
        results: The folder of the JSON files.
        link: That folder, as seen from the page.
        brief: Only the rows that BRIEF names.
    """
    paths = {name: results / f"{name}.json" for name in (*TABLES, "scaling")}
    reports: dict[str, Report] = {name: utils.read_json(path) for name, path in paths.items() if path.exists()}
    host, rows, about = next(iter(reports.values()))["machine"], [], []
    if "peers" in reports:
        about.append(
            "One machine: {machine[cpu]}, {machine[cores]} cores, float32, the demonstration model.\n"
            "Against other ways: {prompts[n]} prompts, a system prompt of {prompts[system_tokens]:.0f} tokens,\n"
            "{prompts[steps]} steps, over all of {n} turns (least to most)."
            "".format(**reports["peers"], n=len(reports["peers"]["turns"]))
        )
    if "overhead" in reports:
        about.append(
            f"Against plain vLLM, above 1 is faster: medians, 95% intervals, at least {reports['overhead']['pairs']} "
            "ABBA turns each, prompts\n"
            "in the prefix cache: decoding is timed, where probing weighs most and a faster kernel pays most."
        )
    for name in (name for name in TABLES if name in reports):
        cpu = reports[name]["machine"]["cpu"]
        elsewhere = "" if cpu == host["cpu"] or name in ("idle", "kernels_cpu", "kernels_cpu_avx2") else f" [{cpu}]"
        rows += [
            [what + elsewhere, result, f"[{TABLES[name][0]}]({link}/{name}.md)"]
            for what, result in table_rows(name, reports[name])
            if not brief or what.startswith(BRIEF)
        ]
    parts = ["\n".join(about), utils.markdown(["", "measured", "all of it"], rows)]
    if "scaling" in reports:
        parts.append(f"![Prompts/s by work and settings, and where the time goes]({link}/scaling.png)")
    return utils.page(*parts)


def separation(results: Path) -> str:
    """Return the table of what signals separate: held-out prompts, then held-out sources, of both models."""
    names = ("readout", "instability", "focus", "words", "length")
    rows = []
    for report in public.reports(results):
        within, left_out = report["within"], report["left_out"]
        own = [cell for source, cell in within.items() if source in public.OWN]
        cells = {
            "deepset, test half": lambda name, at=within: public.ci(at["deepset"]["signals"][name]["auroc"]),
            "Open-Prompt-Injection, target task left out": lambda name, at=within: public.ci(
                at["opi"]["signals"][name]["auroc"]
            ),
            "five own sets, held out within, mean (over sets)": lambda name, at=own: public.ci(
                public.over_sources([cell["signals"][name]["auroc"][0] for cell in at], 0.0, digits=9)
            ),
            f"**a source left out**, mean of {len(left_out['readout']['sources'])} (over sources)": (
                lambda name, at=left_out: public.ci([at[name]["auroc"][0], *at[name]["auroc_by_source"][1:]])
            ),
        }
        rows += [[report["model"], what, *map(cell, names)] for what, cell in cells.items()]
    return utils.markdown(["AUROC", "", *(public.SHORT[name].strip("*") for name in names)], rows)


def parts(page: Path, results: Path = utils.RESULTS) -> dict[str, str]:
    """Return the parts of README.md or of docs/results/measured.md."""
    if page == README:
        return {"measured": measured(results, "bench/results", brief=True), "separation": separation(results)}
    return {"measured": measured(results, "../../bench/results")}


def main() -> None:
    for page in (README, ALL):
        utils.fill_file(page, "scripts/readme_table.py", parts(page))


if __name__ == "__main__":
    main()
