"""Seconds of a training step by method, in turns in one process: `python _consistency_pace.py MODEL QUESTIONS ROUNDS`.

Prints {"attct": [seconds, ...], "act": [...], "bct": [...]}, of steps on the same pairs.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from headrift.consistency.losses import METHODS
from headrift.consistency.pairs import SYSTEM_PROMPT
from headrift.consistency.trainer import ANSWERS, Asked, Trainer, TrainingJob
from headrift.consistency.training_data import DataAsked


def main(model: Path, questions: Path, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = DataAsked((str(questions),), model, SYSTEM_PROMPT, limit=30)
        trainers = {}
        for method in METHODS:
            job = TrainingJob(Asked(data=data, out=Path(folder) / method, weights={method: 1.0}))
            trainer = trainers[method] = Trainer(job.asked, job.layers, job.pairs, job.data.renderer.tokenizer)
            trainer.prepare(job.asked.out / ANSWERS)
            trainer.train_step()
        seconds: dict[str, list[float]] = {method: [] for method in METHODS}
        for _ in range(rounds):
            for method, trainer in trainers.items():
                begun = time.perf_counter()
                trainer.train_step()
                seconds[method].append(time.perf_counter() - begun)
    print(json.dumps(seconds))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
