"""`headrift consistency`: pairs scored into a folder, a part at a time, taken up where it was left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from headrift.consistency import lora
from headrift.consistency.pair_parts import record, rejects_table, schema
from headrift.consistency.pairs import Pair, PairRenderer, PairText, RejectedPair, fingerprint
from headrift.consistency.predicting import summarised
from headrift.consistency.reading import read
from headrift.consistency.scoring import ANSWERS, REGIONS, keys_needed, references_for, score_pairs, together
from headrift.consistency.split import drawn
from headrift.consistency.wrappers import wrap
from headrift.corpus.sources import InputError
from headrift.engine_setup import lora_args, prepare_environment
from headrift.model_facts import read_shape
from headrift.preparing import load_tokenizer
from headrift.probed_engine import ProbedEngine
from headrift.runs.folder import JobError
from headrift.runs.provenance import model_fingerprint, versions
from headrift.runs.resumable import ResumableParts

SUMMARY, REJECTS = "summary.json", "rejects.parquet"
# Pairs in a part: what is scored again of a run that broke off is less than two of them.
PART = 128


@dataclass(frozen=True, slots=True)
class Asked:
    """What `headrift consistency` is asked for. steps: N, 0..N are compared. answers: whose answer the compared rows
    follow, of scoring.ANSWERS. per_family: of each family so many wrappers around a question, drawn, None for all;
    families: pairs of these only; limit: of the first so many questions. lora: an adapter's folder. system_prompt: of
    rows that bring none."""

    inputs: tuple[str, ...]
    model: Path
    out: Path
    system_prompt: str
    steps: int = 4
    answer_tokens: int = 16
    answers: str = ANSWERS[0]
    families: tuple[str, ...] = ()
    per_family: int | None = None
    limit: int | None = None
    seed: int = 0
    columns: Mapping[str, str] | None = None
    lora: Path | None = None
    dtype: str = "auto"
    attention_backend: str = "auto"
    resume: bool = False


class ScoringJob:
    """Scores pairs into the folder `asked.out`. What is wrong with what is asked shows before the model is loaded.

    ValueError (JobError, InputError, LoraError, ModelError) and EngineError from the start. In the folder:
    `part-*.parquet`, a row a pair (see pair_parts); `rejects.parquet`, rows and pairs that cannot be scored, with the
    reason; `summary.json`, settings, versions and, at the end, the figures.
    """

    def __init__(self, asked: Asked, verbose: bool = False) -> None:
        self.asked, self._verbose = asked, verbose
        facts, layers, heads = read_shape(asked.model)
        if asked.lora is not None:
            lora.check(asked.lora, asked.model)
            prepare_environment(verbose)
            lora_args(str(asked.lora))
        self._shape = layers, heads
        texts, rejected = _texts(asked)
        room = None if facts.context is None else facts.context - max(asked.answer_tokens, asked.steps + 1)
        tokenizer = load_tokenizer(str(asked.model), False)
        renderer = PairRenderer(tokenizer, system_prompt=asked.system_prompt, max_tokens=room)
        made = list(renderer.render_all(texts))
        self.pairs = together(each for each in made if isinstance(each, Pair))
        self.rejected = [*rejected, *(each for each in made if isinstance(each, RejectedPair))]
        if not self.pairs:
            raise JobError(f"none of {len(made)} pairs can be scored; {self.rejected[0].id}: {self.rejected[0].detail}")
        self._decode = tokenizer.decode
        self._begin()

    @property
    def _names(self) -> list[str]:
        return [_part(number) for number in range(-(-len(self.pairs) // PART))]

    @property
    def done(self) -> int:
        """Pairs whose scores are in the folder."""
        return len(self.pairs) - sum(len(self._of_part(number)) for number in self._todo)

    def run(self, on_pairs: Callable[[int], None] | None = None) -> dict[str, Any]:
        """Score what is not yet scored; the figures. on_pairs: told how many more are done."""
        asked, todo = self.asked, self._todo
        seconds = None
        if todo:
            pairs = [pair for number in todo for pair in self._of_part(number)]
            keys = keys_needed(pairs, asked.steps)
            with ProbedEngine(
                asked.model,
                steps=asked.steps,
                regions=REGIONS,
                attention_backend=asked.attention_backend,
                engine_args={} if asked.dtype == "auto" else {"dtype": asked.dtype},
                verbose=self._verbose,
                row_references=references_for(*self._shape, asked.steps, keys),
                row_keys=keys,
                lora=asked.lora,
            ) as engine:
                begun = time.monotonic()
                how = {"steps": asked.steps, "answer_tokens": asked.answer_tokens, "answers": asked.answers}
                with closing(score_pairs(engine, pairs, on_pairs=on_pairs, **how)) as scores:  # type: ignore[arg-type]
                    records = (record(score, self._decode) for score in scores)
                    for number in todo:
                        self._write(number, records)
                seconds = time.monotonic() - begun
        return self._finish(seconds)

    @property
    def _todo(self) -> list[int]:
        """Numbers of the parts that are not in the folder."""
        missing = set(self._parts.missing(self._names))
        return [number for number, name in enumerate(self._names) if name in missing]

    def _of_part(self, number: int) -> list[Pair]:
        return self.pairs[number * PART : (number + 1) * PART]

    def _write(self, number: int, records: Iterator[dict[str, Any]]) -> None:
        columns = schema(*self._shape, self.asked.steps)
        self._parts.write_records(_part(number), islice(records, len(self._of_part(number))), columns)

    def _begin(self) -> None:
        """Make the folder, or check that the job in it has the same settings."""
        about = {
            "model": str(self.asked.model),
            "lora": None if self.asked.lora is None else str(self.asked.lora),
            "inputs": list(self.asked.inputs),
            "versions": versions(),
        }
        self._parts = ResumableParts(self.asked.out, SUMMARY, self._settings(), about, resume=self.asked.resume)
        if self.rejected:
            self._parts.write(REJECTS, rejects_table(self.rejected))

    def _settings(self) -> dict[str, Any]:
        asked = self.asked
        adapter = None if asked.lora is None else lora.fingerprint(asked.lora)
        return {
            "model": model_fingerprint(asked.model)["fingerprint"],
            "lora": adapter,
            "steps": asked.steps,
            "answer_tokens": asked.answer_tokens,
            "answers": asked.answers,
            "number of pairs": len(self.pairs),
            "set of pairs": fingerprint(self.pairs),
            "dtype": asked.dtype,
        }

    def _finish(self, seconds: float | None) -> dict[str, Any]:
        """Write the summary. seconds: that the engine took, None where there was nothing left for it."""
        if seconds is None:
            seconds = self._parts.read_summary().get("engine_seconds", 0.0)
        results = {
            "engine_seconds": round(seconds, 2),
            "rejected": len(self.rejected),
            **summarised(self._parts.read(self._names), self.asked.seed),
        }
        return self._parts.write_summary(results)


def _texts(asked: Asked) -> tuple[list[PairText], list[RejectedPair]]:
    """The pairs that are asked for, and the rows that are none. ValueError where there is none."""
    found = read(asked.inputs, asked.columns)
    texts = found.pairs + wrap(found.questions)
    known = sorted({text.family for text in texts if text.family is not None})
    unknown = sorted(set(asked.families) - set(known))
    if unknown:
        there = f"families there are: {', '.join(known)}" if known else "the pairs name no family"
        raise InputError(f"--family {unknown[0]} is not among the pairs; {there}")
    if asked.families:
        texts = [text for text in texts if text.family in asked.families]
    if asked.limit is not None:
        first = set(list(dict.fromkeys(text.question for text in texts))[: asked.limit])
        texts = [text for text in texts if text.question in first]
    if asked.per_family is not None:
        texts = drawn(texts, asked.per_family, asked.seed)
    return texts, found.rejected


def _part(number: int) -> str:
    return f"part-{number:05d}.parquet"
