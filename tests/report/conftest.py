"""Runs to report on, and a report of two of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from headrift.report.report import Report, ReportConfig
from helpers.report_runs import made_run


@pytest.fixture(scope="session")
def write() -> Callable[..., Path]:
    return made_run


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page on two runs with attacks and benign prompts."""
    folder = tmp_path_factory.mktemp("labelled")
    runs = [made_run(folder / name, seed=seed) for seed, name in enumerate(("first", "second"))]
    out = folder / "report.html"
    Report(runs, ReportConfig(out, resamples=10)).write()
    return out
