"""Runs a scoring job as a process that can be killed: `run_job.py ENGINE INPUT MODEL OUT MARKS PAUSE`.

ENGINE: straw, vllm, or small for vllm with shards of a few rows. Ends as `headrift score --resume` does: 0 done, 1 the
disk or the engine failed, 130 stopped.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mortal import MortalEngine
from straw import StrawEngine

from headrift.corpus.child import Child, Engine
from headrift.corpus.job import ScoreJob
from headrift.corpus.settings import Settings

SHARD_ROWS = {"straw": 100, "vllm": 40, "small": 3}


def main(engine: str, given: str, model: str, out: str, marks: str, pause: str) -> int:
    settings = Settings((given,), Path(model), Path(out), system_prompt="Be brief, and be kind.", steps=4)
    make: dict[str, Callable[[], Engine]] = {
        "straw": partial(StrawEngine, Path(marks), float(pause)),
        "vllm": partial(MortalEngine, settings, float(pause)),
        "small": partial(MortalEngine, settings, float(pause)),
    }
    try:
        with ScoreJob(settings, resume=True, engine=partial(Child, make[engine]), shard_rows=SHARD_ROWS[engine]) as job:
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
