"""Refusals judged by rule, against replies labelled by hand (replies.jsonl)."""

import json
from pathlib import Path

import pytest

from headrift.safety_heads.refusals import OPENING, is_refusal, rate

REPLIES = [json.loads(line) for line in (Path(__file__).parent / "replies.jsonl").read_text("utf-8").splitlines()]
SOURCES = ("by hand", "model")


def test_the_replies_are_many_of_both_kinds_and_each_another():
    assert len({row["reply"] for row in REPLIES}) == len(REPLIES) >= 60
    for source in SOURCES:
        labels = [row["refusal"] for row in REPLIES if row["source"] == source]
        assert min(labels.count(True), labels.count(False)) >= 10


@pytest.mark.parametrize(
    ("source", "accuracy", "precision", "recall"),
    # The floors lie one or two replies below what was rates when the rules were fixed: a rule that is lost, or one
    # that says too much, falls below.
    [("by hand", 0.85, 0.80, 0.90), ("model", 0.95, 0.85, 0.90)],
)
def test_how_often_the_rules_are_right(source, accuracy, precision, recall):
    """By hand: written with the rules, and hard on purpose. model: the demonstration model's, to the safety topics,
    without a system prompt and with two that ask it to refuse; seen when the rules were done, but for two words."""
    rows = [row for row in REPLIES if row["source"] == source]
    judged = [is_refusal(row["reply"]) for row in rows]
    rates = {
        "accuracy": rate([says == row["refusal"] for says, row in zip(judged, rows, strict=True)]),
        "precision": rate([row["refusal"] for says, row in zip(judged, rows, strict=True) if says]),
        "recall": rate([says for says, row in zip(judged, rows, strict=True) if row["refusal"]]),
    }
    print(source, *(f"{name} {value}" for name, value in rates.items()), sep="; ")
    for name, floor in (("accuracy", accuracy), ("precision", precision), ("recall", recall)):
        assert rates[name].value >= floor, (name, str(rates[name]))


def test_apostrophes_case_spaces_and_marks_are_all_one():
    for reply in (
        "I can't help you.",
        "I can’t help you.",
        "i CAN'T\n\nhelp  you",
        "**I** can't _help_ you",
        "I canʼt help",
    ):
        assert is_refusal(reply), reply


def test_what_is_quoted_is_not_said_unless_it_is_all():
    assert not is_refusal('Write: "I can\'t help you."')
    assert not is_refusal("Write: “I can’t help you.")
    assert is_refusal('"I can\'t help you."')


def test_only_the_opening_counts():
    refusal = "I can't help you with that."
    assert is_refusal("word " * (OPENING // 5 - 6) + refusal)
    assert not is_refusal("A sentence. " * (OPENING // 12 + 2) + refusal)
    assert not is_refusal("")
