"""Where compiled kernels are kept: beside the sources, else in the user's home, else in a temporary folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import headrift_kernels

COMPILE = """
import numpy as np
from headrift_kernels.cpu import compile
from headrift_kernels.cpu.queries import measured_queries
starts, one = np.array([0, 1], np.int32), np.ones(1, np.int32)
print(compile.__file__, measured_queries(starts, one, one - 1, one, one, 4, False).tolist())
"""


@pytest.fixture
def package(tmp_path) -> Path:
    """A copy of the kernels' package beside whose sources nothing can be written, not even by root."""
    copy = tmp_path / "site-packages" / "headrift_kernels"
    shutil.copytree(Path(headrift_kernels.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "cpu" / "__pycache__").write_text("no folder")
    return copy


def compiled(package: Path, temporary: Path, **environment: str) -> None:
    """Compile one kernel of the package in a process of its own."""
    own = {"HOME": "/proc/none", "TMPDIR": str(temporary), "PYTHONPATH": str(package.parent), "PYTHONSAFEPATH": "1"}
    kept = {k: v for k, v in os.environ.items() if k not in ("XDG_CACHE_HOME", "NUMBA_CACHE_DIR")}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env={**kept, **own, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(maxsplit=1) == [str(package / "cpu" / "compile.py"), "[[0, 0, 0, 0, 1]]\n"]


def kernels_in(folder: Path) -> list[str]:
    return sorted(path.parents[1].name for path in folder.rglob("queries.measured_queries-*.nbi"))


def test_without_a_place_beside_the_sources_or_at_home_it_is_a_temporary_folder_of_the_users_own(package, tmp_path):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    compiled(package, temporary)
    own = temporary / f"headrift-{os.getuid()}"
    assert own.stat().st_mode & 0o777 == 0o700
    (folder,) = own.iterdir()
    assert kernels_in(temporary) == [folder.name]
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*.nb?")}
    compiled(package, temporary)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.nb?")} == written, "compiled anew"


def test_a_temporary_folder_that_others_may_write_to_is_not_used(package, tmp_path):
    temporary = tmp_path / "temporary"
    open_to_all = temporary / f"headrift-{os.getuid()}"
    open_to_all.mkdir(parents=True)
    open_to_all.chmod(0o777)
    compiled(package, temporary)
    assert kernels_in(open_to_all) == []
    assert len(kernels_in(temporary)) == 1


def test_a_home_comes_before_the_temporary_folder(package, tmp_path):
    compiled(package, tmp_path, HOME=str(tmp_path / "home"))
    (folder,) = (tmp_path / "home" / ".cache" / "headrift").iterdir()
    assert kernels_in(tmp_path) == [folder.name]
