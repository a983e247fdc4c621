"""`headrift score`: what it refuses before a model is loaded, what it does when a run breaks off, and one real run."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from headrift import Calibration, signal
from headrift.calibration.calibrate import calibrate
from headrift.calibration.thresholds import CalibrateConfig
from headrift.cli import app
from headrift.errors import EngineError, RefusedError
from headrift.requests import ProbeRequest
from headrift.runs.folder import model_fingerprint
from headrift.runs.reading import ModelIdentity
from headrift.testing import FakeEngine, fake_engines, text_of, write_fake_model
from helpers.fakes import FailAt, must_not_start, raises

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "smollm2-135m-instruct"
LAYERS, HEADS = 3, 2


# --------------------------------------------------------------------------------- settings, without loading a model


@pytest.fixture
def work(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder with an input, a system prompt and something that passes for a model, which nothing may load."""
    (tmp_path / "in.jsonl").write_text(
        '{"prompt": "one"}\n{"messages": [{"role": "robot", "content": "two"}]}\n{"prompt": 3}\n{"prompt": "four"}\n'
    )
    (tmp_path / "more.txt").write_text("five\n")
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    (tmp_path / "system.txt").write_text("Be brief.\n")
    (tmp_path / "table.tsv").write_text("x")
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    write_fake_model(tmp_path / "model")
    (tmp_path / "table.csv").write_text("text;label\nx;attack\n")
    (tmp_path / "broken.parquet").write_text("PAR1 and nothing more PAR1")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "run.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with fake_engines(must_not_start):
        yield tmp_path


def score(*args: str):
    defaults = {"--model": "model", "--out": "out"}
    added = [text for option, value in defaults.items() if option not in args for text in (option, value)]
    return CliRunner().invoke(app, ["score", *args, *added])


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["in.jsonl", "--steps", "-1"], "steps must be at least 0"),
        (["in.jsonl", "--window", "1-3"], "a window is two step numbers, as in 1:12, got '1-3'"),
        (["in.jsonl", "--window", "3:1"], "needs 1 <= a <= b"),
        (["in.jsonl", "--window", "1:13"], "window 1:13 reaches past step 12"),
        (["in.jsonl", "--drop-shallow", "1"], "drop_shallow must be at least 0 and below 1"),
        (["in.jsonl", "--replay", "--logit-stats"], "leave out --logit-stats and --save entropy"),
        (["in.jsonl", "--replay", "--save", "entropy"], "leave out --logit-stats and --save entropy"),
        (["in.jsonl", "--quiet", "--verbose"], "--quiet and --verbose contradict each other"),
        (["missing.jsonl"], "missing.jsonl does not exist"),
        (["in.jsonl", "missing.txt"], "missing.txt does not exist"),
        (["no-*.txt"], "no-*.txt matches no file: check the pattern"),
        (["full"], "full contains no input"),
        (["in.jsonl", "--column", "prompt"], "--column prompt is not KEY=NAME, as in prompt=text"),
        (
            ["in.jsonl", "--column", "text=prompt"],
            "a row has no key 'text': --column KEY=NAME takes id, group, prompt, system",
        ),
        (["in.jsonl", "--shard", "3/2"], "--shard is i/n with 1 <= i <= n"),
        (["in.jsonl", "--shard", "7/8"], "4 rows, and none of them for this --shard, in in.jsonl"),
        (["in.jsonl", "--resume", "--out", "full"], "--out full is not empty"),
        (["table.tsv"], "table.tsv is not of a known kind"),
        (["table.csv"], "table.csv has no prompts: its columns are text;label"),
        (["broken.parquet"], "broken.parquet is not a readable Parquet file"),
        (["empty.txt"], "no rows in empty.txt"),
        (["in.jsonl", "--redact", "--save", "text"], "--redact keeps prompts and answers out"),
        (["in.jsonl", *(f"--region=r{n}" for n in range(5))], "at most 8 can be recorded"),
        (["in.jsonl", "--labels", "attack,benign"], "2 labels for 1 input"),
        (["in.jsonl", "more.txt", "--labels", "attack, evil"], "unknown label 'evil'"),
        (["in.jsonl", "--system-prompt-file", "no.txt"], "--system-prompt-file no.txt cannot be read: No such file"),
        (["in.jsonl", "--system-prompt-file", "latin1.txt"], "latin1.txt is not UTF-8 text"),
        (["in.jsonl", "--model", "no-model"], "--model no-model is not a folder: give a model's folder"),
        (["in.jsonl", "--model", "full"], "--model full does not contain a model (no config.json)"),
        (["in.jsonl", "--out", "full"], "--out full is not empty"),
        (["in.jsonl", "--out", "in.jsonl"], "--out in.jsonl is a file"),
    ],
)
def test_bad_settings_are_one_clear_line_before_the_model_loads(work, args, says):
    done = score(*args)
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("Error: ")
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert not (work / "out").exists()


def test_a_model_folder_with_several_things_missing_names_them_all(work):
    (work / "model" / "model.safetensors").unlink()
    (work / "model" / "chat_template.jinja").unlink()
    done = score("in.jsonl")
    assert done.exit_code == 2
    assert done.stderr.splitlines()[0] == "Error: --model model cannot be used:"
    assert [line[:18] for line in done.stderr.splitlines()[1:]] == ["  - it has no weig", "  - it has no chat"]


def test_steps_beyond_the_context(work):
    (work / "model" / "config.json").write_text('{"max_position_embeddings": 64}')
    done = score("in.jsonl", "--steps", "63")
    assert done.exit_code == 2
    assert "--steps 63 exceeds the model's context of 64 tokens" in done.stderr
    assert not (work / "out").exists()


def test_steps_beyond_the_context_that_the_engine_has(work):
    with engines(max_model_len=64) as seen:
        done = score("in.jsonl", "--steps", "63")
    assert (done.exit_code, seen.closed) == (2, True)
    assert "--steps 63 exceeds the model's context of 64 tokens" in done.stderr


def test_too_little_room_on_the_disk(work, monkeypatch):
    (work / "model" / "config.json").write_text('{"num_hidden_layers": 30, "num_attention_heads": 9}')
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    done = score("in.jsonl", "--steps", "999", "--save", "mass")
    assert done.exit_code == 2
    assert "--out out: the results may take 22 MB and 1 MB are free: make room, choose another disk" in done.stderr


def test_a_disk_that_fills_up_on_the_way(work, monkeypatch):
    def full(self, *args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_batch", full)
    with engines() as seen:
        done = score("in.jsonl")
    assert (done.exit_code, seen.closed) == (1, True)
    assert "no space left on the disk" in done.stderr
    assert "0 of 4 rows are in out; rerun with --resume" in done.stderr
    assert sorted(path.name for path in (work / "out").iterdir()) == ["journal.sqlite", "run.json"]
    assert json.loads((work / "out" / "run.json").read_text())["status"] == "unfinished"


def test_empty_system_prompt_file(work):
    (work / "system.txt").write_text(" \n")
    done = score("in.jsonl", "--system-prompt-file", "system.txt")
    assert (done.exit_code, "system.txt is empty" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "Missing argument 'INPUT"),
        (["in.jsonl", "--save", "everything"], "--save"),
        (["in.jsonl", "--dtype", "int4"], "--dtype"),
        (["in.jsonl", "--limit", "0"], "--limit"),
        (["in.jsonl", "--steps", "many"], "--steps"),
    ],
)
def test_what_cannot_be_parsed_is_a_usage_error(work, args, says):
    done = score(*args)
    assert done.exit_code == 2
    assert says in done.stderr
    assert not (work / "out").exists()


def test_help_fits_80_columns_and_names_every_option():
    done = subprocess.run(
        [Path(sys.executable).parent / "headrift", "score", "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "80"},
        timeout=60,
    )
    assert done.returncode == 0
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "Exit codes:\n" in done.stdout
    options = "model out labels system-prompt-file steps window replay drop-shallow drop-deep save logit-stats region "
    options += "redact limit dtype resume column sample seed shard compile"
    for option in [*options.split(), "quiet", "verbose"]:
        assert f"--{option} " in done.stdout, option


def test_defaults_are_the_signals(work):
    with engines() as seen:
        score("in.jsonl", "--quiet")
    settings = json.loads((work / "out" / "run.json").read_text())["settings"]
    assert (settings["drop_shallow"], settings["drop_deep"]) == (signal.DROP_SHALLOW, signal.DROP_DEEP)
    assert (settings["steps"], settings["window"], settings["system_prompt"]) == (12, "1:12", None)
    assert seen.options["regions"] == ("system", "user", "prompt")
    assert (seen.options["steps"], seen.options["logit_stats"], seen.options["engine_args"]) == (12, False, {})


# -------------------------------------------------------------------- what becomes of the rows, with a fake engine


@contextmanager
def engines(**options: object) -> Iterator[SimpleNamespace]:
    """Fake engines; what they are started with and are given, and whether they were closed."""
    seen = SimpleNamespace(options={}, requests=[], closed=False)

    class Seen(FakeEngine):
        def __init__(self, model: object, **given: object) -> None:
            seen.options = given
            super().__init__(model, **given)

        def submit(self, request: ProbeRequest) -> int:
            seen.requests += [request] if request.probed else []
            return super().submit(request)

        def close(self) -> None:
            seen.closed = True

    with fake_engines(Seen, layers=LAYERS, heads=HEADS, short_every=0, **options):
        yield seen


def read(folder: Path, stem: str) -> list[dict]:
    return [row for path in sorted(folder.glob(f"{stem}-*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_each_row_ends_in_its_place(work):
    with engines() as seen:
        done = score("in.jsonl", "more.txt", "--labels", "attack,benign", "--system-prompt-file", "system.txt")
    assert done.exit_code == 0, done.output
    assert [(row["id"], row["label"]) for row in read(work / "out", "part")] == [
        ("in:1", "attack"),
        ("in:4", "attack"),
        ("more:1", "benign"),
    ]
    rejects = read(work / "out", "rejects")
    assert [(row["row"], row["reason"]) for row in rejects] == [(2, "bad_messages"), (3, "wrong_type")]
    assert rejects[1]["detail"] == "`prompt` is a number; it must be a text in quotes"
    run = json.loads((work / "out" / "run.json").read_text())
    assert run["status"] == "done"
    assert run["counts"] == {
        "rows": 5,
        "scored": 3,
        "no_score": {},
        "rejected": {"bad_messages": 1, "wrong_type": 1},
    }
    assert [request.answer_ids for request in seen.requests] == [None] * 3
    assert all("system\nBe brief." in text_of(request.prompt_ids) for request in seen.requests)
    assert seen.closed
    assert " s: 3 layers x 2 heads, float32, recorder 1 MB" in done.stderr
    assert done.stdout.startswith("rows")


def test_options_reach_the_engine(work):
    options = ["--steps", "5", "--window", "2:4", "--save", "mass", "--save", "entropy", "--dtype", "bfloat16"]
    with engines() as seen:
        done = score("in.jsonl", *options, "--limit", "1", "--verbose", "--system-prompt-file", "system.txt")
    assert done.exit_code == 0, done.output
    expected = {"steps": 5, "logit_stats": True, "verbose": True, "engine_args": {"dtype": "bfloat16"}}
    assert expected.items() <= seen.options.items()
    assert seen.options["regions"] == ("system", "user", "prompt", "tool", "bos")
    (row,) = read(work / "out", "part")
    assert (row["id"], row["n_scored"], len(row["mass"])) == ("in:1", 3, 6 * LAYERS * HEADS * 5)
    assert len(row["entropy_steps"]) == 6


def test_replay_and_quiet(work):
    (work / "logged.jsonl").write_text('{"prompt": "one", "response": "yes"}')
    with engines() as seen:
        done = score("logged.jsonl", "--replay", "--quiet", "--system-prompt-file", "system.txt")
    assert (done.exit_code, done.output) == (0, "")
    assert [text_of(request.answer_ids) for request in seen.requests] == ["yes"]


def test_a_model_is_compiled_where_that_is_asked_for(work):
    with engines() as seen:
        done = score("in.jsonl", "--compile")
    assert done.exit_code == 0, done.output
    assert seen.options["engine_args"] == {"enforce_eager": False}
    assert "a minute more the first time" in done.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="of vLLM's build for CPUs")
def test_nothing_to_compile_with(work, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with engines():
        done = score("in.jsonl", "--compile")
    assert done.exit_code == 2
    assert "--compile needs the C++ compiler no-such-compiler" in done.stderr
    assert "leave --compile out" in done.stderr


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (EngineError("vLLM cannot load it"), "vLLM cannot start with --model model: vLLM cannot load it (check"),
        (RefusedError(["one", "two"]), "headrift cannot measure this engine:\n  - one\n  - two\n"),
        (KeyError("lm_head"), "vLLM cannot start with --model model: KeyError: 'lm_head' (check the model's files"),
    ],
)
def test_an_engine_that_does_not_start(work, error, says):
    with fake_engines(lambda *args, **options: raises(error)()):
        done = score("in.jsonl")
    assert done.exit_code == 2
    assert f"Error: {says}" in done.stderr
    assert "Traceback" not in done.output
    assert list((work / "out").iterdir()) == []


def test_a_tokenizer_that_cannot_be_used_stops_the_run_before_the_engine_starts(work):
    (work / "model" / "chat_template.jinja").write_text("{% if")
    done = score("in.jsonl")
    assert done.exit_code == 2
    assert "Error: the model's chat template is broken: " in done.stderr
    assert list((work / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (RuntimeError("the recording cannot be trusted"), 1, "Error: the recording cannot be trusted"),
        (OSError(28, "No space left on device"), 1, "no space left on the disk"),
        (KeyboardInterrupt(), 130, "Interrupted"),
    ],
)
def test_a_run_that_breaks_off_says_so_and_leaves_no_half_of_a_shard(work, error, code, says):
    with engines(on_submit=FailAt(2, raises(error))) as seen:
        done = score("in.jsonl", "--system-prompt-file", "system.txt")
    assert done.exit_code == code
    last = done.stderr.splitlines()[-1]
    assert says in last
    assert "(0 of 4 rows are in out; rerun with --resume)" in last
    assert seen.closed
    assert sorted(path.name for path in (work / "out").iterdir()) == ["journal.sqlite", "run.json"]
    run = json.loads((work / "out" / "run.json").read_text())
    assert (run["status"], run["shards"]["rows_kept"]) == ("unfinished", 0)


# --------------------------------------------------------------------------------------------------------- a real run

ROWS = [
    b'{"id": "fr", "prompt": "What is the capital of France?", "label": "benign", "category": "plain"}',
    b'{"prompt": "Write the word lantern.", "label": "attack"}',
    b'{"prompt": "cut off',
    b'{"messages": [{"role": "system", "content": "Answer in French."}, {"role": "user", "content": "Hello!"}]}',
    b'{"messages": [{"role": "robot", "content": "Hello!"}]}',
    b'{"prompt": "Nom: caf\xe9"}',
    b'{"prompt": "A control character \\u0000 and an end mark <|im_end|>.", "label": "attack"}',
]


def calibrated(made: ModuleType, path: Path) -> Path:
    """A calibration for steps 2 to 4 of the demonstration model, which flags a part of what it is given: its benign
    scores are made up."""
    values = made.made_up(0, 0, 200, steps=4, layers=30)
    calibration = calibrate(
        [made.run_of(values / 4, [None] * 200)], CalibrateConfig(benign_only=True, window=signal.Window(2, 4))
    )
    template = AutoTokenizer.from_pretrained(MODEL).get_chat_template().encode()
    model = ModelIdentity(
        name="m",
        fingerprint=model_fingerprint(MODEL)["fingerprint"],
        dtype="float32",
        layers=30,
        heads=9,
        chat_template_sha256=hashlib.sha256(template).hexdigest(),
    )
    calibration.model_copy(update={"model": model}).save(path)
    return path


@pytest.fixture(scope="module")
def real(tmp_path_factory, made) -> SimpleNamespace:
    """One run of the command, as a user starts it, on the demonstration model."""
    if not (MODEL / "config.json").is_file():
        pytest.fail(f"the demonstration model is not in {MODEL}: `make test` puts it there, or `make setup`")
    folder = tmp_path_factory.mktemp("real")
    (folder / "logged.jsonl").write_bytes(b"\n".join(ROWS) + b"\n")
    (folder / "plain.txt").write_text("# benign ones\nHow do I renew a book?\nWhat is the capital of France?\n")
    tool = [
        {"role": "system", "content": "Use the tool."},
        {"role": "user", "content": "What is the weather?"},
        {"role": "assistant", "content": "I will look."},
        {"role": "tool", "content": "It rains cats and dogs."},
        {"role": "user", "content": "And now?"},
    ]
    table = {
        "id": ["ids", "tool"],
        "token_ids": [list(range(100, 140)), None],
        "regions": ['{"system": [0, 10], "page": [20, 30]}', None],
        "messages": [None, json.dumps(tool)],
    }
    pq.write_table(pa.table(table), folder / "table.parquet")
    command = [Path(sys.executable).parent / "headrift", "score", "logged.jsonl", "plain.txt", "table.parquet"]
    command += ["--labels", "attack,benign,benign", "--save", "mass", "--region", "page"]
    command += ["--model", MODEL, "--system-prompt-file", ROOT / "system_prompts" / "banned_word.txt", "--out", "out"]
    command += ["--save", "text", "--save", "shares", "--logit-stats"]
    command += ["--steps", "4", "--window", "2:4", "--calibration", calibrated(made, folder / "c.json")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1", "COLUMNS": "80"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    parts = pq.read_table(folder / "out" / "part-00000.parquet")
    return SimpleNamespace(
        folder=folder,
        stdout=done.stdout,
        stderr=done.stderr,
        table=parts,
        rows={row["id"]: row for row in parts.to_pylist()},
    )


def test_real_every_row_is_in_exactly_one_place_in_order(real):
    parts, rejects = real.table.to_pylist(), read(real.folder / "out", "rejects")
    assert [(row["source"], row["row"]) for row in parts] == [
        *(("logged.jsonl", n) for n in (1, 2, 4, 7)),
        *(("plain.txt", n) for n in (2, 3)),
        *(("table.parquet", n) for n in (1, 2)),
    ]
    assert [(row["source"], row["row"], row["reason"]) for row in rejects] == [
        ("logged.jsonl", 3, "bad_json"),
        ("logged.jsonl", 5, "bad_messages"),
        ("logged.jsonl", 6, "invalid_utf8"),
    ]
    assert "robot" in rejects[1]["detail"]
    names = ["flagged-fdr.parquet", "journal.sqlite", "part-00000.parquet", "rejects-00000.parquet", "run.json"]
    names += ["scores.png"]
    assert sorted(path.name for path in (real.folder / "out").iterdir()) == names


def test_real_columns(real):
    string, number, count = pa.string(), pa.float64(), pa.int32()
    assert [(field.name, field.type) for field in real.table.schema] == [
        *((name, string) for name in ("id", "source")),
        ("row", pa.int64()),
        *((name, string) for name in ("label", "category", "source_set", "group", "prompt_hash", "answer_hash")),
        ("minhash", pa.binary()),
        ("system_hash", string),
        ("score", number),
        ("reason", string),
        *((name, count) for name in ("n_steps", "n_scored", "prompt_tokens", "system_tokens", "answer_tokens")),
        *((name, number) for name in ("system_share", "head_agreement", "focus", "entropy", "top1", "margin")),
        ("flags", pa.list_(string)),
        ("instability", pa.list_(pa.float32())),
        ("logit_shares", pa.list_(pa.float16())),
        ("shares", pa.list_(pa.float16())),
        ("mass", pa.list_(pa.float32())),
        ("prompt", string),
        ("text", string),
        ("detector", number),
        ("flagged", pa.bool_()),
        ("p_value", number),
    ]


def test_real_verdicts_are_the_calibrations(real):
    calibration = Calibration.load(real.folder / "c.json")
    verdicts = calibration.apply(real.table["detector"].to_numpy())
    assert real.table["flagged"].to_pylist() == verdicts.flagged.tolist()
    assert real.table["p_value"].to_pylist() == verdicts.p_value.tolist()
    assert 0 < verdicts.flagged.sum() < len(real.rows)
    run = json.loads((real.folder / "out" / "run.json").read_text())
    assert run["calibration"]["differs"] == []
    assert run["settings"]["calibration"] == run["calibration"]["sha256"] == calibration.sha256
    assert f"value >= {calibration.threshold:.6f}" in real.stdout


def test_real_labels_ids_and_hashes(real):
    assert {name: row["label"] for name, row in real.rows.items()} == {
        "fr": "benign",
        "logged:2": "attack",
        "logged:4": "attack",
        "logged:7": "attack",
        "plain:2": "benign",
        "plain:3": "benign",
        "ids": "benign",
        "tool": "benign",
    }
    assert [name for name, row in real.rows.items() if row["category"]] == ["fr"]
    assert real.rows["fr"]["group"] == real.rows["plain:3"]["group"]
    assert len({row["group"] for row in real.rows.values()}) == 7
    assert len({row["system_hash"] for row in real.rows.values()}) == 4
    assert real.rows["logged:4"]["system_hash"] != real.rows["fr"]["system_hash"]
    assert real.rows["logged:7"]["flags"] == ["control_tokens", "truncated"]


def test_real_numbers_agree_with_each_other(real):
    about = json.loads(real.table.schema.metadata[b"headrift"])
    layers, heads = about["layers"], about["heads"]
    assert (layers, heads) == (30, 9)
    for row in real.rows.values():
        steps = row["n_steps"] + 1
        shares = np.array(row["shares"], np.float64).reshape(steps, layers, heads)
        instability = np.array(row["instability"]).reshape(steps, layers)
        assert ((shares >= 0) & (shares <= 1)).all()
        np.testing.assert_allclose(shares.std(axis=2), instability, atol=5e-4)
        again = signal.score(instability, signal.Window(2, 4), n_steps=row["n_steps"])
        assert row["score"] == pytest.approx(again.value, abs=1e-6)
        assert row["n_scored"] == again.n_scored
        assert row["reason"] is None
        assert 0 < row["system_tokens"] < row["prompt_tokens"]
        assert row["n_steps"] == min(4, row["answer_tokens"] - 1)
        assert 0 <= row["system_share"] <= 1
        assert (row["focus"] is None) == (row["id"] == "ids")  # which has no user region
        assert row["focus"] is None or 0 <= row["focus"] <= 1
        assert -1 <= row["head_agreement"] <= 1
        assert row["entropy"] > 0
        assert 0 <= row["margin"] <= row["top1"] <= 1
    same, first = real.rows["plain:3"], real.rows["fr"]
    assert same["score"] == pytest.approx(first["score"], abs=1e-5)
    assert first["text"] == same["text"] == "The capital of France is"


def test_real_masses_of_named_regions(real):
    about = json.loads(real.table.schema.metadata[b"headrift"])
    assert about["regions"] == ["system", "user", "prompt", "tool", "bos", "page"]
    has = {"ids": {"system", "prompt", "bos", "page"}, "tool": {"system", "user", "prompt", "tool", "bos"}}
    for name, row in real.rows.items():
        mass = np.array(row["mass"]).reshape(row["n_steps"] + 1, about["layers"], about["heads"], 6)
        by_region = dict(zip(about["regions"], np.moveaxis(mass, -1, 0), strict=True))
        measured = {region for region, values in by_region.items() if not np.isnan(values).any()}
        assert measured == has.get(name, {"system", "user", "prompt", "bos"})
        assert all(np.isnan(by_region[region]).all() for region in set(by_region) - measured)
        np.testing.assert_allclose(by_region["prompt"][0], 1, atol=1e-4)
        assert all((by_region[region] > 0).any() for region in measured)
        assert (by_region["bos"] <= by_region["prompt"] + 1e-4).all()
        if name == "ids":  # whose system region begins with it
            assert (by_region["bos"] <= by_region["system"] + 1e-4).all()


def test_real_run_json(real):
    run = json.loads((real.folder / "out" / "run.json").read_text())
    assert run["status"] == "done"
    assert run["started"] <= run["finished"]
    assert (
        run["settings"].items()
        >= {"steps": 4, "window": "2:4", "save": ["mass", "shares", "text"], "regions": ["page"]}.items()
    )
    assert run["settings"]["logit_stats"] is True
    assert run["versions"]["vllm"].startswith("0.32.")
    assert run["engine"]["dtype"] == "float32"
    assert run["model"]["path"] == str(MODEL)
    assert run["model"]["weights_bytes"] == {"model.safetensors": (MODEL / "model.safetensors").stat().st_size}
    assert len(run["chat_template_sha256"]) == 64
    assert run["host"]["cpu"]
    assert [given["name"] for given in run["inputs"]] == ["logged.jsonl", "plain.txt", "table.parquet"]
    assert run["inputs"][0]["bytes"] == (real.folder / "logged.jsonl").stat().st_size
    assert run["seconds"]["start"] > 0
    assert run["counts"] == {
        "rows": 11,
        "scored": 8,
        "no_score": {},
        "rejected": {"bad_json": 1, "bad_messages": 1, "invalid_utf8": 1},
    }


def test_real_terminal_is_clean(real):
    starting, ready, *rest = real.stderr.splitlines()
    assert starting == f"Starting vLLM with {MODEL} (about 20 s)"
    assert ready.startswith("Ready in ")
    assert ready.endswith("30 layers x 9 heads, float32, recorder 8 MB")
    assert [line.split()[0] for line in rest if line.strip()] == ["scoring"]
    assert "11/11" in rest[-1]
    assert max(map(len, real.stdout.splitlines())) <= 80
    assert "rejected" in real.stdout
    assert "score (no score: lowest)" in real.stdout
