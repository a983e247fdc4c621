"""Error rates of the statistics are nominal where the truth is known, and those of the naive way are not."""

import pytest

from helpers.scripts import load

simulations = load("bench/simulations")
FEW = 40  # draws of the tests that run at every push


@pytest.mark.parametrize("name", sorted(simulations.SIMULATIONS))
def test_error_rates_are_nominal_in_few_draws(name):
    result = simulations.rates(name, min(FEW, simulations.SIMULATIONS[name].few), processes=1)
    assert simulations.is_nominal(result), result
    assert result["naive"]["rate"] > result["nominal"], "the naive way is as good: the simulation shows nothing"


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", sorted(simulations.SIMULATIONS))
def test_error_rates_are_nominal(name):
    result = simulations.rates(name, simulations.SIMULATIONS[name].draws, first=100_000)  # other draws than published
    assert simulations.is_nominal(result), result
    assert result["naive"]["rate"] > result["allowed"]
