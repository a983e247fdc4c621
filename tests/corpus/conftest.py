"""What jobs with an engine of straw need: a folder that passes for a model, and processes that know the engine."""

import os
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
