"""Runs tests/engine/interpreted, for each backend, model runner and model, in a process whose Triton interprets.

Each engine process costs a minute or so; the push tier has both runners on two models, the slow tier the rest.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"
# Backend, model runner, model, splits of a decode row (0: as many as fill the device, here one).
PUSH = [
    ("triton", "v1", "llama-3to1", "0"),
    ("triton", "v2", "llama-3to1", "3"),
    ("triton", "v1", "gemma3", "3"),
    ("triton", "v2", "gemma3", "0"),
    ("flash", "v2", "llama-3to1", "0"),
]
SLOW = [
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
