"""Shared by the tests of calibration."""

from types import ModuleType

import pytest

from helpers import made_runs


@pytest.fixture(scope="session")
def make() -> ModuleType:
    """What tests make runs with."""
    return made_runs
