"""`headrift consistency`: how far a wrapper moves attention and answers, scored in the engine into a folder, resumable.

A clean prompt answers greedily, once for all its pairs, and its attention rows at steps 0..N stay on the device. Each
wrapped prompt answers greedily too, for its own answer and its own signals. Which rows are compared with the clean ones
on the device (`vllm_plugin.instruments.attention_rows`) depends on ANSWERS:

- "clean" (default): those of the wrapped prompt with the *clean* answer replayed after it. Both rows of a step are then
  of the same token, and the wrapper alone makes the distance.
- "own": those of the wrapped prompt's own answer. Once the answers differ, so do the queries, and the distance contains
  the effect of the other words too. At step 0 both are the same.

`part-*.parquet` have a row per pair. `distance_l2` and `distance_tv` (steps x layers x heads, step 0 first, `n_steps` +
1 of them) and `clean_mass` and `wrapped_mass` (each side's own steps x layers x heads x core, wrapper, system) are
flattened; the metadata, JSON under b"headrift", has `layers`, `heads` and the `shapes`. `distance` is the mean of all
of `distance_tv`.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from headrift import signal
from headrift.consistency.answers import flipped, is_hinted, is_right
from headrift.consistency.data import check_families, first_questions, read_pairs, render, sample_wrappers
from headrift.consistency.models import check_lora, lora_fingerprint
from headrift.consistency.pairs import Pair, PairRenderer, RejectedPair, fingerprint
from headrift.consistency.summary import summarise
from headrift.model_facts import read_shape
from headrift.prepare import load_tokenizer
from headrift.probed_engine import ProbedEngine
from headrift.prompts import Span
from headrift.requests import L2, TV, Finished, ProbeRequest, Recording
from headrift.runs.folder import ResumableParts, model_fingerprint, versions
from headrift.vllm_engine import lora_args, prepare_environment

ANSWERS = ("clean", "own")
REGIONS = ("system", "prompt", "core", "before", "after")
# Bytes of the kept rows: with a large model, fewer clean prompts are in flight at a time.
ROW_BYTES, MOST_REFERENCES = 512 << 20, 64

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
class Side:
    """One prompt of a pair, of whose answer T steps were recorded."""

    answer_ids: list[int]
    mass: NDArray[np.float32] = field(repr=False)  # [T, layers, heads, 3], on core, wrapper and system prompt
    instability: float | None  # its score over steps 1..N
    focus: float  # Attention Tracker's score at step 0, of all heads


@dataclass(frozen=True, slots=True)
class PairScore:
    pair: Pair
    clean: Side
    wrapped: Side
    # [T, layers, heads, 2], L2 and total variation at steps 0..T-1, as far as the compared answers go
    distance: NDArray[np.float32] = field(repr=False)


@dataclass(slots=True, eq=False)
class _Group:
    """Pairs in flight that share a clean prompt's run."""

    pairs: list[Pair]
    reference: int
    clean: Side | None = None
    todo: deque[tuple[int, ProbeRequest]] = field(default_factory=deque)
    wrapped: dict[int, Side] = field(default_factory=dict)
    distances: dict[int, NDArray[np.float32]] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        return self.clean is not None and len(self.distances) == len(self.wrapped) == len(self.pairs)


def references_for(layers: int, heads: int, steps: int, keys: int) -> int:
    """Number of clean prompts whose rows are kept at a time: as many as ROW_BYTES allow, at least 1."""
    return min(max(ROW_BYTES // (layers * heads * (steps + 1) * keys * 4), 1), MOST_REFERENCES)


def keys_needed(pairs: Iterable[Pair], steps: int) -> int:
    """Keys of the longest row of these pairs, at step `steps`."""
    return max(max(len(pair.clean_ids), len(pair.wrapped_ids)) for pair in pairs) + steps


def group_by_clean_prompt(pairs: Iterable[Pair]) -> list[Pair]:
    """Order pairs so that those with the same clean prompt, and the same core in it, are neighbours."""
    groups: dict[Hashable, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(_clean_run(pair), []).append(pair)
    return [pair for group in groups.values() for pair in group]


def score_pairs(
    engine: ProbedEngine,
    pairs: Iterable[Pair],
    *,
    steps: int,
    answer_tokens: int,
    answers: str = ANSWERS[0],
    on_pairs: Callable[[int], None] | None = None,
) -> Generator[PairScore, None, None]:
    """Score pairs; neighbours with the same clean prompt (`group_by_clean_prompt`) share its run.

    Args:
        engine: started with REGIONS, `row_references` and enough `row_keys` (`keys_needed`).
        steps: N of 1 or more; steps 0..N are compared.
        answer_tokens: longest answer.
        answers: one of ANSWERS.
        on_pairs: called with the number of pairs whose distance is done.

    Yields:
        The pairs' scores, in order.

    Raises:
        ValueError: the engine cannot be used.
        RuntimeError: the engine left out a number.
    """
    if engine.regions != REGIONS or not engine.options["row_references"] or steps < 1:
        raise ValueError(f"scoring pairs needs an engine with the regions {REGIONS} and row_references, and steps >= 1")
    if answers not in ANSWERS:
        raise ValueError(f"answers={answers!r}: use one of {', '.join(ANSWERS)}")
    run = _PairRun(engine, pairs, steps, max(answer_tokens, steps + 1), replay=answers == ANSWERS[0])
    return run.scores(on_pairs or (lambda n: None))


class _PairRun:
    """Groups in flight: the clean prompt first, then the wrapped ones, then replayed answers."""

    def __init__(self, engine: ProbedEngine, pairs: Iterable[Pair], steps: int, answer_tokens: int, *, replay: bool):
        self._engine, self._steps, self._tokens, self._replay = engine, steps, answer_tokens, replay
        self._groups = (list(group) for _, group in groupby(pairs, key=_clean_run))
        self._free = list(range(engine.options["row_references"]))
        self._in_flight: deque[_Group] = deque()

    def scores(self, on_pairs: Callable[[int], None]) -> Generator[PairScore, None, None]:
        with closing(self._engine.run(self._requests(), want_mass=True)) as results:
            for (group, i), done, recording in results:
                assert recording is not None
                self._take(group, i, done, recording)
                on_pairs(int(done.request.rows_against is not None))
                while self._in_flight and self._in_flight[0].is_done:
                    finished = self._in_flight.popleft()
                    self._free.append(finished.reference)
                    assert finished.clean is not None
                    for at, pair in enumerate(finished.pairs):
                        yield PairScore(pair, finished.clean, finished.wrapped[at], finished.distances[at])

    def _requests(self) -> Iterator[tuple[tuple[_Group, int | None], ProbeRequest] | None]:
        """Clean prompts (index None) while rows can be kept, else the groups' pairs as they become known."""
        exhausted = False
        while True:
            if self._free and not exhausted:
                pairs = next(self._groups, None)
                exhausted = pairs is None
                if pairs is not None:
                    group = _Group(pairs, self._free.pop())
                    self._in_flight.append(group)
                    regions = _regions(pairs[0].clean_system, pairs[0].core.clean_span, pairs[0].clean_edges)
                    how: Any = {"answer_tokens": self._tokens, "rows_as": group.reference}
                    yield (group, None), ProbeRequest(pairs[0].clean_ids, regions, self._steps, **how)
                continue
            ready = next((group for group in self._in_flight if group.todo), None)
            if ready is not None:
                i, request = ready.todo.popleft()
                yield (ready, i), request
            elif exhausted and all(len(group.distances) == len(group.pairs) for group in self._in_flight):
                return
            else:
                yield None

    def _take(self, group: _Group, i: int | None, done: Finished, recording: Recording) -> None:
        """Keep a result, and queue the requests that follow from it."""
        if i is None:
            group.clean = self._side(done, recording, is_wrapped=False)
            for at in range(len(group.pairs)):
                group.todo.append((at, self._wrapped(group, at, compare=not self._replay, answer_tokens=self._tokens)))
            return
        assert group.clean is not None
        if done.request.answer_ids is None:
            group.wrapped[i] = self._side(done, recording, is_wrapped=True)
            if self._replay:  # the prompt is in the cache by now
                group.todo.append((i, self._wrapped(group, i, compare=True, answer_ids=group.clean.answer_ids)))
        if done.request.rows_against is not None:
            distance = recording.distance[: len(group.clean.mass)]
            if np.isnan(distance).any():
                raise RuntimeError(f"pair {group.pairs[i].id}: the engine left out distances; do not trust its numbers")
            group.distances[i] = distance

    def _wrapped(self, group: _Group, i: int, *, compare: bool, **answer: Any) -> ProbeRequest:
        """A wrapped prompt's request, for its own answer or to replay one."""
        pair = group.pairs[i]
        if compare:
            runs = [(run.clean, run.wrapped, run.length) for run in pair.runs if run.length]
            answer |= {"rows_against": group.reference, "aligned": runs}
        regions = _regions(pair.wrapped_system, pair.core.wrapped_span, pair.wrapper)
        return ProbeRequest(pair.wrapped_ids, regions, self._steps, **answer)

    def _side(self, done: Finished, recording: Recording, *, is_wrapped: bool) -> Side:
        assert recording.mass is not None
        system, _, core, before, after = np.moveaxis(recording.mass, -1, 0)
        around = before + after
        wrapper = around if is_wrapped else np.zeros_like(around)
        system_start = done.request.regions["system"][0]
        covered = signal.covered(len(recording.share), self._engine.windows, system_start, len(done.request.prompt_ids))
        instability = np.where(covered, signal.instability(recording.share), np.nan)
        score = signal.score(instability, signal.Window(1, self._steps), n_steps=done.n_steps).value
        focus = signal.focus(signal.focus_heads(system[0], core[0] + around[0]))
        return Side(done.answer_ids, np.stack([core, wrapper, system], -1), score, focus)


def _clean_run(pair: Pair) -> Hashable:
    return tuple(pair.clean_ids), pair.core.clean_span, pair.clean_system


def _regions(system: Span, core: Span, around: Iterable[Span]) -> dict[str, Span]:
    """The system prompt and the parts of the user's text: before, core and after."""
    parts = {"before" if span[1] <= core[0] else "after": span for span in around}
    return {"system": system, "core": core, **parts}


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
    summary.json. ValueError or EngineError, before the model is loaded, if the config cannot be used."""

    def __init__(self, config: ConsistencyConfig, verbose: bool = False) -> None:
        self.config, self._verbose = config, verbose
        facts, layers, heads = read_shape(config.model)
        self._shape = layers, heads
        if config.lora is not None:
            check_lora(config.lora, config.model)
            prepare_environment(verbose)
            lora_args(str(config.lora))
        inputs = read_pairs(config.inputs, config.columns)
        texts = inputs.texts()
        check_families("--family", config.families, texts)
        texts = [text for text in texts if not config.families or text.family in config.families]
        texts = sample_wrappers(first_questions(texts, config.limit), config.per_family, config.seed)
        room = None if facts.context is None else facts.context - max(config.answer_tokens, config.steps + 1)
        tokenizer = load_tokenizer(str(config.model), False)
        renderer = PairRenderer(tokenizer, system_prompt=config.system_prompt, max_tokens=room)
        pairs, unusable = render(renderer, texts)
        self.pairs, self.rejected = group_by_clean_prompt(pairs), [*inputs.rejected, *unusable]
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
            **{name: getattr(config, name) for name in ("steps", "answer_tokens", "answers", "dtype")},
            "number of pairs": len(self.pairs),
            "set of pairs": fingerprint(self.pairs),
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
            how: Any = {name: getattr(config, name) for name in ("steps", "answer_tokens", "answers")}
            keys = keys_needed(pairs, config.steps)
            with ProbedEngine(
                config.model,
                steps=config.steps,
                regions=REGIONS,
                attention_backend=config.attention_backend,
                engine_args={} if config.dtype == "auto" else {"dtype": config.dtype},
                verbose=self._verbose,
                row_references=references_for(*self._shape, config.steps, keys),
                row_keys=keys,
                lora=config.lora,
            ) as engine:
                begin = time.monotonic()
                with closing(score_pairs(engine, pairs, on_pairs=on_pairs, **how)) as scores:
                    records = (_record(score, self._decode) for score in scores)
                    for name in missing:
                        self._parts.write_records(name, islice(records, len(parts[name])), schema)
                seconds = time.monotonic() - begin
        summary = summarise(self._parts.read(parts), config.seed)
        counts = {"engine_seconds": round(seconds, 2), "rejected": len(self.rejected)}
        return self._parts.write_summary({**counts, **summary})


def part_schema(layers: int, heads: int, steps: int) -> pa.Schema:
    """Columns of a part, for a model's layers and heads and steps 0..`steps`."""
    of_heads = ["n_steps + 1", "layers", "heads"]
    of_mass = ["steps of its answer, at most steps + 1", *of_heads[1:], "core, wrapper, system"]
    shapes = {"distance_l2": of_heads, "distance_tv": of_heads, "clean_mass": of_mass, "wrapped_mass": of_mass}
    about = {"layers": layers, "heads": heads, "steps": steps, "shapes": shapes}
    columns = [(name, kind) for names, kind in _COLUMNS for name in names.split()]
    return pa.schema(columns, metadata={b"headrift": json.dumps(about).encode()})


def _record(score: PairScore, decode: Callable[..., str]) -> dict[str, Any]:
    """A pair's row of a part."""
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
