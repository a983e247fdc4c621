"""The query set of this project, and how queries become token ids."""

import json
from collections import Counter
from difflib import SequenceMatcher
from pathlib import Path

import pytest

from headrift.corpus.sources import InputError
from headrift.prepare import load_tokenizer
from headrift.safety_heads.jobs import prepare, read_rows

SET = Path(__file__).resolve().parents[2] / "datasets" / "safety_topics.jsonl"
NEAR = 0.9


@pytest.fixture(scope="module")
def tokenizer(demo_model):
    return load_tokenizer(str(demo_model), False)


def test_the_set_of_this_project():
    rows = [json.loads(line) for line in SET.read_text(encoding="utf-8").splitlines()]
    assert all(set(row) == {"id", "prompt", "label", "category"} for row in rows)
    assert len({row["id"] for row in rows}) == len(rows)
    by_label = Counter(row["label"] for row in rows)
    assert by_label["attack"] == by_label["benign"] >= 40
    # A query and its benign counterpart are of one topic and stand together, so that --limit takes both.
    for attack, benign in zip(rows[::2], rows[1::2], strict=True):
        assert (attack["label"], benign["label"]) == ("attack", "benign")
        assert attack["category"] == benign["category"]
        assert attack["id"][5:] == benign["id"][5:]
    texts = [row["prompt"].lower() for row in rows]
    assert len(set(texts)) == len(texts)
    for of_label in (texts[::2], texts[1::2]):
        for i, one in enumerate(of_label):
            for other in of_label[:i]:
                assert SequenceMatcher(None, one, other).ratio() < NEAR, (one, other)
    attacks = read_rows([str(SET)], label="attack", limit=7)
    assert [row.id for row in attacks] == [row["id"] for row in rows[:14:2]]
    # At the level of a topic: a query is one short sentence.
    assert max(len(text) for text in texts) < 100


def test_forms(tokenizer, tmp_path):
    file = tmp_path / "q.jsonl"
    rows = [{"prompt": "Hello there", "id": "a", "label": "benign"}, {"prompt": "Bye", "system": "Be brief."}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    rows = read_rows([str(file)])

    def text(form, n=0, **more):
        return tokenizer.decode(prepare(rows, tokenizer, form, **more)[n].token_ids)

    assert text("text") == "Hello there"
    assert text("query") == "## Query:Hello there \n## Answer:"
    assert "Hello there<|im_end|>\n<|im_start|>assistant\n" in text("chat")
    assert "You are a careful clerk." in text("chat", system_prompt="You are a careful clerk.")
    assert "Be brief." in text("chat", 1, system_prompt="You are a careful clerk.")
    query = prepare(rows, tokenizer)[0]
    assert (query.id, query.label, query.category) == ("a", "benign", None)


@pytest.mark.parametrize("name", ["prompt", "input"])
def test_public_sets_have_a_column_input(name, tmp_path, tokenizer):
    file = tmp_path / "set.csv"
    file.write_text(f"{name},source\nOne question?,x\nAnother?,y\n", encoding="utf-8")
    assert [row.prompt.prompt for row in read_rows([str(file)])] == ["One question?", "Another?"]
    assert len(read_rows([str(file)], limit=1)) == 1


def test_what_cannot_be_asked(tmp_path, tokenizer):
    file = tmp_path / "q.csv"
    file.write_text("question\nHm?\n", encoding="utf-8")
    with pytest.raises(InputError, match="prompt"):
        read_rows([str(file)])
    assert read_rows([str(file)], {"prompt": "question"})[0].prompt.prompt == "Hm?"
    with pytest.raises(InputError, match="no query with the label attack"):
        read_rows([str(file)], {"prompt": "question"}, label="attack")
    empty = tmp_path / "none.txt"
    empty.write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(InputError, match="no query"):
        read_rows([str(empty)])
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "x"}\n{"prompt": 3}\n', encoding="utf-8")
    with pytest.raises(InputError, match="row 2"):
        read_rows([str(bad)])
    chat = tmp_path / "chat.jsonl"
    chat.write_text('{"messages": [{"role": "user", "content": "x"}]}\n', encoding="utf-8")
    with pytest.raises(InputError, match="--as text"):
        prepare(read_rows([str(chat)]), tokenizer, "text")
