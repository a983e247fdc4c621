"""`headrift consistency`: score pairs into a folder, resumable.

`part-*.parquet` have a row per pair. `distance_l2` and `distance_tv` (steps x layers x heads, step 0 first, `n_steps` +
1 of them) and `clean_mass` and `wrapped_mass` (each side's own steps x layers x heads x core, wrapper, system) are
flattened; the metadata, JSON under b"headrift", has `layers`, `heads` and the `shapes`. `distance` is the mean of all
of `distance_tv`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from headrift.consistency.answers import flipped, is_hinted, is_right
from headrift.consistency.data import check_families, first_questions, read_pairs, render, sample_wrappers
from headrift.consistency.model import check_lora, lora_fingerprint
from headrift.consistency.pairs import Pair, PairRenderer, PairText, RejectedPair, fingerprint
from headrift.consistency.scoring import (
    ANSWERS,
    REGIONS,
    PairScore,
    group_by_clean_prompt,
    keys_needed,
    references_for,
    score_pairs,
)
from headrift.consistency.summary import summarise
from headrift.model_facts import read_shape
from headrift.prepare import load_tokenizer
from headrift.probed_engine import ProbedEngine
from headrift.requests import L2, TV
from headrift.runs.folder import JobError, ResumableParts, model_fingerprint, versions
from headrift.vllm_engine import lora_args, prepare_environment

SUMMARY, REJECTS = "summary.json", "rejects.parquet"
# Pairs in a part: an interrupted run scores fewer than two parts again.
PART = 128
_STRING, _BOOL, _COUNT, _FLOAT = pa.string(), pa.bool_(), pa.int32(), pa.float64()
_COLUMNS = (
    ("id question family wrapper", _STRING),
    ("clean_tokens wrapped_tokens core_tokens wrapper_tokens", _COUNT),
    ("clean_answer wrapped_answer", _STRING),
    ("flipped clean_right wrapped_right hinted", _BOOL),  # null without an answer key, or without a hint
    ("n_steps", _COUNT),
    ("distance clean_instability wrapped_instability clean_focus wrapped_focus", _FLOAT),
    ("distance_l2 distance_tv clean_mass wrapped_mass", pa.list_(pa.float32())),
)
_REJECT_SCHEMA = pa.schema([(f.name, _COUNT if f.name == "row" else _STRING) for f in fields(RejectedPair)])


@dataclass(frozen=True, slots=True)
class ConsistencyConfig:
    """Options of `headrift consistency`."""

    inputs: tuple[str, ...]
    model: Path
    out: Path
    system_prompt: str  # for rows without one
    steps: int = 4  # N; steps 0..N are compared
    answer_tokens: int = 16
    answers: str = ANSWERS[0]  # whose answer the compared rows follow, one of scoring.ANSWERS
    families: tuple[str, ...] = ()  # only pairs of these
    per_family: int | None = None  # wrappers drawn of each family per question; None for all
    limit: int | None = None  # first questions
    seed: int = 0
    columns: Mapping[str, str] | None = None  # what the files call a key
    lora: Path | None = None  # folder of an adapter
    dtype: str = "auto"
    attention_backend: str = "auto"
    resume: bool = False


class ScoringJob:
    """Scores pairs into the folder `config.out`: parts, rejects.parquet (what cannot be scored, with the reason) and
    summary.json. ValueError or EngineError if the config cannot be used, before the model is loaded."""

    def __init__(self, config: ConsistencyConfig, verbose: bool = False) -> None:
        self.config, self._verbose = config, verbose
        facts, layers, heads = read_shape(config.model)
        self._shape = layers, heads
        if config.lora is not None:
            check_lora(config.lora, config.model)
            prepare_environment(verbose)
            lora_args(str(config.lora))
        texts, rejected = _pair_texts(config)
        room = None if facts.context is None else facts.context - max(config.answer_tokens, config.steps + 1)
        tokenizer = load_tokenizer(str(config.model), False)
        renderer = PairRenderer(tokenizer, system_prompt=config.system_prompt, max_tokens=room)
        pairs, unusable = render(renderer, texts)
        self.pairs, self.rejected = group_by_clean_prompt(pairs), [*rejected, *unusable]
        if not self.pairs:
            first = self.rejected[0]
            raise JobError(f"none of {len(texts)} pairs can be scored; {first.id}: {first.detail}")
        self._decode = tokenizer.decode
        adapter = None if config.lora is None else str(config.lora)
        about = {"model": str(config.model), "lora": adapter, "inputs": list(config.inputs), "versions": versions()}
        self._parts = ResumableParts(config.out, SUMMARY, self._settings(), about, resume=config.resume)
        if self.rejected and not self._parts.resumed:
            self._parts.write_records(REJECTS, map(asdict, self.rejected), _REJECT_SCHEMA)

    def _settings(self) -> dict[str, Any]:
        config = self.config
        return {
            "model": model_fingerprint(config.model)["fingerprint"],
            "lora": None if config.lora is None else lora_fingerprint(config.lora),
            "steps": config.steps,
            "answer_tokens": config.answer_tokens,
            "answers": config.answers,
            "number of pairs": len(self.pairs),
            "set of pairs": fingerprint(self.pairs),
            "dtype": config.dtype,
        }

    @property
    def _pairs_of_part(self) -> dict[str, list[Pair]]:
        starts = range(0, len(self.pairs), PART)
        return {f"part-{i:05d}.parquet": self.pairs[start : start + PART] for i, start in enumerate(starts)}

    @property
    def done(self) -> int:
        """Number of pairs whose scores are in the folder."""
        parts = self._pairs_of_part
        return len(self.pairs) - sum(len(parts[name]) for name in self._parts.missing(parts))

    def run(self, on_pairs: Callable[[int], None] | None = None) -> dict[str, Any]:
        """Score the missing pairs and summarise all. on_pairs: see `score_pairs`."""
        config, parts = self.config, self._pairs_of_part
        missing = self._parts.missing(parts)
        seconds = self._parts.read_summary().get("engine_seconds", 0.0)
        if missing:
            pairs = [pair for name in missing for pair in parts[name]]
            schema = part_schema(*self._shape, config.steps)
            with self._engine(keys_needed(pairs, config.steps)) as engine:
                begin = time.monotonic()
                how: Any = {"answer_tokens": config.answer_tokens, "answers": config.answers, "on_pairs": on_pairs}
                with closing(score_pairs(engine, pairs, steps=config.steps, **how)) as scores:
                    records = (record(score, self._decode) for score in scores)
                    for name in missing:
                        self._parts.write_records(name, islice(records, len(parts[name])), schema)
                seconds = time.monotonic() - begin
        summary = summarise(self._parts.read(parts), config.seed)
        counts = {"engine_seconds": round(seconds, 2), "rejected": len(self.rejected)}
        return self._parts.write_summary({**counts, **summary})

    def _engine(self, keys: int) -> ProbedEngine:
        config = self.config
        return ProbedEngine(
            config.model,
            steps=config.steps,
            regions=REGIONS,
            attention_backend=config.attention_backend,
            engine_args={} if config.dtype == "auto" else {"dtype": config.dtype},
            verbose=self._verbose,
            row_references=references_for(*self._shape, config.steps, keys),
            row_keys=keys,
            lora=config.lora,
        )


def _pair_texts(config: ConsistencyConfig) -> tuple[list[PairText], list[RejectedPair]]:
    """Read the selected pairs and the rows that are neither a pair nor a question; ValueError if none is a pair."""
    inputs = read_pairs(config.inputs, config.columns)
    texts = inputs.texts()
    check_families("--family", config.families, texts)
    texts = [text for text in texts if not config.families or text.family in config.families]
    texts = first_questions(texts, config.limit)
    if config.per_family is not None:
        texts = sample_wrappers(texts, config.per_family, config.seed)
    return texts, inputs.rejected


def part_schema(layers: int, heads: int, steps: int) -> pa.Schema:
    """Columns of a part, for a model's layers and heads and steps 0..`steps`."""
    of_heads = ["n_steps + 1", "layers", "heads"]
    of_mass = ["steps of its answer, at most steps + 1", *of_heads[1:], "core, wrapper, system"]
    shapes = {"distance_l2": of_heads, "distance_tv": of_heads, "clean_mass": of_mass, "wrapped_mass": of_mass}
    about = {"layers": layers, "heads": heads, "steps": steps, "shapes": shapes}
    columns = [(name, kind) for names, kind in _COLUMNS for name in names.split()]
    return pa.schema(columns, metadata={b"headrift": json.dumps(about).encode()})


def record(score: PairScore, decode: Callable[..., str]) -> dict[str, Any]:
    """A pair's row of a part. decode: token ids to text, of the tokenizer."""
    pair, key, distance = score.pair, score.pair.key, score.distance
    sides = {"clean": (pair.clean_ids, score.clean), "wrapped": (pair.wrapped_ids, score.wrapped)}
    replies = {name: decode(side.answer_ids, skip_special_tokens=True).strip() for name, (_, side) in sides.items()}
    row: dict[str, Any] = {
        "id": pair.id,
        "question": pair.question,
        "family": pair.family,
        "wrapper": pair.wrapper_name,
        "core_tokens": pair.core.length,
        "wrapper_tokens": sum(end - start for start, end in pair.wrapper),
        "flipped": flipped(replies["clean"], replies["wrapped"], key),
        "hinted": None if key is None or not pair.hints else is_hinted(replies["wrapped"], key),
        "n_steps": len(distance) - 1,
        "distance": float(distance[..., TV].mean(dtype=float)),
        "distance_l2": distance[..., L2].ravel(),
        "distance_tv": distance[..., TV].ravel(),
    }
    for name, (prompt_ids, side) in sides.items():
        row |= {
            f"{name}_tokens": len(prompt_ids),
            f"{name}_answer": replies[name],
            f"{name}_right": None if key is None else is_right(replies[name], key),
            f"{name}_instability": side.instability,
            f"{name}_focus": side.focus,
            f"{name}_mass": side.mass.ravel(),
        }
    return row
