"""bench/overhead_gpu.py and bench/kernels_gpu.py: which cases fit a GPU, what is required, what fails a run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.scripts import load

BENCH = Path(__file__).resolve().parents[2] / "bench"

kernels_gpu = load("bench/kernels_gpu")
overhead_gpu = load("bench/overhead_gpu")
utils = load("bench/utils")
Shapes = utils.Shapes

GB = 1e9
LLAMA = Shapes.from_config(overhead_gpu.LLAMA_3_8B)
BATCHES_OF_64 = {"decode 64 x 1024", "streaming 64 x 1024"}
ALL = {case.name for case in overhead_gpu.CASES}


# ---------------------------------------------------------------------------------------------------------- memory


def test_engines_share_the_memory_while_each_holds_a_case():
    cases = {"small": 10, "large": 30 << 30}
    weights = 16 * 10**9

    def share(total, engines):
        return overhead_gpu.share_memory(total, weights, cases, engines)

    assert share(141 * GB, 2) == overhead_gpu.Memory(2, 30 << 30, {})
    both = share(80 * GB, 2)
    assert (both.engines, both.kv_bytes, set(both.too_large)) == (2, 10, {"large"})
    assert share(80 * GB, 1) == overhead_gpu.Memory(1, 30 << 30, {})
    assert share(40 * GB, 2).engines == 1
    assert share(20 * GB, 2) is None


@pytest.mark.parametrize(
    ("gigabytes", "layers", "engines", "fitting"),
    [
        (24, 16, 1, BATCHES_OF_64),
        (40, 32, 1, BATCHES_OF_64),
        (80, 32, 2, BATCHES_OF_64),
        (141, 32, 2, ALL),
    ],
)
def test_overhead_sizes(gigabytes, layers, engines, fitting):
    shape, sizes = overhead_gpu.choose_sizes("overhead", gigabytes * GB, dry_run=False)
    assert (shape.layers, sizes.engines) == (layers, engines)
    assert ALL - set(sizes.too_large) == fitting
    # 16 GB of weights and 128 KiB of K and V a token, with all 32 layers.
    used = engines * (2 * shape.parameters + sizes.kv_bytes + overhead_gpu.ENGINE_BYTES)
    assert used <= gigabytes * GB
    for case in overhead_gpu.CASES:
        held = (case.shared + case.batch * (case.context - case.shared + case.tokens)) * shape.layers * 4096
        assert (held <= sizes.kv_bytes) or case.name in sizes.too_large
    assert all("GB of KV cache" in reason for reason in sizes.too_large.values())


@pytest.mark.parametrize(("gigabytes", "layers"), [(24, 16), (40, 32), (80, 32), (141, 32)])
def test_replay_sizes(gigabytes, layers):
    shape, sizes = overhead_gpu.choose_sizes("step0_replay", gigabytes * GB, dry_run=False)
    assert (shape.layers, sizes.engines) == (layers, 1)
    assert set(sizes.too_large) == ({"decoding the answers, measured"} if gigabytes < 80 else set())


@pytest.mark.parametrize("gigabytes", [24, 40, 80, 141])
def test_the_profile_fits(gigabytes):
    shape, sizes = overhead_gpu.choose_sizes("profile", gigabytes * GB, dry_run=False)
    assert (shape.layers, sizes.too_large) == (8, {})


@pytest.mark.parametrize("part", overhead_gpu.PARTS)
def test_a_gpu_that_no_case_fits_is_an_error_with_the_memory_needed(part):
    with pytest.raises(ValueError, match=r"8\.0 GB of GPU memory are free, and the smallest case needs 1\d\.\d GB"):
        overhead_gpu.choose_sizes(part, 8 * GB, dry_run=False)


@pytest.mark.parametrize(
    ("gigabytes", "too_large"),
    [(24, {"uniform 256 x 8192 Llama-3-8B"}), (40, set()), (80, set()), (141, set())],
)
def test_kernel_cases_that_do_not_fit(gigabytes, too_large):
    jobs, reasons = kernels_gpu.plan(["Llama-3-8B", "Qwen2.5-7B"], kernels_gpu.cases(), gigabytes * GB)
    assert set(reasons) == too_large
    assert len(jobs) == 2 * len(kernels_gpu.cases())


def test_the_required_kernel_cases_come_first():
    assert [case.name for case in kernels_gpu.cases()[: kernels_gpu.REQUIRED]] == [
        "uniform 64 x 1024", "streaming 64 x 2048", "ragged 64 x 8192", "uniform 256 x 4096",
    ]  # fmt: skip
    names = [case.name for case in kernels_gpu.cases()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("part", overhead_gpu.PARTS)
def test_the_required_cases_of_a_part_come_first(part):
    first = [overhead_gpu.PROFILED] if part == "overhead" else []
    names = [*first, *overhead_gpu.kv_tokens(part, dry_run=False)]
    required = overhead_gpu.REQUIRED[part]
    assert tuple(names[: len(required)]) == required


# ----------------------------------------------------------------------------------------------------- what is reported


def test_results_separate_required_optional_and_too_large_cases(tmp_path):
    def progress(too_large, cases):
        return utils.Progress(tmp_path / "out.json", 60, ["a", "b", "c", "d"], ["a", "b"], too_large, cases)

    made = progress({"b": "needs 9 GB"}, {})
    assert made.todo == ["a", "c", "d"]
    made.done("c", {"x": 1})
    made.write({"sizes": {"layers": 32}, "cases": made.cases})
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["left_out"] == ["a", "d"]
    assert content["required_left_out"] == ["a"]
    assert content["too_large"] == {"b": "needs 9 GB"}
    assert content["sizes"] == {"layers": 32}
    assert progress({}, content["cases"]).todo == ["a", "b", "d"], "what is in the file is kept"


# ------------------------------------------------------------------------------------------------ runs on a CPU

# Runs bench/kernels_gpu.py with a kernel that raises; other processes, which compile ahead, have the real one.
BROKEN = """
import sys
import kernels_gpu
def broken(*arguments, **options):
    raise RuntimeError("an illegal memory access")
kernels_gpu.decode_mass = broken
sys.exit(kernels_gpu.main())
"""


def run_on_cpu(tmp_path, *start, **variables):
    out = tmp_path / "out.json"
    paths = os.pathsep.join(filter(None, [str(BENCH), os.environ.get("PYTHONPATH")]))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment |= {"PYTHONPATH": paths, **variables}
    command = [sys.executable, "-P", *start, "--dry-run", "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done, json.loads(out.read_text())


@pytest.mark.nightly
def test_a_kernel_of_ours_that_raises_fails_the_run(tmp_path):
    done, results = run_on_cpu(tmp_path, "-c", BROKEN, TRITON_INTERPRET="1")
    assert done.returncode == 1, done.stderr[-4000:]
    assert "FAILED uniform 2 x 40: mass: RuntimeError: an illegal memory access" in done.stdout
    for row in results["rows"]:
        assert row["microseconds"]["replay" if "replay" in row["case"] else "mass"] is None
        assert row["errors"]
        assert row["microseconds"]["vllm_triton"] > 0, "the others are still timed"


@pytest.mark.nightly
def test_a_kernel_of_others_that_is_not_there_has_no_time_and_a_reason(tmp_path):
    done, results = run_on_cpu(tmp_path, str(BENCH / "kernels_gpu.py"), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert (results["left_out"], results["required_left_out"], results["too_large"]) == ([], [], {})
    for row in results["rows"]:
        assert row["microseconds"]["flash_attention"] is None
        assert "ImportError" in row["missing"]["flash_attention"]
        assert not row["errors"]


@pytest.mark.slow
def test_engines_that_do_not_fit_together_run_one_after_the_other(tmp_path):
    done, results = run_on_cpu(tmp_path, str(BENCH / "overhead_gpu.py"), "overhead", "--memory", "9")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert results["sizes"]["engines_at_once"] == 1
    cases = dict(results["cases"])
    assert cases.pop(overhead_gpu.PROFILED)["values"] > 0
    assert set(cases) == {case.name for case in overhead_gpu.TINY_CASES}
    for case in cases.values():
        assert {arm: len(result["runs"]) for arm, result in case["arms"].items()} == {
            "plain": 2,
            "idle": 2,
            "probing": 2,
        }
        assert all(run["values"] > 0 for run in case["arms"]["probing"]["runs"])
