"""Summaries of scored pairs, on pairs whose values are known."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from headrift.consistency.scoring import part_schema
from headrift.consistency.summary import PREDICTORS, print_summary, summarise
from headrift.runs.folder import table_from_records
from headrift.stats import change_interval, exact_interval, rate_interval

LAYERS, HEADS, QUESTIONS, FAMILIES = 2, 3, 40, ("hint", "talk")


def rows(seed: int = 0) -> list[dict]:
    """Pairs of 40 questions in two families: those in the first are further apart and flip more."""
    random, records = np.random.default_rng(seed), []
    for question in range(QUESTIONS):
        for family in FAMILIES:
            far = family == "hint"
            tv = random.uniform(0.2, 0.4, (2, LAYERS, HEADS)) + 0.2 * far
            flips = bool(random.random() < 0.2 + 2 * (tv.mean() - 0.3))
            clean, wrapped = (random.dirichlet(np.ones(3), (2, LAYERS, HEADS)) for _ in range(2))
            records.append(
                {
                    "id": f"{question}:{family}",
                    "question": str(question),
                    "family": family,
                    "wrapper": f"{family}_1",
                    "clean_tokens": 30,
                    "wrapped_tokens": 40,
                    "core_tokens": 8,
                    "wrapper_tokens": int(random.integers(5, 20)),
                    "clean_answer": "4",
                    "wrapped_answer": "5" if flips else "4",
                    "flipped": flips,
                    "clean_right": True,
                    "wrapped_right": not flips,
                    "hinted": flips if far else None,
                    "n_steps": 1,
                    "distance": tv.mean(),
                    # An answer that ends at once has none.
                    "clean_instability": None if question == 0 else random.random(),
                    "wrapped_instability": random.random(),
                    "clean_focus": random.random(),
                    "wrapped_focus": random.random(),
                    "distance_l2": (tv / 2).ravel(),
                    "distance_tv": tv.ravel(),
                    "clean_mass": clean.ravel(),
                    "wrapped_mass": wrapped.ravel(),
                }
            )
    return records


def test_figures_of_known_pairs():
    given = rows()
    summary = summarise(table_from_records(given, part_schema(LAYERS, HEADS, 1)))
    flips = [row["flipped"] for row in given]
    assert 10 < sum(flips) < 70
    assert (summary["pairs"], summary["questions"]) == (2 * QUESTIONS, QUESTIONS)
    predicted = summary["predicts_flips"]
    assert set(predicted) == set(PREDICTORS)
    assert predicted["distance"]["auroc"] == pytest.approx(roc_auc_score(flips, [row["distance"] for row in given]))
    low, high = predicted["distance"]["interval"]
    assert 0.5 < low < predicted["distance"]["auroc"] < high <= 1
    valid = [row for row in given if row["clean_instability"] is not None]
    change = [row["wrapped_instability"] - row["clean_instability"] for row in valid]
    assert predicted["instability_change"]["pairs"] == len(given) - 2
    assert predicted["instability_change"]["auroc"] == pytest.approx(
        roc_auc_score([r["flipped"] for r in valid], change)
    )
    core = [
        np.mean([np.reshape(row[side], (2, LAYERS, HEADS, 3))[0, ..., 0] for side in (name,)])
        for row in given
        for name in ("clean_mass", "wrapped_mass")
    ]
    lost = np.array(core[::2]) - np.array(core[1::2])
    assert predicted["core_mass_lost"]["auroc"] == pytest.approx(roc_auc_score(flips, lost))
    for family in FAMILIES:
        some = [row for row in given if row["family"] == family]
        own = summary["families"][family]
        assert own["pairs"] == QUESTIONS
        for name in ("flipped", "distance", "wrapped_right"):
            low, high = own[name]["interval"]
            assert own[name]["value"] == pytest.approx(np.mean([row[name] for row in some]))
            assert low < own[name]["value"] < high
    assert summary["families"]["talk"]["hinted"] == {"value": None, "interval": None}
    assert summary["all"]["hinted"]["value"] == summary["families"]["hint"]["flipped"]["value"]
    tv = np.mean([np.reshape(row["distance_tv"], (2, LAYERS, HEADS)) for row in given], axis=(0, 1, 3))
    np.testing.assert_allclose(summary["by_layer"]["distance_tv"], tv, rtol=1e-6)
    assert sum(mass[0] for mass in summary["by_layer"]["wrapped_mass"].values()) == pytest.approx(1, abs=1e-6)


def test_intervals_come_from_drawing_questions_whole():
    """The same pairs, each there four times under its question, say no more than once."""
    given = rows()
    once = summarise(table_from_records(given, part_schema(LAYERS, HEADS, 1)))
    often = summarise(table_from_records(given * 4, part_schema(LAYERS, HEADS, 1)))
    for name in ("distance", "wrapped_focus"):
        np.testing.assert_allclose(often["predicts_flips"][name]["interval"], once["predicts_flips"][name]["interval"])
    np.testing.assert_allclose(often["all"]["flipped"]["interval"], once["all"]["flipped"]["interval"])


def test_nothing_flips_and_few_questions(capsys):
    given = [row | {"flipped": False} for row in rows()[:6]]
    summary = summarise(table_from_records(given, part_schema(LAYERS, HEADS, 1)))
    assert summary["predicts_flips"]["distance"] == {"pairs": 6, "flipped": 0, "auroc": None, "interval": None}
    assert summary["all"]["flipped"]["value"] == 0.0
    assert summary["all"]["flipped"]["interval"] == pytest.approx(exact_interval(0, 3))
    assert summary["all"]["distance"]["interval"] is None
    print_summary(summary)
    assert "6 pairs of 3 questions" in capsys.readouterr().out


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("questions", [2, 8, 9, 10, 40])
@pytest.mark.parametrize("happens", [0.0, 0.02, 0.5, 1.0])
def test_no_interval_of_a_rate_leaves_0_to_1_or_has_no_width(seeds, questions, happens):
    random = np.random.default_rng(questions)
    question = np.tile(np.arange(questions), seeds)
    values = (random.random(len(question)) < happens).astype(float)
    low, high = rate_interval(values, question)
    assert 0 <= low <= values.mean() + 1e-9 <= high + 2e-9 <= 1 + 2e-9
    assert high - low > 0.02
    low, high = change_interval(values - values[::-1], question)
    assert -1 <= low < high <= 1


def test_a_rate_has_the_exact_interval_with_questions_as_trials():
    """Seeds that agree say no more than one of them does."""
    one = np.array([1.0] + 7 * [0.0])
    for seeds in (1, 3):
        values, question = np.tile(one, seeds), np.tile(np.arange(8), seeds)
        assert rate_interval(values, question) == pytest.approx(exact_interval(1, 8))


def test_a_change_has_bonett_and_prices_interval():
    first, second = np.array([1, 1, 1, 0, 0, 0, 0, 0.0]), np.array([1, 0, 0, 0, 0, 1, 0, 0.0])
    up, down = 3 / 10, 2 / 10
    half = 1.96 * np.sqrt((up + down - (up - down) ** 2) / 10)
    expected = up - down - half, up - down + half
    assert change_interval(first - second, np.arange(8)) == pytest.approx(expected, abs=1e-4)
    # The same by three seeds each.
    assert change_interval(np.tile(first - second, 3), np.tile(np.arange(8), 3)) == pytest.approx(expected, abs=1e-4)
