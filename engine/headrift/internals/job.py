"""`headrift internals`: the measurements into a folder, a part for each system prompt, taken up where it was left."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from headrift.engine_setup import prepare_environment
from headrift.internals import attention, comparing, instability, placements, sentences
from headrift.internals.analysis import analysed, numbers
from headrift.internals.cases import (
    CHECK,
    Case,
    Reject,
    SystemPrompt,
    make_cases,
    read_questions,
    read_system_prompts,
)
from headrift.internals.components import Model
from headrift.internals.findings import findings, summary
from headrift.internals.neutral import Neutral
from headrift.internals.page import write_page
from headrift.internals.phrases import read_rules, texts_of
from headrift.internals.renderings import Renderer
from headrift.model_facts import read_shape
from headrift.preparing import load_tokenizer
from headrift.report.html import plain
from headrift.runs.folder import JobError
from headrift.runs.provenance import model_fingerprint, versions
from headrift.runs.resumable import ResumableParts
from headrift.scorer import Scorer

RESULTS, REJECTS = "internals.json", "rejects.parquet"
COMPONENTS, CKA, PLACEMENTS, SENTENCES, ATTENTION = "components", "cka", "placements", "sentences", "attention"
INSTABILITY = "instability"
# In transformers; and in vLLM, which starts once for all of them.
INSIDE, IN_ENGINE = (COMPONENTS, PLACEMENTS, SENTENCES), (ATTENTION, INSTABILITY)
# --quick: so many system prompts, spread over the names, and the first so many prompts.
QUICK_SYSTEMS, QUICK_PROMPTS, QUICK_DROPS = 4, 6, 2
_REJECTS = pa.schema(
    [
        ("source", pa.string()),
        ("row", pa.int64()),
        ("id", pa.string()),
        ("system", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Asked:
    """What `headrift internals` is asked for. limit: the first so many prompts. drop_sentences: for the first so many
    prompts every sentence is dropped in turn, and every system text is put elsewhere; 0: neither. steps: tokens of the
    answer that are looked at. features: a file of further ones, see phrases. attention: measure where the model looks
    too, and what dropped sentences do to the instability, for which vLLM starts. seed: of the intervals."""

    model: Path
    system_prompts: Path
    prompts: tuple[str, ...]
    out: Path
    limit: int | None = None
    quick: bool = False
    drop_sentences: int = 8
    attention: bool = True
    features: Path | None = None
    steps: int = 8
    dtype: str = "auto"
    seed: int = 0
    resume: bool = False


@dataclass(slots=True)
class _Part:
    """The work on one system prompt."""

    name: str
    cases: list[Case]
    placed: list[placements.Placed] = field(default_factory=list)
    drops: list[sentences.Drop] = field(default_factory=list)

    def rows(self, kind: str) -> int:
        return {
            COMPONENTS: 2 * len(self.cases),
            PLACEMENTS: len(self.placed),
            SENTENCES: sentences.n_rows(self.drops),
            ATTENTION: len(attention.KINDS) * len(self.cases),
            INSTABILITY: sentences.n_rows(instability.measured(self.drops)),
        }[kind]


class InternalsJob:
    """Measures into the folder `asked.out`. What is wrong with what is asked shows before the model is loaded.

    ValueError (JobError, InputError, ModelError) and EngineError from the start. In the folder, one Parquet file for
    each system prompt: `components/` (a row for a prompt and comparison, see comparing), `cka/`, `placements/`,
    `sentences/`, `attention/` and `instability/`; `rejects.parquet`; `internals.json`, settings, versions and, at the
    end, what was found; `report.html`.
    """

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self._seconds: dict[str, float] = {}  # by kind of measurement
        facts, layers, heads = read_shape(asked.model)
        self._shape = layers, heads
        self._rules = read_rules(asked.features)
        self._tokenizer = load_tokenizer(str(asked.model), False)
        room = None if facts.context is None else facts.context - asked.steps - 1
        self.renderer, neutral = Renderer(self._tokenizer, room), Neutral(self._tokenizer)
        systems = read_system_prompts(asked.system_prompts)
        limit, n_drops = asked.limit, asked.drop_sentences
        if asked.quick:
            systems = _spread(systems, QUICK_SYSTEMS)
            limit, n_drops = min(limit or QUICK_PROMPTS, QUICK_PROMPTS), min(n_drops, QUICK_DROPS)
        self.systems = systems
        self.questions, self.rejected = read_questions(asked.prompts, self.renderer, limit)
        if not self.questions:
            why = f"; the first: {self.rejected[0].detail}" if self.rejected else ""
            raise JobError(f"no prompt in {', '.join(asked.prompts)} can be used{why}")
        self._parts = [self._part(number, system, n_drops, neutral) for number, system in enumerate([*systems, None])]
        if not any(part.cases for part in self._parts[:-1]):
            raise JobError(f"no prompt can be used under any system prompt; the first: {self.rejected[0].detail}")
        self.output = ResumableParts(asked.out, RESULTS, self._settings, self._about(), resume=asked.resume)

    def _part(self, number: int, system: SystemPrompt | None, n_drops: int, neutral: Neutral) -> _Part:
        """The work on a system prompt, None for the check; what cannot be worked on goes to the rejects."""
        made: list[Any] = list(make_cases(self.questions, system, number, self.renderer, neutral))
        part = _Part(CHECK if system is None else system.name, self._sorted_out(made))
        if system is not None and n_drops:
            # A prompt that was rejected under this system prompt is not tried again.
            some = [case.question for case in part.cases][:n_drops]
            part.placed = self._sorted_out(placements.make_placed(some, system, self.renderer))
            part.drops = self._sorted_out(sentences.make_drops(some, system, self.renderer, neutral))
        return part

    def _sorted_out(self, made: Sequence[Any]) -> list[Any]:
        self.rejected += [each for each in made if isinstance(each, Reject)]
        return [each for each in made if not isinstance(each, Reject)]

    @property
    def _todo(self) -> list[tuple[str, int]]:
        """Kind and number of the parts that are not in the folder."""
        return [
            (kind, number)
            for kind in self._phases
            for number, part in enumerate(self._parts)
            if part.rows(kind) and self.output.missing([_file(kind, number)])
        ]

    @property
    def rows(self) -> int:
        """Rows that have yet to run."""
        todo = self._todo
        base = len(self.questions) if any(kind in INSIDE for kind, _ in todo) else 0
        return sum(self._parts[number].rows(kind) for kind, number in todo) + base

    @property
    def _phases(self) -> tuple[str, ...]:
        return (*INSIDE, *IN_ENGINE) if self.asked.attention else INSIDE

    @property
    def done(self) -> str:
        """How far it is, in words."""
        parts = sum(1 for kind in self._phases for part in self._parts if part.rows(kind))
        return f"{parts - len(self._todo)} of {parts} parts are done"

    def run(self, on_rows: Callable[[int], None] | None = None, verbose: bool = False) -> dict[str, Any]:
        """`measure`, and write what was found; what `internals.json` then holds."""
        return self._finish(self.measure(on_rows, verbose))

    def measure(self, on_rows: Callable[[int], None] | None = None, verbose: bool = False) -> float:
        """Measure what is not yet measured; the seconds that it took. on_rows: told how many more are done. verbose:
        let vLLM log."""
        todo, begun = self._todo, time.monotonic()
        prepare_environment(verbose)
        inside = [(kind, number) for kind, number in todo if kind in INSIDE]
        if inside:
            with Model(self.asked.model, self.asked.dtype) as model:
                base = comparing.read_base(model, self._tokenizer, self.questions, self.asked.steps, on_rows)
                for kind, number in inside:
                    with self._timed(kind):
                        self._measure(model, base, kind, number, on_rows)
        in_engine = {kind: [number for one, number in todo if one == kind] for kind in IN_ENGINE}
        if any(in_engine.values()):
            asked = self.asked
            with attention.scorer_of(asked.model, asked.steps, asked.dtype, verbose) as scorer:
                with self._timed(ATTENTION):
                    self._attend(scorer, in_engine[ATTENTION], on_rows)
                for number in in_engine[INSTABILITY]:
                    part = self._parts[number]
                    with self._timed(INSTABILITY):
                        records = instability.measure(scorer, part.name, instability.measured(part.drops), on_rows)
                    self._write(INSTABILITY, number, records, instability.SCHEMA)
        return time.monotonic() - begun

    @contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self._seconds[kind] = self._seconds.get(kind, 0.0) + time.monotonic() - begun

    def _attend(self, scorer: Scorer, todo: Sequence[int], on_rows: Callable[[int], None] | None) -> None:
        """Take the parts through the engine, which is kept full across them."""
        schema = attention.schema(*self._shape, scorer.engine.windows)
        every = (prompt for number in todo for prompt in attention.prompts_of(self._parts[number].cases))
        with closing(scorer.score(every)) as results:
            counted = _counted(results, on_rows)
            for number in todo:
                part = self._parts[number]
                self._write(ATTENTION, number, list(attention.measure(part.name, part.cases, counted)), schema)

    def _measure(
        self, model: Model, base: comparing.Base, kind: str, number: int, on_rows: Callable[[int], None] | None
    ) -> None:
        part = self._parts[number]
        if kind == COMPONENTS:
            records, cka = comparing.compare(model, part.name, part.cases, base, on_rows)
            self._write(CKA, number, cka, comparing.CKA_SCHEMA)
            schema = comparing.schema(model.shape[0])
        elif kind == PLACEMENTS:
            records, schema = placements.measure(model, part.name, part.placed, base, on_rows), placements.SCHEMA
        else:
            records, schema = sentences.measure(model, part.name, part.drops, on_rows), sentences.SCHEMA
        # Last, for it says that the part is done.
        self._write(kind, number, records, schema)

    def _write(self, kind: str, number: int, records: list[dict[str, Any]], schema: pa.Schema) -> None:
        self.output.write_records(_file(kind, number), records, schema)

    def table(self, kind: str) -> pa.Table | None:
        """What was measured of a kind, None where there is nothing of it."""
        return self.output.read(self.output.written(f"{kind}/part-*.parquet"))

    @cached_property
    def _settings(self) -> dict[str, Any]:
        asked, tokens = self.asked, hashlib.sha256()
        for part in self._parts:
            rows: list[Any] = [[case.system.token_ids, case.neutral.token_ids] for case in part.cases]
            rows += [[placed.rendered.token_ids] for placed in part.placed]
            rows += [[drop.dropped.token_ids, drop.neutral.token_ids] for drop in part.drops]
            tokens.update(json.dumps([part.name, rows]).encode())
        return {
            "model": model_fingerprint(asked.model)["fingerprint"],
            "steps": asked.steps,
            "dtype": asked.dtype,
            "prompts": len(self.questions),
            "system prompts": [part.name for part in self._parts],
            "tokens of the prompts": tokens.hexdigest(),
        }

    def _finish(self, seconds: float) -> dict[str, Any]:
        rejected = [*self.rejected, *self._not_finite()]
        self.output.write_records(REJECTS, [asdict(each) for each in rejected], _REJECTS)
        tables = {kind: self.table(kind) for kind in (*INSIDE, *IN_ENGINE, CKA)}
        of = analysed(tables, len(self.questions), texts_of(self.systems), self._rules, self.asked.seed)
        found = {
            "seconds": round(seconds, 2),
            "seconds_of": {kind: round(of_kind, 2) for kind, of_kind in self._seconds.items()},
            "rejected": len(rejected),
            "summary": summary(of),
            "findings": findings(of),
            "numbers": plain(numbers(of)),
        }
        value = self.output.write_summary(found)
        write_page(self.asked.out, of, value["about"], len(rejected))
        return value

    def _not_finite(self) -> list[Reject]:
        """The cases that were run and have no record."""
        table = self.table(COMPONENTS)
        assert table is not None
        there = set(zip(table["system"].to_pylist(), table["prompt"].to_pylist()))
        detail = "the model computes infinities or no numbers for it: try --dtype float32, or leave the prompt out"
        return [
            Reject(case.question.source, case.question.row, case.question.id, part.name, "not_finite", detail)
            for part in self._parts
            for case in part.cases
            if (part.name, case.question.number) not in there
        ]

    def _about(self) -> dict[str, Any]:
        return {
            "model": str(self.asked.model),
            "prompts": list(self.asked.prompts),
            "system_prompts": str(self.asked.system_prompts),
            "baseline": self.renderer.baseline,
            "template_default": self.renderer.default,
            "versions": versions(),
        }


def _file(kind: str, number: int) -> str:
    return f"{kind}/part-{number:03d}.parquet"


def _counted(results: Iterator[Any], on_rows: Callable[[int], None] | None) -> Iterator[Any]:
    for result in results:
        if on_rows:
            on_rows(1)
        yield result


def _spread(systems: Sequence[SystemPrompt], n: int) -> list[SystemPrompt]:
    """At most n of them, first and last among them."""
    if len(systems) <= n:
        return list(systems)
    return [systems[round(i * (len(systems) - 1) / (n - 1))] for i in range(n)]
