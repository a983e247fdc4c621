"""What a job makes of its rows: `ScoreKind` and `GateKind` in the job's process, `ScoringEngine` in the engine's."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import pyarrow as pa
from pydantic import ValidationError

from headrift.calibration.artifact import add_verdicts
from headrift.calibration.bare import BareThreshold, Judge
from headrift.corpus.config import MASS_REGIONS, ScoreConfig, check_context
from headrift.corpus.judging import gated_classes
from headrift.corpus.rows import Row
from headrift.corpus.summary import Summary
from headrift.corpus.worker import Engine
from headrift.errors import EngineError, RefusedError
from headrift.fail_terms import FailTerms
from headrift.model_facts import ModelFacts
from headrift.prepare import Prepared, load_tokenizer, workers_for_machine
from headrift.probed_engine import REGIONS
from headrift.prompts import ChatRenderer
from headrift.results import ScoreResult
from headrift.runs.parts import Record, ShardFiles, column_types, part_schema, record
from headrift.scorer import RequestScorer
from headrift.signals import get
from headrift.vllm_engine import check_compiler

TEXT_BYTES = 4096  # a guess at what a row's texts take, for the space a run needs
# Fields of a ScoreResult that only some --save need.
_SAVED_FIELDS = {"shares": "shares", "mass": "mass", "focus": "focus_heads", "entropy": "logit_stats"}

BLOCKED = "[blocked]"
# Columns of a gate's parts, before and after its own.
_BEFORE = ("id", "source", "row", "label", "category", "group", "prompt_hash", "system_hash")
_AFTER = ("score", "reason", "n_steps", "n_scored", "prompt_tokens", "system_tokens", "answer_tokens", "flags")


class ScoreKind:
    """What a job makes of its rows: here `headrift score`."""

    def __init__(self, config: ScoreConfig) -> None:
        self._config = config
        self._judge: Judge | None = config.calibration

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
        row += 2 * min(steps, 2) * layers * heads  # what detectors read
        row += 2 * steps * layers * heads * ("shares" in save)
        row += 4 * steps * layers * heads * (len(REGIONS) + len(MASS_REGIONS)) * ("mass" in save)
        return row + TEXT_BYTES * ("text" in save)

    def record(self, row: Row, result: ScoreResult) -> Record:
        """A result as the columns of a part."""
        config = self._config
        answer = config.steps > 0 if config.replay else None
        own = row.columns(text="text" in config.save, redact=config.redact, answer=answer)
        columns = record(own, result)
        return columns if self._judge is None else columns | {"detector": self._judge.value(result)}

    def files(self, number: int, engine: dict[str, Any]) -> ShardFiles:
        """A shard's files, with the columns of what judges the rows. engine: its `about`."""
        schema = self._schema(engine)
        if self._judge is None:
            return ShardFiles(self._config.out, number, schema)
        schema = schema.append(pa.field("detector", pa.float64()))
        return ShardFiles(self._config.out, number, schema, partial(add_verdicts, calibration=self._judge))

    def _schema(self, engine: dict[str, Any]) -> pa.Schema:
        return part_schema(self._config.save, **{name: engine[name] for name in ("layers", "heads", "regions")})

    def summary(self) -> Summary:
        """The closing table of the finished shards, from their files."""
        return Summary.of_folder(self._config.out, self._config.score_range.window.end, self._judge)

    def finish(self, summary: Summary, names: Sequence[str]) -> None:
        """Draw scores.png, with a calibration of the detector's values, and write the review list.

        names: of the inputs.
        """
        from headrift.figures import scores_png

        curves, answer_length = {}, get("answer_tokens").label
        for comparison in summary.comparisons()[:1]:
            curves = {name: roc for name, roc in comparison.varying.items() if name != answer_length}
        inputs = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        window = self._config.score_range.window
        steps = "step 0 alone" if window.empty else f"steps {window.start} to {window.end}"
        title = f"{inputs} on {self._config.model.name}, {steps}{summary.sampled}"
        path, calibration = self._config.out / "scores.png", self._config.calibration
        if calibration is None:
            scores_png(path, summary.by_category(), curves, title=title)
        else:
            label, threshold = f"detector: {calibration.label}", calibration.threshold
            groups = summary.by_category("detector")
            scores_png(path, groups, curves, title=title, label=label, threshold=threshold)
        if summary.judged is not None:
            summary.judged.write_list()


@dataclass(frozen=True, slots=True)
class Gate:
    """Options of `headrift gate`.

    Attributes:
        threshold: on instability over the config's window, if there is no calibration.
        on_null: None blocks an answer without a value to judge by unless it is empty.
        compare_ungated: Also record what would have been answered; nothing is stopped.
    """

    max_new_tokens: int = 160
    fail_terms: tuple[str, ...] = ()
    on_null: Literal["block", "pass"] | None = None
    compare_ungated: bool = False
    threshold: float | None = None

    def blocks(self, value: float | None, result: ScoreResult, judge: Judge) -> bool:
        """Tell whether an answer is held back, by the detector's value of it."""
        if value is not None:
            return value >= judge.threshold
        if self.on_null is None:
            return bool(result.text.strip())
        return self.on_null == "block"


class GateKind(ScoreKind):
    """`headrift gate`: answers, `[blocked]` if the detector's value is at or above the threshold.

    The detector and its threshold are the calibration's or, without one, instability and the gate's own.

    An answer is judged while it is made: before its first token if the detector reads step 0 alone, else once it has
    decoded through the window; a blocked one stops there. ValueError if gate and config contradict.
    """

    _judge: Judge

    def __init__(self, config: ScoreConfig, gate: Gate) -> None:
        super().__init__(config)
        if gate.threshold is not None:
            self._judge = BareThreshold(gate.threshold, config.score_range)
        self._gate = gate
        self._terms = FailTerms(gate.fail_terms)
        if gate.max_new_tokens <= config.steps:
            what = f"--max-new-tokens {gate.max_new_tokens} is no more than the steps that decide, {config.steps}"
            raise ValueError(f"{what}: give at least {config.steps + 1}")
        if gate.compare_ungated and not gate.fail_terms:
            what = "--compare-ungated counts answers that should not have been given"
            raise ValueError(f"{what}: name what gives them away with --fail-term")

    def identity(self) -> dict[str, Any]:
        return {"command": "gate", **asdict(self._gate), "fail_terms": list(self._gate.fail_terms)}

    def check(self, context: int | None) -> None:
        check_context(self._gate.max_new_tokens, context, "max-new-tokens")

    @property
    def answer_tokens(self) -> int:
        return self._gate.max_new_tokens

    def engine(self, verbose: bool) -> Callable[[], Engine]:
        """What makes the engine, in its process: it stops the answers that the gate blocks."""
        stop_if = None if self._gate.compare_ungated else partial(_stops, self._gate, self._judge)
        return partial(ScoringEngine, shipped(self._config), verbose=verbose, text=True, stop_if=stop_if)

    def record(self, row: Row, result: ScoreResult) -> Record:
        """A result as the columns of a part, with `[blocked]` for the text of a blocked answer."""
        value = self._judge.value(result)
        blocked = self._gate.blocks(value, result, self._judge)
        text = BLOCKED if blocked else result.text
        leaks = self._terms.in_text if self._gate.fail_terms else None
        return record(row.columns(text=False, redact=True), result) | {
            "blocked": blocked,
            "text": text,
            "leaked": None if leaks is None else not blocked and leaks(text),
            "leaked_ungated": None if leaks is None else leaks(result.text),
            "detector": value,
        }

    def row_bytes(self, model: ModelFacts) -> int:
        return 512 + TEXT_BYTES * (not self._config.redact)

    def _schema(self, engine: dict[str, Any]) -> pa.Schema:
        types = column_types()
        return pa.schema(
            {
                **{name: types[name] for name in _BEFORE},
                "blocked": pa.bool_(),
                **({} if self._config.redact else {"text": pa.string()}),
                "leaked": pa.bool_(),
                **({"leaked_ungated": pa.bool_()} if self._gate.compare_ungated else {}),
                **{name: types[name] for name in _AFTER},
            }
        )

    def summary(self) -> Summary:
        """The closing table, with what was blocked of each class."""
        summary, compared = super().summary(), self._gate.compare_ungated
        summary.gated = gated_classes(self._config.out, summary.samples(), compared=compared)
        return summary

    def finish(self, summary: Summary, names: Sequence[str]) -> None:
        """Do nothing: a gate has only its parts."""


def _stops(gate: Gate, judge: Judge, result: ScoreResult) -> bool:
    return gate.blocks(judge.value(result), result, judge)


def shipped(config: ScoreConfig) -> ScoreConfig:
    """A job's config as an engine's process gets it, on another machine even."""
    # The calibration is applied to what comes back; the machines of a cluster have other working directories.
    model = config.model.resolve() if config.engine == "ray" else config.model
    return replace(config, calibration=None, calibration_anyway=False, model=model)


class ScoringEngine:
    """A scorer in the engine's process (see worker.Engine): prepared prompts in, results out.

    Results have no arrays but those that `config.save` needs, and answers' texts only with `text`. `about` has what
    depends on the engine, the hash of its chat template, and how to feed it. EngineError, RefusedError or
    TokenizerError, with what to do, if it cannot be started.
    """

    def __init__(
        self,
        config: ScoreConfig,
        *,
        verbose: bool = False,
        text: bool = False,
        stop_if: Callable[[ScoreResult], bool] | None = None,
    ) -> None:
        tokenizer = load_tokenizer(str(config.model))
        ChatRenderer(tokenizer)  # raises if the tokenizer or its chat template cannot be used
        self._keep = [_SAVED_FIELDS[kind] for kind in config.save if kind in _SAVED_FIELDS]
        args: dict[str, Any] = {} if config.dtype == "auto" else {"dtype": config.dtype}
        if config.compile:
            check_compiler(verbose)
            args["enforce_eager"] = False
        keep_mass = "mass" in config.save
        try:
            self._scorer = RequestScorer(
                config.model,
                steps=config.steps,
                score_range=config.score_range,
                decode=partial(tokenizer.decode, skip_special_tokens=True) if text else lambda token_ids: "",
                regions=(*MASS_REGIONS, *config.regions) if keep_mass else config.regions,
                logit_stats=config.logit_stats,
                keep_mass=keep_mass,
                stop_if=stop_if,
                attention_backend=config.attention_backend,
                engine_args=args,
                verbose=verbose,
            )
        except RefusedError:
            raise
        except Exception as error:  # a model's files can break vLLM, transformers and torch in any way
            raise EngineError(f"vLLM cannot start with --model {config.model}: {plain_message(error)}") from error
        engine = self._scorer.engine
        names = ("dtype", "layers", "heads", "regions", "max_model_len", "vocabulary", "recorder_bytes")
        self.about: dict[str, Any] = {name: getattr(engine, name) for name in names} | {
            "chat_template_sha256": hashlib.sha256(str(tokenizer.get_chat_template()).encode()).hexdigest(),
            "in_flight": self._scorer.in_flight,
            "prepare_workers": workers_for_machine(engine_in_process=False),
            "tokenizer": pickle.dumps(tokenizer),
        }

    @property
    def waited(self) -> float:
        return self._scorer.seconds_waited

    @property
    def steps_run(self) -> int:
        return self._scorer.engine.steps_run

    def score(self, requests: Iterable[Prepared]) -> Iterator[ScoreResult]:
        for result in self._scorer.score_requests(requests):
            assert isinstance(result, ScoreResult)
            yield result.slim(self._keep)

    def close(self) -> None:
        self._scorer.close()


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
