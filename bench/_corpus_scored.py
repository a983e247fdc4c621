"""Runs with a real model, each in a process of its own: `_corpus_scored.py CASE MODEL N`. Prints a JSON line.

scored: N log rows through a whole job, 12 steps. shared, unshared: N short prompts with one system prompt of 100
tokens, 12 steps; with its prefix primed and small KV blocks, and without and with vLLM's blocks of 128 tokens.
generate, replay: N short prompts with 40 answer tokens each, made and then taken from the log. repeats: N times one
prompt.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _corpus_rows

if TYPE_CHECKING:
    from headrift.scorer import Scorer

SYSTEM = "You answer questions about a library. " + " ".join(
    f"Rule {n}: never speak about shelf {n}." for n in range(9)
)
PLAIN = {"group": False, "prime": False, "repeat_bytes": 0}


def prompts(n: int) -> list[dict[str, Any]]:
    """Short ones, all different, of some 13 tokens."""
    words = _corpus_rows.WORDS.split()
    return [{"prompt": f"Where is {words[i % len(words)]} number {i}, please?", "system": SYSTEM} for i in range(n)]


def scored(model: Path, n: int) -> dict[str, Any]:
    from headrift.corpus.job import ScoreJob
    from headrift.corpus.settings import Settings

    with tempfile.TemporaryDirectory() as scratch:
        given = Path(scratch) / "logs.jsonl"
        _corpus_rows.write(given, n)
        settings = Settings((str(given),), model, Path(scratch) / "out", system_prompt="Be brief.")
        with ScoreJob(settings) as job:
            job.start()
            assert job.run(progress=True)
            seconds, counts = job.seconds["scoring"], job.summary().counts()
    return {"seconds": seconds, "engine_waited": job.seconds["engine_waited"] / seconds, "counts": counts}


def with_whole_answers(scorer: Scorer, n: int) -> list[dict[str, Any]]:
    """The first N prompts, of many that ask for a long answer, whose answers do not end before the last step; with
    their answers. Nothing of them is left in the scorer's caches."""
    words = _corpus_rows.WORDS.split()
    asked = [
        {"prompt": f"Tell a long story of {words[i % len(words)]} number {i}.", "system": SYSTEM} for i in range(3 * n)
    ]
    made = list(zip(asked, scorer.score(asked), strict=True))
    scorer.engine.llm_engine.reset_prefix_cache()
    scorer._primed.clear()
    whole = [(row, result) for row, result in made if result.answer_tokens == scorer.steps + 1]
    assert len(whole) >= n, f"{len(whole)} of {len(made)} answers are long enough"
    return [{**row, "response_ids": result.answer_ids} for row, result in whole[:n]]


def timed(
    model: Path, rows: list[dict[str, Any]] | int, *, replay: bool = False, steps: int = 12, **options: Any
) -> dict[str, Any]:
    """rows: to be scored, or how many of `with_whole_answers`."""
    from headrift.scorer import Scorer

    with Scorer(model, steps=steps, **options) as scorer:
        warm = [{**row, "system": "Warm up."} for row in prompts(8)]
        list(scorer.score(warm))
        if isinstance(rows, int):
            rows = with_whole_answers(scorer, rows)
        begun, cpu = time.monotonic(), time.process_time()
        results = list(scorer.score(rows, replay=replay))
        seconds, cpu_seconds = time.monotonic() - begun, time.process_time() - cpu
    tokens = [result.answer_tokens for result in results]
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,  # of all threads: what others do on the machine changes it little
        "answer_tokens": sum(tokens) / len(tokens),
        "system_tokens": results[0].system_tokens,
    }


def main(case: str, model: Path, n: int) -> None:
    blocks = {"engine_args": {"block_size": 128}}
    cases = {
        "scored": lambda: scored(model, n),
        "shared": lambda: timed(model, prompts(n), repeat_bytes=0),
        "unshared": lambda: timed(model, prompts(n), **PLAIN, **blocks),
        "generate": lambda: timed(model, n, steps=39, repeat_bytes=0),
        "replay": lambda: timed(model, n, steps=39, repeat_bytes=0, replay=True),
        "repeats": lambda: timed(model, prompts(1) * n),
    }
    found = cases[case]()
    print(json.dumps({"case": case, "model": model.name, "rows": n, "rows_per_second": n / found["seconds"], **found}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
