"""Shared by the tests of safety heads."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def made() -> ModuleType:
    """The makers of runs of tests/calibration, whose folder is no package."""
    spec = spec_from_file_location("made_up_runs", Path(__file__).parents[1] / "calibration" / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
