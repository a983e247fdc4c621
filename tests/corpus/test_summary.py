"""The closing table's numbers, against scikit-learn and a slow bootstrap."""

import io
import time

import numpy as np
import pytest
from rich.console import Console
from sklearn.metrics import roc_auc_score

from headrift.corpus import summary as module
from headrift.corpus.summary import Summary, bootstrap_interval


def make_record(n: int, label: str | None, score: float | None, **changes) -> dict:
    fields = {
        "label": label,
        "score": score,
        "reason": None if score is not None else "answer_ended_before_window",
        "prompt_tokens": 100 + n,
        "n_steps": 12,
        "group": f"{n:016x}",
        "system_hash": "f" * 16,
    }
    return fields | changes


def summary_of(*records: dict) -> Summary:
    summary = Summary()
    for record in records:
        summary.add(record)
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
        make_record(4, "benign", None),
        make_record(5, None, None),
    )
    assert summary.by_class() == {
        "benign": {"n": 4, "coverage": 0.75, "mean": pytest.approx(0.3), "median": pytest.approx(0.2)},
        "unlabelled": {"n": 1, "coverage": 0.0, "mean": None, "median": None},
    }


def test_a_score_of_zero_is_a_score():
    assert summary_of(make_record(1, "attack", 0.0)).by_class()["attack"]["coverage"] == 1.0


def test_aurocs_are_scikit_learns_with_missing_scores_lowest():
    records = many()
    aurocs, n_attack, n_benign = summary_of(*records).aurocs()
    attack = [record["label"] == "attack" for record in records]
    assert (n_attack, n_benign) == (50, 50)
    scores = [-9.0 if record["score"] is None else record["score"] for record in records]
    assert aurocs["instability score"].value == pytest.approx(roc_auc_score(attack, scores))
    for name, column in (("prompt length", "prompt_tokens"), ("number of steps", "n_steps")):
        assert aurocs[name].value == pytest.approx(roc_auc_score(attack, [record[column] for record in records]))
    for auroc in aurocs.values():
        assert auroc.interval[0] < auroc.value < auroc.interval[1]


def test_higher_means_attack_and_no_score_means_not_flagged():
    aurocs, _, _ = summary_of(make_record(1, "attack", None), make_record(2, "benign", 0.0)).aurocs()
    assert aurocs["instability score"].value == 0.0


def test_repeats_count_once_and_another_system_prompt_or_label_is_no_repeat():
    rows = [make_record(1, "attack", 0.3), make_record(2, "benign", 0.1), make_record(3, "benign", 0.4)]
    once = summary_of(*rows)
    often = summary_of(*rows, *[rows[2]] * 5, *[rows[0]] * 2)
    assert often.aurocs() == once.aurocs()
    assert often.aurocs()[1:] == (1, 2)
    others = make_record(3, "benign", 0.4, system_hash="0" * 16), make_record(3, "attack", 0.4)
    assert summary_of(*rows, *others).aurocs()[1:] == (2, 3)


def test_no_auroc_unless_both_labels_occur():
    assert Summary().aurocs() is None
    assert summary_of(make_record(1, None, 0.1)).aurocs() is None
    assert summary_of(make_record(1, "attack", 0.1), make_record(2, None, 0.1)).aurocs() is None


def test_no_interval_from_a_handful():
    few = [record for record in many(30) if record["label"] == "attack"][:9]
    aurocs, _, _ = summary_of(*few, *[r for r in many(60) if r["label"] == "benign"]).aurocs()
    assert {auroc.interval for auroc in aurocs.values()} == {None}


def test_interval_is_that_of_resampled_groups(monkeypatch):
    monkeypatch.setattr(module, "RESAMPLES", 50)
    random = np.random.default_rng(3)
    values, attack = random.integers(0, 6, 40).astype(float), random.random(40) < 0.4
    groups = np.unique(random.integers(0, 25, 40), return_inverse=True)[1]
    n_groups = groups.max() + 1
    draws, slow = np.random.default_rng(0), []
    for _ in range(50):
        rows = np.concatenate([np.flatnonzero(groups == g) for g in draws.integers(0, n_groups, n_groups)])
        if len(set(attack[rows])) == 2:
            slow.append(roc_auc_score(attack[rows], values[rows]))
    assert bootstrap_interval(values, attack, groups) == pytest.approx(tuple(np.percentile(slow, [2.5, 97.5])))


def test_the_same_rows_give_the_same_interval_soon():
    summary = summary_of(*many(100))
    summary.aurocs()  # imports scikit-learn
    begun = time.perf_counter()
    assert summary.aurocs() == summary_of(*many(100)).aurocs()
    assert time.perf_counter() - begun < 4


def printed(summary: Summary) -> str:
    out = io.StringIO()
    summary.print(Console(file=out, width=80), start_seconds=14.2, score_seconds=10.0)
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
        "attack 50 100.0% 0.",
        "benign 50 80.0% 0.",
        "50 attack and 50 benign prompts",
    ):
        assert expected in words
    for name in ("instability score", "prompt length", "number of steps"):
        assert any(line.startswith(name) and " to " in line for line in text.splitlines())


def test_table_without_labels_has_no_auroc():
    text = printed(summary_of(make_record(1, None, 0.1)))
    assert "unlabelled" in text
    assert "AUROC" not in text


def test_table_of_nothing_but_rejects():
    summary = Summary()
    summary.reject("no_system_prompt")
    text = printed(summary)
    assert "no_system_prompt 1" in text
    assert "class" not in text
