"""What jobs with an engine of straw need: a folder that passes for a model, and processes that know the engine."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

TORTURE = Path(__file__).resolve().parent / "torture"


@pytest.fixture(scope="session")
def straw_model(tmp_path_factory) -> Path:
    """A folder that passes for a model, which nothing loads."""
    folder = tmp_path_factory.mktemp("model")
    for name, content in {"config.json": "{}", "tokenizer.json": "{}", "chat_template.jinja": "x"}.items():
        (folder / name).write_text(content)
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture(scope="module")
def straw() -> Iterator[ModuleType]:
    """The module `straw`, importable in this process and in those it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TORTURE))
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(TORTURE), os.environ.get("PYTHONPATH")])))
        import straw

        yield straw
        sys.modules.pop("straw", None)


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
