"""What a scoring job makes of its rows: `ScoreKind` in the job's process, `ScoringEngine` in the engine's."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from headrift.calibration.artifact import add_verdicts
from headrift.corpus.config import MASS_REGIONS, ScoreConfig
from headrift.corpus.rows import Row
from headrift.corpus.summary import SCORE, Summary
from headrift.corpus.worker import Engine
from headrift.errors import EngineError, RefusedError
from headrift.model_facts import ModelFacts
from headrift.prepare import Prepared, load_tokenizer, workers_for_machine
from headrift.probed_engine import REGIONS, ProbedEngine
from headrift.prompts import ChatRenderer
from headrift.results import ScoreResult
from headrift.runs.parts import Record, ShardFiles, part_schema, record
from headrift.scorer import RequestScorer, engine_factory
from headrift.vllm_engine.config import check_compiler

TEXT_BYTES = 4096  # a guess at what a row's texts take, for the space a run needs
# Fields of a ScoreResult that only some --save need.
_SAVED_FIELDS = {"shares": "shares", "mass": "mass", "focus": "focus_heads", "entropy": "logit_stats"}


class ScoreKind:
    """What a job makes of its rows: here `headrift score`; gating.GateKind is another kind."""

    def __init__(self, config: ScoreConfig) -> None:
        self._config = config

    @property
    def answer_tokens(self) -> int:
        """The most tokens of an answer."""
        return self._config.steps + 1

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common, beside the job's config: JSON by option, and `command`."""
        return {}

    def check(self, context: int | None) -> None:
        """ValueError if it does not fit a model's context, in tokens."""

    def engine(self, verbose: bool) -> Callable[[], Engine]:
        """What makes the engine, in its process; must pickle."""
        return partial(ScoringEngine, shipped(self._config), verbose=verbose, text="text" in self._config.save)

    def row_bytes(self, model: ModelFacts) -> int:
        """About what a row takes on disk."""
        save, steps, layers, heads = self._config.save, self._config.steps + 1, model.layers or 0, model.heads or 0
        row = 4 * steps * layers + 512
        row += 2 * steps * layers * heads * ("shares" in save)
        row += 4 * steps * layers * heads * (len(REGIONS) + len(MASS_REGIONS)) * ("mass" in save)
        return row + TEXT_BYTES * ("text" in save)

    def record(self, row: Row, result: ScoreResult) -> Record:
        """A result as the columns of a part."""
        return record(row.columns(replay=self._config.replay, text="text" in self._config.save), result)

    def files(self, number: int, engine: dict[str, Any]) -> ShardFiles:
        """A shard's files. engine: its `about`."""
        config, shape = self._config, {name: engine[name] for name in ("layers", "heads", "regions")}
        schema = part_schema(config.save, **shape)
        if config.calibration is None:
            return ShardFiles(config.out, number, schema)
        return ShardFiles(config.out, number, schema, partial(add_verdicts, calibration=config.calibration))

    def summary(self) -> Any:
        """The closing table of the finished shards, from their files."""
        return Summary.of_folder(self._config.out, self._config.score_range.window.end, self._config.calibration)

    def finish(self, summary: Any, names: Sequence[str]) -> None:
        """Draw scores.png and, with a calibration, write the review list. names: of the inputs."""
        from headrift.figures import Curve, scores_png

        curves = []
        for comparison in summary.comparisons()[:1]:
            shown = {name: roc for name, roc in comparison.measures.items() if name != "answer length"}
            curves = [Curve(name, roc.fpr, roc.tprs, roc.auroc, roc.grid, roc.band) for name, roc in shown.items()]
            assert curves[0].name == SCORE
        inputs = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        window = self._config.score_range.window
        title = f"{inputs} on {self._config.model.name}, steps {window.start} to {window.end}{summary.sampled}"
        scores_png(self._config.out / "scores.png", summary.by_category(), curves, title=title)
        if summary.judged is not None:
            summary.judged.write_list()


def shipped(config: ScoreConfig) -> ScoreConfig:
    """A job's config as an engine's process gets it, on another machine even."""
    # The calibration is applied to what comes back; the machines of a cluster have other working directories.
    model = config.model.resolve() if config.engine == "ray" else config.model
    return replace(config, calibration=None, calibration_anyway=False, model=model)


@dataclass(frozen=True, slots=True)
class PickledTokenizer:
    """A model's tokenizer for other processes, which can use it without torch, and its chat template."""

    data: bytes
    chat_template: str

    @classmethod
    def load(cls, model: Path) -> PickledTokenizer:
        """Load it from a model's folder; EngineError or TokenizerError if it, or its chat template, cannot be used."""
        tokenizer = load_tokenizer(str(model), False)
        ChatRenderer(tokenizer)
        return cls(pickle.dumps(tokenizer), str(tokenizer.get_chat_template()))


class ScoringEngine:
    """A scorer in the engine's process (see worker.Engine): prepared prompts in, results out.

    Args:
        config: The job's, see `shipped`.
        verbose: Let vLLM log.
        text: Whether results need the answers' texts. They have no arrays but those that `config.save` needs.
        stop_if: As Scorer has it.
        tokenizer: By default it is loaded from the model's folder.

    Attributes:
        about: dtype, layers, heads, regions, max_model_len, vocabulary and recorder_bytes of the engine, the hash of
            the chat template, and how to feed it: `in_flight`, the pickled `tokenizer` and `prepare_workers`.

    Raises:
        EngineError, RefusedError, ValueError: With what to do, if the engine cannot be started.
    """

    def __init__(
        self,
        config: ScoreConfig,
        *,
        verbose: bool = False,
        text: bool = False,
        stop_if: Callable[[ScoreResult], bool] | None = None,
        tokenizer: PickledTokenizer | None = None,
    ) -> None:
        tokenizer = tokenizer or PickledTokenizer.load(config.model)
        decode = partial(pickle.loads(tokenizer.data).decode, skip_special_tokens=True) if text else _no_text
        self._keep = [_SAVED_FIELDS[kind] for kind in config.save if kind in _SAVED_FIELDS]
        engine = _start_engine(config, verbose)
        self._scorer = RequestScorer(
            engine,
            score_range=config.score_range,
            decode=decode,
            logit_stats=config.logit_stats,
            keep_mass="mass" in config.save,
            stop_if=stop_if,
        )
        names = ("dtype", "layers", "heads", "regions", "max_model_len", "vocabulary", "recorder_bytes")
        self.about: dict[str, Any] = {name: getattr(engine, name) for name in names} | {
            "chat_template_sha256": hashlib.sha256(tokenizer.chat_template.encode()).hexdigest(),
            "in_flight": self._scorer.in_flight,
            "prepare_workers": workers_for_machine(engine_in_process=False),
            "tokenizer": tokenizer.data,
        }

    @property
    def waited(self) -> float:
        """Seconds in which the engine waited for rows to be read, rendered and tokenised."""
        return self._scorer.seconds_waited

    @property
    def steps_run(self) -> int:
        """Steps that the engine has run."""
        return self._scorer.engine.steps_run

    def score(self, requests: Iterable[Prepared]) -> Iterator[ScoreResult]:
        """Answer requests in order; they are taken as they are needed."""
        for result in self._scorer.score_requests(requests):
            assert isinstance(result, ScoreResult)
            yield result.slim(self._keep)

    def close(self) -> None:
        """Stop the engine."""
        self._scorer.close()


def _no_text(token_ids: list[int]) -> str:
    return ""


def _start_engine(config: ScoreConfig, verbose: bool) -> ProbedEngine:
    args: dict[str, Any] = {} if config.dtype == "auto" else {"dtype": config.dtype}
    if config.compile:
        check_compiler(verbose)
        args["enforce_eager"] = False
    more = (*MASS_REGIONS, *config.regions) if "mass" in config.save else config.regions
    try:
        engine: ProbedEngine = engine_factory.get()(
            config.model,
            steps=config.steps,
            regions=(*REGIONS, *(name for name in more if name not in REGIONS)),
            logit_stats=config.logit_stats,
            attention_backend=config.attention_backend,
            engine_args=args,
            verbose=verbose,
        )
    except RefusedError:
        raise
    except Exception as error:  # a model's files can break vLLM, transformers and torch in any way
        raise EngineError(f"vLLM cannot start with --model {config.model}: {plain_message(error)}") from error
    return engine


def plain_message(error: Exception) -> str:
    """Why an engine did not start, in a line, without pydantic's framing, and what to do."""
    causes = [error]
    while (cause := causes[-1].__cause__) is not None and isinstance(cause, Exception):
        causes.append(cause)
    validation = next((cause for cause in causes if isinstance(cause, ValidationError)), None)
    messages = [str(error)] if validation is None else [str(one["msg"]) for one in validation.errors()]
    lines = [text.removeprefix("Value error, ").strip().partition("\n")[0] for text in messages]
    kind = [] if isinstance(error, RuntimeError | ValueError | OSError) else [type(error).__name__]
    return f"{': '.join([*kind, *lines])} (check the model's files, or take another model)"
