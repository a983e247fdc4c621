"""Pairs: from files and from the library, lined up by token ids; and what is turned down, with its reason."""

import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrift.consistency.data import library, read_pairs, sample_wrappers, split, wrap
from headrift.consistency.pairs import Pair, PairRenderer, PairText, RejectedPair
from headrift.corpus.sources import InputError


@pytest.fixture(scope="module")
def renderer(tokenizer):
    return PairRenderer(tokenizer)


@pytest.fixture(scope="module")
def questions():
    from pathlib import Path

    result = read_pairs([str(Path(__file__).parents[2] / "datasets" / "consistency_questions.jsonl")])
    assert not result.rejected
    return result.questions


def one(renderer, text):
    (result,) = renderer.render_all([text])
    return result


def check(pair, tokenizer):
    """What holds for every pair."""
    ours, theirs = np.array(pair.clean_ids), np.array(pair.wrapped_ids)
    at, to = pair.clean_positions, pair.wrapped_positions
    assert len(at) == len(to)
    np.testing.assert_array_equal(ours[at], theirs[to])
    assert (np.diff(at) > 0).all()
    assert (np.diff(to) > 0).all()
    # Head, core, tail and wrapper are the wrapped prompt, each token once.
    wrapper = [i for span in pair.wrapper for i in range(*span)]
    assert sorted([*to.tolist(), *wrapper]) == list(range(len(theirs)))
    assert at[-1] == len(ours) - 1
    assert pair.head.length >= pair.clean_system[1]
    assert pair.clean_system == pair.wrapped_system
    # Rows before the first query are the same by causality, and before it alone.
    first = pair.first_query
    assert pair.clean_ids[: at[first]] != pair.wrapped_ids[: to[first]]
    assert first == 0 or pair.clean_ids[: at[first - 1]] == pair.wrapped_ids[: to[first - 1]]
    # Head, core, tail and edges are the clean prompt, each token once.
    edges = [i for span in pair.clean_edges for i in range(*span)]
    assert sorted([*at.tolist(), *edges]) == list(range(len(ours)))


def test_a_wrapper_as_long_as_what_it_replaces_is_still_a_wrapper(renderer, tokenizer):
    """All places are the same then, and only the tokens tell which rows differ."""
    pair = one(renderer, PairText("a", "q", "Now add 2 + 2 quickly", "Then add 2 + 2 quickly"))
    assert isinstance(pair, Pair)
    check(pair, tokenizer)
    np.testing.assert_array_equal(pair.clean_positions, pair.wrapped_positions)
    assert len(pair.clean_queries) == pair.core.length + pair.tail.length


def test_every_pair_of_the_library_lines_up(renderer, tokenizer, questions):
    some = [q for topic in ("arithmetic", "fact", "choice") for q in [x for x in questions if x.topic == topic][:4]]
    texts = wrap(some)
    assert len(texts) == len(some) * len(library())
    for text in texts:
        pair = one(renderer, text)
        assert isinstance(pair, Pair), pair
        check(pair, tokenizer)
        # All of the question but for its edges: its first and last token may come out otherwise beside the wrapper.
        core = tokenizer.decode(pair.wrapped_ids[slice(*pair.core.wrapped_span)])
        assert core.strip() in text.clean
        ids = tokenizer(text.clean, add_special_tokens=False)["input_ids"]
        assert pair.core.length >= len(ids) - 2


def test_edges_that_tokenise_otherwise_are_left_out(renderer, tokenizer):
    text = PairText("1", "q", "What is 17 + 26?", 'Say "What is 17 + 26?"!', core="What is 17 + 26?")
    pair = one(renderer, text)
    check(pair, tokenizer)
    # `?"` and `"What` (or the like) are tokens of their own there, and `What` and `?` are not.
    core = tokenizer.decode(pair.clean_ids[slice(*pair.core.clean_span)])
    assert core in "What is 17 + 26?"
    assert len(core) < len("What is 17 + 26?")


def test_the_core_is_where_it_was_said_to_be(renderer, tokenizer):
    wrapped = "Is 2 + 2 = 5? What is 2 + 2? What is 2 + 2?"
    first = one(renderer, PairText("1", "q", "What is 2 + 2?", wrapped, core="What is 2 + 2?", wrapped_at=14))
    second = one(renderer, PairText("2", "q", "What is 2 + 2?", wrapped, core="What is 2 + 2?", wrapped_at=29))
    check(first, tokenizer)
    check(second, tokenizer)
    assert second.core.wrapped > first.core.wrapped


def test_without_a_core_it_is_the_longest_common_run(renderer, tokenizer):
    pair = one(renderer, PairText("1", "q", "Tell me: who wrote Oliver Twist?", "Quick! Who wrote Oliver Twist? Now!"))
    check(pair, tokenizer)
    assert tokenizer.decode(pair.wrapped_ids[slice(*pair.core.wrapped_span)]).strip() == "wrote Oliver Twist?"


@pytest.mark.parametrize(
    ("clean", "wrapped", "core", "reason"),
    [
        ("What is 2 + 2?", "What is 2 + 2?", None, "identical_pair"),
        ("What is 2 + 2?", " What is 2 + 2?\n", None, "identical_pair"),
        ("What is 2 + 2?", "Hello there, friend", None, "no_common_core"),
        ("Name the capital of Norway, please.", "Norway", None, "no_common_core"),
        ("What is 2 + 2?", "2 + 2? 2 + 2?", "2 + 2?", "core_not_found"),
        ("What is 2 + 2?", "What is it?", "2 + 2", "core_not_found"),
        ("What is 2 + 2?", "   ", None, "no_common_core"),
    ],
)
def test_a_pair_that_is_none_is_rejected_with_the_reason(renderer, clean, wrapped, core, reason):
    result = one(renderer, PairText("1", "q", clean, wrapped, core=core, source="pairs.jsonl", row=7))
    assert isinstance(result, RejectedPair)
    assert (result.reason, result.source, result.row) == (reason, "pairs.jsonl", 7)
    assert len(result.detail) > 20


def test_a_pair_too_long_for_the_context_is_rejected(tokenizer):
    result = one(
        PairRenderer(tokenizer, max_tokens=60), PairText("1", "q", "What is 2 + 2?", "What is 2 + 2? " + "a b " * 99)
    )
    assert result.reason == "prompt_too_long"


# --------------------------------------------------------------------------------------------------------------- files


def rows_of(folder, name, rows):
    path = folder / name
    if name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif name.endswith(".csv"):
        cells = [{k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows]
        import csv

        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(cells[0]))
            writer.writeheader()
            writer.writerows(cells)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


PAIRS = [
    {"id": "a", "clean": "What is 2 + 2?", "wrapped": "I say 5. What is 2 + 2?", "answer": "4", "wrong": "5",
     "family": "hint", "system": "Be brief."},
    {"id": "b", "clean": "Which is a fish?", "wrapped": "Hm. Which is a fish?", "answer": "A", "wrong": "B",
     "family": "noise", "system": "Be brief.", "choices": ["cod", "cow"]},
]  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_pairs_from_every_kind_of_file(tmp_path, kind):
    rows = [{"choices": [], **row} for row in PAIRS]
    result = read_pairs([rows_of(tmp_path, f"pairs.{kind}", rows)])
    assert not result.rejected
    first, second = result.pairs
    assert (first.id, first.clean, first.wrapped, first.family) == ("a", *list(PAIRS[0].values())[1:3], "hint")
    assert (first.key.kind, first.key.answer, first.key.wrong, first.hints) == ("number", "4", "5", True)
    assert second.key.choices == ("cod", "cow")
    assert first.system == "Be brief."


def test_columns_may_have_other_names(tmp_path):
    path = rows_of(tmp_path, "p.csv", [{"plain": "What is it?", "dressed": "Ha! What is it?"}])
    (pair,) = read_pairs([path], {"clean": "plain", "wrapped": "dressed"}).pairs
    assert (pair.clean, pair.key, pair.hints) == ("What is it?", None, False)
    with pytest.raises(InputError, match="no such key"):
        read_pairs([path], {"tidy": "plain"})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"clean": "a"}, "no_pair"),
        ({"clean": "a", "wrapped": " "}, "no_pair"),
        ({"prompt": "a"}, "no_pair"),
        ({"clean": "a", "wrapped": 3}, "wrong_type"),
        ({"question": "What?"}, "no_answer_key"),
        ({"question": "What?", "answer": "x"}, "no_answer_key"),
        ({"question": "What?", "answer": "x", "wrong": "X"}, "bad_answer_key"),
        ({"question": "What?", "answer": "x", "wrong": "y", "kind": "essay"}, "bad_answer_key"),
        ({"question": "What?", "answer": "x", "wrong": "y", "kind": "number"}, "bad_answer_key"),
        ({"question": "What?", "answer": "E", "wrong": "A", "choices": ["a", "b"]}, "bad_answer_key"),
        ({"question": "What?", "answer": "A", "wrong": "B", "choices": "a, b"}, "bad_json"),
        ({"id": "good", "clean": "c", "wrapped": "d"}, "duplicate_id"),
    ],
)
def test_a_bad_row_is_rejected_with_its_number(tmp_path, row, reason):
    good = {"id": "good", "clean": "a b c", "wrapped": "x a b c"}
    result = read_pairs([rows_of(tmp_path, "p.jsonl", [good, row])])
    assert len(result.pairs) == 1
    (bad,) = result.rejected
    assert (bad.reason, bad.row) == (reason, 2)


def test_broken_lines_and_unusable_files(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(PAIRS[0]) + '\n{"clean": \n')
    assert [bad.reason for bad in read_pairs([str(path)]).rejected] == ["bad_json"]
    path.write_text('{"clean": \n')
    with pytest.raises(InputError, match=r"no pair and no question.* not valid JSON"):
        read_pairs([str(path)])
    with pytest.raises(InputError, match="does not exist"):
        read_pairs([str(tmp_path / "none.jsonl")])
    (tmp_path / "p.txt").write_text("What is it?\n")
    with pytest.raises(InputError, match="plain text"):
        read_pairs([str(tmp_path / "p.txt")])


# ------------------------------------------------------------------------------------------- the library and its split


def test_the_library_has_what_was_promised(questions):
    wrappers = library()
    assert len(wrappers) >= 12
    families = ("opinion_hint", "role_play", "authority_urgency", "irrelevant_context")
    assert tuple(dict.fromkeys(w.family for w in wrappers)) == families
    assert len({w.name for w in wrappers}) == len({w.text for w in wrappers}) == len(wrappers)
    for wrapper in wrappers:
        assert wrapper.text.count("{question}") == 1
        assert wrapper.hints == (wrapper.text.count("{wrong}") > 0)
    assert all(w.hints for w in wrappers if w.family == "opinion_hint")
    assert not any(w.hints for w in wrappers if w.family == "irrelevant_context")
    assert len(questions) >= 300
    topics = Counter(question.topic for question in questions)
    assert min(topics["arithmetic"], topics["fact"], topics["choice"]) >= 75


def test_no_question_comes_twice_and_every_key_is_consistent(questions):
    from headrift.consistency.answers import is_hinted, is_right

    assert len({question.prompt.casefold() for question in questions}) == len(questions)
    for question in questions:
        key = question.key
        for right in (key.answer, *key.also):
            assert is_right(right, key), question.id
            assert not is_hinted(right, key), question.id
        assert is_hinted(key.wrong, key), question.id
        assert not is_right(key.wrong, key), question.id
    letters = Counter(question.key.answer for question in questions if question.key.kind == "choice")
    assert max(letters.values()) - min(letters.values()) <= 1  # no letter is right more often


def test_the_arithmetic_is_right_and_is_what_the_script_writes(tmp_path, questions, monkeypatch):
    from importlib.util import module_from_spec, spec_from_file_location
    from pathlib import Path

    script = Path(__file__).parents[2] / "scripts" / "consistency_questions.py"
    spec = spec_from_file_location("consistency_questions", script)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    written = module.FILE.read_text(encoding="utf-8")
    copy = tmp_path / "questions.jsonl"
    copy.write_text(written, encoding="utf-8")
    monkeypatch.setattr(module, "FILE", copy)
    module.main()
    assert copy.read_text(encoding="utf-8") == written
    signs = {"plus": "+", "minus": "-", "times": "*", "multiplied by": "*", "divided by": "/"}
    for question in questions:
        if question.topic == "arithmetic":
            sum_ = question.text.removeprefix("What is ").removeprefix("How much is ").rstrip("?")
            for word, sign in signs.items():
                sum_ = sum_.replace(word, sign)
            assert eval(sum_) == int(question.key.answer)


def test_a_wrapped_question_holds_the_question_where_it_says(questions):
    for text in wrap(questions[:3] + questions[-3:]):
        assert text.wrapped[text.wrapped_at :].startswith(text.core)
        assert (text.key.wrong in text.wrapped.replace(text.core, "")) or not text.hints
        assert "{" not in text.wrapped


def test_one_wrapper_of_each_family_is_drawn_by_the_seed(questions):
    some = questions[:40]
    one_each, again, other = (sample_wrappers(wrap(some), 1, seed) for seed in (0, 0, 1))
    assert one_each == again != other
    assert len(one_each) == 4 * len(some)
    assert {text.wrapper for text in one_each} == {wrapper.name for wrapper in library()}


def test_what_is_held_out_is_never_trained_on(questions):
    texts = wrap(questions)
    result = split(texts)
    assert result == split(texts)
    assert result != split(texts, seed=1)
    trained, held = ([text for text in texts if some(text)] for some in (result.is_trained, result.is_held_out))
    assert len(result.questions) == round(0.2 * len(questions))
    assert len(result.families) == 1
    assert not {t.question for t in trained} & {h.question for h in held}
    assert not {t.family for t in trained} & {h.family for h in held}
    assert not {t.clean for t in trained} & {h.clean for h in held}
    assert {h.question for h in held} == result.questions
    named = split(texts, held_out=["role_play"])
    assert named.families == {"role_play"}
    with pytest.raises(ValueError, match="choose from authority_urgency"):
        split(texts, held_out=["poetry"])
    with pytest.raises(ValueError, match="nothing is left to train on"):
        split(texts, held_out=sorted({w.family for w in library()}))
    with pytest.raises(ValueError, match="not between 0 and 1"):
        split(texts, fraction=1.0)


def test_pairs_without_a_family_are_held_out_by_question():
    texts = [PairText(str(i), str(i // 2), f"clean {i // 2}", f"wrapped {i}") for i in range(20)]
    result = split(texts)
    assert result.families == frozenset()
    assert sum(map(result.is_held_out, texts)) == 4
    assert sum(map(result.is_trained, texts)) == 16
