"""What `headrift calibrate` takes on runs of many rows: seconds, rows a second, peak memory.

    python bench/calibration.py [--rows N]... [--steps 40] [--layers 32] [--resamples 200] [--scratch DIR]

Makes runs (a fifth attacks, a planted effect, a tenth repeats, a tenth of the answers ending early) and calibrates each
in a process of its own. A million rows of 40 steps x 32 layers take 5 GB of disk.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent))

import utils
from utils import Stopwatch

from headrift.near_duplicates import NUMBERS
from headrift.runs.parts import part_schema
from helpers.made_runs import columns_of, write_about

SHARD, GROUP = 25_000, 5_000
WINDOW, LAYERS, EFFECT = slice(3, 13), slice(8, 24), 0.004  # planted: steps 3 to 12
MOST_SECONDS, MOST_GB = 300, 6  # for a million rows, on two cores


def make_run(folder: Path, n: int, steps: int, layers: int) -> None:
    """Make a run of n rows, as far as calibration reads it."""
    schema = part_schema((), layers=layers, heads=32, regions=("system", "user", "prompt"))
    folder.mkdir()
    for shard, first in enumerate(range(0, n, SHARD)):
        with pq.ParquetWriter(folder / f"part-{shard:05d}.parquet", schema, compression="zstd") as file:
            for start in range(first, min(n, first + SHARD), GROUP):
                file.write_table(make_rows(start, min(GROUP, n - start), n, steps, layers, schema))
    write_about(folder, steps, layers, heads=32)


def make_rows(start: int, n: int, n_all: int, steps: int, layers: int, schema: pa.Schema) -> pa.Table:
    """Make rows start to start + n - 1 of n_all."""
    random = np.random.default_rng(start)
    attack = random.random(n) < 0.2
    values = random.standard_normal((n, steps + 1, layers), np.float32) * np.float32(0.03)
    values += (0.1 + 0.01 * random.standard_normal((n, 1, 1))).astype(np.float32)
    values[attack, WINDOW, LAYERS] += np.float32(EFFECT)
    early = random.random(n) < 0.1
    n_steps = np.where(early, random.integers(0, steps, n), steps).astype(np.int32)
    # A repeat is of a row of the same class: the group says which.
    repeated = random.random(n) < 0.1
    group = np.where(repeated, random.integers(0, max(n_all // 100, 1), n), n_all + start + np.arange(n))
    columns = columns_of(values, np.where(attack, "attack", "benign"), 2 * group + attack, n_steps=n_steps)
    # No two prompts are near duplicates, which is what takes longest to see.
    sketches = np.random.default_rng(group).integers(0, 1 << 16, (n, NUMBERS)).astype(np.uint16)
    columns |= {"minhash": [sketch.tobytes() for sketch in sketches]}
    columns |= {"prompt_tokens": random.integers(10, 900, n, np.int32), "system_share": random.random(n)}
    return pa.table({field.name: columns.get(field.name, pa.nulls(n)) for field in schema}).cast(schema)


def measure(folder: Path, out: Path, resamples: int) -> dict:
    """Calibrate in a process of its own."""
    command = [sys.executable, "-P", "-m", "headrift.cli", "calibrate", str(folder), "--out", str(out), "--force"]
    load = os.getloadavg()[0]
    with Stopwatch() as clock:
        child = subprocess.Popen([*command, "--resamples", str(resamples)], cwd=utils.ROOT)
        _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"headrift calibrate failed ({os.waitstatus_to_exitcode(status)})")
    calibration = utils.read_json(out)
    return {
        "seconds": clock.seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_gb": usage.ru_maxrss * 1024 / 1e9,
        "load_before": load,
        "load_after": os.getloadavg()[0],
        "window": calibration["window"],
        "layers": calibration["layers"],
        "auroc": calibration["figures"]["auroc"]["value"],
        "procedure": calibration["procedure"],
    }


def table(report: dict) -> str:
    rows = [
        [f"{int(n):,}", f"{run['seconds']:.1f}", f"{run['cpu_seconds']:.1f}", f"{int(n) / run['seconds']:,.0f}"]
        + [f"{run['peak_gb']:.2f} GB", f"{run['load_before']:.1f}, {run['load_after']:.1f}"]
        + [f"{run['window']}, {run['layers'][0]} to {run['layers'][1] - 1}"]
        for n, run in report["runs"].items()
    ]
    head = ["rows", "seconds", "of CPU", "rows/s", "peak memory", "load"]
    return utils.page(
        "# Calibration of many rows",
        f"Made by `python bench/calibration.py`: {report['steps']} steps x {report['layers']} layers, "
        f"{report['resamples']} resamples, on {report['machine']['cpu']} ({report['machine']['cores']} cores, shared: "
        "the load is that before and after).\n"
        f"Required: a million rows in under {MOST_SECONDS} s and {MOST_GB} GB, growing no faster than linearly.",
        utils.markdown([*head, "chosen steps, layers (planted: 3:12, 8 to 23)"], rows),
    )


def main() -> None:
    options = utils.Options(__doc__, "calibration", short=False)
    options.add_argument("--rows", type=int, action="append", help="10,000, 100,000 and 1,000,000 by default")
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--layers", type=int, default=32)
    options.add_argument("--resamples", type=int, default=200)
    options.add_argument("--scratch", type=Path, help="a folder with room for the runs")
    args = options.parse()
    settings = {name: getattr(args, name) for name in ("steps", "layers", "resamples")}
    report = {"machine": utils.host(), **settings, "runs": {}}
    for n in args.rows or (10_000, 100_000, 1_000_000):
        with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
            make_run(Path(scratch) / "run", n, args.steps, args.layers)
            report["runs"][str(n)] = measure(Path(scratch) / "run", Path(scratch) / "c.json", args.resamples)
        print(f"{n:,} rows: {report['runs'][str(n)]}", flush=True)
    utils.write(report, table(report), args.out)


if __name__ == "__main__":
    main()
