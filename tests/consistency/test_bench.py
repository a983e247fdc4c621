"""bench/consistency.py: equal budgets for tuning, questions as the unit, paired comparisons of methods."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from helpers.scripts import load

bench = load("bench/consistency")


def rows(flips: list[list[float]], distance: float = 0.1) -> list[dict]:
    """Pairs of a held-out family, a list of outcomes for each question."""
    return [
        {"question": str(i), "family": "role_play"}
        | {state: {"flipped": flip, "distance": distance * flip, "right": None} for state in ("before", "after")}
        for i, of_question in enumerate(flips)
        for flip in of_question
    ]


def test_every_method_tries_the_same_rates_with_the_same_steps_and_questions(monkeypatch, tmp_path):
    """And the rate with the fewest held-in flips is taken; of two with as many, the lower one."""
    trained, held_in = [], {"attct": (0.2, 0.1), "act": (0.3, 0.3), "bct": (0.1, 0.4)}
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    monkeypatch.setattr(bench, "train", lambda folder, *options: trained.append(options[:4]))

    class Fake:
        def __init__(self, *names):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            pass

        def call(self, method, model, folders, questions):
            assert (method, questions) == ("flips", 20)
            rates = [rate for method in ("attct", "act", "bct") for rate in held_in[method]]
            outcomes = [[[float(i < 20 * rate)] for i in range(20)] for rate in rates]
            return {"replies": [[row | {"family": "authority_urgency"} for row in rows(own)] for own in outcomes]}

    monkeypatch.setattr(bench, "Child", Fake)
    args = SimpleNamespace(tune_steps=7, tune_questions=20, model="m")
    tuning = bench.tune(["attct", "act", "bct"], args)
    assert trained == [(method, rate, 0, 7) for method in ("attct", "act", "bct") for rate in bench.LEARNING_RATES]
    assert tuning["chosen"] == {"attct": "0.003", "act": "0.001", "bct": "0.001"}
    assert (tuning["questions"], tuning["pairs"], tuning["families"]) == (20, 20, ["authority_urgency"])


def test_no_question_is_there_that_a_choice_was_made_with(monkeypatch, tmp_path):
    from headrift.consistency.data import read_pairs, split

    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    ids = {json.loads(line)["id"] for line in bench.write_questions().read_text().splitlines()}
    assert len(ids) == 350 - 71
    assert not ids & split(read_pairs([str(bench.QUESTIONS)]).texts()).questions


def test_seeds_that_agree_say_no_more_than_one():
    one = [[float(i % 3 == 0)] for i in range(30)]
    for name in ("flipped", "distance"):
        alone = bench.mean(rows(one), "after", name)
        often = bench.mean(rows([own * 3 for own in one]), "after", name)
        assert often["value"] == pytest.approx(alone["value"])
        assert often["interval"] == pytest.approx(alone["interval"])
        assert often["questions"] == 30
    assert bench.mean(rows(one), "after", "right") is None


def test_methods_are_compared_by_question():
    """A difference that all questions have is shown, however much the questions differ."""
    some = rows([[float(i < 20)] * 3 for i in range(40)])
    fewer = rows([[float(i < 10)] * 3 for i in range(40)])
    result = bench.difference(some, fewer, "flipped", 3)
    assert (result["value"], result["questions"]) == (0.25, 40)
    low, high = result["interval"]
    assert 0 < low < 0.25 < high < 0.5
    assert bench.verdict(result) == "more"
    single = bench.difference(some, fewer, "flipped", 1)["interval"]
    assert low < single[0] < single[1] < high
    same = bench.difference(some, some, "flipped", 3)
    assert same["interval"][0] < 0 < same["interval"][1]
    assert bench.verdict(same) == "no difference shown"
    distance = bench.difference(some, fewer, "distance", 3)
    assert distance["interval"][0] < distance["value"] == pytest.approx(0.025)
    assert np.diff(distance["interval"]) > 0
