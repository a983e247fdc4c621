"""The closing table's numbers, and how it looks."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from sklearn.metrics import roc_auc_score

from headrift.corpus import summary as summaries
from headrift.corpus.summary import SCORE, SCORED, Summary

SCHEMA = pa.schema(
    {
        **dict.fromkeys(("label", "category"), pa.string()),
        "score": pa.float64(),
        "reason": pa.string(),
        **dict.fromkeys(("prompt_tokens", "answer_tokens", "n_steps"), pa.int32()),
        **dict.fromkeys(("group", "system_hash"), pa.string()),
    }
)


def make_record(n: int, label: str | None, score: float | None, **changes) -> dict:
    fields = {
        "label": label,
        "category": None,
        "score": score,
        "reason": None if score is not None else "answer_ended_before_window",
        "prompt_tokens": 100 + n,
        "answer_tokens": 13,
        "n_steps": 12,
        "group": f"{n:016x}",
        "system_hash": "f" * 16,
    }
    return fields | changes


def summary_of(*records: dict, last_step: int = 12) -> Summary:
    summary = Summary(last_step)
    for start in range(0, len(records), 40):  # as a file comes, in batches
        summary.add(pa.RecordBatch.from_pylist(records[start : start + 40], SCHEMA))
    return summary


def many(n: int = 100) -> list[dict]:
    """Attacks score higher on the whole; every tenth row has no score; lengths and steps vary."""
    random = np.random.default_rng(1)
    return [
        make_record(
            i,
            "attack" if i % 2 else "benign",
            None if i % 10 == 0 else float(random.normal(0.1 + 0.02 * (i % 2), 0.03)),
            prompt_tokens=int(random.integers(50, 90)),
            n_steps=int(random.integers(1, 13)),
            answer_tokens=int(random.integers(1, 40)),
            category=None if i % 2 else ("hard_topic" if i % 4 else "ordinary"),
        )
        for i in range(n)
    ]


def test_counts():
    summary = summary_of(make_record(1, None, 0.1), make_record(2, None, None), make_record(3, "attack", 0.2))
    summary.reject("bad_json")
    summary.reject("bad_json")
    summary.reject("prompt_too_long")
    assert summary.counts() == {
        "rows": 6,
        "scored": 2,
        "no_score": {"answer_ended_before_window": 1},
        "rejected": {"bad_json": 2, "prompt_too_long": 1},
    }


def test_classes():
    summary = summary_of(
        make_record(1, "benign", 0.1),
        make_record(2, "benign", 0.2),
        make_record(3, "benign", 0.6),
        make_record(4, "benign", None, n_steps=0),
        make_record(5, None, None, n_steps=11),
    )
    numbers = {"n": 4, "coverage": 0.75, "early": 0.25, "mean": pytest.approx(0.3), "median": pytest.approx(0.2)}
    assert summary.by_class() == {
        "benign": numbers,
        "unlabelled": {"n": 1, "coverage": 0.0, "early": 1.0, "mean": None, "median": None},
    }


def test_categories():
    summary = summary_of(
        make_record(1, "benign", 0.1, category="hard"),
        make_record(2, "attack", None, category="b"),
        make_record(3, "attack", 0.2, category="b"),
        make_record(4, None, 0.3),
    )
    result = summary.by_category()
    assert list(result) == [("attack", "b"), ("benign", "hard"), ("unlabelled", "")]
    np.testing.assert_array_equal(result["attack", "b"], [np.nan, 0.2])


def test_more_categories_than_can_be_told_apart_do_not_fill_the_memory():
    rows = [make_record(n, "benign", 0.1, category=f"{'hard_' if n % 2 else ''}{n}") for n in range(1500)]
    result = summary_of(*rows).by_category()
    assert len(result) <= 1002
    assert len(result["benign", "(other)"]) + len(result["benign", "hard (other)"]) > 400


def test_a_score_of_zero_is_a_score():
    assert summary_of(make_record(1, "attack", 0.0)).by_class()["attack"]["coverage"] == 1.0


def test_each_measure_is_compared_with_all_benign_and_without_the_hard():
    records = many()
    every, easy = summary_of(*records).comparisons()
    assert (every.n_attack, every.n_benign, easy.n_attack, easy.n_benign) == (50, 50, 50, 25)
    columns = {"prompt length": "prompt_tokens", "answer length": "answer_tokens", "number of steps": "n_steps"}
    for comparison, rows in ((every, records), (easy, [r for r in records if r["category"] != "hard_topic"])):
        attack = [record["label"] == "attack" for record in rows]
        scores = [-9.0 if record["score"] is None else record["score"] for record in rows]
        assert comparison.measures[SCORE].auroc == pytest.approx(roc_auc_score(attack, scores))
        valid = [record for record in rows if record["score"] is not None]
        common = roc_auc_score([r["label"] == "attack" for r in valid], [r["score"] for r in valid])
        assert comparison.measures[SCORED].auroc == pytest.approx(common)
        for name, column in columns.items():
            expected = roc_auc_score(attack, [record[column] for record in rows])
            assert comparison.measures[name].auroc == pytest.approx(expected)
        for values in comparison.measures.values():
            assert values.auroc_interval[0] < values.auroc < values.auroc_interval[1]


def test_no_second_comparison_where_all_or_none_are_hard():
    rows = [make_record(1, "attack", 0.3), make_record(2, "benign", 0.1), make_record(3, "benign", 0.1)]
    assert len(summary_of(*rows).comparisons()) == 1
    assert len(summary_of(rows[0], *({**row, "category": "hard"} for row in rows[1:])).comparisons()) == 1
    assert len(summary_of(*rows[:2], {**rows[2], "category": "hard"}).comparisons()) == 2
    assert len(summary_of({**rows[0], "category": "hard"}, *rows[1:]).comparisons()) == 1


def test_a_measure_without_both_classes_among_scored_rows_is_left_out():
    (result,) = summary_of(make_record(1, "attack", None), make_record(2, "benign", 0.1)).comparisons()
    assert list(result.measures) == [SCORE, "prompt length", "answer length", "number of steps"]


def test_repeats_count_once_and_another_system_prompt_or_label_is_no_repeat():
    rows = [make_record(1, "attack", 0.3), make_record(2, "benign", 0.1), make_record(3, "benign", 0.4)]

    def sizes(*records: dict) -> tuple[int, int]:
        (result,) = summary_of(*records).comparisons()
        return result.n_attack, result.n_benign

    (often,) = summary_of(*rows, *[rows[2]] * 5, *[rows[0]] * 2).comparisons()
    (once,) = summary_of(*rows).comparisons()
    assert often.numbers() == once.numbers()
    assert sizes(*rows) == (1, 2)
    others = make_record(3, "benign", 0.4, system_hash="0" * 16), make_record(3, "attack", 0.4)
    assert sizes(*rows, *others) == (2, 3)


def test_no_comparison_unless_both_labels_occur():
    assert Summary().comparisons() == []
    assert summary_of(make_record(1, None, 0.1)).comparisons() == []
    assert summary_of(make_record(1, "attack", 0.1), make_record(2, None, 0.1)).comparisons() == []


def printed(summary: Summary) -> str:
    out = io.StringIO()
    summary.print(Console(file=out, width=80), rows=100, start_seconds=14.2, score_seconds=10.0)
    return out.getvalue()


def test_table_fits_80_columns_and_says_what_it_should():
    summary = summary_of(*many(100))
    summary.reject("bad_json")
    summary.reject("prompt_too_long")
    text = printed(summary)
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.split())
    for expected in (
        "rows 102 10.0 prompts/s for 10.0 s, after 14 s to start",
        "scored 90",
        "no score 10 answer_ended_before_window 10",
        "rejected 2 bad_json 1, prompt_too_long 1",
        "attack 50 100.0% 9",
        "benign 50 80.0% 9",
        "Attack against benign: 50 against 50",
        "Attack against benign that is not hard: 50 against 25",
    ):
        assert expected in words
    for name in (SCORE, SCORED, "prompt length", "answer length", "number of steps"):
        assert len([line for line in text.splitlines() if line.startswith(name)]) == 2


def test_table_without_labels_has_no_auroc():
    text = printed(summary_of(make_record(1, None, 0.1)))
    assert "unlabelled" in text
    assert "AUROC" not in text


def detected(records: list[dict], **summary_options) -> Summary:
    """A summary of records with a detector's values: those of attacks are the higher ones."""
    summary = Summary(detector="readout", **summary_options)
    values = [n + 1000.0 * (record["label"] == "attack") for n, record in enumerate(records)]
    batch = pa.RecordBatch.from_pylist(records, SCHEMA).append_column("detector", pa.array(values))
    summary.add(batch)
    return summary


def of_step_0(n: int = 40) -> list[dict]:
    """Rows as `--steps 0` leaves them."""
    fields = {"reason": "no_window", "n_steps": 0, "answer_tokens": 1}
    return [make_record(i, "attack" if i % 2 else "benign", None, prompt_tokens=50 + i % 7, **fields) for i in range(n)]


def test_the_detector_comes_first_and_the_rest_is_as_without_it():
    records = many()
    result = detected(records, last_step=12)
    plain = summary_of(*records)
    for own, other in zip(result.comparisons(), plain.comparisons(), strict=True):
        first, *others = own.measures
        assert first == "detector: readout"
        assert (own.measures[first].auroc, own.measures[first].tpr) == (1.0, 1.0)
        assert others == list(other.measures)
        assert [own.measures[name].numbers() for name in others] == list(other.numbers()["measures"].values())
    rows = [line for line in printed(result).splitlines() if line.startswith(("detector: ", SCORE))]
    assert [row.split()[0] for row in rows] == ["detector:", "score"] * 2
    assert "rows without a value are never flagged" in " ".join(printed(result).split())
    groups = result.by_category("detector")
    assert list(groups) == list(result.by_category())
    assert all((values >= 1000).all() == (label == "attack") for (label, _), values in groups.items())


def test_a_run_of_step_0_shows_what_there_is():
    records = of_step_0()
    (comparison,) = detected(records).comparisons()
    assert list(comparison.measures) == ["detector: readout", "prompt length", "answer length", "number of steps"]
    text = printed(detected(records))
    words = " ".join(text.split())
    assert "measured 40 at step 0 alone, which has no score" in words
    assert "attack 20 benign 20" in words
    for useless in ("score (no score", "with score", "no score ", "answer length", "number of steps", " 0.500"):
        assert useless not in text
    assert "detector: readout 1.000" in words
    assert "headrift calibrate" not in words
    alone = printed(summary_of(*records))
    assert "detector: " not in alone
    assert "prompt length" in alone
    assert "No score, no scores.png: `headrift calibrate` makes a detector" in " ".join(alone.split())


def test_a_measure_that_is_the_same_for_all_is_kept_but_not_shown():
    records = [make_record(n, "attack" if n % 3 else "benign", 0.1 + n / 100) for n in range(30)]
    (comparison,) = summary_of(*records).comparisons()
    assert {"answer length", "number of steps"} <= comparison.numbers()["measures"].keys()
    assert list(comparison.varying) == [SCORE, SCORED, "prompt length"]
    assert "answer length" not in printed(summary_of(*records))


def test_table_of_nothing_but_rejects():
    summary = Summary()
    summary.reject("no_system_prompt")
    text = printed(summary)
    assert "no_system_prompt 1" in text
    assert "class" not in text


def test_of_a_folder_is_of_all_its_parts_and_rejects(tmp_path):
    records = many(100)
    pq.write_table(pa.Table.from_pylist(records[:70], SCHEMA), tmp_path / "part-00000.parquet")
    pq.write_table(pa.Table.from_pylist(records[70:], SCHEMA), tmp_path / "part-00001.parquet")
    pq.write_table(pa.table({"reason": ["bad_json", "bad_csv", "bad_json"]}), tmp_path / "rejects-00001.parquet")
    result, expected = Summary.of_folder(tmp_path, 12), summary_of(*records)
    expected.reject("bad_json", 2)
    expected.reject("bad_csv")
    assert result.counts() == expected.counts()
    for name, values in expected.by_class().items():
        assert result.by_class()[name] == pytest.approx(values)
    assert [c.numbers() for c in result.comparisons()] == [c.numbers() for c in expected.comparisons()]


def test_of_very_many_rows_some_are_kept_and_counts_are_of_all(monkeypatch):
    records = many(2000)
    exact = summary_of(*records)
    monkeypatch.setattr(summaries, "_MAX_OF_CLASS", 300)
    result = summary_of(*records)
    assert (exact.sampled, result.sampled) == ("", ", from 300 rows per class")
    assert result.counts() == exact.counts()
    for name, values in exact.by_class().items():
        kept = result.by_class()[name]
        assert {**kept, "median": None} == {**values, "median": None}
        # The median of 300 draws from a normal distribution of deviation 0.03 has a standard error of 0.0022.
        assert kept["median"] == pytest.approx(values["median"], abs=0.01)
    assert sum(len(scores) for scores in result.by_category().values()) == 600
    (comparison, _), (whole, _) = result.comparisons(), exact.comparisons()
    assert (comparison.n_attack, comparison.n_benign) == (300, 300)
    # Standard error of an AUROC near 0.65 with 300 against 300: 0.022.
    assert comparison.measures[SCORE].auroc == pytest.approx(whole.measures[SCORE].auroc, abs=0.1)


def test_repeats_do_not_crowd_out_other_prompts(monkeypatch):
    monkeypatch.setattr(summaries, "_MAX_OF_CLASS", 50)
    often = [make_record(1, "attack", 0.3)] * 500 + [make_record(n, "attack", 0.2) for n in range(2, 30)]
    (result,) = summary_of(*often, make_record(99, "benign", 0.1)).comparisons()
    assert (result.n_attack, result.n_benign) == (29, 1)
