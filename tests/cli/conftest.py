"""The commands on a fake engine, in this process: all but the engine is real."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from headrift.testing import fake_engines, write_fake_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that passes for a model; in it also system.txt, a system prompt."""
    folder = write_fake_model(tmp_path_factory.mktemp("fake") / "model")
    (folder / "system.txt").write_text("Be brief.")
    return folder


@pytest.fixture
def fake_model(model_folder: Path) -> Iterator[Path]:
    """A folder that passes for a model, for commands that run on a fake engine."""
    with fake_engines():
        yield model_folder
