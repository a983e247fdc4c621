"""Runs a scoring job as a process that can be killed: `run_job.py ENGINE INPUT MODEL OUT MARKS PAUSE [CALIBRATION]`.

ENGINE: fake, vllm, or small for vllm with shards of a few rows. CALIBRATION: a file, for whatever model. Ends as
`headrift score --resume` does: 0 done, 1 the disk or the engine failed, 130 stopped.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from faulty import FaultyEngine, FaultyScoringEngine

from headrift.calibration.artifact import Calibration
from headrift.corpus.config import ScoreConfig
from headrift.corpus.job import ScoreJob
from headrift.corpus.worker import Engine, EngineProcess

SHARD_ROWS = {"fake": 100, "vllm": 40, "small": 3}


def settings_of(given: str, model: str, out: str, calibration: str | None, **options: Any) -> ScoreConfig:
    if calibration is not None:
        options |= {"calibration": Calibration.load(calibration), "calibration_anyway": True}
    return ScoreConfig((given,), Path(model), Path(out), system_prompt="Be brief, and be kind.", steps=4, **options)


def main(engine: str, given: str, model: str, out: str, marks: str, pause: str, calibration: str | None = None) -> int:
    settings = settings_of(given, model, out, calibration)
    make: dict[str, Callable[[], Engine]] = {
        "fake": partial(FaultyEngine, Path(marks), Path(model), float(pause)),
        "vllm": partial(FaultyScoringEngine, settings, float(pause)),
        "small": partial(FaultyScoringEngine, settings, float(pause)),
    }
    try:
        with ScoreJob(
            settings, resume=True, engine=partial(EngineProcess, make[engine]), shard_rows=SHARD_ROWS[engine]
        ) as job:
            if job.done:
                job.finish()
                return 0
            job.start()
            return 0 if job.run() else 130
    except KeyboardInterrupt:
        return 130
    except (OSError, RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
