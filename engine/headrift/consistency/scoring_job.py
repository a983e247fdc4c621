"""`headrift consistency`: pairs scored into a folder, a part at a time, taken up where it was left."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from headrift.beside import write_json, written_beside
from headrift.consistency import lora
from headrift.consistency.pair_parts import record, rejects_table, schema, table_of
from headrift.consistency.pairs import Pair, PairRenderer, PairText, RejectedPair, fingerprint
from headrift.consistency.predicting import summarised
from headrift.consistency.reading import read
from headrift.consistency.scoring import ANSWERS, REGIONS, keys_needed, references_for, score_pairs, together
from headrift.consistency.split import drawn
from headrift.consistency.wrappers import wrap
from headrift.corpus.fingerprints import model_fingerprint, versions
from headrift.corpus.sources import InputError
from headrift.engine_setup import lora_args, prepare_environment
from headrift.job_folder import JobError, begun_before, new_folder, shape_of
from headrift.preparing import load_tokenizer
from headrift.probed_engine import ProbedEngine

SUMMARY, REJECTS, _PARTS = "summary.json", "rejects.parquet", "part-*.parquet"
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
        facts, layers, heads = shape_of(asked.model)
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
    def done(self) -> int:
        """Pairs whose scores are in the folder."""
        return sum(len(self._of_part(number)) for number in self._parts_there())

    def run(self, on_pairs: Callable[[int], None] | None = None) -> dict[str, Any]:
        """Score what is not yet scored; the figures. on_pairs: told how many more are done."""
        asked, there = self.asked, self._parts_there()
        todo = [number for number in range(self._n_parts) if number not in there]
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
    def _n_parts(self) -> int:
        return -(-len(self.pairs) // PART)

    def _of_part(self, number: int) -> list[Pair]:
        return self.pairs[number * PART : (number + 1) * PART]

    def _parts_there(self) -> set[int]:
        numbers = {_part(number): number for number in range(self._n_parts)}
        return {numbers[path.name] for path in self.asked.out.glob(_PARTS) if path.name in numbers}

    def _write(self, number: int, records: Iterator[dict[str, Any]]) -> None:
        columns = schema(*self._shape, self.asked.steps)
        table = table_of(list(islice(records, len(self._of_part(number)))), columns)
        with written_beside(self.asked.out / _part(number)) as unfinished:
            pq.write_table(table, unfinished, compression="zstd")

    def _begin(self) -> None:
        """Make the folder, or make sure that what lies in it was begun with the same settings."""
        out, settings = self.asked.out, self._settings()
        if begun_before(out / SUMMARY, settings, self.asked.resume):
            return
        new_folder(out)
        if self.rejected:
            with written_beside(out / REJECTS) as unfinished:
                pq.write_table(rejects_table(self.rejected), unfinished)
        self._write_summary({"settings": settings})

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
            seconds = json.loads((self.asked.out / SUMMARY).read_text(encoding="utf-8")).get("engine_seconds", 0.0)
        parts = [self.asked.out / _part(number) for number in range(self._n_parts)]
        found = {
            "settings": self._settings(),
            "about": {
                "model": str(self.asked.model),
                "lora": None if self.asked.lora is None else str(self.asked.lora),
                "inputs": list(self.asked.inputs),
                "versions": versions(),
            },
            "engine_seconds": round(seconds, 2),
            "rejected": len(self.rejected),
            **summarised(pa.concat_tables(pq.read_table(path) for path in parts), self.asked.seed),
        }
        self._write_summary(found)
        return found

    def _write_summary(self, value: dict[str, Any]) -> None:
        write_json(self.asked.out / SUMMARY, value)


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
