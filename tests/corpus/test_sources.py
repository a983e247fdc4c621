"""Where inputs come from: folders, globs, partitions, compressed and damaged files, an object store on localhost."""

import gzip
import io
import json
import os
import socket
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrift.corpus.readers import Reader
from headrift.corpus.rows import BadRow, Row
from headrift.corpus.sources import InputError, find


def read(*inputs: Path | str, labels: list[str] | None = None, **columns: str) -> list[Row | BadRow]:
    sources = find([str(given) for given in inputs], labels, columns)
    reader = Reader(sources, columns)
    rows = list(reader.rows())
    assert sum(reader.count(source) for source in sources) == len(rows)
    return rows


def jsonl(*prompts: str) -> bytes:
    return b"".join(json.dumps({"prompt": prompt}).encode() + b"\n" for prompt in prompts)


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


# ---------------------------------------------------------------------------------------------------- which files


@pytest.fixture
def logs(tmp_path, monkeypatch) -> Path:
    """A folder of logs by day and label, with files in it that are no logs."""
    for name, content in {
        "day=1/label=attack/a.jsonl": jsonl("one"),
        "day=1/label=benign/a.jsonl": jsonl("two") + b'{"prompt": "three", "label": "attack"}\n',
        "day=2/label=benign/b.txt.gz": gzip.compress(b"four\n"),
        "day=2/label=benign/category=hard%20ones/c.csv": b"prompt\nfive\n",
        "day=2/_temporary/d.jsonl": b"not yet there",
        "day=2/.e.jsonl.swp.jsonl": b"hidden",
        "notes.md": b"# about these logs",
    }.items():
        path = tmp_path / "logs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "logs"


def test_a_folder_is_its_known_files_in_order_and_its_partitions_are_fields(logs):
    rows = read("logs")
    assert [(row.prompt.prompt, row.label, row.category) for row in rows] == [
        ("one", "attack", None),
        ("two", "benign", None),
        ("three", "attack", None),  # its own label wins
        ("four", "benign", None),
        ("five", "benign", "hard ones"),
    ]
    assert [row.source for row in rows[:2]] == ["logs/day=1/label=attack/a.jsonl", "logs/day=1/label=benign/a.jsonl"]
    assert [row.id for row in rows] == [
        "logs/day=1/label=attack/a.jsonl:1",
        "logs/day=1/label=benign/a.jsonl:1",
        "logs/day=1/label=benign/a.jsonl:2",
        "b:1",
        "c:1",
    ]


def test_a_pattern_is_the_files_that_match(logs):
    assert [row.prompt.prompt for row in read("logs/**/a.jsonl")] == ["one", "two", "three"]
    assert [row.prompt.prompt for row in read("logs/day=2/*/*.gz", "logs/day=1/label=attack")] == ["four", "one"]


def test_labels_are_one_for_each_input_however_many_files_it_is(logs, tmp_path):
    (tmp_path / "other").mkdir()
    for name in "xy":
        (tmp_path / "other" / f"{name}.txt").write_text(f"{name}\n")
    rows = read("other", "logs/**/*.csv", labels=["attack", "benign"])
    assert [(row.prompt.prompt, row.label) for row in rows] == [("x", "attack"), ("y", "attack"), ("five", "benign")]


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        (["logs", "logs/notes.md"], "logs/notes.md is not of a known kind"),
        (["logs/day=2/_temporary/*"], None),
        (["nothing/*.jsonl"], "matches no file"),
        (["logs", "logs/**/a.jsonl"], "an input is named twice: logs/day=1/label=attack/a.jsonl"),
        (["nowhere://bucket/x.jsonl"], "nowhere://bucket/x.jsonl cannot be read: Protocol not known: nowhere"),
        (["memory://bucket/x.jsonl"], "memory://bucket/x.jsonl does not exist"),
    ],
)
def test_what_cannot_be_found_is_said(logs, inputs, says):
    if says is None:
        assert len(find(inputs)) == 1  # named itself, so it is wanted
    else:
        with pytest.raises(InputError) as raised:
            find(inputs)
        assert says in str(raised.value)


def test_keys_that_are_called_otherwise(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "prompt": 7, "verdict": "attack"}\n')
    (tmp_path / "b.csv").write_text("text,verdict\ntwo,benign\n")
    pq.write_table(pa.table({"text": ["three"], "verdict": ["evil"], "label": ["attack"]}), tmp_path / "c.parquet")
    (tmp_path / "verdict=attack").mkdir()
    (tmp_path / "verdict=attack" / "d.jsonl").write_text('{"text": "four"}\n')
    *good, bad, last = read(tmp_path / "*.*", tmp_path / "verdict=attack", prompt="text", label="verdict")
    assert [(row.prompt.prompt, row.label) for row in [*good, last]] == [
        ("one", "attack"),
        ("two", "benign"),
        ("four", "attack"),
    ]
    assert bad.reason == "unknown_label"
    with pytest.raises(InputError, match=r"its columns are text, verdict.*--column prompt=NAME"):
        read(tmp_path / "b.csv")


# ------------------------------------------------------------------------------------------ compressed and damaged


@pytest.mark.parametrize("compress", [gzip.compress, zstd], ids=["gz", "zst"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv"])
def test_compressed_files_are_read_as_they_are_plain(tmp_path, kind, compress):
    prompts = [f"prompt {n} with some words" for n in range(5000)]
    plain = {
        "txt": "\n".join(prompts).encode(),
        "jsonl": jsonl(*prompts),
        "csv": "\n".join(["prompt", *prompts]).encode(),
    }
    suffix = {gzip.compress: "gz", zstd: "zst"}[compress]
    (tmp_path / f"x.{kind}").write_bytes(plain[kind])
    (tmp_path / f"x.{kind}.{suffix}").write_bytes(compress(plain[kind]))
    result, expected = read(tmp_path / f"x.{kind}.{suffix}"), read(tmp_path / f"x.{kind}")
    assert [row.prompt for row in result] == [row.prompt for row in expected]
    assert [row.id for row in result] == [row.id for row in expected]
    assert len(result) == 5000


@pytest.mark.parametrize("compress", [gzip.compress, zstd], ids=["gz", "zst"])
@pytest.mark.parametrize("damage", ["cut off", "overwritten"])
def test_what_is_before_the_damage_is_read_and_the_damage_is_a_reject(tmp_path, compress, damage):
    prompts = [f"{os.urandom(20).hex()} {n}" for n in range(20_000)]
    whole = compress(jsonl(*prompts))
    half = len(whole) // 2
    broken = whole[:half] if damage == "cut off" else whole[:half] + bytes(1000) + whole[half + 1000 :]
    name = f"x.jsonl.{'gz' if compress is gzip.compress else 'zst'}"
    (tmp_path / name).write_bytes(broken)
    (tmp_path / "y.jsonl").write_bytes(jsonl("after"))
    *good, last = read(tmp_path / name, tmp_path / "y.jsonl")
    bad = [row for row in good if isinstance(row, BadRow)]
    before = [row for row in good if isinstance(row, Row)]
    assert last.prompt.prompt == "after"
    # The damage is at about row 10,000; what is in the same block of zstd's (128 KB: 2,200 rows) or read is lost.
    assert len(before) > 6000
    assert [row.prompt.prompt for row in before[:6000]] == prompts[:6000]
    # gzip notices what was overwritten only when it comes to the checksum: until then lines are damaged.
    assert [row.reason for row in bad].count("damaged_file") == 1
    assert len(bad) == 1 or (compress, damage) == (gzip.compress, "overwritten")
    damaged = good[-1]
    assert (damaged.source, damaged.reason) == (str(tmp_path / name), "damaged_file")
    assert f"after row {damaged.row - 1} (" in damaged.detail


def test_a_file_that_is_not_compressed_at_all(tmp_path):
    (tmp_path / "x.txt.gz").write_bytes(b"plain text")
    (bad,) = read(tmp_path / "x.txt.gz")
    assert (bad.reason, bad.row) == ("damaged_file", 1)
    assert "after row 0 (Not a gzipped file" in bad.detail


def test_an_error_of_the_disk_is_no_damage(tmp_path, monkeypatch):
    """Else a network that fails for a minute would cost rows for good."""
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(jsonl(*map(str, range(100_000)))))
    (source,) = find([str(tmp_path / "x.jsonl.gz")])

    class Failing:
        def __init__(self, file):
            self._file, self._left = file, 3

        def read(self, *args):
            self._left -= 1
            if not self._left:
                raise OSError(5, "Input/output error")
            return self._file.read(*args)

        def __getattr__(self, name):
            return getattr(self._file, name)

    monkeypatch.setattr(type(source), "open", lambda self: Failing(io.BytesIO(Path(self.path).read_bytes())))
    with pytest.raises(OSError, match="Input/output error"):
        list(Reader([source]).rows())


def test_a_schema_that_changes_between_files(tmp_path):
    pq.write_table(pa.table({"prompt": ["one"], "label": ["attack"]}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"extra": [1.5], "prompt": ["two"], "id": [7]}), tmp_path / "2.parquet")
    pq.write_table(pa.table({"prompt": [3], "label": [True]}), tmp_path / "3.parquet")
    messages = [[{"role": "user", "content": "four"}]]
    pq.write_table(pa.table({"messages": messages, "label": pa.nulls(1)}), tmp_path / "4.parquet")
    one, two, three, four = read(tmp_path)
    assert [(row.label, row.id) for row in (one, two, four)] == [("attack", "1:1"), (None, "7"), (None, "4:1")]
    assert (three.reason, three.row, three.source) == ("wrong_type", 1, str(tmp_path / "3.parquet"))
    pq.write_table(pa.table({"question": ["five"]}), tmp_path / "5.parquet")
    with pytest.raises(InputError, match=r"5.parquet has no prompts: its columns are question"):
        read(tmp_path)


def test_a_bad_row_group_costs_its_rows_and_names_itself(tmp_path):
    table = pa.table({"prompt": [f"prompt {n} " + "x" * 200 for n in range(30)]})
    path = tmp_path / "x.parquet"
    pq.write_table(table, path, row_group_size=10, use_dictionary=False, compression="zstd")
    data = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    start, size = column.data_page_offset, column.total_compressed_size
    data[start : start + size] = bytes(size)
    path.write_bytes(data)
    rows = read(path)
    assert [row.row for row in rows] == list(range(1, 31))
    assert {row.row for row in rows if isinstance(row, BadRow)} == set(range(11, 21))
    assert "in row group 2" in rows[10].detail


def test_memory_does_not_grow_with_a_parquet_file(tmp_path):
    with pq.ParquetWriter(tmp_path / "x.parquet", pa.schema({"prompt": pa.string()})) as writer:
        for _ in range(20):
            writer.write_table(pa.table({"prompt": [os.urandom(100).hex() for _ in range(2000)]}))
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    most = 0
    try:
        reader = Reader(find([str(tmp_path / "x.parquet")]))
        for n, _ in enumerate(reader.rows()):
            if n % 500 == 0:
                most = max(most, pa.total_allocated_bytes() - before)
        assert n == 39_999
        # A row group is 2,000 rows of 200 characters, 0.4 MB; the file has 8 MB.
        assert most < 3_000_000
        assert tracemalloc.get_traced_memory()[1] < 3_000_000
    finally:
        tracemalloc.stop()


# --------------------------------------------------------------------------------------------------- an object store


@pytest.fixture(scope="module")
def bucket() -> Iterator[Callable[[str, bytes], None]]:
    """Puts objects into the bucket `logs` of moto's S3 server, which listens on localhost, in a process of its own."""
    from pyarrow.fs import S3FileSystem

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
            patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
            deadline = time.monotonic() + 60
            while socket.socket().connect_ex(("127.0.0.1", port)) and time.monotonic() < deadline:
                assert server.poll() is None, "moto's server ended"
                time.sleep(0.1)
            store = S3FileSystem(endpoint_override=f"http://127.0.0.1:{port}", allow_bucket_creation=True)
            store.create_dir("logs")

            def put(name: str, content: bytes) -> None:
                with store.open_output_stream(f"logs/{name}", compression=None) as stream:
                    stream.write(content)

            yield put
    finally:
        server.kill()
        server.wait()


def test_an_object_store_is_read_like_a_folder(bucket, tmp_path):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"prompt": ["six", "seven"]}), sink, row_group_size=1)
    for name, content in {
        "week/label=attack/a.jsonl": jsonl("one", "two"),
        "week/label=benign/b.jsonl.gz": gzip.compress(jsonl("three")),
        "week/label=benign/c.txt.zst": zstd(b"four\n"),
        "week/label=benign/d.csv": b"prompt\nfive\n",
        "week/label=benign/e.parquet": sink.getvalue().to_pybytes(),
        "week/label=benign/_SUCCESS": b"",
        "other.jsonl": jsonl("elsewhere"),
    }.items():
        bucket(name, content)
    rows = read("s3://logs/week")
    assert [(row.prompt.prompt, row.label) for row in rows] == [
        ("one", "attack"),
        ("two", "attack"),
        *((prompt, "benign") for prompt in ("three", "four", "five", "six", "seven")),
    ]
    assert rows[0].source == "s3://logs/week/label=attack/a.jsonl"
    assert rows[-1].id == "e:2"
    assert [row.prompt.prompt for row in read("s3://logs/other.jsonl")] == ["elsewhere"]
    assert [row.prompt.prompt for row in read("s3://logs/week/*/*.jsonl*")] == ["one", "two", "three"]
    (source,) = find(["s3://logs/other.jsonl"])
    assert source.fingerprint()["bytes"] == len(jsonl("elsewhere"))
    with pytest.raises(InputError, match="s3://logs/none does not exist"):
        find(["s3://logs/none"])
    with pytest.raises(InputError, match="s3://no-such-bucket/x does not exist"):
        find(["s3://no-such-bucket/x"])


def test_other_stores_through_fsspec():
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/week/a.jsonl", jsonl("one"))
    memory.pipe("/week/b.txt.gz", gzip.compress(b"two\n"))
    rows = read("memory://week")
    assert [row.prompt.prompt for row in rows] == ["one", "two"]
    assert rows[0].source == "memory:///week/a.jsonl"
