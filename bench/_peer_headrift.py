"""A Scorer in a process of its own: a child of bench/peers.py and bench/scaling.py (see _children.serve)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _children import Stopwatch, serve
from _model_math import Shapes, keys_attended


class Scored:
    """What the parent asks for. Results are never taken from earlier ones (`repeat_bytes=0`)."""

    def start(self, model: str, **options: Any) -> dict[str, Any]:
        from headrift import Scorer

        self._shapes = Shapes.of(Path(model))
        self._scorer = Scorer(model, repeat_bytes=0, **options)
        self._finished: list[Any] = []
        engine, step = self._scorer.engine, self._scorer.engine.step

        def noted() -> list[Any]:
            finished = step()
            self._finished += finished
            return finished

        engine.step = noted
        return {}

    def run(self, rows: Sequence[dict[str, Any]], *, replay: bool = False, out: str | None = None) -> dict[str, Any]:
        """Score the rows, with nothing in the prefix cache. out: a file for masses and answers, which are then taken
        off the device too, as _peer_transformers writes them; s0, s1, ... are the scores."""
        scorer = self._scorer
        scorer.engine.llm_engine.reset_prefix_cache()
        scorer._primed.clear()
        scorer.keep_mass = out is not None
        self._finished.clear()
        with Stopwatch() as clock:
            results = list(scorer.score(rows, replay=replay))
        rejected = [result for result in results if not hasattr(result, "shares")]
        if rejected:
            raise ValueError(f"prompts that cannot be scored: {rejected[:3]}")
        if out is not None:
            arrays = {f"m{result.index}": result.mass for result in results}
            arrays |= {f"s{result.index}": np.nan if result.score is None else result.score for result in results}
            np.savez(out, **arrays, **{f"a{result.index}": result.answer_ids for result in results})
        return {
            "seconds": clock.seconds,
            "cpu_seconds": clock.cpu_seconds,
            "prompt_tokens": sum(result.prompt_tokens for result in results) / len(results),
            "system_tokens": sum(result.system_tokens for result in results) / len(results),
            "answers": [result.answer_ids for result in results],
            "flops": sum(map(self._flops, self._finished)),
        }

    def _flops(self, done: Any) -> int:
        """What the engine really computed for a request: no token that came from the cache."""
        fed, logits = len(done.request.prompt_ids) + len(done.answer_ids) - 1, len(done.answer_ids)
        if done.request.answer_ids is not None:
            fed, logits = len(done.request.prompt_ids) + done.n_steps, 1
        tokens = fed - done.cached_tokens
        return self._shapes.flops(tokens, keys_attended(done.cached_tokens, tokens), logits)


if __name__ == "__main__":
    scored = Scored()
    serve({"start": scored.start, "run": scored.run})
