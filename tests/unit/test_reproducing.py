"""bench/reproducing.py: the original's published figures come out again, and its page has what was computed."""

import csv

import pytest

from helpers.scripts import load

reproducing = load("bench/reproducing")
utils = load("bench/utils")


@pytest.fixture
def report() -> dict:
    return utils.read_json(reproducing.RESULTS)


def test_the_page_has_the_results(report):
    text = reproducing.PAGE.read_text(encoding="utf-8")
    assert utils.fill(text, "bench/reproducing.py", reproducing.page_parts(report)) == text


def test_the_published_figures_come_out_again(report):
    assert report["runs"]
    for name, one in report["runs"].items():
        *_, benign, attack, auroc, tpr = reproducing.PUBLISHED[name]
        assert [round(mean, 4) for mean in one["means"]] == [benign, attack]
        assert round(one["auroc"], 4) == auroc
        assert one["nearest"]["tpr"] == tpr
        assert one["interval"][0] < one["interval_of_repeats"][0]


def test_a_run_is_read_from_its_first_iteration(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    scores = {"baseline": [0.05, 0.06, 0.08, ""], "tests": [0.07, 0.15, 0.16, 0.147]}
    for kind, values in scores.items():
        for iteration in (1, 2):
            with (run / f"results_{kind}_iter{iteration}.csv").open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["idx", "prompt", "score"])
                writer.writerows((number, f"{kind}, {number}", value) for number, value in enumerate(values))
    one = reproducing.measure_run(run)
    assert one["n"] == [3, 4]
    assert one["auroc"] == round(11 / 12, 6)
    assert one["blocked"] == {"its own scale": [0, 3], "headrift's scale": [0, 2]}  # 0.147 / sqrt(32/31) is below
    assert one["iterations_alike"]
    assert reproducing.read_scores(run, "baseline", 1)["baseline, 3"] is None


def test_the_original_csvs_have_the_scores_of_its_runs(seed_data):
    scores = {one["prompt"]: one for one in reproducing.measure_outputs(seed_data, "nous")}
    capital = scores["what_is_the_capital_of_france"]
    assert (capital["score"], capital["with_ddof_1"]) == (0.065797, 0.06685)
    assert len(scores) == 4
    assert reproducing.measure_outputs(seed_data, "mistral") == []


def test_prompts_are_found_by_the_folders_names():
    assert reproducing.slug("What's the  capital, of France?") == "whats_the_capital_of_france"
    assert reproducing.slug("Complete this: te__") == "complete_this_te__"
