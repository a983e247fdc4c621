"""Where the time of a job goes: a child of bench/scaling.py (see _children.serve).

Reading, scoring and writing run in this one process, and every part of it is timed by the wall clock on its way in and
out, what lies inside another counted once: what the engine does in a step, less the kernel's calls in it, is PREFILL's
where the step computed tokens of a prompt (it may decode for others too) and DECODE's where it did not.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _children import Stopwatch, serve

PREFILL, DECODE = "steps with prefill", "steps of decoding"
ATTENTION, MASS = "decode attention with masses", "masses of prompts' last tokens"
TOKENISING, READING, WRITING, DRAIN, SCORES = "tokenising", "reading", "writing", "drain", "scores"
REST = "the rest"
PHASES = (READING, TOKENISING, PREFILL, DECODE, ATTENTION, MASS, DRAIN, SCORES, WRITING, REST)


class Clock:
    """Seconds by phase, each without the phases that ran inside it."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inside = [0.0]

    @contextmanager
    def phase(self, name: Callable[[], str]) -> Iterator[None]:
        """A phase; its name is asked for at its end."""
        self._inside.append(0.0)
        start = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - start
            self.seconds[name()] += took - self._inside.pop()
            self._inside[-1] += took

    def wrap(self, owner: Any, method: str, name: str | Callable[..., str]) -> None:
        """Have calls of a method counted. name: of the phase, or what gives it, told the call's arguments."""
        called = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(lambda: name if isinstance(name, str) else name(*args, **kwargs)):
                return called(*args, **kwargs)

        setattr(owner, method, timed)


class Job:
    """A scorer in this process, with everything that it calls timed."""

    def start(self, model: str, **options: Any) -> dict[str, Any]:
        from headrift import Scorer
        from headrift_kernels.cpu.paged_attention import PagedAttention

        self._clock = clock = Clock()
        self._scorer = scorer = Scorer(model, repeat_bytes=0, prepare_workers=0, **options)
        self._prefilling = False
        clock.wrap(scorer.preparer, "prepare", TOKENISING)
        clock.wrap(scorer.engine, "step", lambda: PREFILL if self._prefilling else DECODE)
        clock.wrap(scorer.engine, "collect", DRAIN)
        clock.wrap(scorer.engine, "recordings", DRAIN)
        clock.wrap(scorer, "_result", SCORES)
        clock.wrap(PagedAttention, "attend", lambda *args, output=None, **more: MASS if output is None else ATTENTION)
        scheduler = scorer.engine.llm_engine.engine_core.engine_core.scheduler
        schedule = scheduler.schedule

        def noted(*args: Any, **kwargs: Any) -> Any:
            planned = schedule(*args, **kwargs)
            most = max(planned.num_scheduled_tokens.values(), default=0)
            self._prefilling = bool(planned.scheduled_new_reqs) or most > 1
            return planned

        scheduler.schedule = noted
        return {}

    def run(self, file: str) -> dict[str, Any]:
        """Score a file of rows into a part; seconds by phase."""
        self._scorer.engine.llm_engine.reset_prefix_cache()
        self._scorer._primed.clear()
        self._clock.seconds.clear()
        with tempfile.TemporaryDirectory() as folder, Stopwatch() as clock:
            n = self._through(file, Path(folder))
        found = dict(self._clock.seconds)
        found[REST] = clock.seconds - sum(found.values())
        return {"seconds": clock.seconds, "prompts": n, "phases": {name: found.get(name, 0.0) for name in PHASES}}

    def _through(self, file: str, folder: Path) -> int:
        from headrift.corpus import readers, sources
        from headrift.runs import parts

        clock, engine = self._clock, self._scorer.engine
        schema = parts.part_schema((), layers=engine.layers, heads=engine.heads, regions=engine.regions)
        files = parts.ShardFiles(folder, 0, schema)
        taken: list[Any] = []

        def prompts() -> Iterator[Any]:
            rows = readers.Reader(sources.find([file])).rows()
            while True:
                with clock.phase(lambda: READING):
                    row = next(rows, None)
                if row is None:
                    return
                taken.append(row)
                yield row.prompt

        for result in self._scorer.score(prompts()):
            with clock.phase(lambda: WRITING):
                files.add(parts.record(taken[result.index].columns(), result))
        with clock.phase(lambda: WRITING):
            files.publish()
        return len(taken)


if __name__ == "__main__":
    job = Job()
    serve({"start": job.start, "run": job.run})
