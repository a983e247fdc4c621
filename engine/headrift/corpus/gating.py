"""`headrift gate`: answers, `[blocked]` if the score is at or above the threshold, and their closing table.

An answer is scored while it is made: the request decodes through the calibration's window, where a blocked one stops.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from headrift.calibration.artifact import add_verdicts
from headrift.corpus.config import ScoreConfig, check_context
from headrift.corpus.rows import Row
from headrift.corpus.scoring import TEXT_BYTES, ScoreKind, ScoringEngine, shipped
from headrift.corpus.summary import Summary
from headrift.corpus.worker import Engine
from headrift.fail_terms import FailTerms
from headrift.model_facts import ModelFacts
from headrift.results import ScoreResult
from headrift.runs.parts import Record, ShardFiles, column_types, record
from headrift.runs.reading import read_batches
from headrift.stats import exact_interval
from headrift.terminal import print_table

if TYPE_CHECKING:
    from rich.console import Console

    from headrift.calibration.artifact import Calibration

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
        """Tell whether an answer is held back."""
        if result.score is not None:
            return result.score >= threshold
        if self.on_null is None:
            return bool(result.text.strip())
        return self.on_null is OnNull.BLOCK


class GateKind(ScoreKind):
    """`headrift gate`, as a kind of job; the config has a calibration. ValueError if gate and config contradict."""

    def __init__(self, config: ScoreConfig, gate: Gate) -> None:
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
        """Return what a resumed run must have in common, besides the config."""
        return {"command": "gate", **asdict(self._gate), "fail_terms": list(self._gate.fail_terms)}

    def check(self, context: int | None) -> None:
        """ValueError if an answer exceeds a model's context, in tokens."""
        check_context(self._gate.max_new_tokens, context, "max-new-tokens")

    @property
    def answer_tokens(self) -> int:
        """The most tokens of an answer."""
        return self._gate.max_new_tokens

    def engine(self, verbose: bool) -> Callable[[], Engine]:
        """Return what makes the engine, in its process: it stops the answers that the gate blocks."""
        blocks = partial(Gate.blocks, self._gate, threshold=self._calibration.threshold)
        stop_if = None if self._gate.compare_ungated else blocks
        return partial(ScoringEngine, shipped(self._config), verbose=verbose, text=True, stop_if=stop_if)

    def record(self, row: Row, result: ScoreResult) -> Record:
        """Convert a result to the columns of a part, with `[blocked]` for the text of a blocked answer."""
        blocked = self._gate.blocks(result, self._calibration.threshold)
        text = BLOCKED if blocked else result.text
        leaks = self._terms.in_text if self._gate.fail_terms else None
        return record(row.columns(text=False), result) | {
            "blocked": blocked,
            "text": text,
            "leaked": None if leaks is None else not blocked and leaks(text),
            "leaked_ungated": None if leaks is None else leaks(result.text),
        }

    def row_bytes(self, model: ModelFacts) -> int:
        """Estimate what a row takes on disk."""
        return 512 + TEXT_BYTES * (not self._config.redact)

    def files(self, number: int, engine: dict[str, Any]) -> ShardFiles:
        """Return a shard's files, to which the calibration's columns are added."""
        schema = _schema(self._gate, redact=self._config.redact)
        return ShardFiles(self._config.out, number, schema, partial(add_verdicts, calibration=self._calibration))

    def summary(self) -> GateSummary:
        """Return the closing table of the finished shards, from their files."""
        last = self._config.score_range.window.end
        return GateSummary(self._config.out, last, self._calibration, compared=self._gate.compare_ungated)

    def finish(self, summary: GateSummary, names: Sequence[str]) -> None:
        """Do nothing: a gate has only its parts."""


def _schema(gate: Gate, *, redact: bool) -> pa.Schema:
    """Return the columns of the parts, without those that the calibration adds."""
    added: dict[str, pa.DataType] = {"blocked": pa.bool_(), "text": pa.string(), "leaked": pa.bool_()}
    if redact:
        del added["text"]
    if gate.compare_ungated:
        added["leaked_ungated"] = pa.bool_()
    types = column_types()
    before, after = ({name: types[name] for name in names} for names in (_BEFORE, _AFTER))
    return pa.schema({**before, **added, **after})


@dataclass(frozen=True, slots=True)
class Rate:
    """k of n distinct prompts, with the exact 95% interval of the rate (Clopper-Pearson)."""

    k: int
    n: int
    rate: float
    interval: tuple[float, float]

    @classmethod
    def from_counts(cls, k: int, n: int) -> Rate:
        """Make a rate of counts."""
        return cls(k, n, k / n, exact_interval(k, n))

    @property
    def cells(self) -> tuple[str, str]:
        """The rate and its interval, to print."""
        return f"{self.rate:.1%}", f"{self.interval[0]:.1%}-{self.interval[1]:.1%}"


@dataclass(frozen=True, slots=True)
class GatedClass:
    """What a gate did to a class of rows; the rates are of distinct prompts (at most 20,000, sampled)."""

    rows: int
    rows_blocked: int
    tokens: int  # decoded for answers
    blocked: Rate
    leaked: Rate | None  # answers with a fail term; None without fail terms
    leaked_ungated: Rate | None  # the same without the gate; None unless compared
    prevented: Rate | None  # blocked answers that would have had a fail term; None unless compared


class GateSummary:
    """What was blocked of each class, and how many answers had a fail term, from all files in a folder.

    `compared` tells whether the parts have a column leaked_ungated.
    """

    def __init__(self, folder: Path, last_step: int, calibration: Calibration, *, compared: bool) -> None:
        self.counts = Summary.of_folder(folder, last_step, calibration)
        samples = self.counts.samples()
        sampled = np.sort(np.concatenate([*samples.values(), np.array([], np.int64)]))
        columns = ["label", "blocked", "leaked", "answer_tokens", *(["leaked_ungated"] if compared else [])]
        rows, rows_blocked, tokens = Counter[str](), Counter[str](), Counter[str]()
        prompts: Counter[tuple[str, str]] = Counter()  # sampled prompts for which a column is true
        first = 0
        for batch in read_batches(folder, columns):
            values = {name: batch[name].to_pylist() for name in columns}
            labels = [label or "unlabelled" for label in values["label"]]
            rows.update(labels)
            rows_blocked.update(label for label, blocked in zip(labels, values["blocked"]) if blocked)
            for label, n in zip(labels, values["answer_tokens"]):
                tokens[label] += n
            start, stop = np.searchsorted(sampled, [first, first + len(batch)])
            for at in (sampled[start:stop] - first).tolist():
                row = {name: column[at] for name, column in values.items()}
                true = {name for name in ("blocked", "leaked", "leaked_ungated") if row.get(name) is True}
                if {"blocked", "leaked_ungated"} <= true:
                    true.add("prevented")
                if row["leaked"] is not None:
                    true.add("searched")
                prompts.update((labels[at], name) for name in true)
            first += len(batch)
        self.classes = {}
        for label, sample in samples.items():
            names = ["blocked", *(["leaked"] if prompts[label, "searched"] else [])]
            names += ["leaked_ungated", "prevented"] if compared else []
            rates = {name: Rate.from_counts(prompts[label, name], len(sample)) for name in names}
            self.classes[label] = GatedClass(
                rows=rows[label],
                rows_blocked=rows_blocked[label],
                tokens=tokens[label],
                blocked=rates["blocked"],
                leaked=rates.get("leaked"),
                leaked_ungated=rates.get("leaked_ungated"),
                prevented=rates.get("prevented"),
            )

    @property
    def rows(self) -> int:
        """All rows, rejects included."""
        return self.counts.rows

    def numbers(self) -> dict[str, Any]:
        """Return what run.json keeps."""
        return {**self.counts.numbers(), "gate": {name: asdict(gated) for name, gated in self.classes.items()}}

    def print(self, console: Console, *, rows: int, start_seconds: float, score_seconds: float) -> None:
        """Print the tables (see `Summary.print`)."""
        self.counts.print_counts(console, rows=rows, start_seconds=start_seconds, score_seconds=score_seconds)
        blocked, leaks = [], []
        for name, gated in self.classes.items():
            counts = (f"{n:,}" for n in (gated.rows, gated.rows_blocked, gated.tokens))
            blocked.append((name, *counts, *gated.blocked.cells))
            rates = (gated.leaked, gated.leaked_ungated, gated.prevented)
            for what, rate in zip(("with the gate", "without it", "prevented by it"), rates):
                if rate is not None:
                    leaks.append((f"{name}, {what}", f"{rate.k:,} of {rate.n:,}", *rate.cells))
        print_table(console, ("", "rows", "blocked", "tokens made", "of prompts", "95% interval"), blocked)
        if leaks:
            print_table(console, ("answers with a fail term", "prompts", "", "95% interval"), leaks)
        self.counts.print_warnings(console)
