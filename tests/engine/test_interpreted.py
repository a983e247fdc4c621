"""Runs tests/engine/interpreted, for each backend, model runner and model, in a process whose Triton interprets.

Each engine process costs a minute or so: `make test` has one runner and model, the nightly tests the other runner on
another, the slow ones the rest.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parent / "interpreted"
# Backend, model runner, model, splits of a decode row (0: as many as fill the device, here one).
PUSH = [
    ("flash", "v2", "llama-3to1", "3"),
    pytest.param(("triton", "v1", "gemma3", "3"), marks=pytest.mark.nightly),
]
SLOW = [
    ("triton", "v2", "llama-3to1", "3"),
    ("triton", "v1", "llama-3to1", "0"),
    ("triton", "v2", "gemma3", "0"),
    *(("triton", runner, model, splits)
      for model in ("llama-4to1", "qwen3", "mistral") for runner, splits in (("v1", "3"), ("v2", "0"))),
    ("flash", "v1", "llama-3to1", "0"),
    ("flash", "v1", "gemma3", "0"),
    ("flash", "v2", "gemma3", "0"),
]  # fmt: skip


def _run(case: tuple[str, str, str, str]) -> None:
    command = [sys.executable, "-m", "pytest", str(FOLDER), "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": str(int(case[1] == "v2")),
        "HEADRIFT_TEST_CASE": " ".join(case),
        "PYTEST_ADDOPTS": "",
        "PYTHONWARNINGS": "ignore",
    }
    for name in [name for name in environment if name.startswith("PYTEST_XDIST")]:
        del environment[name]
    done = subprocess.run(command, env=environment, cwd=FOLDER.parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", PUSH, ids=" ".join)
def test_interpreted(case):
    _run(case)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", SLOW, ids=" ".join)
def test_interpreted_slow(case):
    _run(case)


# An entry point, since it imports vLLM (see conftest.py for why it is there).
PATCH = """
def register():
    import vllm.v1.sample.ops.topk_topp_sampler as topk_topp_sampler

    topk_topp_sampler.HAS_TRITON = False
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_model_runner_v2_in_a_process_of_its_own(tiny_model, oracle, assert_agrees, tmp_path):
    shutil.copy(FOLDER / "patches.py", tmp_path / "sitecustomize.py")
    (tmp_path / "no_top_k.py").write_text(PATCH)
    distribution = tmp_path / "no_top_k-1.dist-info"
    distribution.mkdir()
    (distribution / "METADATA").write_text("Metadata-Version: 2.1\nName: no-top-k\nVersion: 1\n")
    (distribution / "entry_points.txt").write_text("[vllm.general_plugins]\nno_top_k = no_top_k:register\n")
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path),
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    program = [sys.executable, str(FOLDER / "own_process.py"), str(tiny_model("llama-3to1"))]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    result = json.loads(line.removeprefix("FOUND"))
    assert len(result) == 2
    for item in result:
        expected = oracle("llama-3to1").masses(item["prompt"], item["answer"], 3, [(2, 14), (15, 24), (0, 30)])
        np.testing.assert_allclose(item["mass"], expected, rtol=0, atol=assert_agrees.tolerance)
