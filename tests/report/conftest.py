"""Runs to report on, and a report of two of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from headrift.report.report import Report, ReportConfig
from helpers.made_runs import write_patterns
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


@pytest.fixture(scope="session")
def step_0_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Runs of step 0 alone with a pattern in two heads of their attacks, and higher focus in benign prompts."""
    folder, runs = tmp_path_factory.mktemp("step_0"), []
    for seed, name in enumerate(("one", "two")):
        random = np.random.default_rng(seed)
        options = {
            "prompt": [f"{'Say' if number < 60 else 'Tell'} {name} {number}" for number in range(160)],
            "group": np.arange(160) + 1000 * seed,
            "focus": np.r_[random.normal(0.4, 0.05, 60), random.normal(0.5, 0.05, 100)],
        }
        runs.append(write_patterns(folder / name, seed, 60, 100, effect=2.0, at=[(2, 1), (3, 2)], **options))
    return runs
