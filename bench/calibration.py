"""What `headrift calibrate` takes on runs of many rows: seconds, rows a second, peak memory.

    python bench/calibration.py [--rows N]... [--steps 40] [--layers 32] [--resamples 200] [--scratch DIR]

Makes runs by script (a fifth attacks, a planted effect, a tenth of the rows repeats, a tenth of the answers ending
early), calibrates each in a process of its own, and writes bench/results/calibration.json, a table and a plot. A
million rows of 40 steps x 32 layers take 5 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from headrift.runs.parts import part_schema
from headrift.runs.provenance import processor

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results"
SHARD, GROUP = 25_000, 5_000
WINDOW, LAYERS, EFFECT = slice(3, 13), slice(8, 24), 0.004  # planted: steps 3 to 12
MOST_SECONDS, MOST_GB = 300, 6  # for a million rows, on two cores


def make_run(folder: Path, n: int, steps: int, layers: int) -> None:
    """A run of n rows, as far as calibration reads it."""
    schema = part_schema((), layers=layers, heads=32, regions=("system", "user", "prompt"))
    folder.mkdir()
    for shard, first in enumerate(range(0, n, SHARD)):
        with pq.ParquetWriter(folder / f"part-{shard:05d}.parquet", schema, compression="zstd") as file:
            for start in range(first, min(n, first + SHARD), GROUP):
                file.write_table(rows(start, min(GROUP, n - start), n, steps, layers, schema))
    about = {
        "status": "done",
        "settings": {"steps": steps, "window": f"1:{steps}", "drop_shallow": 0.25, "drop_deep": 0.15, "replay": False},
        "model": {"path": "models/made-up", "fingerprint": "made-up"},
        "engine": {"dtype": "float32", "layers": layers, "heads": 32},
        "chat_template_sha256": "made-up",
    }
    (folder / "run.json").write_text(json.dumps(about))


def rows(start: int, n: int, of: int, steps: int, layers: int, schema: pa.Schema) -> pa.Table:
    random = np.random.default_rng(start)
    attack = random.random(n) < 0.2
    values = random.standard_normal((n, steps + 1, layers), np.float32) * np.float32(0.03)
    values += (0.1 + 0.01 * random.standard_normal((n, 1, 1))).astype(np.float32)
    values[attack, WINDOW, LAYERS] += np.float32(EFFECT)
    early = random.random(n) < 0.1
    n_steps = np.where(early, random.integers(0, steps, n), steps).astype(np.int32)
    there = np.arange(steps + 1) <= n_steps[:, None]
    offsets = np.concatenate([[0], np.cumsum((n_steps + 1) * layers)]).astype(np.int32)
    # A repeat is of a row of the same class: the group says which.
    group = np.where(random.random(n) < 0.1, random.integers(0, max(of // 100, 1), n), of + start + np.arange(n))
    columns = {
        "label": pa.array(np.where(attack, "attack", "benign")),
        "group": pa.array([f"{2 * number + one:016x}" for number, one in zip(group.tolist(), attack.tolist())]),
        "system_hash": pa.array(["0" * 16] * n),
        "n_steps": pa.array(n_steps),
        "prompt_tokens": pa.array(random.integers(10, 900, n, np.int32)),
        "answer_tokens": pa.array(n_steps + 1),
        "system_share": pa.array(random.random(n)),
        "instability": pa.ListArray.from_arrays(offsets, pa.array(values[there].ravel())),
    }
    given = [columns.get(field.name, pa.nulls(n, field.type)) for field in schema]
    return pa.table(given, names=schema.names).cast(schema)


def measure(folder: Path, out: Path, resamples: int) -> dict:
    """Calibrate in a process of its own."""
    command = [sys.executable, "-P", "-m", "headrift.cli", "calibrate", str(folder), "--out", str(out)]
    load, begun = os.getloadavg()[0], time.perf_counter()
    child = subprocess.Popen([*command, "--resamples", str(resamples)], cwd=ROOT)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - begun
    if status:
        raise SystemExit(f"headrift calibrate failed ({os.waitstatus_to_exitcode(status)})")
    found = json.loads(out.read_text())
    return {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_gb": usage.ru_maxrss * 1024 / 1e9,
        "load_before": load,
        "load_after": os.getloadavg()[0],
        "window": found["window"],
        "layers": found["layers"],
        "auroc": found["figures"]["auroc"]["value"],
        "procedure": found["procedure"],
    }


def table(found: dict) -> str:
    lines = [
        "# Calibration of many rows",
        "",
        f"Made by `python bench/calibration.py`: {found['steps']} steps x {found['layers']} layers, "
        f"{found['resamples']} resamples, on {found['machine']['cpu']} ({found['machine']['cores']} cores, shared: the "
        "load is that before and after).",
        f"Wanted: a million rows in under {MOST_SECONDS} s and {MOST_GB} GB, growing no faster than linearly.",
        "",
        "| rows | seconds | of CPU | rows/s | peak memory | load | chosen steps, layers (planted: 3:12, 8 to 23) |",
        "|---|---|---|---|---|---|---|",
    ]
    for n, of in found["runs"].items():
        load = f"{of['load_before']:.1f}, {of['load_after']:.1f}"
        lines.append(
            f"| {int(n):,} | {of['seconds']:.1f} | {of['cpu_seconds']:.1f} | {int(n) / of['seconds']:,.0f} "
            f"| {of['peak_gb']:.2f} GB | {load} | {of['window']}, {of['layers'][0]} to {of['layers'][1] - 1} |"
        )
    return "\n".join(lines) + "\n"


def plot(found: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    n = [int(of) for of in found["runs"]]
    seconds = [of["seconds"] for of in found["runs"].values()]
    gigabytes = [of["peak_gb"] for of in found["runs"].values()]
    figure = Figure(figsize=(8, 3.4), layout="constrained", dpi=150)
    for axes, values, limit, label in zip(
        figure.subplots(1, 2), (seconds, gigabytes), (MOST_SECONDS, MOST_GB), ("seconds", "peak memory (GB)")
    ):
        axes.plot(n, values, "o-", color="#0072b2", label="measured")
        axes.plot(n[-1], limit, "v", color="#d55e00", label="limit")
        if label == "seconds":
            axes.plot(n, np.array(n) * seconds[-1] / n[-1], ":", color="#777777", label="linear")
            axes.set(yscale="log")
        else:
            axes.set(ylim=(0, 1.1 * limit))
        axes.set(xscale="log", xlabel="scored rows", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, action="append", help="10,000, 100,000 and 1,000,000 where not given")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--resamples", type=int, default=200)
    parser.add_argument("--scratch", type=Path, help="a folder with room for the runs")
    args = parser.parse_args()
    found = {
        "machine": {"cpu": processor()[0], "cores": os.cpu_count()},
        **{name: getattr(args, name) for name in ("steps", "layers", "resamples")},
        "runs": {},
    }
    for n in args.rows or (10_000, 100_000, 1_000_000):
        with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
            make_run(Path(scratch) / "run", n, args.steps, args.layers)
            found["runs"][str(n)] = measure(Path(scratch) / "run", Path(scratch) / "c.json", args.resamples)
        print(f"{n:,} rows: {found['runs'][str(n)]}", flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "calibration.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "calibration.md").write_text(table(found), encoding="utf-8")
    plot(found, RESULTS / "calibration.png")


if __name__ == "__main__":
    main()
