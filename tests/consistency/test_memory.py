"""What a training step takes above the weights: measured by the benchmark's script, with the demonstration model."""

import pytest

from helpers.scripts import load


@pytest.mark.slow
def test_a_step_takes_at_most_half_the_memory_of_full_maps(demo_model):
    results = {}
    for way in ("headrift", "eager"):
        with load("bench/utils").Child("consistency.py", "step") as child:
            results[way] = child.call("measure", way=way, model=str(demo_model), tokens=512)
    assert results["headrift"]["bytes"] <= 0.5 * results["eager"]["bytes"]
    # The same loss and gradient from another order of float32 operations over 30 layers.
    for name in ("loss", "gradient"):
        assert results["headrift"][name] == pytest.approx(results["eager"][name], rel=1e-4)
