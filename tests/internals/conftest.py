"""Tiny random models of three architectures, as the tests of consistency have them."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

_spec = spec_from_file_location("tiny_models_of_engine", Path(__file__).parents[1] / "engine" / "conftest.py")
assert _spec is not None
assert _spec.loader is not None
_tiny_models = module_from_spec(_spec)
_spec.loader.exec_module(_tiny_models)


@pytest.fixture(scope="session")
def random_models(tmp_path_factory):
    """Folder of a tiny random model by name: 3 layers, 211 tokens, no tokenizer."""
    names = ("llama-3to1", "qwen3", "gemma3")
    return {name: _tiny_models.make_tiny_model(name, tmp_path_factory.mktemp(name)) for name in names}


@pytest.fixture(scope="session")
def tokenizer(demo_model):
    from headrift.preparing import load_tokenizer

    return load_tokenizer(str(demo_model), False)
