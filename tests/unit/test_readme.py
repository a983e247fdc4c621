"""Pages that scripts write are as the committed results make them."""

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench/results"
sys.path.insert(0, str(ROOT / "bench"))

readme_table = importlib.import_module("readme_table")
roofline = importlib.import_module("roofline")
generated = importlib.import_module("_generated")


def test_the_readme_has_what_the_results_have():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme_table.page(text) == text, "README.md and bench/results differ: run bench/readme_table.py"


def test_the_page_on_performance_is_what_the_arithmetic_gives():
    text = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    assert roofline.page(text) == text, "docs/performance.md is out of date: run bench/roofline.py"


def test_another_result_makes_another_readme(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in RESULTS.glob("*.json"):
        shutil.copy(path, tmp_path)
    assert readme_table.page(text, tmp_path) == text
    report = json.loads((tmp_path / "kernels_cpu.json").read_text())
    report["geometric_means"]["speedup"] = 7.77
    (tmp_path / "kernels_cpu.json").write_text(json.dumps(report))
    changed = readme_table.page(text, tmp_path)
    assert changed != text
    assert "| 7.77 |" in changed


def test_parts_go_where_they_belong_and_nowhere_else():
    text = "before\n<!-- a: made by s.py -->\nold\n<!-- end of a -->\nafter\n"
    assert generated.filled(text, "s.py", {"a": r"new \1"}) == text.replace("old", r"new \1")
    with pytest.raises(ValueError, match="one place for b"):
        generated.filled(text, "s.py", {"b": "new"})
    with pytest.raises(ValueError, match="one place for a"):
        generated.filled(text + text, "s.py", {"a": "new"})
