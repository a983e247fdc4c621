"""Pages that scripts write are as the committed results make them."""

import json
import shutil
from pathlib import Path

import pytest

from helpers.scripts import load

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench/results"

readme_table = load("scripts/readme_table")
roofline = load("scripts/roofline")
utils = load("bench/utils")

# Each page of results, and the script whose table it is.
TABLES = {name: name for name in ("calibration", "consistency", "host_cost", "idle", "overhead", "peers")}
TABLES |= {name: name for name in ("safety_heads", "sahara", "scaling", "tuning")}
TABLES |= {"entropy": "overhead", "kernels_cpu": "kernels", "kernels_cpu_avx2": "kernels"}


def test_the_readme_has_what_the_results_have():
    for page in (readme_table.README, readme_table.ALL):
        text = page.read_text(encoding="utf-8")
        made = utils.fill(text, "scripts/readme_table.py", readme_table.parts(page))
        assert made == text, f"{page.name} and bench/results differ: run scripts/readme_table.py"


def test_the_page_on_performance_is_what_the_arithmetic_gives():
    text = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    made = utils.fill(text, "scripts/roofline.py", roofline.parts())
    assert made == text, "docs/performance.md is out of date: run scripts/roofline.py"


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_of_results_are_of_the_results(name):
    table = load(f"bench/{TABLES[name]}").table(utils.read_json(RESULTS / f"{name}.json"))
    assert (RESULTS / f"{name}.md").read_text(encoding="utf-8") == table + "\n"


def test_the_pages_of_evidence_are_of_the_results():
    public = load("bench/public")
    for page in (public.PAGE, public.ORIGINAL_PAGE):
        text = page.read_text(encoding="utf-8")
        made = utils.fill(text, "bench/public.py", public.page_parts(public.reports(), page))
        assert made == text, f"{page.name} is out of date: run bench/public.py page"


def test_what_was_measured_is_exact_and_within_its_bounds():
    """Of the committed results, what does not hang on a machine's speed."""
    for case in json.loads((RESULTS / "overhead.json").read_text(encoding="utf-8"))["cases"]:
        assert set(case["answers_equal"].values()) == {1.0}, case["name"]
        for name, arm in case["arms"].items():
            assert arm["bytes_per_prompt"] <= case["bytes_bound"], (case["name"], name)
    peers = json.loads((RESULTS / "peers.json").read_text(encoding="utf-8"))
    for way in ("generate", "replay", "generate, compiled"):
        result = peers["agreement"][way]
        assert result["same_answers"] == peers["prompts"]["n"]
        assert result["masses_compared"] > 1e5
        # 2e-5: float32 sums of softmax weights in another order; measured 7e-6 at most.
        assert result["largest_difference"] <= 2e-5
        assert result["spearman_of_scores"] > 0.999


def test_an_engine_without_headrifts_parts_calls_none_of_it():
    """Of the committed results of bench/idle.py."""
    for case in json.loads((RESULTS / "idle.json").read_text(encoding="utf-8"))["one_process"]:
        assert case["calls"]["plain"] == 0, case["name"]
        assert 0 < case["calls"]["idle"] < case["calls"]["probing"], case["name"]


def test_another_result_makes_another_readme(tmp_path):
    for path in RESULTS.glob("*.json"):
        shutil.copy(path, tmp_path)
    before = readme_table.parts(readme_table.README, tmp_path)
    assert before == readme_table.parts(readme_table.README)
    report = json.loads((tmp_path / "kernels_cpu.json").read_text())
    report["geometric_means"]["speedup"] = 7.77
    (tmp_path / "kernels_cpu.json").write_text(json.dumps(report))
    changed = readme_table.parts(readme_table.README, tmp_path)
    assert changed["separation"] == before["separation"]
    assert "| 7.77 |" in changed["measured"]
    assert "| 7.77 |" not in before["measured"]


def test_parts_go_where_they_belong_and_nowhere_else():
    text = "before\n<!-- a: made by s.py -->\nold\n<!-- end of a -->\nafter\n"
    assert utils.fill(text, "s.py", {"a": r"new \1"}) == text.replace("old", r"new \1")
    with pytest.raises(ValueError, match="one place for b"):
        utils.fill(text, "s.py", {"b": "new"})
    with pytest.raises(ValueError, match="one place for a"):
        utils.fill(text + text, "s.py", {"a": "new"})
