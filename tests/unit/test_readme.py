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


@pytest.mark.parametrize("name", ["consistency", "overhead", "idle", "peers", "scaling", "tuning"])
def test_the_tables_of_results_are_of_the_results(name):
    made = importlib.import_module(name).table(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")))
    assert (RESULTS / f"{name}.md").read_text(encoding="utf-8") == made


def test_what_was_measured_is_exact_and_within_its_bounds():
    """Of the committed results, what does not hang on a machine's speed."""
    for case in json.loads((RESULTS / "overhead.json").read_text(encoding="utf-8"))["cases"]:
        assert set(case["answers_equal"].values()) == {1.0}, case["name"]
        for name, arm in case["arms"].items():
            assert arm["bytes_per_prompt"] <= case["bytes_bound"], (case["name"], name)
    peers = json.loads((RESULTS / "peers.json").read_text(encoding="utf-8"))
    for way in ("generate", "replay", "generate, compiled"):
        found = peers["agreement"][way]
        assert found["same_answers"] == peers["prompts"]["n"]
        assert found["masses_compared"] > 1e5
        # 2e-5: float32 sums of softmax weights in another order; measured 7e-6 at most.
        assert found["largest_difference"] <= 2e-5
        assert found["spearman_of_scores"] > 0.999


def test_an_engine_without_headrifts_parts_calls_none_of_it():
    """Of the committed results of bench/idle.py."""
    for case in json.loads((RESULTS / "idle.json").read_text(encoding="utf-8"))["one_process"]:
        assert case["calls"]["plain"] == 0, case["name"]
        assert 0 < case["calls"]["idle"] < case["calls"]["probing"], case["name"]


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
