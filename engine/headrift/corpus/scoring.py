"""The engine of a scoring job, in the process that the job gives it: rows in, the parts' records out."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from headrift import scorer as scoring
from headrift.corpus.parts import Record, columns, record_of
from headrift.corpus.rows import Row
from headrift.corpus.settings import Settings, check_context
from headrift.probed_engine import EngineError
from headrift.vllm_plugin.plugin import RefusedError

if TYPE_CHECKING:
    from headrift.scorer import Prompt, Scorer


@dataclass(frozen=True, slots=True)
class Turned:
    """The answer for a row that the scorer turned down."""

    reason: str
    detail: str


class ScoringEngine:
    """A scorer as the settings want it (see child.Engine): rows in, a record of the parts or a Turned out for each.

    about: dtype, layers, heads, regions, max_model_len and recorder_bytes of the engine, and the chat template's hash.
    EngineError, RefusedError and ValueError, saying what to do, where it cannot be.
    """

    def __init__(self, asked: Settings, *, verbose: bool = False) -> None:
        self._asked, self._columns = asked, columns(asked.save)
        self.scorer = _scorer(asked, verbose)
        try:
            self.about = self._described()
        except BaseException:
            self.close()
            raise

    @property
    def waited(self) -> float:
        """Seconds in which the engine waited for rows to be read, rendered and tokenised."""
        return self.scorer.seconds_waited

    def _described(self) -> dict[str, Any]:
        scorer, engine = self.scorer, self.scorer.engine
        scorer.renderer  # noqa: B018  made now, so that a tokenizer that cannot be used stops the run before the first row
        check_context(self._asked.steps, engine.max_model_len)
        names = ("dtype", "layers", "heads", "regions", "max_model_len", "recorder_bytes")
        template = scorer.tokenizer.get_chat_template().encode()
        return {name: getattr(engine, name) for name in names} | {
            "chat_template_sha256": hashlib.sha256(template).hexdigest(),
            "in_flight": scorer.in_flight,
        }

    def score(self, rows: Iterable[Row]) -> Iterator[Record | Turned]:
        """Answers in order; rows are taken as they are needed."""
        taken: deque[Row] = deque()

        def prompts() -> Iterator[Prompt]:
            for row in rows:
                taken.append(row)
                yield row.prompt

        for result in self.scorer.score(prompts(), replay=self._asked.replay):
            row = taken.popleft()
            if isinstance(result, scoring.ScoreResult):
                record = record_of(row, result)
                yield {name: record[name] for name in self._columns}
            else:
                yield Turned(result.reason, result.detail)

    def close(self) -> None:
        """Stop the engine."""
        self.scorer.close()


def _scorer(asked: Settings, verbose: bool) -> Scorer:
    window = scoring.check_settings(asked.steps, asked.window, asked.drop_shallow, asked.drop_deep)
    try:
        return scoring.Scorer(
            asked.model,
            system_prompt=asked.system_prompt,
            steps=asked.steps,
            window=window,
            drop_shallow=asked.drop_shallow,
            drop_deep=asked.drop_deep,
            logit_stats=asked.logit_stats,
            keep_mass="mass" in asked.save,
            regions=("tool", *asked.regions) if "mass" in asked.save else asked.regions,
            attention_backend=asked.attention_backend,
            engine_args={} if asked.dtype == "auto" else {"dtype": asked.dtype},
            verbose=verbose,
            prepare_workers=None,
        )
    except RefusedError:
        raise
    except Exception as error:  # a model's files can break vLLM, transformers and torch in any way
        raise EngineError(f"vLLM cannot start with --model {asked.model}: {plainly(error)}") from error


def plainly(error: Exception) -> str:
    """What an engine that did not start has to say, without pydantic's framing: a line, and what to do."""
    causes = [error]
    while (cause := causes[-1].__cause__) is not None and isinstance(cause, Exception):
        causes.append(cause)
    validation = next((cause for cause in causes if isinstance(cause, ValidationError)), None)
    said = [str(error)] if validation is None else [str(one["msg"]) for one in validation.errors()]
    lines = [text.removeprefix("Value error, ").strip().partition("\n")[0] for text in said]
    named = [] if isinstance(error, RuntimeError | ValueError | OSError) else [type(error).__name__]
    return f"{': '.join([*named, *lines])} (check the model's files, or take another model)"
