"""Malformed input in every format: each row ends in exactly one of parts or rejects, and the job continues."""

import csv
import io
import json
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import headrift.figures
from headrift.cli import app
from headrift.corpus.config import ScoreConfig
from headrift.corpus.job import ScoreJob
from headrift.corpus.rows import KEYS, REASONS
from headrift.corpus.sources import InputError
from headrift.prepare import NOT_RENDERED

ROOT = Path(__file__).resolve().parents[2]


def read(folder: Path, stem: str) -> list[dict]:
    return [row for path in sorted(folder.glob(f"{stem}-*.parquet")) for row in pq.read_table(path).to_pylist()]


@pytest.fixture
def run(fake_model, tmp_path):
    """Score a file of the given name and content; its parts, rejects and everything that was printed."""

    def score(name: str, content: bytes | str | pa.Table, *options: str) -> SimpleNamespace:
        path = tmp_path / name
        if isinstance(content, pa.Table):
            pq.write_table(content, path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        out = tmp_path / "out"
        command = ["score", str(path), "--model", str(fake_model), "--out", str(out), "--steps", "4"]
        command += ["--system-prompt-file", str(fake_model / "system.txt"), *options]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        parts, rejects = read(out, "part"), read(out, "rejects")
        return SimpleNamespace(parts=parts, rejects=rejects, out=out, done=done)

    return score


# ------------------------------------------------------------------------------------------------- formats, read whole

CONVERSATION = {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]}


def test_csv_is_read_with_quotes_line_breaks_nothing_and_nested_json(run):
    lines = [
        ["id", "prompt", "label", "messages", "extra"],
        ["1", "a, b\nand ü", "attack", "", "x"],
        ["", "plain", "", "", ""],
        ["3", "", "benign", json.dumps(CONVERSATION["messages"]), ""],
        ["4", "", "", "", ""],
    ]
    text = io.StringIO()
    csv.writer(text).writerows(lines)
    result = run("t.csv", "\ufeff" + text.getvalue() + "\n", "--save", "text")
    assert [(row["row"], row["id"], row["prompt"], row["label"]) for row in result.parts] == [
        (1, "1", "a, b\nand ü", "attack"),
        (2, "t:2", "plain", None),
        (3, "3", json.dumps(CONVERSATION["messages"]), "benign"),
    ]
    assert [(row["row"], row["id"], row["reason"]) for row in result.rejects] == [(4, "4", "no_prompt")]


def test_broken_csv_rows_do_not_affect_others(run):
    lines = [
        b"prompt,label",
        b"fine,",
        b"caf\xe9,",
        b"a\0b,",
        b"one,two,three",
        b"short",
        b'"quote"open,',
        b"x,evil",
        b"fine too,attack",
        b'"never closed,',
    ]
    result = run("t.csv", b"\n".join(lines) + b"\nswallowed,\n")
    assert [row["row"] for row in result.parts] == [1, 8]
    assert [(row["row"], row["reason"]) for row in result.rejects] == [
        (2, "invalid_utf8"),
        (3, "nul_byte"),
        (4, "wrong_columns"),
        (5, "wrong_columns"),
        (6, "bad_csv"),
        (7, "unknown_label"),
        (9, "bad_csv"),
    ]
    assert "0xe9" in result.rejects[0]["detail"]
    assert "never closed" in result.rejects[-1]["detail"]


def test_parquet_takes_texts_bytes_lists_structs_and_json(run):
    message = pa.struct({"role": pa.string(), "content": pa.string(), "name": pa.string()})
    struct = pa.array([CONVERSATION["messages"], None, None, None], pa.list_(message))
    table = pa.table(
        {
            "id": pa.array([7, 8, 9, 10], pa.int64()),
            "messages": struct,
            "prompt": pa.array([None, b"caf\xc3\xa9", b"caf\xe9", None], pa.binary()),
            "token_ids": pa.array([None, None, None, [1, 2, 3, 4, 5]]),
            "regions": pa.array([None, None, None, '{"system": [1, 3], "page": [3, 4]}']),
            "label": pa.array(["attack", "benign", None, None]).dictionary_encode(),
        }
    )
    result = run("t.parquet", table, "--save", "text", "--region", "page")
    assert [(row["id"], row["label"], row["prompt"]) for row in result.parts] == [
        ("7", "attack", json.dumps(CONVERSATION["messages"])),
        ("8", "benign", "café"),
        ("10", None, "[1, 2, 3, 4, 5]"),
    ]
    assert [(row["row"], row["id"], row["reason"]) for row in result.rejects] == [(3, "t:3", "invalid_utf8")]


def test_a_damaged_row_group_costs_its_own_rows_only(run, tmp_path):
    table = pa.table({"prompt": [f"prompt {n} " + "x" * 200 for n in range(30)]})
    whole = tmp_path / "whole.parquet"
    pq.write_table(table, whole, row_group_size=10, use_dictionary=False, compression="zstd")
    data = bytearray(whole.read_bytes())
    column = pq.ParquetFile(whole).metadata.row_group(1).column(0)
    data[column.data_page_offset : column.data_page_offset + column.total_compressed_size] = bytes(
        column.total_compressed_size
    )
    result = run("t.parquet", bytes(data))
    assert [row["row"] for row in result.parts] == [*range(1, 11), *range(21, 31)]
    assert [(row["row"], row["reason"]) for row in result.rejects] == [(n, "unreadable_rows") for n in range(11, 21)]


# ------------------------------------------------------------------------------------------------ each kind of bad row


@pytest.mark.parametrize(
    ("row", "reason", "says"),
    [
        ({"messages": [{"role": "wizard", "content": "x"}]}, "bad_messages", "message 1 has the role 'wizard'; known"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "unsupported_content", "'image_url'"),
        ({"messages": [{"role": "system", "content": "x"}]}, "no_user_message", "add the prompt as one"),
        ({"prompt": "word " * 811}, "prompt_too_long", "tokens; with 4 steps at most 4091 fit"),
        ({"prompt": "x" * 10_000_000}, "prompt_too_long", "10,000,"),
        ({"token_ids": [1, 10**30], "regions": {"system": [0, 1]}}, "bad_token_ids", "is not one of the model's 258"),
        ({"token_ids": [1, -1], "regions": {"system": [0, 1]}}, "bad_token_ids", "none below 0"),
        ({"token_ids": [1, 2], "regions": {"system": [0, 9]}}, "bad_regions", "0 <= start <= end <= 2"),
        ({"token_ids": [1, 2]}, "no_system_prompt", "names no system region"),
        ({"token_ids": [1, 2], "regions": {"system": [0, 1], "new": [0, 1]}}, "unknown_region", "--region"),
        ({"prompt": "x", "regions": {"user": [0, 1]}}, "bad_regions", "goes with `token_ids`"),
        ({"prompt": "x", "token_ids": [1]}, "several_prompts", "`prompt` and `token_ids`"),
        ({"prompt": "x", "system": " "}, "empty_system_prompt", "give a text"),
        ({"prompt": "x", "id": "first"}, "duplicate_id", "an earlier row has the id 'first' too"),
        ({"messages": [{"role": "x" * 9999, "content": "x"}]}, "bad_messages", "..."),
    ],
)
def test_a_bad_row_is_rejected_with_its_place_and_a_fix(run, row, reason, says):
    first = {"id": "first", "prompt": "fine"}
    result = run("in.jsonl", "\n".join(json.dumps(line) for line in (first, row, {"prompt": "fine too"})))
    assert [part["row"] for part in result.parts] == [1, 3]
    (reject,) = result.rejects
    assert (Path(reject["source"]).name, reject["row"], reject["reason"]) == ("in.jsonl", 2, reason)
    assert says in reject["detail"]
    assert len(reject["detail"]) <= 503
    assert reason in REASONS


def test_a_line_too_long_for_memory_is_a_reject(run, monkeypatch):
    monkeypatch.setattr("headrift.corpus.readers.MAX_LINE_BYTES", 1000)
    result = run("in.txt", "fine\n" + "x" * 5000 + "\nfine too\n" + "y" * 3000)
    assert [row["row"] for row in result.parts] == [1, 3]
    assert [(row["row"], row["reason"]) for row in result.rejects] == [(2, "row_too_big"), (4, "row_too_big")]


def test_a_cell_too_long_for_memory_is_a_reject(run, monkeypatch):
    monkeypatch.setattr("headrift.corpus.readers.MAX_CELL_CHARACTERS", 1000)
    result = run("in.csv", "prompt\nfine\n" + "x" * 1500 + '\nfine too\n"' + "open\n" * 500)
    assert [row["prompt_tokens"] > 0 for row in result.parts][:2] == [True, True]
    assert {row["reason"] for row in result.rejects} <= {"row_too_big", "bad_csv"}
    assert result.rejects


def test_an_empty_file_among_others_is_reported(run, tmp_path):
    (tmp_path / "none.txt").write_text("# nothing\n")
    result = run("in.txt", "one\n", str(tmp_path / "none.txt"))
    assert f"Note: {tmp_path / 'none.txt'} has no rows\n" in result.done.stderr


# ------------------------------------------------------------------------------------------------- flags, regions


def test_flags(run):
    rows = [
        {"prompt": "mark <|im_end|> here ab"},
        {"messages": [{"role": "developer", "content": "D"}, {"role": "user", "content": "U"}]},
        {"messages": [*CONVERSATION["messages"], {"role": "assistant", "content": "Yes and"}]},
    ]
    result = run("in.jsonl", "\n".join(map(json.dumps, rows)))
    flags = [set(row["flags"]) - {"truncated"} for row in result.parts]
    assert flags == [{"control_tokens"}, {"merged_system"}, {"assistant_prefill"}]
    assert [row["reason"] is None for row in result.parts] == ["truncated" in row["flags"] for row in result.parts]


# --------------------------------------------------------------------------------------------------- nothing leaks

SECRET = "xyzzy-plugh-secret"


def test_redact_keeps_texts_out_of_every_byte(run, tmp_path):
    (tmp_path / "system.txt").write_text(f"Never say {SECRET}.")
    rows = [
        {"prompt": SECRET, "response": SECRET},
        {"prompt": "x", "label": SECRET},
        {"messages": [{"role": SECRET, "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": SECRET}]}]},
        {"messages": [{"role": "tool", "content": SECRET}]},
        {"token_ids": [1, 2], "regions": {SECRET: [0, 1], "system": [0, 1]}},
        {"prompt": "x", "system": SECRET, "messages": []},
        {
            "messages": [{"role": "user", "content": SECRET}, {"role": "user", "content": SECRET}],
            "tools": [{"a": SECRET}],
        },
    ]
    lines = "\n".join(map(json.dumps, rows)) + f"\n{SECRET}\n"
    options = ["--system-prompt-file", str(tmp_path / "system.txt"), "--save", "shares", "--save", "mass"]
    result = run("in.jsonl", lines, "--redact", *options)
    written = b"".join(path.read_bytes() for path in sorted(result.out.iterdir()))
    # Parquet compresses: what a reader sees counts as well.
    seen = json.dumps([result.parts, result.rejects], default=str) + result.done.output
    assert SECRET.encode() not in written
    assert SECRET not in seen
    assert len(result.parts) + len(result.rejects) == len(rows) + 1
    assert all(row["detail"] == REASONS[row["reason"]] for row in result.rejects)
    run_json = json.loads((result.out / "run.json").read_text())
    assert run_json["settings"]["system_prompt"] is None
    assert len(run_json["settings"]["system_prompt_sha256"]) == 64


def test_the_same_without_redact_does_show_them(run):
    result = run(
        "in.jsonl", json.dumps({"prompt": "x", "label": SECRET}) + "\n" + json.dumps({"prompt": SECRET}), "--save=text"
    )
    assert SECRET in result.rejects[0]["detail"]
    assert result.parts[0]["prompt"] == SECRET


# ----------------------------------------------------------------------------------------------- what is documented


def test_every_reason_in_the_code_is_known_and_documented():
    sources = [ROOT / "engine/headrift" / name for name in ("prompts.py", "prepare.py")]
    sources += (ROOT / "engine/headrift/corpus").glob("*.py")
    raised = re.compile(r'(?:PromptError|RowError)\(\s*"([a-z0-9_]+)"')
    used = {reason for path in sources for reason in raised.findall(path.read_text(encoding="utf-8"))}
    used |= {"engine_died", NOT_RENDERED}  # not as literals where rows are rejected
    assert used == set(REASONS)
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([a-z0-9_]+)` \| .*\.? \|$", page, re.MULTILINE)) >= used


# ----------------------------------------------------------------------------------------------- any malformed input

ANY_TEXT = st.text(st.characters(), max_size=8)  # lone surrogates too
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=6,
)
ROLES = st.sampled_from(["system", "developer", "user", "assistant", "tool", "wizard", ""])
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": ROLES | ANY_JSON, "content": ANY_TEXT | ANY_JSON},
        optional={"tool_calls": ANY_JSON, "name": ANY_JSON, "type": ANY_JSON},
    ),
    max_size=4,
)
NUMBERS = st.lists(st.integers(-1, 60_000) | st.integers(), max_size=6)
REGIONS = st.dictionaries(
    st.sampled_from(["system", "user", "tool", "page", "prompt", "?"]), NUMBERS | ANY_JSON, max_size=3
)
LIKELY = {
    "id": st.sampled_from(["same", 1, ""]),
    "prompt": ANY_TEXT,
    "label": st.sampled_from(["attack", "benign", "evil"]),
    "messages": MESSAGES,
    "tools": st.lists(st.dictionaries(ANY_TEXT, ANY_JSON, max_size=2), max_size=2),
    "token_ids": NUMBERS,
    "regions": REGIONS,
    "response_ids": NUMBERS,
}
ANY_ROW = st.fixed_dictionaries({}, optional={key: LIKELY.get(key, ANY_JSON) | ANY_JSON for key in KEYS})
BROKEN = st.sampled_from([b"", b"\xff", b"\0", b"}", b"\\ud800", b'"', b",", b"\r", b"\xef\xbb\xbf", b"\xed\xa0\x80"])
LINES = st.lists(
    st.binary(max_size=20)
    | st.builds(lambda row, cut, junk: json.dumps(row).encode()[:cut] + junk, ANY_ROW, st.integers(1, 300), BROKEN),
    max_size=6,
)


@st.composite
def files(draw) -> tuple[str, bytes | pa.Table]:
    kind = draw(st.sampled_from(["x.txt", "x.jsonl", "x.csv", "x.parquet"]))
    end = draw(st.sampled_from([b"\n", b"\r\n"]))
    if kind in ("x.txt", "x.jsonl"):
        return kind, end.join(draw(LINES))
    if kind == "x.csv" and draw(st.booleans()):
        return kind, b"id,prompt,messages" + end + end.join(draw(LINES))
    rows = draw(st.lists(ANY_ROW, max_size=4))
    if kind == "x.csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, KEYS)
        writer.writeheader()
        for row in rows:
            writer.writerow({key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()})
        return kind, text.getvalue().encode(errors="surrogatepass")
    columns = {"prompt": pa.array([row.get("prompt") for row in rows if False], pa.string())}
    for key in draw(st.sets(st.sampled_from(KEYS))) | {"prompt"}:
        columns[key] = draw(arrays([row.get(key) for row in rows]))
    return kind, pa.table(columns)


@st.composite
def arrays(draw, values: list) -> pa.Array:
    """A column of a Parquet file: the values as JSON text or bytes, not always UTF-8, or of a type of their own."""
    texts = [None if value is None else json.dumps(value).encode() + draw(BROKEN) for value in values]
    n = len(values)
    others = [
        pa.array(texts, pa.binary()),
        pa.array(texts, pa.binary()).view(pa.string()),  # what it holds is not looked at
        pa.array([value if isinstance(value, str) and value.isprintable() else None for value in values], pa.string()),
        pa.array([2**62] * n, pa.timestamp("ns")),
        pa.array([2**62] * n, pa.timestamp("ms")),
        pa.array([[1, None, 2]] * n, pa.list_(pa.int32())),
        pa.array([{"role": "user", "content": None}] * n),
        pa.array([[{"role": "user", "content": "x"}, None]] * n),
        pa.array([[("system", [0, 1])]] * n, pa.map_(pa.string(), pa.list_(pa.int64()))),
        pa.array([{"system": [0, 1], "user": None}] * n),
        pa.array([None] * n, pa.null()),
        pa.array([1.5] * n),
        pa.array([10**20] * n, pa.decimal128(38)),
    ]
    return draw(st.sampled_from(others))


@given(files())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(("x.jsonl", b'{"id": "same", "prompt": "a"}\n{"id": "same", "prompt": "b"}\n' + b'{"a":' * 3000))
@example(("x.csv", b'prompt\n"open\nnext\n'))
def test_every_row_is_in_exactly_one_place_and_nothing_escapes(fake_model, monkeypatch, file):
    monkeypatch.setattr(headrift.figures, "scores_png", lambda *args, **options: None)
    name, content = file
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / name, Path(folder) / "out"
        if isinstance(content, pa.Table):
            pq.write_table(content, path)
            n_rows = len(content)
        else:
            path.write_bytes(content)
            n_rows = None
        try:
            config = ScoreConfig(
                (str(path),), fake_model, out, system_prompt="Be brief.", steps=4, save=("text", "mass")
            )
            job = ScoreJob(config)
        except InputError as error:  # nothing but this is wrong with a file as a whole
            assert "no rows in" in str(error) and not n_rows  # noqa: PT017, PT018
            return
        with job:
            job.start()
            assert job.run()
        parts, rejects = read(out, "part"), read(out, "rejects")
        places = sorted((row["source"], row["row"]) for row in parts + rejects)
        assert len(places) == len(set(places)) == job.summary().rows
        assert n_rows is None or [row for _, row in places] == list(range(1, n_rows + 1))
        if name.endswith((".txt", ".jsonl")):
            lines = enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1)
            kept = [n for n, line in lines if line.strip() and not (name == "x.txt" and line.strip().startswith(b"#"))]
            assert [row for _, row in places] == kept
        assert all(row["reason"] in REASONS and row["detail"] for row in rejects)
        assert json.loads((out / "run.json").read_text())["counts"]["rows"] == len(places)
