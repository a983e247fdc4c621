"""What a scoring job makes of its rows: the engine, in the process that the job gives it; the parts; the closing table.

Scoring is what the job is told of all this, in its own process (see job.Kind).
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from headrift import scorer as scoring
from headrift.calibration.verdicts import add_verdicts
from headrift.corpus.child import Engine
from headrift.corpus.rows import Row
from headrift.corpus.settings import WITH_MASS, Settings, check_context
from headrift.corpus.summary import SCORE, Summary
from headrift.engine_setup import check_compiler
from headrift.errors import EngineError, RefusedError
from headrift.model_facts import ModelFacts
from headrift.probed_engine import REGIONS
from headrift.results import ScoreResult
from headrift.runs.parts import Record, ShardFiles, column_types, part_schema, record

if TYPE_CHECKING:
    from headrift.scorer import Prompt, Scorer


TEXT_BYTES = 4096  # a guess at what a row's texts take, for the space a run needs


class Scoring:
    """`headrift score`, as a kind of job (see job.Kind). settings: those of the job."""

    def __init__(self, settings: Settings) -> None:
        self._asked = settings
        self._window = scoring.check_settings(
            settings.steps, settings.window, settings.drop_shallow, settings.drop_deep
        )

    def asked(self) -> dict[str, Any]:
        """What a resumed run must have in common beside Settings: nothing."""
        return {}

    def check(self, context: int | None) -> None:
        """What there is to check beside Settings: nothing."""

    def engine(self, verbose: bool) -> Callable[[], Engine]:
        """What makes the engine, in its process."""
        return partial(ScoringEngine, travelling(self._asked), verbose=verbose)

    def row_bytes(self, model: ModelFacts) -> int:
        """About what a row takes on disk."""
        save, steps, layers, heads = self._asked.save, self._asked.steps + 1, model.layers or 0, model.heads or 0
        row = 4 * steps * layers + 512
        row += 2 * steps * layers * heads * ("shares" in save)
        row += 4 * steps * layers * heads * (len(REGIONS) + len(WITH_MASS)) * ("mass" in save)
        return row + TEXT_BYTES * ("text" in save)

    def files(self, number: int, engine: dict[str, Any]) -> ShardFiles:
        """A shard's files, for the records that the engine makes; with a calibration its columns are added."""
        asked, shape = self._asked, {name: engine[name] for name in ("layers", "heads", "regions")}
        schema = part_schema(asked.save, **shape)
        if asked.calibration is None:
            return ShardFiles(asked.out, number, schema)
        return ShardFiles(asked.out, number, schema, partial(add_verdicts, calibration=asked.calibration))

    def summary(self) -> Summary:
        """The closing table of the finished shards, from their files."""
        return Summary.of_folder(self._asked.out, self._window.end, self._asked.calibration)

    def finish(self, summary: Summary, names: Sequence[str]) -> None:
        """Draw scores.png and, with a calibration, write the list of what it finds. names: of the inputs."""
        from headrift.figures import Curve, scores_png

        curves = []
        for comparison in summary.comparisons()[:1]:
            shown = {name: of for name, of in comparison.measures.items() if name != "answer length"}
            curves = [Curve(name, of.fpr, of.tprs, of.auroc, of.grid, of.band) for name, of in shown.items()]
            assert curves[0].name == SCORE
        inputs = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        window = f"steps {self._window.start} to {self._window.end}"
        title = f"{inputs} on {self._asked.model.name}, {window}{summary.sampled}"
        scores_png(self._asked.out / "scores.png", summary.by_category(), curves, title=title)
        if summary.judged is not None:
            summary.judged.write_list()


def travelling(asked: Settings) -> Settings:
    """Settings as an engine's process gets them, on another machine even."""
    # The calibration is applied to what comes back; the machines of a cluster have other working directories.
    model = asked.model.resolve() if asked.engine == "ray" else asked.model
    return replace(asked, calibration=None, model=model)


@dataclass(frozen=True, slots=True)
class Turned:
    """The answer for a row that the scorer turned down."""

    reason: str
    detail: str


class ScoringEngine:
    """A scorer as the settings want it (see child.Engine): rows in, a record of the parts or a Turned out for each.

    about: dtype, layers, heads, regions, max_model_len and recorder_bytes of the engine, and the chat template's hash.
    max_new_tokens, stop_if: as Scorer has them. EngineError, RefusedError and ValueError, saying what to do, where it
    cannot be.
    """

    def __init__(
        self,
        asked: Settings,
        *,
        verbose: bool = False,
        max_new_tokens: int | None = None,
        stop_if: Callable[[ScoreResult], bool] | None = None,
    ) -> None:
        self._asked, self._columns = asked, list(column_types(asked.save))
        self.scorer = _scorer(asked, verbose=verbose, max_new_tokens=max_new_tokens, stop_if=stop_if)
        try:
            self.about = self._described()
        except BaseException:
            self.close()
            raise

    @property
    def waited(self) -> float:
        """Seconds in which the engine waited for rows to be read, rendered and tokenised."""
        return self.scorer.seconds_waited

    @property
    def steps_run(self) -> int:
        """Steps that the engine has run."""
        return self.scorer.engine.steps_run

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
            if isinstance(result, ScoreResult):
                yield self._record(row, result)
            else:
                yield Turned(result.reason, result.detail)

    def _record(self, row: Row, result: ScoreResult) -> Record:
        everything = record(row.columns(replay=self._asked.replay), result)
        return {name: everything[name] for name in self._columns}

    def close(self) -> None:
        """Stop the engine."""
        self.scorer.close()


def _scorer(asked: Settings, *, verbose: bool, **more: Any) -> Scorer:
    window = scoring.check_settings(asked.steps, asked.window, asked.drop_shallow, asked.drop_deep)
    engine_args = _engine_args(asked, verbose)
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
            regions=(*WITH_MASS, *asked.regions) if "mass" in asked.save else asked.regions,
            attention_backend=asked.attention_backend,
            engine_args=engine_args,
            verbose=verbose,
            prepare_workers=None,
            **more,
        )
    except RefusedError:
        raise
    except Exception as error:  # a model's files can break vLLM, transformers and torch in any way
        raise EngineError(f"vLLM cannot start with --model {asked.model}: {plainly(error)}") from error


def _engine_args(asked: Settings, verbose: bool) -> dict[str, Any]:
    args: dict[str, Any] = {} if asked.dtype == "auto" else {"dtype": asked.dtype}
    if asked.compile:
        check_compiler(verbose)
        args["enforce_eager"] = False
    return args


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
