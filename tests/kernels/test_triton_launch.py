"""Runs tests/kernels/fake_gpu in a process of its own: what Triton compiles for its fake GPU no other test may meet."""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "fake_gpu"


def test_launches_with_a_fake_gpu(tmp_path):
    command = [sys.executable, "-m", "pytest", str(FOLDER), "-q", "-x", "-p", "no:cacheprovider"]
    ignored = ("TRITON_INTERPRET", "PYTEST_XDIST")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ignored)}
    environment |= {"HEADRIFT_FAKE_GPU": "1", "TRITON_CACHE_DIR": str(tmp_path), "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, env=environment, cwd=FOLDER.parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
