"""Features by rules, and what dropped sentences say: planted truths, in made-up tables and in a real model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from headrift.internals.sentences import (
    KL_SCHEMA,
    RulesError,
    effect_of_features,
    find_features,
    rank_sentences,
    read_rules,
)
from headrift.stats import side

ROOT = Path(__file__).resolve().parents[2]
RULES = read_rules()


@pytest.mark.parametrize(
    ("text", "features"),
    [
        ("You are a pirate.", {"persona"}),
        ("Act as a judge and never laugh.", {"persona", "constraint"}),
        ("Write a numbered list.", {"format"}),
        ("Think step by step.", {"step_by_step"}),
        ("Be brief.", {"brevity"}),
        ("Answer in JSON, in ten words or fewer.", {"format", "brevity"}),
        ("The tides follow the moon.", set()),
        ("The shortstop instep mustang.", set()),
    ],
)
def test_features_are_told_by_words(text, features):
    assert set(find_features(text, RULES)) == features


def test_users_rules_are_added_or_stand_in(tmp_path):
    own = tmp_path / "own.toml"
    own.write_text("[politeness]\npatterns = ['\\bplease\\b']\n[brevity]\npatterns = ['\\bcurt\\b']\n")
    rules = read_rules(own)
    assert set(find_features("Please be brief and curt, step by step.", rules)) == {
        "politeness", "brevity", "step_by_step"
    }  # fmt: skip
    assert find_features("Be brief.", rules) == []
    with pytest.raises(RulesError, match="cannot be read"):
        read_rules(tmp_path / "nowhere.toml")


def table_of(effects: dict[str, np.ndarray], system: str = "made") -> pa.Table:
    """Sentences of a system prompt with their effects [prompts]."""
    rows = [
        {
            "system": system, "sentence": i, "text": text, "sentence_tokens": 5, "prompt": j, "id": str(j), "kl": 1.0,
            "kl_neutral": 1.0 - value, "effect": value, "top1_changed": value > 0.5,
        }
        for i, (text, values) in enumerate(effects.items())
        for j, value in enumerate(values)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=KL_SCHEMA)


def test_a_sentence_that_does_something_is_shown_and_those_that_do_not_are_not():
    random = np.random.default_rng(0)
    nothing = {f"Idle sentence number {i}.": random.normal(0, 0.1, 8) for i in range(40)}
    rows = rank_sentences(table_of({**nothing, "You must answer in JSON.": random.normal(0.6, 0.1, 8)}), RULES)
    assert rows[0]["text"] == "You must answer in JSON."
    assert rows[0]["features"] == ["format", "constraint"]
    assert rows[0]["shown"]
    assert (rows[0]["effect"].prompts, rows[0]["effect"].rows) == (8, 8)
    # At a false discovery rate of 5% with one true effect, more than two of 40 are all but impossible.
    assert sum(row["shown"] for row in rows) <= 3
    # Uncorrected, two of 40 would be expected to be below 5%; correction only ever raises p.
    assert all(row["p_corrected"] >= row["effect"].p for row in rows)
    over_zero = [row for row in rows[1:] if row["effect"].interval[0] <= 0 <= row["effect"].interval[1]]
    assert len(over_zero) >= 34


def test_features_of_sentences_have_one_value_for_each_system_prompt():
    """Ten sentences of one system prompt are one value, and not judged; 30 system prompts are."""
    random = np.random.default_rng(1)

    def effects(level: float, n: int = 1) -> dict[str, np.ndarray]:
        brief = {f"Be brief, number {i}.": random.normal(level, 0.1, 8) for i in range(n)}
        return {**brief, "Tea is hot.": random.normal(0, 0.1, 8)}

    levels = random.normal(0.5, 0.1, 30)
    tables = [table_of(effects(level, 10 if i == 0 else 1), f"s{i}") for i, level in enumerate(levels)]
    results = effect_of_features(pa.concat_tables(tables), RULES)
    brief, rest = results["brevity"], results["none of them"]["effect"]
    assert (brief["sentences"], brief["effect"].systems, brief["effect"].prompts) == (39, 30, 8)
    assert brief["effect"].value == pytest.approx(0.5, abs=0.1)
    assert side(brief["effect"].interval, 0) == 1
    assert brief["effect"].not_judged is None
    assert side(rest.interval, 0) is None
    assert results["persona"]["sentences"] == 0
    one = effect_of_features(tables[0], RULES)["brevity"]["effect"]
    assert (one.systems, one.interval, one.not_judged) == (1, None, "not judged: 1 system prompt, 30 needed")


@pytest.mark.slow
def test_the_demonstration_model_minds_an_instruction_and_not_small_talk(demo_model, tmp_path):
    """Planted truth: among sentences of neutral text, one that asks for something ranks first, and is shown."""
    from headrift.internals.job import InternalsConfig, InternalsJob

    (tmp_path / "systems").mkdir()
    order = "You must always answer in capital letters and begin with the word BANANA."
    idle = ["Olive trees grow slowly and can become very old.", "A canal joins the two lakes."]
    (tmp_path / "systems" / "mixed.txt").write_text(f"{idle[0]} {order} {idle[1]}")
    config = InternalsConfig(
        demo_model,
        tmp_path / "systems",
        (str(ROOT / "datasets/internals_prompts.jsonl"),),
        tmp_path / "out",
        limit=12,
        drop_sentences=12,
        attention=False,
    )
    results = InternalsJob(config).run()
    sentences = results["numbers"]["sentences"]
    assert sentences[0]["text"] == order
    assert sentences[0]["shown"]
    assert not any(row["effect"]["interval"][0] > 0 for row in sentences if row["text"] in idle)
    check = results["numbers"]["beyond_neutral"]["kl"]["(neutral text)"]
    assert check["interval"][0] <= 0 <= check["interval"][1]
