"""What a gate makes of its rows: answers, and `[blocked]` for those whose score is at or above the threshold.

An answer is scored while it is made: the request decodes through the calibration's window, is stopped there where it is
blocked, and else answers on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from typing import Any

import pyarrow as pa

from headrift.calibration.artifact import add_verdicts
from headrift.corpus.gate_summary import GateSummary
from headrift.corpus.rows import Row
from headrift.corpus.scoring import TEXT_BYTES, ScoreKind, ScoringEngine, shipped
from headrift.corpus.settings import Settings, check_context
from headrift.corpus.worker import Engine
from headrift.fail_terms import FailTerms
from headrift.model_facts import ModelFacts
from headrift.results import ScoreResult
from headrift.runs.parts import Record, ShardFiles, column_types, record

BLOCKED = "[blocked]"
_BEFORE = ("id", "source", "row", "label", "category", "group", "system_hash")
_AFTER = ("score", "reason", "n_steps", "n_scored", "prompt_tokens", "system_tokens", "answer_tokens", "flags")


class OnNull(StrEnum):
    """What becomes of an answer without a score."""

    BLOCK = "block"
    PASS = "pass"


@dataclass(frozen=True, slots=True)
class Gate:
    """Options of `headrift gate`.

    Attributes:
        on_null: None blocks an answer without a score unless it is empty.
        compare_ungated: Also record what would have been answered; nothing is stopped.
    """

    max_new_tokens: int = 160
    fail_terms: tuple[str, ...] = ()
    on_null: OnNull | None = None
    compare_ungated: bool = False

    def blocks(self, result: ScoreResult, threshold: float) -> bool:
        """Whether an answer is held back."""
        if result.score is not None:
            return result.score >= threshold
        if self.on_null is None:
            return bool(result.text.strip())
        return self.on_null is OnNull.BLOCK


class GateKind(ScoreKind):
    """`headrift gate`, as a kind of job; the config has a calibration. ValueError if gate and config contradict."""

    def __init__(self, config: Settings, gate: Gate) -> None:
        super().__init__(config)
        assert config.calibration is not None
        self._gate, self._calibration = gate, config.calibration
        self._terms = FailTerms(gate.fail_terms)
        if gate.max_new_tokens <= config.steps:
            raise ValueError(
                f"--max-new-tokens {gate.max_new_tokens} is no more than the steps that decide, {config.steps}: give "
                f"at least {config.steps + 1}"
            )
        if gate.compare_ungated and not gate.fail_terms:
            raise ValueError(
                "--compare-ungated counts answers that should not have been given: name what gives them away with "
                "--fail-term"
            )

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one that was begun, beside Settings."""
        return {"command": "gate", **asdict(self._gate), "fail_terms": list(self._gate.fail_terms)}

    def check(self, context: int | None) -> None:
        """ValueError where an answer does not fit a context of so many tokens."""
        check_context(self._gate.max_new_tokens, context, "max-new-tokens")

    @property
    def answer_tokens(self) -> int:
        """The most tokens of an answer."""
        return self._gate.max_new_tokens

    def engine(self, verbose: bool) -> Callable[[], Engine]:
        """What makes the engine, in its process: it stops the answers that the gate blocks."""
        blocks = partial(Gate.blocks, self._gate, threshold=self._calibration.threshold)
        stop_if = None if self._gate.compare_ungated else blocks
        return partial(ScoringEngine, shipped(self._config), verbose=verbose, text=True, stop_if=stop_if)

    def record(self, row: Row, result: ScoreResult) -> Record:
        """A result as the columns of a part, with `[blocked]` for the text of a blocked answer."""
        blocked = self._gate.blocks(result, self._calibration.threshold)
        text = BLOCKED if blocked else result.text
        leaks = self._terms.in_text if self._gate.fail_terms else None
        return record(row.columns(), result) | {
            "blocked": blocked,
            "text": text,
            "leaked": None if leaks is None else not blocked and leaks(text),
            "leaked_ungated": None if leaks is None else leaks(result.text),
        }

    def row_bytes(self, model: ModelFacts) -> int:
        """About what a row takes on disk."""
        return 512 + TEXT_BYTES * (not self._config.redact)

    def files(self, number: int, engine: dict[str, Any]) -> ShardFiles:
        """A shard's files, to which the calibration's columns are added."""
        schema = _schema(self._gate, redact=self._config.redact)
        return ShardFiles(self._config.out, number, schema, partial(add_verdicts, calibration=self._calibration))

    def summary(self) -> GateSummary:
        """The closing table of the finished shards, from their files."""
        last = self._config.score_range.window.end
        return GateSummary(self._config.out, last, self._calibration, compared=self._gate.compare_ungated)

    def finish(self, summary: GateSummary, names: Sequence[str]) -> None:
        """Write what lies beside the parts: nothing."""


def _schema(gate: Gate, *, redact: bool) -> pa.Schema:
    """Columns of the parts, but those that the calibration adds."""
    added: dict[str, pa.DataType] = {"blocked": pa.bool_(), "text": pa.string(), "leaked": pa.bool_()}
    if redact:
        del added["text"]
    if gate.compare_ungated:
        added["leaked_ungated"] = pa.bool_()
    types = column_types()
    before, after = ({name: types[name] for name in names} for names in (_BEFORE, _AFTER))
    return pa.schema({**before, **added, **after})
