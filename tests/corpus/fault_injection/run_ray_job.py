"""Runs a scoring job on a Ray cluster of its own: `run_ray_job.py ENGINE INPUT MODEL OUT MARKS PAUSE [CALIBRATION]`.

As run_job.py, with two engines on a cluster of two nodes with a core each, which begins and ends with this process.
"""

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import ray
from faulty import FaultyEngine
from ray.cluster_utils import Cluster
from run_job import SHARD_ROWS, settings_of

from headrift.corpus.job import ScoreJob
from headrift.corpus.scoring import ScoringEngine
from headrift.corpus.worker import Engine, EngineProcess


def main(engine: str, given: str, model: str, out: str, marks: str, pause: str, calibration: str | None = None) -> int:
    settings = settings_of(given, model, out, calibration, engine="ray", workers=2)
    make: dict[str, Callable[[], Engine]] = {
        "fake": partial(FaultyEngine, Path(marks), Path(model), float(pause)),
        "vllm": partial(ScoringEngine, settings),
    }
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    node = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 128 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    cluster.add_node(**node)
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        with ScoreJob(
            settings,
            resume=True,
            engine=partial(EngineProcess, make[engine]),
            shard_rows=SHARD_ROWS[engine],
            notice=lambda text: print(text, file=sys.stderr, flush=True),
        ) as job:
            if job.done:
                job.finish()
                return 0
            job.start()
            return 0 if job.run() else 130
    except (OSError, RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    finally:  # in this order: a driver whose cluster goes first ends with code 1
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
