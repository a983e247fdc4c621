"""Shared by all tests: where the demonstration model and the original's data are."""

import os
from pathlib import Path

import pytest

# As headrift sets it itself, but before any test imports torch (see engine_setup).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def demo_model() -> Path:
    folder = ROOT / "models" / "smollm2-135m-instruct"
    if not (folder / "model.safetensors").exists():
        pytest.fail(f"the demonstration model is not in {folder}: run `make setup`, or `headrift demo-model {folder}`")
    return folder


@pytest.fixture(scope="session")
def seed_data() -> Path:
    """The original's prompts, which are not part of this repository: tests that need them are skipped without."""
    folder = ROOT.parent / "shared" / "seed_data"
    if not folder.exists():
        pytest.skip("the original's prompts are not beside this repository")
    return folder
