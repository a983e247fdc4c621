"""Nothing is found where nothing is, and the intervals say so: 100 calibrations on noise."""

import warnings
from concurrent.futures import ProcessPoolExecutor

import pytest

from headrift.calibration.calibrate import calibrate
from headrift.calibration.thresholds import CalibrateConfig
from helpers import made_runs

SEEDS = 100


def on_noise(seed: int) -> tuple[str, tuple[float, float]]:
    """Verdict and interval of the held-out AUROC of 60 attacks and 90 benign prompts that do not differ, 336 heads."""
    warnings.simplefilter("ignore")
    run = made_runs.run_of_patterns(seed, 60, 90, layers=28, heads=12)
    calibration = calibrate([run], CalibrateConfig(target_fpr=0.1, seed=seed))
    interval = calibration.figures["auroc"].interval
    assert interval is not None
    assert calibration.verdict is not None
    return calibration.verdict.usable, interval


@pytest.mark.nightly
@pytest.mark.timeout(3600)  # eight minutes on two quiet cores
def test_choice_and_penalty_leak_nothing():
    with ProcessPoolExecutor(2) as pool:
        results = list(pool.map(on_noise, range(SEEDS)))
    not_usable = sum(usable == "no" for usable, _ in results)
    hold = sum(low <= 0.5 <= high for _, (low, high) in results)
    print(f"not usable: {not_usable} of {SEEDS}; intervals that hold 0.5: {hold}")
    assert not_usable >= 95
    assert hold >= 90
