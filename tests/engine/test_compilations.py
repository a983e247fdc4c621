"""Every variant of every kernel is compiled while the engine starts, and none in the middle of a job."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_no_kernel_is_compiled_during_a_job(tmp_path):
    program = Path(__file__).with_name("compilations.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("COMPILED")]
    compiled = json.loads(line.removeprefix("COMPILED"))
    kernels = {"decode_kernel", "combine_kernel", "replay_kernel", "replay_combine_kernel", "logit_statistics_kernel"}
    assert set(compiled["at_start"]) == kernels
    assert compiled["later"] == []
