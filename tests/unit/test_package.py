"""The package as a whole: what importing it costs, what its modules may import, what its files may name."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import headrift

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "vllm", "transformers", "triton", "numba", "pyarrow", "sklearn", "numpy")


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd="/", env=environment or None
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", ["headrift", "headrift.cli"])
def test_importing_is_light(module):
    loaded = run_python(f"import sys, {module}\nprint(*sorted(m for m in {HEAVY!r} if m in sys.modules))")
    assert loaded.split() == []


def test_plugin_that_was_not_asked_for_loads_nothing():
    code = (
        "import sys\nfrom headrift.vllm_plugin.plugin import register\nregister()\n"
        f"print(*sorted(m for m in {HEAVY!r} if m in sys.modules))"
    )
    assert run_python(code, PATH="/usr/bin").split() == []


def test_version_has_one_source():
    assert importlib.metadata.version("headrift") == headrift.__version__
    done = subprocess.run(
        [Path(sys.executable).parent / "headrift", "--version"], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == f"headrift {headrift.__version__}"


def test_entry_points_are_declared():
    (plugin,) = [
        e
        for e in importlib.metadata.entry_points(group="vllm.general_plugins")
        if e.value.startswith("headrift.") and e.dist is not None and e.dist.name == "headrift"
    ]
    assert plugin.value == "headrift.vllm_plugin.plugin:register"


def test_unknown_attribute_is_an_ordinary_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        headrift.nonsense
    assert {"Scorer", "ScoreResult", "__version__"} <= set(dir(headrift))


def test_the_definition_of_the_score_imports_numpy_only():
    tree = ast.parse((ROOT / "engine/headrift/signal.py").read_text(encoding="utf-8"))
    named = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            named.add(node.module.partition(".")[0])
    assert named - set(sys.stdlib_module_names) == {"numpy"}


@pytest.mark.parametrize("folder", ["engine", "kernels", "datasets", "."])
def test_folders_that_share_a_librarys_name_are_no_packages(folder):
    assert not (ROOT / folder / "__init__.py").exists()


def test_the_repository_root_is_not_importable():
    on_path = [str(Path(entry or ".").resolve()) for entry in sys.path]
    assert str(ROOT) not in on_path, "start the tests with `make test`, or with PYTHONSAFEPATH=1"


# ------------------------------------------------------------------------------------------- what files may name


def texts() -> list[tuple[str, str]]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = []
    for name in sorted(filter(None, listed.stdout.split("\0"))):
        path = ROOT / name
        if path.is_file() and path.stat().st_size < 20_000_000:
            try:
                files.append((name, path.read_text(encoding="utf-8")))
            except UnicodeDecodeError:
                pass
    return files


def matching(pattern: str, files: list[tuple[str, str]]) -> list[str]:
    return [
        f"{name}:{number}: {line.strip()[:120]}"
        for name, text in files
        for number, line in enumerate(text.splitlines(), 1)
        if re.search(pattern, line)
    ]


def test_no_file_names_a_package_registry():
    hosts = ["pypi" + ".org", "python" + "hosted", "registry." + "npmjs", "deb." + "debian", "conda." + "anaconda"]
    assert matching("|".join(map(re.escape, hosts)), texts()) == []


def test_locks_name_no_place():
    locks = [(name, text) for name, text in texts() if name.startswith("requirements/") and name.endswith(".lock")]
    assert {name for name, _ in locks} >= {"requirements/cpu.lock", "requirements/dev.lock"}
    assert matching(r"^\s*--|://| @ ", locks) == []


def test_no_file_names_a_path_of_one_machine():
    # Prompts in datasets/ may speak of any path.
    files = [(name, text) for name, text in texts() if not name.startswith("datasets/")]
    assert matching(r"(?<![\w./~-])/(?:ro{2}t|w[o]rk)/", files) == []


def test_the_licence_is_the_standard_text():
    import hashlib

    digest = hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest()
    assert digest == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
