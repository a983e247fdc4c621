"""Check headrift on this machine's GPU: `headrift selftest`, the tests marked gpu, and the kernel benchmark.

    python scripts/gpu_check.py [--model DIR] [--results DIR]

writes one file, gpu-check-<device>.json, to bench/results: machine, versions, and what each of the three found. Exit
code 0 where all went well, 1 otherwise; without a GPU that torch can use nothing is run and nothing is written.
It has never run on a GPU: the first run is its own test too. It needs the packages of `headrift[gpu]` and pytest.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent


def device() -> str | None:
    """The name of the first GPU, None without one that torch can use."""
    try:
        import torch
    except ImportError:
        return None
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def run(name: str, command: list[str]) -> dict[str, Any]:
    """Run one of the three, its output on the screen: exit status and seconds."""
    print(f"== {name}", flush=True)
    start = time.monotonic()
    status = subprocess.run([sys.executable, "-P", *command], cwd=ROOT).returncode
    return {"exit_status": status, "seconds": round(time.monotonic() - start, 1)}


def of_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def of_junit(path: Path) -> dict[str, Any]:
    """How many tests passed, failed and were skipped, and the names of those that failed."""
    if not path.exists():
        return {}
    cases = list(ElementTree.parse(path).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "passed": len(cases) - len(failed) - skipped,
        "failed": [f"{case.get('classname')}.{case.get('name')}" for case in failed],
        "skipped": skipped,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models/smollm2-135m-instruct")
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results")
    arguments = parser.parse_args()
    gpu = device()
    if gpu is None:
        print(f"gpu-check: {sys.executable} has no torch that finds a GPU here; nothing was run", file=sys.stderr)
        return 1
    found: dict[str, Any] = {"device": gpu}
    with tempfile.TemporaryDirectory(prefix="headrift-gpu-check-") as folder:
        selftest, tests, kernels = (Path(folder) / name for name in ("selftest.json", "tests.xml", "kernels.json"))
        command = ["-m", "headrift.cli", "selftest", "--model", str(arguments.model), "--out", str(selftest)]
        found["selftest"] = run("headrift selftest", command) | of_json(selftest)
        command = ["-m", "pytest", "-m", "gpu", f"--junitxml={tests}"]
        found["tests"] = run("tests marked gpu", command) | of_junit(tests)
        command = [str(ROOT / "bench/_kernels_cuda.py"), "--out", str(kernels)]
        found["kernels"] = run("kernel benchmark", command) | of_json(kernels)
    well = all(found[part]["exit_status"] == 0 for part in ("selftest", "tests", "kernels"))
    found["passed"] = well and found["tests"].get("passed", 0) > 0  # tests that were all skipped prove nothing
    out = arguments.results / f"gpu-check-{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"gpu-check on {gpu}: {'passed' if found['passed'] else 'FAILED'}; results are in {out}")
    return 0 if found["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
