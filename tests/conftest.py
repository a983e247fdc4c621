"""Shared by all tests: where the demonstration model and the original's data are."""

import os
import shutil
from pathlib import Path

import pytest

# As headrift sets it itself, but before any test imports torch (see engine_setup).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Which tests one process runs when several run at once (`make test`; pytest-xdist's loadgroup).

    Those that start engines in their own process take turns in one; interpreted engines have a process each anyway; of
    the others those of a file stay together, for their fixtures' sake.
    """
    for item in items:
        path = item.path.relative_to(ROOT / "tests")
        group = str(path)
        if path.name == "test_interpreted.py":
            group = item.nodeid
        elif path.parts[0] == "engine" or path.name == "test_throughput.py":
            group = "engine"
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def demo_model() -> Path:
    folder = ROOT / "models" / "smollm2-135m-instruct"
    if not (folder / "model.safetensors").exists():
        pytest.fail(f"the demonstration model is not in {folder}: run `make setup`, or `headrift demo-model {folder}`")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, demo_model) -> Path:
    """Two random layers with the demonstration model's tokenizer and chat template."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("tiny")
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=128, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        if (demo_model / name).exists():
            shutil.copy(demo_model / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def seed_data() -> Path:
    """The original's prompts, which are not part of this repository: tests that need them are skipped without."""
    folder = ROOT.parent / "shared" / "seed_data"
    if not folder.exists():
        pytest.skip("the original's prompts are not beside this repository")
    return folder
