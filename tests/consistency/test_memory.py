"""What a training step takes above the weights: measured by the benchmark's script, with the demonstration model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

STEP = Path(__file__).parents[2] / "bench" / "_consistency_step.py"


@pytest.mark.slow
def test_a_step_takes_at_most_half_the_memory_of_full_maps(demo_model):
    found = {}
    for how in ("headrift", "eager"):
        command = [sys.executable, "-P", str(STEP), how, str(demo_model), "512"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        found[how] = json.loads(done.stdout)
    assert found["headrift"]["bytes"] <= 0.5 * found["eager"]["bytes"]
    # The same loss and gradient from another order of float32 operations over 30 layers.
    for name in ("loss", "gradient"):
        assert found["headrift"][name] == pytest.approx(found["eager"][name], rel=1e-4)
