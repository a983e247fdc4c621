"""Runs tests/kernels/fake_gpu in a process of its own: what Triton compiles for its fake GPU no other test may meet."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "fake_gpu"


def run_python(*arguments, packages=None, **variables):
    """Run Python with these arguments, and with the packages of a folder before those that are installed."""
    ignored = ("TRITON_INTERPRET", "PYTEST_XDIST")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ignored)} | variables
    if packages is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(packages), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=FOLDER.parents[2], capture_output=True, text=True)


def run_folder(cache, packages=None):
    variables = {"HEADRIFT_FAKE_GPU": "1", "TRITON_CACHE_DIR": str(cache), "PYTEST_ADDOPTS": ""}
    pytest_command = ("-m", "pytest", FOLDER, "-q", "-x", "-p", "no:cacheprovider")
    done = run_python(*pytest_command, packages=packages, **variables)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_launches_with_a_fake_gpu(tmp_path):
    run_folder(tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("version", ["3.7.1", "3.6.0"])  # as vLLM 0.32's torch for CUDA pins it; of an older torch
def test_launches_under_another_triton(version, tmp_path):
    packages = tmp_path / "packages"
    pip = ("-m", "pip", "install", "-q", "--no-deps", "--only-binary=:all:", "--target", packages)
    installed = run_python(*pip, f"triton=={version}")
    if installed.returncode:
        pytest.skip(f"pip cannot install triton {version}: {installed.stderr.strip().splitlines()[-1]}")
    imported = run_python("-c", "import triton; print(triton.__version__)", packages=packages)
    assert imported.stdout.split() == [version], imported.stderr[-2000:]
    run_folder(tmp_path / "cache", packages)
