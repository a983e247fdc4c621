"""`headrift internals`: measure into a folder, one part for each system prompt and kind of measurement."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from headrift.internals import attention, cases, comparing, sentences
from headrift.internals.analysis import analyse
from headrift.internals.comparing import Record, StateReader
from headrift.internals.page import IN_SHORT, find, write_page
from headrift.model_facts import read_shape
from headrift.prepare import load_tokenizer
from headrift.prompts import PromptError
from headrift.report.html import plain
from headrift.runs.folder import JobError, OnRows, ResumableParts, columns, ignore_rows, model_fingerprint, versions
from headrift.scorer import Scorer
from headrift.vllm_engine import prepare_environment

RESULTS, REJECTS = "internals.json", "rejects.parquet"
COMPONENTS, PLACEMENTS, SENTENCES, CKA = "components", "placements", "sentences", "cka"
ATTENTION, INSTABILITY = "attention", "instability"
# Measured in transformers; and in vLLM, which starts once for both.
IN_TRANSFORMERS, IN_ENGINE = (COMPONENTS, PLACEMENTS, SENTENCES), (ATTENTION, INSTABILITY)
QUICK_SYSTEMS, QUICK_PROMPTS, QUICK_DROPS = 4, 6, 2
_REJECTS_SCHEMA = pa.schema(columns("source string, row int64, id string, system string, reason string, detail string"))


@dataclass(frozen=True, slots=True)
class InternalsConfig:
    """What `headrift internals` is asked for."""

    model: Path
    system_prompts: Path  # a folder of .txt files
    prompts: tuple[str, ...]
    out: Path
    limit: int | None = None  # use the first prompts only
    quick: bool = False  # QUICK_SYSTEMS system prompts, the first QUICK_PROMPTS prompts
    drop_sentences: int = 8  # for how many prompts sentences are dropped, and system prompts put elsewhere
    attention: bool = True  # also what needs the engine: attention, and what sentences do to instability
    features: Path | None = None
    steps: int = 8  # tokens of the answer
    dtype: str = "auto"
    resume: bool = False


@dataclass(slots=True)
class _Part:
    """The work on one system prompt."""

    name: str
    cases: list[cases.Case]
    placed: list[comparing.Placed] = field(default_factory=list)
    drops: list[sentences.DroppedSentence] = field(default_factory=list)

    def rows(self, kind: str) -> int:
        """How many rows are run for a kind of measurement."""
        return {
            COMPONENTS: 2 * len(self.cases),
            PLACEMENTS: len(self.placed),
            SENTENCES: sentences.count_rows(self.drops),
            ATTENTION: len(attention.KINDS) * len(self.cases),
            INSTABILITY: sentences.count_rows(sentences.scored_drops(self.drops)),
        }[kind]


class InternalsJob:
    """Measures into a folder. ValueError if the config or an input cannot be used, before the model is loaded."""

    def __init__(self, config: InternalsConfig) -> None:
        self.config = config
        self._seconds: dict[str, float] = defaultdict(float)  # by kind of measurement
        facts, self._layers, self._heads = read_shape(config.model)
        self._rules = sentences.read_rules(config.features)
        self._tokenizer = load_tokenizer(str(config.model), False)
        max_tokens = None if facts.context is None else facts.context - config.steps - 1
        self.renderer, neutral = cases.Renderer(self._tokenizer, max_tokens), cases.NeutralText(self._tokenizer)
        self.systems = cases.read_system_prompts(config.system_prompts)
        limit, n_drops = config.limit, config.drop_sentences
        if config.quick:
            last, n = len(self.systems) - 1, min(QUICK_SYSTEMS, len(self.systems))
            self.systems = [self.systems[round(i)] for i in np.linspace(0, last, n).tolist()]  # evenly spaced
            limit, n_drops = min(limit or QUICK_PROMPTS, QUICK_PROMPTS), min(n_drops, QUICK_DROPS)
        self.questions, self.rejects = cases.read_questions(config.prompts, self.renderer, limit)
        if not self.questions:
            why = f"; the first: {self.rejects[0].detail}" if self.rejects else ""
            raise JobError(f"no prompt in {', '.join(config.prompts)} can be used{why}")
        self._parts = [self._part(i, system, n_drops, neutral) for i, system in enumerate([*self.systems, None])]
        if not any(part.cases for part in self._parts[:-1]):
            raise JobError(f"no prompt can be used under any system prompt; the first: {self.rejects[0].detail}")
        self._folder = ResumableParts(config.out, RESULTS, self._settings(), self._about(), resume=config.resume)

    def _part(self, number: int, system: cases.SystemPrompt | None, n_drops: int, neutral: cases.NeutralText) -> _Part:
        """The work on a system prompt, None for CHECK."""
        made = self._without_rejects(cases.make_cases(self.questions, system, number, self.renderer, neutral))
        part = _Part(cases.CHECK if system is None else system.name, made)
        if system is not None and n_drops:
            # A prompt that was rejected under this system prompt is not tried again.
            questions = [case.question for case in made][:n_drops]
            part.placed = self._without_rejects(comparing.make_placed(questions, system, self.renderer))
            part.drops = self._without_rejects(sentences.drop_sentences(questions, system, self.renderer, neutral))
        return part

    def _without_rejects(self, results: Any) -> list[Any]:
        results = list(results)
        self.rejects += [one for one in results if isinstance(one, cases.Reject)]
        return [one for one in results if not isinstance(one, cases.Reject)]

    def _settings(self) -> dict[str, Any]:
        config, digest = self.config, hashlib.sha256()
        for part in self._parts:
            ids: list[Any] = [[case.system.token_ids, case.neutral.token_ids] for case in part.cases]
            ids += [[placed.rendering.token_ids] for placed in part.placed]
            ids += [[drop.dropped.token_ids, drop.neutral.token_ids] for drop in part.drops]
            digest.update(json.dumps([part.name, ids]).encode())
        return {
            "model": model_fingerprint(config.model)["fingerprint"],
            "steps": config.steps,
            "dtype": config.dtype,
            "prompts": len(self.questions),
            "system prompts": [part.name for part in self._parts],
            "tokens of the prompts": digest.hexdigest(),
        }

    def _about(self) -> dict[str, Any]:
        return {
            "model": str(self.config.model),
            "prompts": list(self.config.prompts),
            "system_prompts": str(self.config.system_prompts),
            "baseline": self.renderer.baseline,
            "template_default": self.renderer.default,
            "versions": versions(),
        }

    @property
    def _work(self) -> list[tuple[str, int]]:
        """Kind and number of all parts."""
        kinds = (*IN_TRANSFORMERS, *IN_ENGINE) if self.config.attention else IN_TRANSFORMERS
        return [(kind, number) for kind in kinds for number, part in enumerate(self._parts) if part.rows(kind)]

    @property
    def _missing(self) -> list[tuple[str, int]]:
        """Those that are still to be measured."""
        return [one for one in self._work if self._folder.missing([_name(*one)])]

    @property
    def rows(self) -> int:
        """Rows that are still to be run."""
        missing = self._missing
        alone = len(self.questions) if any(kind in IN_TRANSFORMERS for kind, _ in missing) else 0
        return sum(self._parts[number].rows(kind) for kind, number in missing) + alone

    def run(self, on_rows: OnRows = ignore_rows, verbose: bool = False) -> dict[str, Any]:
        """Measure, analyse and write the results, and return what internals.json contains. verbose: let vLLM log."""
        return self._write_results(self.measure(on_rows, verbose))

    def measure(self, on_rows: OnRows = ignore_rows, verbose: bool = False) -> float:
        """Measure the missing parts, and return how many seconds it took."""
        missing, start, config = self._missing, time.monotonic(), self.config
        prepare_environment(verbose)
        in_transformers = [(kind, number) for kind, number in missing if kind in IN_TRANSFORMERS]
        if in_transformers:
            with StateReader(config.model, config.dtype) as reader:
                baseline = comparing.read_baseline(reader, self._tokenizer, self.questions, config.steps, on_rows)
                for kind, number in in_transformers:
                    with self._timed(kind):
                        self._measure_part(reader, baseline, kind, number, on_rows)
        in_engine = {kind: [number for one, number in missing if one == kind] for kind in IN_ENGINE}
        if any(in_engine.values()):
            with attention.open_scorer(config.model, config.steps, config.dtype, verbose) as scorer:
                with self._timed(ATTENTION):
                    self._measure_attention(scorer, in_engine[ATTENTION], on_rows)
                for number in in_engine[INSTABILITY]:
                    part = self._parts[number]
                    with self._timed(INSTABILITY):
                        drops = sentences.scored_drops(part.drops)
                        records = sentences.measure_instability(scorer, part.name, drops, on_rows)
                    self._write(INSTABILITY, number, records, sentences.INSTABILITY_SCHEMA)
        return time.monotonic() - start

    @contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._seconds[kind] += time.monotonic() - start

    def _measure_part(
        self, reader: StateReader, baseline: comparing.Baseline, kind: str, number: int, on_rows: OnRows
    ) -> None:
        part = self._parts[number]
        if kind == COMPONENTS:
            records, cka = comparing.compare(reader, part.name, part.cases, baseline, on_rows)
            # Before the components, whose file says that the part is done.
            self._write(CKA, number, cka, comparing.CKA_SCHEMA)
            self._write(kind, number, records, comparing.schema(self._layers))
        elif kind == PLACEMENTS:
            records = comparing.compare_placements(reader, part.name, part.placed, baseline, on_rows)
            self._write(kind, number, records, comparing.PLACEMENTS_SCHEMA)
        else:
            records = sentences.measure_kl(reader, part.name, part.drops, on_rows)
            self._write(kind, number, records, sentences.KL_SCHEMA)

    def _measure_attention(self, scorer: Scorer, numbers: Sequence[int], on_rows: OnRows) -> None:
        """Run parts through the engine, which is kept full across them."""
        schema = attention.schema(self._layers, self._heads, scorer.engine.windows)
        prompts = (prompt for number in numbers for prompt in attention.make_prompts(self._parts[number].cases))
        with closing(attention.score(scorer, prompts, on_rows)) as results:
            for number in numbers:
                part = self._parts[number]
                self._write(ATTENTION, number, list(attention.records(part.name, part.cases, results)), schema)

    def _write(self, kind: str, number: int, records: Sequence[Record], schema: pa.Schema) -> None:
        self._folder.write_records(_name(kind, number), records, schema)

    def table(self, kind: str) -> pa.Table | None:
        """What was measured of a kind; None if nothing was."""
        return self._folder.read(self._folder.written(f"{kind}/part-*.parquet"))

    def progress(self) -> str:
        """How far the job is, in words."""
        parts = len(self._work)
        return f"{parts - len(self._missing)} of {parts} parts are done; rerun with --resume"

    def _write_results(self, seconds: float) -> dict[str, Any]:
        rejects = [*self.rejects, *self._not_finite()]
        self._folder.write_records(REJECTS, map(asdict, rejects), _REJECTS_SCHEMA)
        tables = {kind: self.table(kind) for kind in (*IN_TRANSFORMERS, *IN_ENGINE, CKA)}
        changes, numbers = analyse(tables, len(self.questions), self.systems, self._rules)
        findings = {question: [one.to_json() for one in some] for question, some in find(numbers).items()}
        before = self._folder.read_summary()  # a job that is resumed adds to the seconds that it took
        seconds_of = Counter(before.get("seconds_of", {}))
        seconds_of.update(self._seconds)
        results = self._folder.write_summary(
            {
                "seconds": round(before.get("seconds", 0.0) + seconds, 2),
                "seconds_of": {kind: round(one, 2) for kind, one in seconds_of.items()},
                "rejected": len(rejects),
                "summary": findings.pop(IN_SHORT),
                "findings": findings,
                "numbers": plain(numbers),
            }
        )
        write_page(self.config.out, self.config.model.name, changes, numbers, self.renderer.baseline, len(rejects))
        return results

    def _not_finite(self) -> list[cases.Reject]:
        """The cases that were run and have no record."""
        table = self.table(COMPONENTS)
        assert table is not None
        measured = set(zip(table["system"].to_pylist(), table["prompt"].to_pylist()))
        detail = "the model computes infinities or no numbers for it: try --dtype float32, or leave the prompt out"
        error = PromptError("not_finite", detail)
        return [
            case.question.reject(part.name, error)
            for part in self._parts
            for case in part.cases
            if (part.name, case.question.number) not in measured
        ]


def _name(kind: str, number: int) -> str:
    """The file of a system prompt's part in the folder."""
    return f"{kind}/part-{number:03d}.parquet"
