"""A scoring job without a model, as a process to be measured: `_corpus_job.py INPUT OUT`.

Everything is real but the engine, which answers in its child process at once, with made-up numbers of the shape of a
model's with 30 layers and 9 heads, 13 steps. Prints a JSON line: rows, wall and CPU seconds, peak memory of both
processes.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from headrift.corpus.child import Child
from headrift.corpus.job import ScoreJob
from headrift.corpus.rows import Row, group_of
from headrift.corpus.settings import Settings
from headrift.runs.parts import column_types

LAYERS, HEADS, STEPS = 30, 9, 12


class EmptyEngine:
    """Answers each row at once."""

    def __init__(self) -> None:
        shape = {"dtype": "float32", "layers": LAYERS, "heads": HEADS, "regions": ["system", "user", "prompt"]}
        sizes = {"max_model_len": 8192, "recorder_bytes": 0, "in_flight": 640, "chat_template_sha256": ""}
        self.about: dict[str, Any] = {**shape, **sizes}
        self.waited, self.steps_run = 0.0, 0
        self._instability = np.random.default_rng(0).random((STEPS + 1) * LAYERS, np.float32)
        self._same: dict[str, Any] = dict.fromkeys(column_types())
        self._same |= {"n_steps": STEPS, "n_scored": STEPS, "answer_tokens": STEPS + 1, "flags": [], "score": 0.1}

    def score(self, rows: Iterable[Row]) -> Iterator[dict[str, Any]]:
        """A record for each row."""
        for row in rows:
            prompt = row.prompt.prompt or ""
            yield self._same | {
                **{"id": row.id, "source": row.source, "row": row.row, "label": row.label, "category": row.category},
                **{"group": group_of(row.prompt), "system_hash": "0" * 16, "prompt_tokens": len(prompt) // 4},
                **{"system_tokens": 20, "instability": self._instability},
            }

    def close(self) -> None:
        """There is nothing to give back."""


def main(given: str, out: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch)
        for name, content in {"config.json": "{}", "tokenizer.json": "{}", "chat_template.jinja": "x"}.items():
            (model / name).write_text(content)
        (model / "model.safetensors").write_text("")
        begun, cpu = time.monotonic(), time.process_time()
        engine = partial(Child, EmptyEngine)
        with ScoreJob(Settings((given,), model, Path(out), system_prompt="Be brief."), engine=engine) as job:
            job.start()
            assert job.run()
            rows = job.kept
    own, child = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    found = {
        "rows": rows,
        "seconds": time.monotonic() - begun,
        "scoring_seconds": job.seconds["scoring"],
        "cpu_seconds": time.process_time() - cpu,
        "cpu_seconds_of_child": child.ru_utime + child.ru_stime,
        "peak_bytes": own.ru_maxrss * 1024,
        "peak_bytes_of_child": child.ru_maxrss * 1024,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    # The child imports the engine by this module's name.
    import _corpus_job

    _corpus_job.main(*sys.argv[1:])
