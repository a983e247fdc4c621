"""What is written, read back with pyarrow."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrift.corpus.rows import BadRow, Row, content_of
from headrift.near_duplicates import NUMBERS
from headrift.results import ScoreResult
from headrift.runs import folder as run_folder
from headrift.runs import parts
from headrift.runs.folder import JobError, can_resume, write_json
from headrift.runs.parts import FinishedShard, ShardFiles, part_schema, record, remove_unfinished
from headrift.scorer import Prompt

LAYERS, HEADS, REGIONS = 4, 3, ("system", "user", "prompt")
KINDS = ("shares", "mass", "focus", "text", "entropy")
STRING, FLOATS = pa.string(), pa.list_(pa.float32())
ALWAYS = {
    **dict.fromkeys(("id", "source"), STRING),
    "row": pa.int64(),
    **dict.fromkeys(("label", "category", "source_set", "group", "prompt_hash", "answer_hash"), STRING),
    "minhash": pa.binary(),
    "system_hash": STRING,
    "score": pa.float64(),
    "reason": STRING,
    **dict.fromkeys(("n_steps", "n_scored", "prompt_tokens", "system_tokens", "answer_tokens"), pa.int32()),
    **dict.fromkeys(("system_share", "head_agreement", "focus", "entropy", "top1", "margin"), pa.float64()),
    "flags": pa.list_(STRING),
    "instability": FLOATS,
    "logit_shares": pa.list_(pa.float16()),
}


def make_row(n: int, **changes) -> Row:
    return Row(**{"source": "in.txt", "row": n, "id": f"in:{n}", "label": None, "category": None} | changes)


def make_result(n: int, n_steps: int = 2, **changes) -> ScoreResult:
    random = np.random.default_rng(n)
    t = n_steps + 1
    instability = random.random((t, LAYERS), np.float32)
    instability[0, 0] = np.nan
    fields = {
        "index": n,
        "id": None,
        "score": 0.1 + n / 1000,
        "reason": None,
        "n_steps": n_steps,
        "n_scored": n_steps,
        "prompt_tokens": 20 + n,
        "system_tokens": 5,
        "answer_tokens": t,
        "system_hash": "00ff" * 4,
        "signals": {
            "system_share": 0.3,
            "head_agreement": 0.5,
            "focus": 0.6,
            "entropy": 1.5,
            "top1": 0.7,
            "margin": 0.4,
        },
        "flags": ("merged_system",),
        "answer_ids": [1] * t,
        "text": f"answer {n}",
        "instability": instability,
        "shares": random.random((t, LAYERS, HEADS), np.float32),
        "focus_heads": random.random((LAYERS, HEADS), np.float32),
        "logit_stats": random.random((t, 3), np.float32),
        "mass": random.random((t, LAYERS, HEADS, len(REGIONS)), np.float32),
        "region_names": REGIONS,
        "logit_shares": random.random((2, LAYERS, HEADS), np.float32),
    }
    return ScoreResult(**fields | changes)


def schema_of(*save: str) -> pa.Schema:
    return part_schema(save, layers=LAYERS, heads=HEADS, regions=REGIONS)


def make_record(n: int, n_steps: int = 2, **changes) -> dict:
    return record(make_row(n, prompt=Prompt(prompt=f"p{n}")).columns(), make_result(n, n_steps, **changes))


def written(folder, schema: pa.Schema, *records: dict) -> FinishedShard:
    files = ShardFiles(folder, 0, schema)
    for each in records:
        files.add(each)
    return files.publish()


def files_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------------------------------------------- columns


def test_columns_their_order_and_types_are_the_promised_ones(tmp_path):
    written(tmp_path, schema_of(), make_record(1))
    schema = pq.read_schema(tmp_path / "part-00000.parquet")
    assert dict(zip(schema.names, schema.types, strict=True)) == ALWAYS
    assert schema.names == list(ALWAYS)


def test_saved_columns_follow_in_one_order_whatever_was_said_first(tmp_path):
    schema = schema_of("entropy", "text", "shares", "mass", "focus")
    assert schema.names[len(ALWAYS) :] == ["shares", "mass", "focus_heads", "prompt", "text", "entropy_steps"]
    assert schema.types[len(ALWAYS) :] == [pa.list_(pa.float16()), FLOATS, FLOATS, STRING, STRING, FLOATS]


def test_everything_reads_back_in_its_shape(tmp_path):
    rows = [
        make_row(1, prompt=Prompt(prompt="Ask"), label="attack", category="direct"),
        make_row(2, prompt=Prompt(prompt="b")),
    ]
    results = [make_result(1, 3), make_result(2, 0)]
    written(tmp_path, schema_of(*KINDS), *map(record, [row.columns() for row in rows], results))
    table = pq.read_table(tmp_path / "part-00000.parquet")
    about = json.loads(table.schema.metadata[b"headrift"])
    assert (about["layers"], about["heads"], about["regions"]) == (LAYERS, HEADS, list(REGIONS))
    sizes = {"layers": LAYERS, "heads": HEADS, "regions": len(REGIONS), "blocks": 2}
    for got, row, result in zip(table.to_pylist(), rows, results, strict=True):
        assert (got["id"], got["source"], got["row"], got["label"], got["category"]) == (
            row.id,
            row.source,
            row.row,
            row.label,
            row.category,
        )
        for name in ("score", "reason", "n_steps", "n_scored", "prompt_tokens", "system_share", "focus", "text"):
            assert got[name] == getattr(result, name)
        assert got["flags"] == ["merged_system"]
        assert got["prompt"] == row.prompt.prompt
        assert got["group"] == got["prompt_hash"] == hashlib.sha256(content_of(row.prompt).encode()).hexdigest()[:16]
        sizes["n_steps + 1"] = result.n_steps + 1
        expected = {
            "instability": result.instability,
            "logit_shares": result.logit_shares.astype(np.float16),
            "shares": result.shares.astype(np.float16),
            "mass": result.mass,
            "focus_heads": result.focus_heads,
            "entropy_steps": result.logit_stats[:, 0],
        }
        assert set(expected) == set(about["shapes"])
        for name, array in expected.items():
            shape = [sizes[axis] for axis in about["shapes"][name]]
            np.testing.assert_array_equal(np.array(got[name], array.dtype).reshape(shape), array, err_msg=name)


def test_columns_of_nothing_but_null_keep_their_types(tmp_path):
    changes = dict.fromkeys(("score", "focus_heads", "mass", "logit_stats", "logit_shares"))
    changes |= {"reason": "answer_ended_before_window", "signals": {}}
    written(tmp_path, schema_of(*KINDS), make_record(1, 0, flags=(), **changes))
    table = pq.read_table(tmp_path / "part-00000.parquet")
    assert table.schema.types == schema_of(*KINDS).types
    (got,) = table.to_pylist()
    assert {name for name, value in got.items() if value is None} == {
        *("score", "focus_heads", "mass", "system_share", "head_agreement", "focus", "entropy", "top1", "margin"),
        *("label", "category", "source_set", "answer_hash", "entropy_steps", "logit_shares"),
    }
    assert got["flags"] == []


# -------------------------------------------------------------------------------------------------------------- files


def test_a_shard_is_a_part_and_rejects_with_its_number_and_sizes(tmp_path):
    files = ShardFiles(tmp_path, 7, schema_of("text"))
    for n in range(5):
        files.add(make_record(n))
    files.reject(make_row(4, prompt=Prompt(prompt="x")), "prompt_too_long", "shorten it")
    files.reject(BadRow("in.txt", 5, "in:5", "bad_json", "mend it"), "bad_json", "mend it")
    assert files.rows == 7
    assert files_in(tmp_path) == []  # small rows wait in memory
    sizes = files.publish()
    assert files_in(tmp_path) == ["part-00007.parquet", "rejects-00007.parquet"]
    assert (sizes.number, sizes.scored, sizes.rejected, sizes.rows) == (7, 5, 2, 7)
    assert sizes.part_bytes == (tmp_path / "part-00007.parquet").stat().st_size
    assert sizes.rejects_bytes == (tmp_path / "rejects-00007.parquet").stat().st_size
    assert pq.read_table(tmp_path / "part-00007.parquet")["row"].to_pylist() == list(range(5))
    first, second = pq.read_table(tmp_path / "rejects-00007.parquet").to_pylist()
    assert first == {"source": "in.txt", "row": 4, "id": "in:4", "reason": "prompt_too_long", "detail": "shorten it"}
    assert second["reason"] == "bad_json"


def test_no_rows_no_files(tmp_path):
    assert ShardFiles(tmp_path, 0, schema_of()).publish() == FinishedShard(0, 0, 0, 0, 0)
    assert files_in(tmp_path) == []


def test_an_unfinished_part_is_hidden_and_big_rows_do_not_wait_for_it_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "_ROW_GROUP_BYTES", 2 * make_record(1)["shares"].nbytes)
    files = ShardFiles(tmp_path, 0, schema_of("shares"))
    for n in range(9):
        files.add(make_record(n))
    assert files_in(tmp_path) == [".part-00000.parquet.tmp"]
    files.publish()
    assert files_in(tmp_path) == ["part-00000.parquet"]
    with pq.ParquetFile(tmp_path / "part-00000.parquet") as whole:
        assert whole.num_row_groups > 3
        assert whole.read()["row"].to_pylist() == list(range(9))
        assert whole.metadata.row_group(0).column(0).compression == "ZSTD"


def test_what_is_discarded_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "_ROW_GROUP_BYTES", 1)
    files = ShardFiles(tmp_path, 0, schema_of("shares"))
    files.add(make_record(1))
    assert files_in(tmp_path) == [".part-00000.parquet.tmp"]
    files.discard()
    files.discard()
    assert files_in(tmp_path) == []


def test_files_of_shards_that_are_not_finished_are_removed_and_no_others(tmp_path):
    kept = ["part-00000.parquet", "rejects-00000.parquet", "part-00002.parquet", "part-x.parquet", "notes.txt"]
    gone = ["part-00001.parquet", ".part-00002.parquet.tmp", ".rejects-00003.parquet.tmp"]
    for name in kept + gone:
        (tmp_path / name).write_text("")
    remove_unfinished(tmp_path, {0, 2})
    assert files_in(tmp_path) == sorted(kept)


# ------------------------------------------------------------------------------------------------------------- folder


def test_folder_is_made_with_its_parents_and_may_exist_if_empty(tmp_path):
    for _ in range(2):
        assert can_resume(tmp_path / "a" / "b", "run.json", resume=False) is False
    assert (tmp_path / "a" / "b").is_dir()
    for leftover in (".lock", ".run.json.tmp"):  # of a job that was killed at its very start
        (tmp_path / "a" / "b" / leftover).write_text("")
    assert can_resume(tmp_path / "a" / "b", "run.json", resume=True) is False


def test_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("x")
    for resume in (False, True):
        with pytest.raises(JobError, match="not empty"):
            can_resume(tmp_path, "run.json", resume=resume)
    with pytest.raises(JobError, match="is a file"):
        can_resume(tmp_path / "file", "run.json", resume=False)
    with pytest.raises(JobError, match="cannot be made"):
        can_resume(tmp_path / "file" / "below", "run.json", resume=False)


def test_folder_with_a_run_is_for_resuming_only(tmp_path):
    (tmp_path / "run.json").write_text("")
    assert can_resume(tmp_path, "run.json", resume=True) is True
    with pytest.raises(JobError, match="--resume"):
        can_resume(tmp_path, "run.json", resume=False)


def test_a_json_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"status": "running", "text": "löslich", "name": "\udc80"})  # a file name that is not Unicode
    assert json.loads(path.read_text()) == {"status": "running", "text": "löslich", "name": "\udc80"}
    with pytest.raises(TypeError):
        write_json(path, {"status": object()})
    write_json(path, {"status": "done"})
    assert files_in(tmp_path) == ["run.json"]
    assert json.loads(path.read_text()) == {"status": "done"}


# ----------------------------------------------------------------------------------------- groups and fingerprints


def test_group_overlooks_case_spacing_and_unicode_form():
    group = content_of(Prompt(prompt="Say the word, Stra\u00dfe caf\u00e9"))
    assert group == content_of(Prompt(prompt="  say  the\nWORD, strasse cafe\u0301 ", system="another"))
    assert group != content_of(Prompt(prompt="say the words, strasse cafe\u0301"))
    assert group == "say the word, strasse caf\u00e9"
    hashed = hashlib.sha256(group.encode()).hexdigest()[:16]
    columns = make_row(1, prompt=Prompt(prompt=group)).columns()
    assert columns["group"] == columns["prompt_hash"] == hashed


def test_a_group_of_its_own_is_hashed_and_the_prompt_is_still_known():
    one, other = (make_row(n, prompt=Prompt(prompt="Same"), group=f"session {n}").columns() for n in (1, 2))
    assert one["group"] != other["group"]
    assert one["prompt_hash"] == other["prompt_hash"] not in (one["group"], other["group"])
    assert one["group"] == make_row(3, prompt=Prompt(prompt="Another"), group="session 1").columns()["group"]


def test_logged_answers_are_told_apart_where_they_are_replayed_past_step_0():
    question = {"prompt": "Ask"}
    rows = [make_row(1, prompt=Prompt(**question, response=text)) for text in ("Yes.", "No.", "Yes.")]
    chat = [turn("user", "Ask"), turn("assistant", "Yes.")]
    rows.append(make_row(1, prompt=Prompt(messages=chat)))
    rows.append(make_row(1, prompt=Prompt(**question, response_ids=[1, 2])))
    replayed = [row.columns(answer=True) for row in rows]
    assert replayed[0]["answer_hash"] == replayed[2]["answer_hash"]
    assert len({one["answer_hash"] for one in replayed}) == 4
    assert {one["prompt_hash"] for one in replayed} == {one["group"] for one in replayed} == {replayed[0]["group"]}
    for answer in (False, None):  # step 0 alone is the same for every answer; without replay the model answers
        assert {row.columns(answer=answer)["answer_hash"] for row in rows} == {None}


def test_a_redacted_part_keeps_no_sketch_of_a_prompt():
    row = make_row(1, prompt=Prompt(prompt="Ask"))
    assert row.columns(redact=True)["minhash"] is None
    assert len(row.columns()["minhash"]) == 2 * NUMBERS


def turn(role: str, content: str | list | None, **others) -> dict:
    return {"role": role, "content": content, **others}


def call(arguments: object, number: str = "1", name: str = "look") -> dict:
    return turn("assistant", None, tool_calls=[{"id": number, "function": {"name": name, "arguments": arguments}}])


def test_content_of_messages_is_of_all_turns_but_the_system_prompt():
    parts_ = [{"type": "text", "text": "Two"}, {"type": "text", "text": "three"}]
    chat = [turn("user", "One"), turn("assistant", "Yes?"), turn("user", parts_)]
    group = content_of(Prompt(messages=chat))
    assert group == content_of(Prompt(messages=[turn("system", "S"), turn("developer", "D"), *chat]))
    assert group == content_of(Prompt(messages=[*chat[:2], turn("user", " two\nTHREE ")]))
    others = [
        [*chat[:1], chat[2]],
        [*chat[:1], turn("assistant", "No?"), chat[2]],
        [turn("assistant", "One"), *chat[1:]],
        [*chat[:2], turn("system", "S"), chat[2]],  # no part of the system prompt
        [*chat, turn("assistant", "And")],
    ]
    assert len({group, *(content_of(Prompt(messages=other)) for other in others)}) == 6
    assert content_of(Prompt(messages=[turn("user", "One")])) == content_of(Prompt(prompt="one"))


def test_group_is_of_what_tools_were_asked_and_gave_back():
    user = turn("user", "One")
    chat = [user, call({"b": 1, "a": 2}), turn("tool", "It rains.", tool_call_id="1")]
    group = content_of(Prompt(messages=chat))
    assert group == content_of(Prompt(messages=[user, call('{"a": 2,  "b": 1}', "7"), turn("tool", "it rains.")]))
    for other in (
        [user, chat[1], turn("tool", "It snows.")],
        [user, call({"b": 1, "a": 3}), chat[2]],
        [user, call({"b": 1, "a": 2}, name="find"), chat[2]],
        [user, chat[2]],
    ):
        assert content_of(Prompt(messages=other)) != group
    assert content_of(Prompt(messages=[user, call("no JSON"), chat[2]])) != group


def test_a_logged_answer_is_no_part_of_the_group_where_it_is_replayed():
    chat, answer = [turn("user", "One")], turn("assistant", "Two")
    group = content_of(Prompt(messages=chat))
    assert content_of(Prompt(messages=[*chat, answer])) != group
    assert content_of(Prompt(messages=[*chat, answer]), replay=True) == group
    assert content_of(Prompt(messages=chat, response="Two"), replay=True) == group
    assert content_of(Prompt(messages=[*chat, answer], response=" and three"), replay=True) != group


def test_group_of_token_ids_is_of_those_outside_the_system_region():
    prompt = Prompt(token_ids=[1, 2, 3, 4], regions={"system": (1, 2)})
    assert content_of(prompt) == content_of(Prompt(token_ids=[1, 7, 7, 3, 4], regions={"system": (1, 3)}))
    assert content_of(prompt) != content_of(Prompt(token_ids=[1, 2, 3, 5], regions={"system": (1, 2)}))


def test_no_two_prompts_of_the_projects_own_sets_are_one_group():
    seen = 0
    for path in sorted((Path(__file__).resolve().parents[2] / "datasets").glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        prompts = [Prompt.from_any(row) for row in rows if "prompt" in row]  # not the questions of consistency
        seen += len(prompts)
        assert len(set(map(content_of, prompts))) == len(prompts)
    assert seen > 800


def test_fingerprints_change_with_what_they_stand_for(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    first = run_folder.model_fingerprint(tmp_path)
    assert first["weights_bytes"] == {"model.safetensors": 4}
    assert first == run_folder.model_fingerprint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    assert run_folder.model_fingerprint(tmp_path)["fingerprint"] != first["fingerprint"]
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    (tmp_path / "config.json").write_text("{} ")
    assert run_folder.model_fingerprint(tmp_path)["fingerprint"] != first["fingerprint"]
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1235")  # as long as before
    assert run_folder.model_fingerprint(tmp_path)["fingerprint"] != first["fingerprint"]
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    assert run_folder.model_fingerprint(tmp_path) == first
    (tmp_path / "chat_template.jinja").write_text("x")
    assert run_folder.model_fingerprint(tmp_path)["fingerprint"] != first["fingerprint"]
    (tmp_path / "config.json").write_text("{} ")
    assert run_folder.file_fingerprint(tmp_path / "config.json") == {
        "bytes": 3,
        "sha256": hashlib.sha256(b"{} ").hexdigest(),
    }


def test_large_files_are_hashed_in_places_their_ends_among_them(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "_HASHED_WHOLE", 1000)
    monkeypatch.setattr(run_folder, "_BLOCK_BYTES", 10)
    data = bytearray(5000)
    path = tmp_path / "large"
    path.write_bytes(data)
    first = run_folder.file_fingerprint(path)
    assert (first["bytes"], first["sampled"]) == (5000, True)
    for place in (0, 9, 4990, 4999):
        path.write_bytes(data[:place] + b"x" + data[place + 1 :])
        assert run_folder.file_fingerprint(path) != first
    path.write_bytes(data + b"\0")
    assert run_folder.file_fingerprint(path) != first


def test_versions_and_processor_are_known_here():
    result = run_folder.versions()
    assert set(result) == {"headrift", "python", "vllm", "torch", "transformers", "numba"}
    assert None not in result.values()
    assert run_folder.processor()[0]
