"""Every line of an input is a row, a bad row or skipped, and nothing else ever comes of it."""

import json
import os
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from headrift.corpus.readers import Reader
from headrift.corpus.rows import BadRow, Row
from headrift.corpus.sources import InputError, find
from headrift.scorer import Prompt


def read_rows(inputs: list[Path | str], labels: list[str] | None = None, **columns: str) -> list[Row | BadRow]:
    return list(Reader(find([str(given) for given in inputs], labels, columns), columns).rows())


def count_rows(path: Path | str, limit: int | None = None) -> int:
    sources = find([str(path)])
    return sum(Reader(sources).count(source, limit) for source in sources)


def rows_of(path: Path, content: bytes | str, labels: list[str] | None = None) -> list[Row | BadRow]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_rows([path], labels)


# ------------------------------------------------------------------------------------------------------------- rows


def test_txt_is_a_prompt_a_line_without_comments_and_blank_lines(tmp_path):
    content = (
        "\ufeff# made by hand\n\n  spaces stay  \r\n   # indented comment\n \t\nAsk #2: löslich?\u2028still one line"
    )
    rows = rows_of(tmp_path / "few.txt", content)
    assert [(row.row, row.prompt.prompt) for row in rows] == [
        (3, "  spaces stay  "),
        (6, "Ask #2: löslich?\u2028still one line"),
    ]
    assert [(row.source, row.id, row.label, row.category) for row in rows] == [
        (str(tmp_path / "few.txt"), "few:3", None, None),
        (str(tmp_path / "few.txt"), "few:6", None, None),
    ]


def test_byte_order_mark_does_not_hide_a_comment(tmp_path):
    assert rows_of(tmp_path / "a.txt", b"\xef\xbb\xbf# comment\n") == []
    assert rows_of(tmp_path / "b.jsonl", b'\xef\xbb\xbf{"prompt": "x"}\n')[0].prompt == Prompt(prompt="x")


def test_jsonl_takes_both_forms_and_what_goes_with_them(tmp_path):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "u"}]}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    lines = [
        {"prompt": "p", "system": "s", "response": "r", "id": "one", "label": "attack", "category": "c", "more": {}},
        {"messages": messages, "tools": tools, "id": 7, "label": ""},
        {"prompt": "", "messages": None, "label": None, "id": None, "system": None},
    ]
    rows = rows_of(tmp_path / "x.jsonl", "\n".join(map(json.dumps, lines)))
    source = str(tmp_path / "x.jsonl")
    assert rows == [
        Row(source, 1, "one", "attack", "c", Prompt(prompt="p", system="s", response="r")),
        Row(source, 2, "7", None, None, Prompt(messages=messages, tools=tools)),
        Row(source, 3, "x:3", None, None, Prompt(prompt="")),
    ]


def test_hash_is_no_comment_in_jsonl(tmp_path):
    assert rows_of(tmp_path / "x.jsonl", "# comment")[0].reason == "bad_json"


def test_a_character_of_number_0_is_text_like_any_other_in_json(tmp_path):
    (row,) = rows_of(tmp_path / "x.jsonl", r'{"prompt": "a\u0000b"}')
    assert row.prompt.prompt == "a\0b"


def test_a_pair_of_surrogates_is_a_character(tmp_path):
    (row,) = rows_of(tmp_path / "x.jsonl", r'{"prompt": "\ud83d\ude00"}')
    assert row.prompt.prompt == "😀"


def test_unused_keys_may_hold_anything(tmp_path):
    (row,) = rows_of(tmp_path / "x.jsonl", r'{"prompt": "p", "notes": "\ud800", "score": NaN}')
    assert isinstance(row, Row)


@pytest.mark.parametrize(
    ("line", "reason", "says"),
    [
        (b'{"prompt": "x"', "bad_json", "column 15"),
        (b'{"prompt": "x"} {"prompt": "y"}', "bad_json", "column 17"),
        (b"prompt", "bad_json", "not valid JSON"),
        (b'{"id": ' + b"9" * 5000 + b"}", "bad_json", "digits"),
        (b"[" * 100_000, "bad_json", "nested too deep"),
        (b'"text"', "not_an_object", "the line is a text"),
        (b'[{"prompt": "x"}]', "not_an_object", "the line is a list"),
        (b"null", "not_an_object", "the line is null"),
        (b"{}", "no_prompt", "no `prompt` and no `messages`"),
        (b'{"prompt": null}', "no_prompt", "add the one that was sent"),
        (b'{"prompt": "x", "messages": []}', "several_prompts", "keep the one that was sent"),
        (b'{"system": "x", "messages": []}', "system_not_used", "put the system prompt into `messages`"),
        (b'{"prompt": 3}', "wrong_type", "`prompt` is a number; it must be a text"),
        (b'{"prompt": ["x"]}', "wrong_type", "`prompt` is a list"),
        (b'{"prompt": "x", "system": true}', "wrong_type", "`system` is true or false"),
        (b'{"prompt": "x", "response": {}}', "wrong_type", "`response` is an object"),
        (b'{"prompt": "x", "label": 1}', "wrong_type", "`label` is a number"),
        (b'{"prompt": "x", "id": 1.5}', "wrong_type", "`id` is a number; it must be a text or a whole number"),
        (b'{"prompt": "x", "id": true}', "wrong_type", "`id` is true or false"),
        (b'{"messages": {"role": "user"}}', "wrong_type", "`messages` is an object; it must be a list of objects"),
        (b'{"messages": ["hi"]}', "wrong_type", "a list with other things in it"),
        (b'{"prompt": "x", "tools": "f"}', "wrong_type", "`tools` is a text"),
        (b'{"prompt": "x", "label": "Attack"}', "unknown_label", '\'Attack\' is unknown; write "attack" or "benign"'),
        (b'{"prompt": "caf\xe9"}', "invalid_utf8", "byte 16 of the line (0xe9) is not valid UTF-8"),
        (b'{"prompt": "\xed\xa0\x80"}', "invalid_utf8", "convert the file to UTF-8"),
        (b'{"prompt": "a\0b"}', "nul_byte", "UTF-16"),
        (rb'{"prompt": "\ud800"}', "lone_surrogate", r"\ud800"),
        (rb'{"messages": [{"role": "user", "content": "\uDFFF"}]}', "lone_surrogate", r"\udfff"),
    ],
)
def test_bad_rows_say_what_is_wrong_and_stand_alone(tmp_path, line, reason, says):
    before, bad, after = rows_of(tmp_path / "x.jsonl", b'{"prompt": "1"}\n' + line + b'\n{"prompt": "3"}')
    assert (before.prompt.prompt, after.prompt.prompt) == ("1", "3")
    assert isinstance(bad, BadRow)
    assert (bad.source, bad.row, bad.id, bad.reason) == (str(tmp_path / "x.jsonl"), 2, "x:2", reason)
    assert says in bad.detail


@pytest.mark.parametrize(("line", "reason"), [(b"caf\xe9", "invalid_utf8"), (b"a\0b", "nul_byte")])
def test_bad_rows_of_txt(tmp_path, line, reason):
    bad, good = rows_of(tmp_path / "x.txt", line + b"\nfine")
    assert (bad.reason, bad.row, good.row) == (reason, 1, 2)


def test_utf16_file_is_all_bad_rows(tmp_path):
    rows = rows_of(tmp_path / "x.txt", "one\ntwo\n".encode("utf-16"))
    assert {type(row) for row in rows} == {BadRow}


def test_a_bad_row_keeps_its_own_id(tmp_path):
    (bad,) = rows_of(tmp_path / "x.jsonl", '{"id": "mine", "prompt": 3}')
    assert bad.id == "mine"


def test_a_huge_label_is_not_repeated_in_full(tmp_path):
    (bad,) = rows_of(tmp_path / "x.jsonl", json.dumps({"prompt": "x", "label": "a" * 10_000}))
    assert len(bad.detail) < 200


# ----------------------------------------------------------------------------------------------- inputs and labels


def test_inputs_come_in_order_with_their_labels_and_a_rows_own_label_wins(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.jsonl").write_text('{"prompt": "three"}\n{"prompt": "four", "label": "attack"}\n')
    inputs = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    rows = list(read_rows(inputs, ["attack", "benign"]))
    assert [row.prompt.prompt for row in rows] == ["one", "two", "three", "four"]
    assert [row.label for row in rows] == ["attack", "attack", "benign", "attack"]
    assert [count_rows(path) for path in inputs] == [2, 2]
    assert count_rows(inputs[0], 1) == 1


@pytest.mark.parametrize(
    ("names", "labels", "says"),
    [
        ([], None, "no input file"),
        (["missing.txt"], None, "missing.txt does not exist"),
        (["table.tsv"], None, "table.tsv is not of a known kind"),
        (["noname"], None, "not of a known kind"),
        (["folder.txt"], None, "folder.txt contains no input"),
        (["no?.txt"], None, "no\\?.txt matches no file: check the pattern"),
        (["x.parquet.gz"], None, "x.parquet.gz is not of a known kind"),
        (["a.txt", "./a.txt"], None, "named twice"),
        (["a.txt", "b.jsonl"], ["attack"], "1 label for 2 inputs"),
        (["a.txt"], ["attack", "benign"], "2 labels for 1 input:"),
        (["a.txt"], ["evil"], "unknown label 'evil': labels are attack and benign"),
    ],
)
def test_settings_that_cannot_be_raise_at_the_call(tmp_path, monkeypatch, names, labels, says):
    monkeypatch.chdir(tmp_path)
    Path("folder.txt").mkdir()
    for name in ("a.txt", "b.jsonl", "table.tsv", "noname", "x.parquet.gz"):
        Path(name).write_text("x")
    with pytest.raises(InputError, match=says):
        read_rows([Path(name) for name in names], labels)


def test_suffixes_in_capitals_are_known(tmp_path):
    assert len(rows_of(tmp_path / "X.TXT", "one")) == 1


def test_a_file_name_that_is_not_unicode_can_be_written_to_parquet(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt"))
    try:
        path.write_text("one")
    except OSError:
        pytest.skip("this file system takes Unicode names only")
    (row,) = read_rows([path])
    assert row.id == r"caf\udce9:1"
    row.source.encode()


def test_memory_does_not_grow_with_the_file(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"a prompt of some length, again and again\n" * 50_000)
    tracemalloc.start()
    try:
        reader = Reader(find([str(tmp_path / "x.txt")]))
        assert sum(1 for _ in reader.rows()) == 50_000
        assert tracemalloc.get_traced_memory()[1] < 500_000
    finally:
        tracemalloc.stop()


# ----------------------------------------------------------------------------------------------------------- rubbish

ANY_TEXT = st.text(st.characters(), max_size=8)  # lone surrogates too
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=6,
)
KEYS = ("id", "prompt", "system", "response", "label", "category", "messages", "tools")
ANY_ROW = st.dictionaries(st.sampled_from(KEYS), ANY_JSON | st.just("attack"), max_size=5)
NEARLY = st.builds(
    lambda row, cut, malformed: json.dumps(row).encode()[:cut] + malformed,
    ANY_ROW,
    st.integers(1, 100),
    st.sampled_from([b"", b"", b"\xff", b"\0", b"}", b"\\ud800"]),
)
LINES = st.binary(max_size=20) | NEARLY | st.sampled_from([b"", b" ", b"# c", b"\xef\xbb\xbf", b"\r", b"\x0c", b"\xa0"])


@given(st.lists(LINES, max_size=6), st.sampled_from([b"\n", b"\r\n"]), st.sampled_from(["x.txt", "x.jsonl"]))
@example([b"\xef\xbb\xbf#", b'{"id": "\\ud800", "prompt": "x"}'], b"\n", "x.jsonl")
def test_whatever_the_bytes_each_line_is_one_row_or_one_bad_row_or_skipped(lines, end, name):
    content = end.join(lines)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        result = rows_of(path, content)
        assert count_rows(path) == len(result)
    physical = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    kept = [
        n
        for n, line in enumerate(physical, 1)
        if line.strip() and not (name == "x.txt" and line.strip().startswith(b"#"))
    ]
    assert [row.row for row in result] == kept
    for row in result:
        assert isinstance(row, Row | BadRow)
        texts = [row.id, row.source]
        if isinstance(row, BadRow):
            assert row.reason.isidentifier()
            texts.append(row.detail)
        else:
            assert (row.prompt.prompt is None) != (row.prompt.messages is None)
            assert row.label in (None, "attack", "benign")
            assert row.category is None or isinstance(row.category, str)
            texts.append(json.dumps([row.prompt.prompt, row.prompt.messages, row.category], ensure_ascii=False))
        "".join(texts).encode()  # nothing in it that a file would refuse
